"""Tasks: what a target asks of a head, read off the target, the head and the inputs.

A target comes as a loss takes it: class indices, numbers, or masks, at each sample or at each position of it, channels
last or behind the samples. It is brought to one of two forms: *indices* ``[n, *positions]`` or *values*
``[n, *positions, c]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sylinit.errors import SylinitError

TASKS = ("multiclass", "binary", "multilabel", "regression", "next-token", "reconstruction", "none")
"""The names of all tasks."""


@dataclass(frozen=True)
class Task:
    """What a head is asked for.

    Attributes:
        name: one of `TASKS`.
        reason: what it was read off.
        classes: number of classes, 0 for targets that are values.
        width: length of a value, 0 for class indices.
        positions: number of dimensions of a target's positions.
        channels_first: whether values lie behind the samples rather than last.
        flat: whether a value is a whole sample.
    """

    name: str
    reason: str = ""
    classes: int = 0
    width: int = 0
    positions: int = 0
    channels_first: bool = False
    flat: bool = False

    @property
    def has_logits(self) -> bool:
        """Whether the head gives logits rather than values."""
        return self.exclusive or self.name == "multilabel"

    @property
    def exclusive(self) -> bool:
        """Whether the logits are of classes that exclude each other."""
        return self.name in ("multiclass", "binary", "next-token")

    @property
    def of_shares(self) -> bool:
        """Whether the targets are shares of such classes rather than one class each."""
        return self.exclusive and not self.classes


PROBLEM_TYPES = {
    "regression": "regression",
    "single_label_classification": "multiclass",
    "multi_label_classification": "multilabel",
}
"""What Transformers' ``config.problem_type`` stands for."""


def configured_task(model: Any, *, real: bool) -> str:
    """The task by a model's own configuration, which decides its loss; "auto" where it says nothing.

    Args:
        model: one of Transformers', or any other.
        real: whether the targets are real numbers.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "problem_type", None)
    if kind is None and type(model).__name__.endswith("ForSequenceClassification"):
        if getattr(config, "num_labels", None) == 1:
            kind = "regression"
        elif real:
            kind = "multi_label_classification"
    return PROBLEM_TYPES.get(kind, "auto") if isinstance(kind, str) else "auto"


@dataclass(frozen=True)
class HeadShape:
    """The outputs of a head.

    Attributes:
        name: of the layer.
        units: its outputs.
        positions: the sizes of the output's positions in a batch: none for one output a sample.
        channels_first: whether units lie behind the samples, as a convolution gives them.
    """

    name: str
    units: int
    positions: tuple[int, ...] = ()
    channels_first: bool = False


@dataclass(frozen=True)
class Facts:
    """What is to be known of the targets of one process, or of all of them.

    Attributes:
        real: whether they are floating-point numbers.
        shape: of a target, without the samples; of the first batch.
        known: whether any is no missing or ignored one.
        zero_one: whether all are 0 or 1.
        sums_to_one: by dimension behind the samples, whether the numbers along it are shares.
        smallest: the smallest number.
        largest: the largest.
        finite: whether none is infinite.
        next_token: whether they repeat the model's integer input.
    """

    real: bool
    shape: tuple[int, ...]
    known: bool
    zero_one: bool
    sums_to_one: tuple[bool, ...]
    smallest: float
    largest: float
    finite: bool
    next_token: bool = False


def facts_of(targets: Sequence[Tensor], ids: Sequence[Tensor | None], ignore_index: int) -> Facts:
    """Look at the targets of this process once.

    Args:
        targets: by batch.
        ids: by batch, the model's integer input, if it has one.
        ignore_index: the class index that means "no label here".
    """
    first = targets[0]
    real = first.is_floating_point()
    known, zero_one, finite, next_token = False, True, True, not real
    smallest, largest = float("inf"), -float("inf")
    shares = [True] * max(0, first.ndim - 1)
    for target, inputs in zip(targets, ids, strict=True):
        there = ~target.isnan() if real else target != ignore_index
        values = target[there]
        next_token &= inputs is not None and inputs.shape == target.shape and torch.equal(inputs[there], values)
        if not values.numel():
            continue
        known = True
        values = values.to(torch.uint8) if values.dtype == torch.bool else values
        zero_one &= bool(((values == 0) | (values == 1)).all())
        smallest, largest = min(smallest, float(values.min())), max(largest, float(values.max()))
        finite &= bool(values.isfinite().all()) if real else True
        for dim in range(len(shares)):
            total = target.double().nan_to_num(1.0 / target.shape[1 + dim]).sum(1 + dim)
            shares[dim] &= target.shape[1 + dim] > 1 and smallest >= 0 and bool(((total - 1).abs() < 1e-3).all())
    next_token = next_token and known and first.ndim == 2
    return Facts(real, tuple(first.shape[1:]), known, zero_one, tuple(shares), smallest, largest, finite, next_token)


def merged(facts: Sequence[Facts]) -> Facts:
    """The facts of all processes together; those without a label say nothing."""
    said = [each for each in facts if each.known] or list(facts[:1])
    if len({(each.real, len(each.shape)) for each in said}) > 1:
        raise SylinitError("batches: the targets of the processes of the group are of different kinds or widths")
    return Facts(
        said[0].real,
        said[0].shape,
        any(each.known for each in said),
        all(each.zero_one for each in said),
        tuple(map(all, zip(*(each.sums_to_one for each in said), strict=True))),
        min(each.smallest for each in said),
        max(each.largest for each in said),
        all(each.finite for each in said),
        all(each.next_token for each in said),
    )


CONTRADICTIONS = {
    "multilabel": ("multiclass",),
    "multiclass": ("regression",),
    "binary": ("regression", "multiclass"),
}
"""What targets cannot be where another task is asked for."""

REMEDIES = {
    "multilabel": "pass 0 and 1 in as many columns as there are labels",
    "multiclass": "pass class indices as integers, or shares of sum 1",
    "binary": "pass 0 and 1, with a head of one or two outputs",
}
"""The targets of a task."""


def infer_task(facts: Facts, head: HeadShape, asked: str, classes: int | None) -> Task:
    """The task of a head: as asked for, or read off its targets.

    Args:
        facts: of the targets.
        head: the head's outputs.
        asked: a name in `TASKS`, or "auto".
        classes: the number of classes, if the user says so.

    Raises:
        SylinitError: the targets do not fit the head or the task.
    """
    if not facts.finite:
        raise SylinitError(
            "batches: the targets hold infinite numbers; drop those samples, or use NaN for missing ones"
        )
    if asked in ("next-token", "reconstruction"):
        found = asked
    elif asked == "auto" and facts.next_token and head.units > facts.largest and head.positions:
        found = "next-token"
    else:
        found = ""
    if found == "next-token":
        reason = "the labels repeat the input ids" if asked == "auto" else "task="
        return _checked(Task("next-token", reason, head.units, positions=1), facts, head, classes)
    form = _form(facts, head, asked)
    if form.name in CONTRADICTIONS.get(asked, ()):
        kind = "real numbers other than 0 and 1" if facts.real else "class indices"
        raise SylinitError(
            f"task={asked!r}: the targets are {kind}, of shape [{', '.join(map(str, ('samples', *facts.shape)))}], "
            f"which are {form.name}; {REMEDIES[asked]}, or leave task= out"
        )
    return _checked(form, facts, head, classes)


def _form(facts: Facts, head: HeadShape, asked: str) -> Task:
    """The form of the targets, and the task that it stands for."""
    shape, units = facts.shape, head.units
    channels = _channel_dimension(facts, head, asked)
    values = channels is not None
    width = 1 if channels is None or channels < 0 else shape[channels]
    spots = len(shape) - (1 if values and channels is not None and channels >= 0 else 0)
    first = channels == 0 and len(shape) > 1
    flat = asked == "reconstruction" and width != units and _product(shape) == units
    as_values: dict[str, Any] = {"width": width, "positions": spots, "channels_first": first}
    if flat:
        as_values = {"width": units, "flat": True}
    if asked == "reconstruction":
        return Task(asked, "the input is the target", **as_values)
    if asked == "regression":
        return Task(asked, "task=", **as_values)
    squeezed = values and width == 1 and units > 1  # class indices in a dimension of their own, or as real numbers
    if not values or squeezed:
        as_classes: dict[str, Any] = {"classes": max(units, 2), "positions": spots, "channels_first": first}
        if units <= 2 and facts.zero_one:
            return Task("binary", asked if asked != "auto" else f"labels 0 and 1, {units} logits", **as_classes)
        if not values or not facts.real or asked == "multiclass":
            return Task("multiclass", "class indices", **as_classes)
        return Task("regression", "real numbers", **as_values)
    shares = channels is not None and channels >= 0 and facts.sums_to_one[channels]
    if width > 1 and shares and asked in ("auto", "multiclass", "binary"):
        name = "binary" if width == 2 and asked == "binary" else "multiclass"
        return Task(name, "shares of classes, of sum 1", **as_values)
    if facts.zero_one and asked != "multiclass":
        if width == 1:
            return Task("binary", "values 0 and 1, one logit", classes=2, positions=spots, channels_first=first)
        return Task("multilabel", "values 0 and 1", **as_values)
    if not facts.real:
        raise SylinitError(
            f"batches: the targets are integers up to {facts.largest:g}, and the head {head.name!r} has {units} "
            f"output{'s' if units > 1 else ''}: as counts or measurements pass them as y.float(); class indices need a "
            f"head of {facts.largest + 1:g} outputs"
        )
    return Task("regression", "real numbers", **as_values)


def _channel_dimension(facts: Facts, head: HeadShape, asked: str) -> int | None:
    """Which dimension behind the samples holds the numbers of one value; -1 for none of its own; None for indices."""
    shape, units = facts.shape, head.units
    if not shape:
        return -1 if facts.real or (units == 1 and not facts.zero_one) or asked == "regression" else None
    spots = len(head.positions)
    if len(shape) > spots and spots > 0 and head.channels_first and shape[0] in (1, units):
        return 0
    if len(shape) > spots and shape[-1] in (1, units):
        return len(shape) - 1
    if facts.real or asked in ("regression", "multilabel", "reconstruction"):
        if len(shape) == spots and units <= 2 and (facts.zero_one or units == 1):
            return -1
        return 0 if head.channels_first and len(shape) > 1 else len(shape) - 1
    return None


def _checked(task: Task, facts: Facts, head: HeadShape, classes: int | None) -> Task:
    """Refuse targets that the head cannot express.

    Raises:
        SylinitError: a label out of range, or another width.
    """
    units = head.units
    if task.name == "next-token" and head.positions and facts.shape[0] not in head.positions:
        raise SylinitError(
            f"batches: the head {head.name!r} gives logits at {head.positions[-1]} positions of texts of "
            f"{facts.shape[0]} tokens, so which of them predicts which token is not known; let forward= run a part "
            "that reads the tokens alone, pass the target of each position by target=, or pass head=None"
        )
    if task.classes and task.positions and not head.positions and head.name:
        raise SylinitError(
            f"batches: the targets have {task.positions} dimension{'s' if task.positions > 1 else ''} of positions "
            f"({', '.join(map(str, facts.shape))}), and the head {head.name!r} gives one output for each sample; name "
            "the layer that gives one for each position by head=, or pass one target a sample"
        )
    if classes is not None and task.classes and classes != units and not (classes == 2 and units == 1):
        raise SylinitError(
            f"classes={classes}: the head {head.name!r} has {units} outputs; give the model a head of {classes} "
            "outputs, or leave classes= out"
        )
    if task.classes and facts.known:
        if facts.smallest < 0:
            raise SylinitError(
                f"batches: there is the label {facts.smallest:g}; class indices start at 0 (-100 means ignored; "
                "another mark is named by ignore_index=)"
            )
        if facts.largest >= task.classes:
            raise SylinitError(
                f"labels out of range: there is a label {facts.largest:g}, but layer {head.name!r} has {units} "
                f"outputs; labels must lie in 0 to {max(units, 2) - 1}; a mark such as 255 for 'ignored' is named by "
                "ignore_index=, and if this layer is not the head, pass head=None or its name"
            )
    if task.width and task.width != units:
        raise SylinitError(
            f"head: the target has {task.width} values a sample, layer {head.name!r} has {units} outputs; make the "
            "model or the target fit, or name the head by head="
            + ("; class indices must be integers, as y.long()" if task.width == 1 and facts.real else "")
        )
    return task


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total

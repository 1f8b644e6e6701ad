"""Which layers' outputs are the model's predictions, and what each of them is to predict.

A head is found by following the trial run to the model's output, not by the order in which layers are registered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sylinit.data.calibration import CalibrationSet, reconstructed
from sylinit.data.goals import Goal
from sylinit.data.tasks import Facts, HeadShape, Task
from sylinit.errors import SylinitError, warn
from sylinit.layers.convolution import ConvView
from sylinit.layers.view import LayerView
from sylinit.plan.selection import matches, require_match
from sylinit.plan.trace import Output, Trace


@dataclass(frozen=True)
class Heads:
    """The heads of a model.

    Attributes:
        goals: what each head's outputs are to be, by view.
        told: what layers before the heads are told of the samples.
        task: of the first head; "none" without any.
        notes: about the choice.
    """

    goals: dict[LayerView, Goal]
    told: Goal | None
    task: Task
    notes: tuple[str, ...] = ()


def _heads(goals: dict[LayerView, Goal]) -> Heads:
    first = next(iter(goals.values()))
    return Heads(goals, first, first.task)


NO_TASK = Task("none", "there are no targets")


def find_heads(
    views: Sequence[LayerView],
    head: Any,
    task: str,
    classes: int | None,
    names: Sequence[str],
    data: CalibrationSet,
    trace: Trace,
) -> Heads:
    """The heads and their goals.

    Args:
        views: all of the model's.
        head: what the user asked for: a name, names, a mapping from name to target, "auto" or None.
        task: as the user asked for it.
        classes: likewise.
        names: of all modules, for messages.
        data: the calibration set.
        trace: what the trial run showed.

    Raises:
        SylinitError: a head that does not exist, or targets that do not fit it.
    """
    asked = list(head) if isinstance(head, (Mapping, list, tuple)) else [head] if head not in (None, "auto") else []
    for name in asked:
        require_match(name, names, "head")
    if not views:
        return Heads({}, None, NO_TASK)
    if task == "none":
        return Heads({}, None, Task("none", "task="))
    chosen = [_named(name, views) for name in asked]
    if isinstance(head, Mapping):
        goals = {}
        for name, view in zip(asked, chosen, strict=True):
            if (facts := data.facts(name)) is None:
                raise SylinitError(f"head={{{name!r}: ...}}: its targets hold no label")
            goals[view] = data.goal(_shape(view, trace), name, facts, task, classes)
        return _heads(goals)
    facts = data.facts()
    makers = chosen or _makers_of_output(views, trace)
    if facts is None:
        heads = _reconstruction(makers, head, task, data, trace)
        return heads if heads.goals or head is None else replace(heads, notes=_all_ignored(data))
    if head is None:
        return _told_only(views, makers, task, classes, data, trace)
    if not chosen and not facts.real:
        makers = _not_too_wide(makers, views, int(facts.largest) + 1, classes, trace)
    goals, failure = {}, None
    for view in makers:
        try:
            goals[view] = data.goal(_shape(view, trace), "", facts, task, classes)
        except SylinitError as error:
            failure = failure or error
    if chosen and failure:
        raise failure
    if goals and not chosen:
        goals = _of_one_width(goals, facts.largest if not facts.real else None, trace)
    if goals:
        if not chosen:
            _warn_of_shared_values(goals)
        asked_for = chosen or facts.real or classes is not None
        return replace(_heads(goals), notes=() if asked_for else _width_note(goals, int(facts.largest) + 1))
    return _none_found(views, makers, failure, facts, task, classes, data, trace)


def _warn_of_shared_values(goals: Mapping[LayerView, Goal]) -> None:
    """Several heads may be an ensemble, or a mean beside a variance, to which the values say nothing."""
    if len(goals) > 1 and next(iter(goals.values())).task.name == "regression":
        names = ", ".join(repr(view.name) for view in goals)
        warn(
            f"heads {names}: each is computed for the one target, as in an ensemble; if one of them is something else, "
            "such as a variance, name the others by head="
        )


def _all_ignored(data: CalibrationSet) -> tuple[str, ...]:
    """Warn, and note, that there are labels of which none counts."""
    if not any(batch.targets for batch in data.batches):
        return ()
    note = f"no head was computed: every label is {data.ignore_index}, which ignore_index= says to ignore"
    warn(note)
    return (note,)


def _not_too_wide(
    makers: Sequence[LayerView], views: Sequence[LayerView], seen: int, classes: int | None, trace: Trace
) -> list[LayerView]:
    """The layers that made the output, less those wider than the classes where an unreached layer fits them."""
    unreached = [view for view in views if module_name(view) not in trace.seen and view.units == (classes or seen)]
    wide = [view for view in makers if view.units > max(2, seen)]
    return [view for view in makers if not (unreached and view in wide)]


def _width_note(goals: Mapping[LayerView, Goal], seen: int) -> tuple[str, ...]:
    """A head with many more outputs than the sample has classes may be none; vocabularies always have more."""
    return tuple(
        f"the labels are 0 to {seen - 1}, and {view.name!r}, which makes the output, has {view.units} outputs; if "
        "it is not the head, pass head=None or the head's name, and if it is, classes= says so"
        for view, goal in goals.items()
        if view.units > max(2, 2 * seen) and goal.task.name != "next-token"
    )[:1]


def _named(name: str, views: Sequence[LayerView]) -> LayerView:
    """The layer that the user named."""
    found = [view for view in views if view.name == name] or [view for view in views if matches(name, view.name)]
    if not found:
        raise SylinitError(f"head={name!r} is no layer that sylinit can initialize")
    if found[-1].groups > 1:
        raise SylinitError(f"head={name!r}: {_grouped(found[-1])}; make it a layer of one group, or pass head=None")
    return found[-1]


def _makers_of_output(views: Sequence[LayerView], trace: Trace) -> list[LayerView]:
    """The layers that made the output, in its order; the last of the pass where there is no output to follow."""
    by_name = {module_name(view): view for view in views}  # of attention's projections, the last
    made = [by_name[name] for out in trace.outputs for name in sorted(out.made_by - out.rectified) if name in by_name]
    if not any(out.made_by for out in trace.outputs):  # a forward= that returns nothing
        made = [by_name[name] for name in trace.order[-1:] if name in by_name]
    return [view for view in dict.fromkeys(made) if view.groups == 1]


def _of_one_width(goals: dict[LayerView, Goal], largest: float | None, trace: Trace) -> dict[LayerView, Goal]:
    """Of several layers that could be heads of one target, those that fit best.

    Ensembles and early exits of one target have heads of equal width; where widths differ, class indices go to the
    heads that have just as many outputs as there are classes, else to those of the first tensor of the output.
    """
    if len({view.units for view in goals}) == 1:
        return goals
    if largest is not None:
        exact = {view: goal for view, goal in goals.items() if view.units == largest + 1}
        if exact:
            return exact
    first: Output | None = next((out for out in trace.outputs if out.made_by), None)
    names = first.made_by if first else frozenset()
    widths = [view.units for view in goals if module_name(view) in names] or [next(iter(goals)).units]
    return {view: goal for view, goal in goals.items() if view.units == widths[0]}


def _reconstruction(makers: Sequence[LayerView], head: Any, task: str, data: CalibrationSet, trace: Trace) -> Heads:
    """The head of an autoencoder: asked for, or seen by an output of the input's shape."""
    if task not in ("auto", "reconstruction", "next-token"):
        raise SylinitError(f"task={task!r}: the batches have no targets; pass batches of (x, y), or target=")
    if head is None or not makers:
        return Heads({}, None, NO_TASK)
    if task == "next-token":
        return _heads({makers[0]: data.next_tokens(_shape(makers[0], trace))})
    x = reconstructed(data.batches[0])
    alike = x is not None and any(out.real and out.shape[1:] == tuple(x.shape[1:]) for out in trace.outputs[:1])
    if task == "auto" and not alike:
        return Heads({}, None, NO_TASK)
    try:
        return _heads({makers[0]: data.reconstruction(_shape(makers[0], trace), "reconstruction")})
    except SylinitError:
        if task == "auto":  # an output of the input's shape by another way
            return Heads({}, None, NO_TASK)
        raise


def _told_only(
    views: Sequence[LayerView],
    makers: Sequence[LayerView],
    task: str,
    classes: int | None,
    data: CalibrationSet,
    trace: Trace,
) -> Heads:
    """No head, but targets that the layers are told of."""
    facts = data.facts()
    assert facts is not None
    width = facts.shape[-1] if facts.real and facts.shape else int(facts.largest) + 1 if not facts.real else 1
    shape = _shape(makers[0], trace) if makers else HeadShape("", width)
    outputs = HeadShape("", max(width, classes or 0, 1), shape.positions, shape.channels_first)
    goal = data.goal(outputs, "", facts, task, classes)
    return Heads({}, goal, Task("none", "head=None"))


def _none_found(
    views: Sequence[LayerView],
    makers: Sequence[LayerView],
    failure: SylinitError | None,
    facts: Facts,
    task: str,
    classes: int | None,
    data: CalibrationSet,
    trace: Trace,
) -> Heads:
    """Warn, and note, that no layer was taken for the head; the layers are told of the targets all the same."""
    if trace.made:
        note = (
            f"no head was computed: the forward pass makes layers ({', '.join(trace.made)}), which it undoes here; run "
            "the model once, so that they exist, and initialize then"
        )
    elif failure is not None and not facts.real:
        raise failure
    elif failure is not None:
        note = f"no head was computed: {str(failure).removeprefix('head: ')}"
    else:
        last = next((view for view in reversed(views) if module_name(view) in trace.seen), None)
        note = "no layer that sylinit can compute makes the model's output, so none was taken for the head"
        missed = [view.name for view in views if module_name(view) not in trace.seen]
        if last is not None and last.groups > 1:
            note = f"no head was taken: {_grouped(last)}"
        elif missed:
            note += f"; the data never reached {', '.join(map(repr, missed[:3]))}: let forward= run the whole model"
        elif last is not None:
            note += (
                f"; if {last.name!r} ({last.units} outputs) is the head, pass head={last.name!r}, otherwise head=None"
            )
    warn(note)
    told = _told_only(views, makers, task, classes, data, trace)
    return Heads({}, told.told, Task("none", "no head was found"), (note,))


def module_name(view: LayerView) -> str:
    """The name of the module at which a view is met: of attention's projections, that of the attention."""
    name = view.name
    if isinstance(view.module, nn.MultiheadAttention):
        for suffix in ("out_proj", "in_proj.query", "in_proj.key", "in_proj.value"):
            name = name.removesuffix(suffix)
    return name.removesuffix(".")


def _shape(view: LayerView, trace: Trace) -> HeadShape:
    """What the trial run showed of a head's outputs."""
    shape = trace.shapes.get(module_name(view), (1, view.units))
    conv = isinstance(view, ConvView)
    positions = shape[2:] if conv else shape[1:-1]
    return HeadShape(view.name, view.units, tuple(positions), conv)


def _grouped(view: LayerView) -> str:
    return f"{view.name!r} is a {view.kind} of {view.groups} groups, each of which sees a part of the features only"

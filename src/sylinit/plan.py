"""The doors of a pass: which matrices and statistics are to be computed, with which code, and what is left alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sylinit.codes.registry import CODES, Code, as_code, select_target
from sylinit.data.targets import TargetKind
from sylinit.errors import SylinitError, UnsupportedLayerError, warn
from sylinit.layers.views import ConvView, View, views_of
from sylinit.report import ROOT, LayerReport
from sylinit.scaling import keeps_statistics
from sylinit.select import matches, require_match, selector


@dataclass(frozen=True)
class Door:
    """One thing to compute when the data reaches it.

    Attributes:
        name: of the layer.
        module: where its input is met.
        view: the matrix to compute, or None for the statistics of a normalisation layer.
        code: the latent code of a matrix.
        head: whether its outputs are the logits or predictions.
        selected: whether the user's ``layers=`` names it.
        held: whether it is selected and a normalisation, or feeds one, and is to stay near its start because samples
            are few.
    """

    name: str
    module: nn.Module
    view: View | None = None
    code: Code | None = None
    head: bool = False
    selected: bool = True
    held: bool = False

    @property
    def kind(self) -> str:
        """The type of the module."""
        return self.view.kind if self.view else type(self.module).__name__

    @property
    def device(self) -> torch.device:
        """Where the layer is."""
        return next(tensor.device for tensor in (*self.module.parameters(), *self.module.buffers()))


FEW = 3000
"""Fewer training samples than these are few.

Normalisations, and the layers that feed them, then start so that training moves them little: long filters, half scale,
an offset, and more label units (`sylinit.scaling`, `NORMALISED_LABEL_SHARE`). That starts better, and
ends better while labels are few. With more, what moves learns.
"""


def feeds_normalisation(view: View | None) -> bool:
    """Whether a layer's outputs feed a normalisation: a convolution without a bias is taken to."""
    return isinstance(view, ConvView) and not view.has_bias


HEAD = Code("head", select_target, "moments", labels=True, leading=1.0)
"""The code of a head: the targets themselves."""


@dataclass(frozen=True)
class Plan:
    """Doors in the model's order, the layers left alone, and what a user should know.

    `rivals` are the names of layers that fit the targets as well as the head that was taken.
    """

    doors: tuple[Door, ...]
    left_alone: tuple[LayerReport, ...]
    notes: tuple[str, ...]
    rivals: frozenset[str] = frozenset()


def make_plan(
    model: nn.Module, layers: Any, code: Any, head: str | None, kind: TargetKind, samples: int, train_size: int | None
) -> Plan:
    """Find every layer, decide what happens to it, and refuse what cannot be done.

    Args:
        model: whose layers.
        layers: the user's choice of them.
        code: the user's choice of latent codes.
        head: the user's choice of the head.
        kind: of the targets.
        samples: that calibrate it.
        train_size: how many it will be trained on; None for the same.

    Raises:
        SylinitError: an unknown layer or code, a frozen, meta-device or quantised layer among those selected, a code
            that needs labels without labels, a label out of range, or nothing to initialise.
    """
    views, norms, left = _find(model)
    few = (train_size or samples) < FEW
    modules = {name or ROOT: module for name, module in model.named_modules()}
    names = [name for name in (*modules, *(view.name for view in views)) if name not in ("", ROOT)]
    chosen = selector(layers, names)
    code_of = _codes(code, names)
    head_view, notes = _head(views, head, kind, names, chosen)

    doors: list[Door] = []
    # A parameter that something left alone also uses is left alone too.
    owners = {_memory(p): layer.name for layer in left for p in _own(modules.get(layer.name))}
    owners |= {_memory(p): view.name for view in views if not chosen(view.name, view.module) for p in view.parameters}
    for view in views:
        if not chosen(view.name, view.module):
            left.append(_left(view.name, view.kind, "not selected by layers="))
            continue
        owner = next((owners[_memory(p)] for p in view.parameters if _memory(p) in owners), None)
        if owner is not None and not _slices_of_one(view, owner):
            left.append(_left(view.name, view.kind, f"its weight is tied to that of {owner!r}"))
            continue
        _require_writable(view)
        owners.update({_memory(parameter): view.name for parameter in view.parameters})
        is_head = view is head_view
        held = few and not is_head and feeds_normalisation(view)
        its_code = HEAD if is_head else _with_targets(_in_place(code_of(view.name), held), view.name, kind)
        doors.append(Door(view.name, view.module, view, its_code, is_head, held=held))
    _refuse(left, modules, chosen)
    if not doors:
        reasons = "; ".join(f"{layer.name} ({layer.kind}): {layer.reason}" for layer in left[:5])
        raise SylinitError(f"the model has no layer to initialise{': ' + reasons if reasons else ''}")
    for name, module in norms:
        selected = chosen(name, module)
        doors.append(Door(name, module, selected=selected, held=few and selected))
    order = {id(module): place for place, module in enumerate(modules.values())}
    doors.sort(key=lambda door: order[id(door.module)])
    fallbacks = {door.code.name for door in doors if door.code and not kind.present and not isinstance(code, Mapping)}
    asked = as_code(code).name if isinstance(code, str) else None
    if asked and not kind.present and fallbacks and asked not in fallbacks:
        notes.append(f"there are no labels, so the code {asked!r} fell back to {', '.join(sorted(fallbacks))!r}")
    if train_size is None and any(door.held for door in doors):
        notes.append(
            f"{samples} samples are few: normalisations and what feeds them will move little in training; "
            f"pass train_size= if it is on {FEW:,} or more"
        )
    rivals = fitting(views, kind) if head == "auto" and head_view is not None else ()
    return Plan(tuple(doors), tuple(left), tuple(notes), frozenset(v.name for v in rivals if v is not head_view))


def _find(model: nn.Module) -> tuple[list[View], list[tuple[str, nn.Module]], list[LayerReport]]:
    """Every matrix, every normalisation layer with statistics, and every other module with parameters of its own."""
    views: list[View] = []
    norms: list[tuple[str, nn.Module]] = []
    left: list[LayerReport] = []
    for name, module in model.named_modules():
        if "parametrizations" in name.split(".") or any(view.name == name for view in views):
            continue
        parametrized = hasattr(module, "parametrizations")
        own = [key for key, value in module._parameters.items() if value is not None]
        if _lazy(module):
            reason = "lazy and not materialised yet; run one batch through the model first"
            left.append(_left(name or ROOT, type(module).__name__, reason))
        elif keeps_statistics(module):
            norms.append((name, module))
        elif "norm" in type(module).__name__.lower():
            if own:
                left.append(_left(name, type(module).__name__, "normalisation without running statistics"))
        elif own or parametrized or isinstance(module, nn.MultiheadAttention) or _quantised(module):
            try:
                views += views_of(module, name)
            except UnsupportedLayerError as error:
                left.append(_left(name or ROOT, type(module).__name__, str(error)))
    return views, norms, left


def _codes(code: Any, names: list[str]) -> Any:
    """A function from a layer's name to its latent code."""
    if not isinstance(code, Mapping):
        one = as_code(code)
        return lambda name: one
    for pattern in code:
        require_match(pattern, names, "code")
    table = [(pattern, as_code(value)) for pattern, value in code.items()]
    return lambda name: next((value for pattern, value in table if matches(pattern, name)), CODES["mixed"])


def _in_place(code: Code, held: bool) -> Code:
    """The code itself, or the one that takes its place in layers that feed a normalisation where samples are few."""
    return code.normalised if code.normalised and held else code


def _with_targets(code: Code, name: str, kind: TargetKind) -> Code:
    """The code itself, or what it falls back to where there are no targets."""
    if not code.labels or kind.present or code.values is not None:
        return code
    remedy = "pass batches of (x, y), or a code without labels such as code='pca'"
    return code.without_labels(name, "the batches have none", remedy)


def _head(
    views: list[View], head: str | None, kind: TargetKind, names: list[str], chosen: Any
) -> tuple[View | None, list[str]]:
    """The view whose outputs are predictions, and notes about the choice."""
    if head is None or not kind.present or not views:
        if head not in (None, "auto"):
            require_match(head or "", names, "head")
        return None, []
    width = kind.classes or kind.width
    if head != "auto":
        require_match(head, names, "head")
        found = [view for view in views if view.name == head] or [view for view in views if matches(head, view.name)]
        if not found:
            raise SylinitError(f"head={head!r} is no layer that sylinit can initialise")
        if found[-1].groups > 1:
            raise SylinitError(f"head={head!r}: {_grouped(found[-1])}; make it a layer of one group, or pass head=None")
        _require_width(found[-1], kind, "head")
        return found[-1], []
    fits = fitting(views, kind)
    if fits:
        return fits[-1], []
    last = views[-1]
    if kind.classes:
        _require_width(last, kind, "auto")
    if not chosen(last.name, last.module):
        return None, []
    unit = "classes" if kind.classes else "target values"
    note = (
        f"no layer has {width} outputs for the {width} {unit}, so none was taken for the head; "
        f"if {last.name!r} ({_outputs(last)} outputs) is the head, pass head={last.name!r}, otherwise head=None"
    )
    if last.groups > 1:
        note = f"no head was taken: {_grouped(last)}"
    warn(note)
    return None, [note]


def _grouped(view: View) -> str:
    return f"{view.name!r} is a {view.kind} of {view.groups} groups, each of which sees a part of the features only"


def fitting(views: Iterable[View], kind: TargetKind) -> list[View]:
    """The views that may be a head: one output a class or value; for two classes one may do, if none has two."""
    whole = [view for view in views if view.groups == 1]
    width = kind.classes or kind.width
    return [v for v in whole if v.units == width] or [v for v in whole if kind.classes == 2 and v.units == 1]


def _require_width(view: View, kind: TargetKind, head: str) -> None:
    outputs = _outputs(view)
    if kind.classes > outputs and not (kind.classes == 2 and outputs == 1):
        raise SylinitError(
            f"labels out of range: there is a label {kind.classes - 1}, but layer {view.name!r} has {outputs} outputs; "
            f"labels must lie in 0 to {outputs - 1}"
            + (", or pass head=None if this layer is not the head" if head == "auto" else "")
        )
    if kind.width and kind.width != outputs:
        raise SylinitError(
            f"head: the target has {kind.width} values a sample, layer {view.name!r} has {outputs} outputs"
        )


def _outputs(view: View) -> int:
    return view.groups * view.units


def _slices_of_one(view: View, owner: str) -> bool:
    """Whether view and owner are slices of one packed parameter of the same module, not the same matrix twice."""
    return view.name.rpartition(".")[0] == owner.rpartition(".")[0] and ".in_proj." in f".{view.name}"


def _require_writable(view: View) -> None:
    for parameter in view.parameters:
        if parameter.is_meta:
            raise SylinitError(
                f"layer {view.name!r} is on the meta device and has no numbers; materialise the model first, "
                "for example with model.to_empty(device=...) or by loading its weights"
            )
        if not parameter.requires_grad:
            raise SylinitError(
                f"layer {view.name!r} is frozen (requires_grad=False); unfreeze it, or leave it out, for example with "
                "layers=lambda name, module: all(p.requires_grad for p in module.parameters())"
            )


def _refuse(left: list[LayerReport], modules: dict[str, nn.Module], chosen: Any) -> None:
    """A quantised layer is an error wherever it is selected: silence would mislead. A lazy one always is.

    The pass would give a lazy layer random weights, others in each process, of which a failure could not rid it.
    """
    for layer in left:
        module = modules.get(layer.name)
        if module is None:
            continue
        if _lazy(module):
            raise SylinitError(f"layer {layer.name!r} ({layer.kind}): {layer.reason}")
        if (
            layer.name != ROOT
            and _quantised(module)
            and not layer.reason.startswith("not selected")
            and chosen(layer.name, module)
        ):
            raise SylinitError(
                f"layer {layer.name!r} ({layer.kind}) is quantised to integers: {layer.reason}; initialise the model "
                "before quantising it, or leave this layer out with layers="
            )


def _lazy(module: nn.Module) -> bool:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return any(isinstance(t, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)) for t in tensors)


def _memory(parameter: nn.Parameter) -> int:
    """What tied parameters share: their memory, though they be two objects (after ``b.data = a.data``)."""
    plain = type(parameter) is nn.Parameter  # lazy ones and tensors made of others have none of their own
    return (parameter.data_ptr() if plain else 0) or id(parameter)


def _own(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters(recurse=False))


def _quantised(module: nn.Module) -> bool:
    if "quantized" in type(module).__module__:
        return True
    tensors = [*module._parameters.values()]
    return any(
        t is not None
        and not isinstance(t, nn.parameter.UninitializedParameter)
        and not (t.is_floating_point() or t.is_complex())
        and t.dtype != torch.bool
        for t in tensors
    )


def _left(name: str, kind: str, reason: str) -> LayerReport:
    return LayerReport(name=name, kind=kind, action="left alone", reason=reason)

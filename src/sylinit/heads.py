"""Which layers' outputs are the model's predictions: those that the trial run saw make the model's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from sylinit.data.targets import TargetKind
from sylinit.errors import SylinitError, warn
from sylinit.layers.view import LayerView
from sylinit.selection import matches, require_match
from sylinit.trace import Trace


def find_heads(
    views: Sequence[LayerView],
    head: str | Sequence[str] | None,
    kind: TargetKind,
    names: Sequence[str],
    chosen: Callable[[str, nn.Module], bool],
    trace: Trace,
) -> tuple[list[LayerView], list[str]]:
    """The views whose outputs are predictions, and notes about the choice.

    Args:
        views: all of the model's.
        head: what the user asked for.
        kind: of the targets.
        names: of all modules, for messages.
        chosen: whether ``layers=`` names a layer.
        trace: what the trial run showed.

    Raises:
        SylinitError: a head that does not exist, or whose width does not fit the targets.
    """
    asked = [] if head in (None, "auto") else [head] if isinstance(head, str) else list(head or ())
    for name in asked:
        require_match(name, names, "head")
    if head is None or not kind.present or not views:
        return [], []
    if asked:
        return [_named(name, views, kind) for name in asked], []
    heads = _makers_of_output(views, kind, trace)
    if heads:
        return heads, []
    return [], _none_found(views, kind, chosen, trace)


def _named(name: str, views: Sequence[LayerView], kind: TargetKind) -> LayerView:
    """The layer that the user named."""
    found = [view for view in views if view.name == name] or [view for view in views if matches(name, view.name)]
    if not found:
        raise SylinitError(f"head={name!r} is no layer that sylinit can initialize")
    if found[-1].groups > 1:
        raise SylinitError(f"head={name!r}: {_grouped(found[-1])}; make it a layer of one group, or pass head=None")
    _require_width(found[-1], kind, "head")
    return found[-1]


def _makers_of_output(views: Sequence[LayerView], kind: TargetKind, trace: Trace) -> list[LayerView]:
    """The layers that made the output and are as wide as the targets; the last of the pass if there is no output."""
    last_of = {view.module: view for view in views}
    by_name = {view.name: view for view in last_of.values()} | {_module_name(v): v for v in last_of.values()}
    made = [by_name[name] for out in trace.outputs for name in sorted(out.made_by - out.rectified) if name in by_name]
    if not any(out.made_by for out in trace.outputs):  # a forward= that returns nothing
        made = [by_name[name] for name in trace.order[-1:] if name in by_name]
    made = [view for view in dict.fromkeys(made) if view.groups == 1]
    exact = fitting(made, kind)
    if exact or not kind.classes:
        return exact
    return [view for view in made if view.units > kind.classes]


def _module_name(view: LayerView) -> str:
    """The name of the module at which a view is met: of attention's projections, that of the attention."""
    name = view.name
    for suffix in (".out_proj", ".in_proj.query", ".in_proj.key", ".in_proj.value"):
        name = name.removesuffix(suffix) if isinstance(view.module, nn.MultiheadAttention) else name
    return name


def _none_found(
    views: Sequence[LayerView], kind: TargetKind, chosen: Callable[[str, nn.Module], bool], trace: Trace
) -> list[str]:
    """Warn, and note, that no layer was taken for the head."""
    reached = [view for view in views if _module_name(view) in trace.seen or view.name in trace.seen]
    last = (reached or list(views))[-1]
    if kind.classes:
        _require_width(last, kind, "auto")
    if not chosen(last.name, last.module):
        return []
    unit, width = ("classes", kind.classes) if kind.classes else ("target values", kind.width)
    note = (
        f"no layer that makes the model's output has {width} outputs for the {width} {unit}, so none was taken for the "
        f"head; if {last.name!r} ({_outputs(last)} outputs) is the head, pass head={last.name!r}, otherwise head=None"
    )
    if trace.made:
        note = (
            f"no head was computed: the forward pass makes layers ({', '.join(trace.made)}), which it undoes here; run "
            "the model once, so that they exist, and initialize then"
        )
    elif last.groups > 1:
        note = f"no head was taken: {_grouped(last)}"
    warn(note)
    return [note]


def fitting(views: Sequence[LayerView], kind: TargetKind) -> list[LayerView]:
    """The views that may be a head: one output a class or value; for two classes one may do, if none has two."""
    whole = [view for view in views if view.groups == 1]
    width = kind.classes or kind.width
    return [v for v in whole if v.units == width] or [v for v in whole if kind.classes in (1, 2) and v.units == 1]


def _grouped(view: LayerView) -> str:
    return f"{view.name!r} is a {view.kind} of {view.groups} groups, each of which sees a part of the features only"


def _require_width(view: LayerView, kind: TargetKind, head: str) -> None:
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


def _outputs(view: LayerView) -> int:
    return view.groups * view.units

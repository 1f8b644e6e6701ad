"""What to compute: sites in the model's order, the layers left alone, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sylinit.codes import CODES, HEAD, Code, as_code
from sylinit.config import Config
from sylinit.data.calibration import CalibrationSet
from sylinit.data.targets import TargetKind
from sylinit.errors import SylinitError
from sylinit.heads import find_heads
from sylinit.inventory import Inventory
from sylinit.layers.convolution import ConvView
from sylinit.layers.registry import is_quantized
from sylinit.layers.view import LayerView
from sylinit.report import ROOT, LayerReport
from sylinit.selection import matches, require_match, selector
from sylinit.sites import MatrixSite, NormalizationSite, Site
from sylinit.trace import Trace


@dataclass(frozen=True)
class Plan:
    """Sites in the model's order, the layers left alone, and what a user should know."""

    sites: tuple[Site, ...]
    left_alone: tuple[LayerReport, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Wish:
    """What the user asked for.

    Attributes:
        layers: which layers.
        code: which latent codes.
        head: which layer makes the predictions.
        train_size: how many samples the model will be trained on; None for as many as the data tells.
    """

    layers: Any = None
    code: Any = "mixed"
    head: Any = "auto"
    train_size: int | None = None


def make_plan(
    model: nn.Module, inventory: Inventory, trace: Trace, wish: Wish, data: CalibrationSet, config: Config
) -> Plan:
    """Decide what happens to every layer, and refuse what cannot be done.

    Args:
        model: whose layers.
        inventory: its parts.
        trace: what a trial run showed of them.
        wish: what the user asked for.
        data: the calibration set.
        config: the constants of the method.

    Raises:
        SylinitError: an unknown layer or code, a frozen or quantized layer among those selected, a code
            that needs labels without labels, a label out of range, or nothing to initialize.
    """
    kind = data.kind
    views, left = _seen(inventory, trace)
    few = (wish.train_size or data.train_size) < config.few_samples
    modules = {name or ROOT: module for name, module in model.named_modules()}
    names = [name for name in (*modules, *(view.name for view in views)) if name not in ("", ROOT)]
    chosen = selector(wish.layers, names)
    code_of = _codes(wish.code, names)
    heads, notes = find_heads(views, wish.head, kind, names, chosen, trace)

    sites: list[Site] = []
    # A parameter that something left alone also uses is left alone too.
    owners = {_memory(p): layer.name for layer in left for p in _own(modules.get(layer.name))}
    owners |= {_memory(p): view.name for view in views if not chosen(view.name, view.module) for p in view.parameters}
    for view in views:
        if not chosen(view.name, view.module):
            left.append(LayerReport(view.name, view.kind, "left alone", "not selected by layers="))
            continue
        owner = next((owners[_memory(p)] for p in view.parameters if _memory(p) in owners), None)
        if owner is not None and not _slices_of_one(view, owner):
            left.append(LayerReport(view.name, view.kind, "left alone", f"its weight is tied to that of {owner!r}"))
            continue
        _require_writable(view)
        owners.update({_memory(parameter): view.name for parameter in view.parameters})
        if any(view is head for head in heads):
            sites.append(MatrixSite(view, HEAD, "logits" if kind.categorical else "values"))
            continue
        held = few and _feeds_normalization(view)
        code = _with_targets(code_of(view.name), view.name, kind)
        sites.append(MatrixSite(view, code, "directions" if held else "units"))
    _refuse_quantized(left, modules, chosen)
    left += [LayerReport(name, "", "left alone", MADE_INSIDE) for name in trace.made]
    if not sites:
        reasons = "; ".join(f"{layer.name} ({layer.kind}): {layer.reason}" for layer in left[:5])
        raise SylinitError(f"the model has no layer to initialize{': ' + reasons if reasons else ''}")
    for name, module in inventory.norms.items():
        selected = chosen(name, module)
        sites.append(NormalizationSite(name or ROOT, module, selected=selected, held=few and selected))
    order = {id(module): place for place, module in enumerate(modules.values())}
    sites.sort(key=lambda site: order[id(site.module)])
    if len(data.batches) > 1:
        notes += _depends_on_the_cut(modules)
    return Plan(tuple(sites), tuple(left), (*notes, *_advice(sites, wish, data, config)))


MADE_INSIDE = (
    "made inside the forward pass, which the pass undoes; run the model once, so that it exists, and initialize then"
)


def _seen(inventory: Inventory, trace: Trace) -> tuple[list[LayerView], list[LayerReport]]:
    """The views of all layers as the trial run saw them, and what is no layer."""
    views: list[LayerView] = []
    left = list(inventory.left_alone)
    for candidate in inventory.candidates:
        number = trace.seen.get(candidate.name, 0)  # one that was not reached is looked at when it is
        if number < 0:
            reason = "it computes something else than rows(x) @ weight.mT + bias"
            left.append(LayerReport(candidate.name or ROOT, type(candidate.module).__name__, "left alone", reason))
        else:
            views += candidate.hypotheses[number]
    return views, left


def _advice(sites: Sequence[Site], wish: Wish, data: CalibrationSet, config: Config) -> list[str]:
    """What a user should know of codes that fell back and of normalizations that start otherwise."""
    notes = []
    kind = data.kind
    used = {site.code.name for site in sites if isinstance(site, MatrixSite)}
    asked = as_code(wish.code).name if isinstance(wish.code, str) else None
    if asked and not kind.present and used and asked not in used:
        notes.append(f"there are no labels, so the code {asked!r} fell back to {', '.join(sorted(used))!r}")
    held = any(getattr(site, "held", False) or getattr(site, "role", "") == "directions" for site in sites)
    if wish.train_size is None and held:
        notes.append(
            f"{data.train_size} samples are few: normalizations and what feeds them will move little in training; "
            f"pass train_size= if it is on {config.few_samples:,} or more"
        )
    return notes


def _depends_on_the_cut(modules: dict[str, nn.Module]) -> list[str]:
    """Normalizations that see one batch at a time."""
    names = [n for n, m in modules.items() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None]
    if not names:
        return []
    return [
        f"{names[0]!r} normalizes by each batch, having no running statistics, and the batches could not be joined: "
        "the weights depend on how the data is cut; pass one batch, or samples of equal shape"
    ]


def _feeds_normalization(view: LayerView) -> bool:
    """Whether a layer's outputs feed a normalization: a convolution without a bias is taken to."""
    return isinstance(view, ConvView) and not view.has_bias


def _codes(code: Any, names: list[str]) -> Callable[[str], Code]:
    """A function from a layer's name to its latent code."""
    if not isinstance(code, Mapping):
        one = as_code(code)
        return lambda name: one
    for pattern in code:
        require_match(pattern, names, "code")
    table = [(pattern, as_code(value)) for pattern, value in code.items()]
    return lambda name: next((value for pattern, value in table if matches(pattern, name)), CODES["mixed"])


def _with_targets(code: Code, name: str, kind: TargetKind) -> Code:
    """The code itself, or what it falls back to where there are no targets."""
    if not code.labels or kind.present or code.values is not None:
        return code
    remedy = "pass batches of (x, y), or a code without labels such as code='pca'"
    return code.without_labels(name, "the batches have none", remedy)


def _slices_of_one(view: LayerView, owner: str) -> bool:
    """Whether view and owner are slices of one packed parameter of the same module, not the same matrix twice."""
    return view.name.rpartition(".")[0] == owner.rpartition(".")[0] and ".in_proj." in f".{view.name}"


def _require_writable(view: LayerView) -> None:
    for parameter in view.parameters:
        if not parameter.requires_grad:
            raise SylinitError(
                f"layer {view.name!r} is frozen (requires_grad=False); unfreeze it, or leave it out, for example with "
                "layers=lambda name, module: all(p.requires_grad for p in module.parameters())"
            )


def _refuse_quantized(left: list[LayerReport], modules: dict[str, nn.Module], chosen: Any) -> None:
    """A quantized layer is an error wherever it is selected: silence would mislead."""
    for layer in left:
        module = modules.get(layer.name)
        if module is None or layer.name == ROOT or layer.reason.startswith("not selected"):
            continue
        if is_quantized(module) and chosen(layer.name, module):
            raise SylinitError(
                f"layer {layer.name!r} ({layer.kind}) is quantized to integers: {layer.reason}; initialize the model "
                "before quantizing it, or leave this layer out with layers="
            )


def _memory(parameter: nn.Parameter) -> int:
    """What tied parameters share: their memory, though they be two objects (after ``b.data = a.data``)."""
    plain = type(parameter) is nn.Parameter  # lazy ones and tensors made of others have none of their own
    return (parameter.data_ptr() if plain else 0) or id(parameter)


def _own(module: nn.Module | None) -> list[nn.Parameter]:
    return [] if module is None else list(module.parameters(recurse=False))

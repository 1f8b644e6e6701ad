"""What to compute: sites in the model's order, the layers left alone, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sylinit.codes import CODES, HEAD, Code, as_code
from sylinit.config import Config
from sylinit.data.calibration import CalibrationSet
from sylinit.data.goals import Goal
from sylinit.data.tasks import configured_task
from sylinit.errors import ROOT, SylinitError, warn
from sylinit.layers.attention import AttentionOutputView
from sylinit.layers.convolution import ConvView
from sylinit.layers.registry import is_quantized
from sylinit.layers.view import LayerView
from sylinit.plan.heads import Heads, find_heads, module_name
from sylinit.plan.inventory import Inventory
from sylinit.plan.recipes import AUTO, RECIPES, recipe_named
from sylinit.plan.selection import matches, require_match, selector
from sylinit.plan.sites import MatrixSite, NormalizationSite, Site
from sylinit.plan.trace import Trace
from sylinit.report import LayerReport
from sylinit.solvers.problem import Role


@dataclass(frozen=True)
class Plan:
    """Sites in the model's order, the layers left alone, the heads, and what a user should know."""

    sites: tuple[Site, ...]
    left_alone: tuple[LayerReport, ...]
    heads: Heads
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Wish:
    """What the user asked for.

    Attributes:
        layers: which layers.
        code: which latent codes.
        head: which layer makes the predictions, or a mapping from heads to targets.
        task: what the head is asked for.
        classes: how many classes there are.
        overwrite: whether a model that looks trained is to be re-made.
        heads_only: whether only heads are to be computed.
        train_size: how many samples the model will be trained on; None for as many as the data tells.
    """

    layers: Any = None
    code: Any = "auto"
    head: Any = "auto"
    task: str = "auto"
    classes: int | None = None
    overwrite: bool = False
    heads_only: bool = False
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
        SylinitError: an unknown layer or code, a frozen or quantized layer that layers= names, a code
            that needs labels without labels, a label out of range, or nothing to initialize.
    """
    views, left = _seen(inventory, trace)
    wish = _named_part(wish, model, views, trace)
    few = (wish.train_size or data.train_size) < config.few_samples
    modules = {name or ROOT: module for name, module in model.named_modules()}
    names = [name for name in (*modules, *(view.name for view in views)) if name not in ("", ROOT)]
    chosen = selector(wish.layers, names)
    recipe = recipe_named(wish.code)
    code_of = recipe.rule if recipe else _codes(wish.code, names)
    asked = _asked_task(wish, model, data)
    heads = find_heads(views, wish.head, asked, wish.classes, names, data, trace)
    if asked != wish.task and heads.task.name == asked:
        heads = replace(heads, task=replace(heads.task, reason="as the model's configuration has it"))
    if wish.heads_only and not heads.goals:
        raise SylinitError(f"no head to compute: {'; '.join(heads.notes) or heads.task.reason}; name it by head=")
    notes = list(heads.notes)
    notes += _require_untrained(inventory, wish)

    sites: list[Site] = []
    # A parameter that something left alone also uses is left alone too.
    owners = {_memory(p): layer.name for layer in left for p in _own(modules.get(layer.name))}
    tied = _tied(heads, owners)
    if tied and wish.heads_only:
        raise SylinitError(f"no head to compute: {tied}; untie it, or give the model a head of its own")
    kept = bool(tied) and wish.layers is None and not wish.overwrite
    if kept:
        notes.append(
            f"nothing was computed: {tied}, and a body made anew would not fit it; layers= or overwrite=True does it"
        )
        warn(notes[-1])
    for view in views:
        reason = _reason_to_leave(view, view in heads.goals, wish, chosen)
        if kept and view not in heads.goals:
            reason = reason or "the head is tied to the embedding, which stays"
        if reason:
            left.append(LayerReport(view.name, view.kind, "left alone", reason))
            owners |= {_memory(parameter): view.name for parameter in view.parameters}
    passed_over = {layer.name for layer in left}
    classes = heads.told is not None and heads.told.task.has_logits
    for view in views:
        if view.name in passed_over:
            continue
        owner = next((owners[_memory(p)] for p in view.parameters if _memory(p) in owners), None)
        if owner is not None and not _slices_of_one(view, owner):
            reason = f"its weight is tied to that of {owner!r}"
            left.append(LayerReport(view.name, view.kind, "left alone", reason))
            if view in heads.goals and any(site.name == owner and not site.is_head for site in sites):
                notes.append(f"head {view.name!r} predicts nothing yet: {reason}, which is computed as a hidden layer")
                warn(f"{notes[-1]}; untie them, so that the head is computed")
            continue
        owners.update({_memory(parameter): view.name for parameter in view.parameters})
        entry = module_name(view) in trace.entries
        if view in heads.goals:
            goal = heads.goals[view]
            sites.append(MatrixSite(view, HEAD, "logits" if goal.task.has_logits else "values", goal, entry))
            continue
        held = few and _feeds_normalization(view)
        code = code_of(view, entry)
        if code is None:
            left.append(LayerReport(view.name, view.kind, "left alone", "the recipe keeps it as it came"))
            continue
        code = _with_targets(code, view.name, heads.told)
        deviation = recipe.ends if recipe and _ends_branch(view, trace) else 1.0
        encoding = recipe.encoding if recipe and classes and not isinstance(view, ConvView) else 1.0
        role: Role = "directions" if held else "units"
        sites.append(MatrixSite(view, code, role, heads.told, entry, deviation, encoding))
    if not wish.heads_only:  # a quantized body is no hindrance to its head
        _refuse_quantized(left, modules, chosen)
    left += [LayerReport(name, "", "left alone", MADE_INSIDE) for name in trace.made]
    if not sites and not kept:
        reasons = "; ".join(f"{layer.name} ({layer.kind}): {layer.reason}" for layer in left[:5])
        raise SylinitError(f"the model has no layer to initialize{': ' + reasons if reasons else ''}")
    for name, module in inventory.norms.items():
        selected = chosen(name, module) and not wish.heads_only and not kept
        sites.append(NormalizationSite(name or ROOT, module, selected=selected, held=few and selected))
    order = {id(module): place for place, module in enumerate(modules.values())}
    sites.sort(key=lambda site: order[id(site.module)])
    if len(data.batches) > 1:
        notes += _depends_on_the_cut(modules)
    return Plan(tuple(sites), tuple(left), heads, (*notes, *_advice(sites, wish, heads, data, config)))


def _named_part(wish: Wish, model: nn.Module, views: Sequence[LayerView], trace: Trace) -> Wish:
    """The wish with "head", "new" and "last:N" as the layers that they stand for."""
    layers = wish.layers
    if not isinstance(layers, str) or any(matches(layers, name) for name, _ in model.named_modules() if name):
        return wish
    if layers == "head":
        return replace(wish, layers=None, heads_only=True)
    if layers == "new":
        new = new_parameters(model)
        named = {view.name for view in views if any(id(parameter) in new for parameter in view.parameters)}
    elif layers.startswith("last:"):
        count = layers.removeprefix("last:")
        if not count.isdecimal() or int(count) < 1:
            raise SylinitError(f"layers={layers!r}: after 'last:' comes how many layers, as in 'last:2'")
        by_module: dict[str, list[LayerView]] = {}
        for view in views:
            by_module.setdefault(module_name(view), []).append(view)
        met = [view.name for name in trace.order for view in by_module.get(name, ())]
        named = set(met[-int(count) :])
    else:
        return wish
    return replace(wish, layers=lambda name, module: name in named, overwrite=True)


def new_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters that ``from_pretrained`` found no weights for.

    Transformers marks each parameter that it loads (``_is_hf_initialized``) and leaves those that it draws unmarked.

    Raises:
        SylinitError: no parameter is marked, or all are.
    """
    drawn = {id(p) for p in model.parameters() if not getattr(p, "_is_hf_initialized", False)}
    if len(drawn) == len(list(model.parameters())):
        raise SylinitError(
            "layers='new': nothing tells which weights were loaded and which are new; this is known of models from "
            "Transformers' from_pretrained; pass the names of the layers, or initialize_head_"
        )
    if not drawn:
        raise SylinitError("layers='new': all weights were loaded, none is new")
    return drawn


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


def _asked_task(wish: Wish, model: nn.Module, data: CalibrationSet) -> str:
    """The task that the user or, where there are targets, the model's configuration asks for."""
    targets = [target for batch in data.batches for target in batch.targets.values()]
    if wish.task != "auto" or wish.head != "auto" or not targets:
        return wish.task
    return configured_task(model, real=targets[0].is_floating_point())


def _tied(heads: Heads, owners: Mapping[int, str]) -> str:
    """That every head shares its weight with a part that is left alone, such as an embedding; empty if not."""
    found = [(view, owners.get(_memory(view.parameters[0]))) for view in heads.goals]
    if not found or any(owner is None for _, owner in found):
        return ""
    view, owner = found[0]
    return f"the head {view.name!r} is tied to {owner!r}, which stays"


def _reason_to_leave(view: LayerView, is_head: bool, wish: Wish, chosen: Callable[[str, nn.Module], bool]) -> str:
    """Why a layer is not computed; empty if it is.

    Raises:
        SylinitError: a frozen layer that the user names.
    """
    if wish.heads_only and not is_head:
        return "not a head"
    if not chosen(view.name, view.module):
        return "not selected by layers="
    if not all(parameter.requires_grad for parameter in view.parameters):
        patterns = [part for part in _parts(wish.layers) if isinstance(part, str)]
        if any(matches(pattern, view.name) for pattern in patterns):
            raise SylinitError(
                f"layer {view.name!r} is frozen (requires_grad=False), and layers= names it; unfreeze it, or leave it "
                "out"
            )
        return "frozen (requires_grad=False)"
    if not is_head and not bool(view.weight().any()):
        return "it starts at zero on purpose, so that its branch adds nothing yet"
    return ""


def _parts(layers: Any) -> list[Any]:
    return list(layers) if isinstance(layers, (list, tuple, set)) else [layers]


SEEN_BATCHES = 2
"""A normalization that has seen more batches than this has been trained."""


def _require_untrained(inventory: Inventory, wish: Wish) -> list[str]:
    """A model that looks trained is re-made only when asked for; then a note says so.

    Raises:
        SylinitError: it is not asked for.
    """
    seen = {name: getattr(norm, "num_batches_tracked", None) for name, norm in inventory.norms.items()}
    trained = [name for name, count in seen.items() if count is not None and int(count) > SEEN_BATCHES]
    if not trained or wish.heads_only:
        return []
    count = int(seen[trained[0]])  # type: ignore[arg-type]
    what = f"the model looks trained ({trained[0]!r} has seen {count} batches)"
    if wish.layers is None and not wish.overwrite:
        raise SylinitError(
            f"{what}; sylinit.initialize_head_ computes its head alone, layers= some layers, and overwrite=True all of "
            "it anew"
        )
    note = (
        f"{what}, and its layers were computed anew, as asked for; sylinit.initialize_head_ would keep all but the head"
    )
    if wish.layers is None:
        warn(note)
    return [note]


def _advice(sites: Sequence[Site], wish: Wish, heads: Heads, data: CalibrationSet, config: Config) -> list[str]:
    """What a user should know of codes that fell back and of normalizations that start otherwise."""
    notes = []
    used = {site.code.name for site in sites if isinstance(site, MatrixSite)}
    named = isinstance(wish.code, str)
    asked = None if not named else wish.code if recipe_named(wish.code) else as_code(wish.code).name
    if asked and heads.told is None and used and asked not in used:
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


def _ends_branch(view: LayerView, trace: Trace) -> bool:
    """Whether what a Linear layer, or attention's last projection, makes is added to a residual stream."""
    inside = isinstance(view.module, nn.MultiheadAttention) and not isinstance(view, AttentionOutputView)
    return module_name(view) in trace.ends and not inside and not isinstance(view, ConvView)


def _codes(code: Any, names: list[str]) -> Callable[[LayerView, bool], Code | None]:
    """A function from a layer, and whether it reads the data itself, to its latent code; None keeps the layer."""
    if not isinstance(code, Mapping):
        one = as_code(code, (AUTO, *RECIPES))
        return lambda view, entry: one
    for pattern, value in code.items():
        require_match(pattern, names, "code")
        if recipe_named(value):
            raise SylinitError(
                f"code={{{pattern!r}: {value!r}}}: {value!r} is a recipe for a whole model; pass code={value!r}, or "
                f"give {pattern!r} one of {', '.join(CODES)}"
            )
    table = [(pattern, as_code(value)) for pattern, value in code.items()]
    return lambda view, entry: next((value for pattern, value in table if matches(pattern, view.name)), CODES["mixed"])


def _with_targets(code: Code, name: str, told: Goal | None) -> Code:
    """The code itself, or what it falls back to where there are no targets."""
    if not code.labels or told is not None or code.values is not None:
        return code
    remedy = "pass batches of (x, y), or a code without labels such as code='pca'"
    return code.without_labels(name, "the batches have none", remedy)


def _slices_of_one(view: LayerView, owner: str) -> bool:
    """Whether view and owner are slices of one packed parameter of the same module, not the same matrix twice."""
    return view.name.rpartition(".")[0] == owner.rpartition(".")[0] and ".in_proj." in f".{view.name}"


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

"""``code="auto"``: which recipe is best for a model and its data, by cross-validation that costs no training.

The samples are cut into folds. For each recipe and each fold the model is initialized from the other folds, and its
output on the fold is scored: neither the layers nor the head have seen it. Accuracy before training tells which start
ends higher. Where no recipe is better than the model's own body by more than a standard error of the paired
difference, the body stays as it came.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sylinit.data.batches import Batch, Reader
from sylinit.data.goals import Goal
from sylinit.data.score import flat
from sylinit.errors import SylinitError
from sylinit.layers.convolution import ConvView
from sylinit.layers.view import LayerView
from sylinit.plan.heads import module_name
from sylinit.plan.inventory import Inventory
from sylinit.plan.one_pass import Pass
from sylinit.plan.plan import Plan, Wish, make_plan
from sylinit.plan.recipes import OWN, RECIPES, Recipe
from sylinit.plan.sites import Context
from sylinit.plan.trace import Trace, output_tensors

FEWEST = 20
"""Fewer samples than this cannot tell recipes apart."""

SAMPLES = 768
"""So many samples, spread evenly, are enough to choose by."""

FOLDS = 3


@dataclass(frozen=True)
class Choice:
    """A recipe, and how it was chosen.

    Attributes:
        recipe: the recipe.
        note: for the report.
    """

    recipe: Recipe
    note: str


def choose(
    model: nn.Module,
    inventory: Inventory,
    trace: Trace,
    wish: Wish,
    context: Context,
    reader: Reader,
    call: Callable[[Batch], Any],
) -> Choice:
    """Try every recipe and keep the best.

    Args:
        model: in eval mode; it is put back after each trial.
        inventory: its parts.
        trace: what the trial run showed.
        wish: what the user asked for.
        context: of the pass.
        reader: which read the batches.
        call: runs the model on a batch.
    """
    fallback = RECIPES["mixed"]
    batch = context.data.batches[0]
    whole = _plan(model, inventory, trace, wish, context, fallback)
    if not whole.heads.goals:
        return Choice(fallback, "code='auto': there is no head to judge recipes by, so 'mixed' was taken")
    if len(context.data.batches) > 1 or batch.samples < FEWEST:
        return Choice(fallback, "code='auto': the samples cannot be cut into folds, so 'mixed' was taken")
    view, goal = next(iter(whole.heads.goals.items()))
    index = torch.arange(min(SAMPLES, batch.samples)) * batch.samples // min(SAMPLES, batch.samples)
    folds = _folds(goal, index)
    found: dict[str, list[Tensor]] = {name: [] for name in RECIPES}
    for fold in range(FOLDS):
        seen, held = (reader.part(batch, part) for part in (index[folds != fold], index[folds == fold]))
        for name, recipe in RECIPES.items():
            found[name].append(_held_out(model, inventory, trace, wish, context, recipe, view, seen, held, call))
            context.transaction.rewind()
    shared = context.processes.agree(lambda: {name: torch.cat(parts).tolist() for name, parts in found.items()})
    values = {name: torch.tensor([v for each in shared for v in each[name]]) for name in RECIPES}
    return _best(values)


def _plan(model: nn.Module, inventory: Inventory, trace: Trace, wish: Wish, context: Context, recipe: Recipe) -> Plan:
    return make_plan(model, inventory, trace, replace(wish, code=recipe), context.data, context.config)


def _held_out(
    model: nn.Module,
    inventory: Inventory,
    trace: Trace,
    wish: Wish,
    context: Context,
    recipe: Recipe,
    head: LayerView,
    seen: Batch,
    held: Batch,
    call: Callable[[Batch], Any],
) -> Tensor:
    """How well each held-out sample is predicted by the model initialized from the others: 1 is right, 0 wrong."""
    data = context.data
    size = sum(data.processes.agree(lambda: seen.samples))
    train = replace(data, batches=(seen,), samples=size)
    here = replace(context, data=train, promises={})
    plan = _plan(model, inventory, trace, replace(wish, train_size=wish.train_size or data.train_size), here, recipe)
    run = Pass(plan, here, model, trace, offload=False, progress=None)
    try:
        run.through(call)
    finally:
        run.end()
    outputs = list(output_tensors(call(held)))
    goal = _plan(model, inventory, trace, wish, replace(context, data=replace(data, batches=(held,))), OWN).heads.goals
    for place, output in enumerate(trace.outputs):
        if module_name(head) not in output.made_by or place >= len(outputs):
            continue
        pair = flat(goal[head], [outputs[place]], channels_first=isinstance(head, ConvView))
        if pair is not None and pair[0].shape[1] == head.units:
            return _values(goal[head], *pair)
    raise SylinitError("code='auto': the model's output does not have the form of its targets; pass code='mixed'")


def _values(goal: Goal, y: Tensor, t: Tensor) -> Tensor:
    """What each prediction is worth: 1 or 0 for classes, the share of right labels, or 1 - error / variance."""
    if goal.task.classes:
        guess = (y[:, 0] > 0).long() if y.shape[1] == 1 else y.argmax(1)
        return (guess == t).double()
    if goal.task.name == "multiclass":
        return (y.argmax(1) == t.argmax(1)).double()
    known = ~t.isnan()
    if goal.task.name in ("multilabel", "binary"):
        return (((y > 0) == (t > 0.5)) & known).double().sum(1) / known.sum(1).clamp(min=1)
    variance = (t - t.nanmean(0)).square().nanmean().clamp(min=1e-12)
    return 1 - (torch.where(known, y - t, 0).square().sum(1) / known.sum(1).clamp(min=1)) / variance


def _folds(goal: Goal, index: Tensor) -> Tensor:
    """A fold for each sample, with the classes spread evenly over the folds."""
    target = goal.targets[0][index.to(goal.targets[0].device)].cpu()
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    if goal.task.classes and target.ndim == 1:
        order = order[target[order].argsort(stable=True)]
    folds = torch.empty_like(order)
    folds[order] = torch.arange(len(order)) % FOLDS
    return folds


def _best(values: dict[str, Tensor]) -> Choice:
    """The best recipe, or the model's own body where none is better by more than a standard error."""
    means = {name: float(value.mean()) for name, value in values.items()}
    best = max(means, key=lambda name: means[name])
    difference = values[best] - values[OWN.name]
    error = float(difference.std() / len(difference) ** 0.5) if len(difference) > 1 else float("inf")
    taken = best if means[best] - means[OWN.name] > error else OWN.name
    scores = ", ".join(f"{name} {mean:.3f}" for name, mean in sorted(means.items(), key=lambda item: -item[1]))
    said = f"code='auto' took {taken!r} ({RECIPES[taken].meaning}); held-out scores"
    return Choice(RECIPES[taken], f"{said} of {len(difference)} predictions: {scores}")

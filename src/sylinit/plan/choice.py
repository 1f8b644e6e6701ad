"""``code="auto"``: which recipe is best for a model and its data, by cross-validation that costs no training.

The samples are cut into folds. For each recipe and each fold the model is initialized from samples outside the fold,
and its output on the fold is scored: neither the layers nor the head have seen it. Accuracy before training tells which
start ends higher. Where no recipe is better than the model's own body, it stays as it came.

What it costs: recipes that do the same to a model are tried once, a trial computes from at most `SEEN` samples, there
are no more folds than give `JUDGED` predictions, and a recipe that is credibly worse than the best is tried no further.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sylinit.codes import Code
from sylinit.data.batches import Batch, Reader
from sylinit.data.goals import Goal
from sylinit.data.score import worth_of
from sylinit.data.tree import CannotConcatenate
from sylinit.errors import SylinitError, SylinitWarning
from sylinit.layers.view import LayerView
from sylinit.plan.gain import predictions
from sylinit.plan.heads import module_name
from sylinit.plan.one_pass import Pass
from sylinit.plan.plan import Plan
from sylinit.plan.recipes import FALLBACK, OWN, RECIPES, TRIED, Recipe
from sylinit.plan.sites import Context, MatrixSite
from sylinit.plan.trace import Trace, output_tensors
from sylinit.runtime.processes import Processes

FEWEST = 20
"""Fewer samples than this cannot tell recipes apart."""

FOLDS = 3

SEEN = 512
"""A trial computes the model from at most so many samples."""

JUDGED = 128
"""So many predictions of each recipe are enough to choose by."""

CREDIBLE = 2.0
"""A recipe that is so many standard errors worse than the best is out of the race."""


@dataclass(frozen=True)
class Choice:
    """What is to be done, and how it was chosen.

    Attributes:
        plan: of the recipe that was taken.
        notes: for the report; none where all recipes do the same.
        held_out: of a computed body, what held-out samples are worth: accuracy, or R²; None where there are none.
    """

    plan: Plan
    notes: tuple[str, ...] = ()
    held_out: float | None = None


@dataclass(frozen=True)
class Part:
    """Some samples of this process's batches.

    Attributes:
        batches: parts of those batches that have any of the samples.
        places: the numbers of these batches.
        indices: which samples of each of them, int64 on the CPU.
        samples: how many there are in all processes.
        before: how many there are in processes of lower rank.
    """

    batches: tuple[Batch, ...]
    places: tuple[int, ...]
    indices: tuple[Tensor, ...]
    samples: int
    before: int

    def of(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """The samples' part of one tensor (or None) a batch."""
        chosen = ((values[place], index) for place, index in zip(self.places, self.indices, strict=True))
        return tuple(None if value is None else value[index.to(value.device)] for value, index in chosen)

    def goal(self, goal: Goal, processes: Processes) -> Goal:
        """What is known of the samples."""
        return goal.of_part(self.of(goal.targets), self.of(goal.vectors), processes)


def choose(
    plan: Plan,
    plan_of: Callable[[Recipe], Plan],
    model: nn.Module,
    trace: Trace,
    context: Context,
    reader: Reader,
    call: Callable[[Batch], Any],
    offload: bool | str,
) -> Choice:
    """Try every recipe and keep the best; where they cannot be tried, the fallback.

    Args:
        plan: of the fallback.
        plan_of: the plan of a recipe.
        model: in eval mode; it is put back after each trial.
        trace: what the trial run showed.
        context: of the pass.
        reader: which read the batches.
        call: runs the model on a batch.
        offload: where the activations of waiting batches go.
    """

    def fallback(reason: str) -> Choice:
        return Choice(plan, (f"code='auto': {reason}, so {FALLBACK.name!r} was taken",))

    if plan.heads.told is None:
        return Choice(plan)  # whose notes say that there are no labels
    if not plan.heads.goals:
        return fallback("there is no head to judge recipes by")
    if not any(isinstance(site, MatrixSite) for site in plan.sites):
        return Choice(plan)  # whose notes say why nothing is computed
    if not _computed(plan):
        return fallback("the head keeps its weights, and judges no recipe")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SylinitWarning)  # what the user should know is said of the plan that is taken
        plans = _distinct(plan, plan_of)
        if len(plans) == 1:
            return Choice(plan)
        if context.data.samples < FEWEST:
            return fallback(f"{context.data.samples} samples are too few to judge recipes by")
        try:
            values, failed = _held_out(plans, plan.heads.goals, model, trace, context, reader, call, offload)
        except Exception as error:  # in whatever a model cannot do with other batches than the user's
            context.processes.announce(error)
            context.transaction.rewind()
            return fallback(f"the recipes could not be tried on parts of the samples ({_in_a_line(error)})")
    labels = max(map(len, values.values()))
    if labels < FEWEST:
        return fallback(f"{labels} labels are too few to judge recipes by")
    if not any(math.isfinite(sum(each)) for each in values.values()):
        return fallback("the model's output on held-out samples is not finite")
    return _best(values, plans, failed)


def _computed(plan: Plan) -> list[LayerView]:
    """The heads that are computed; others are frozen, or tied to something that stays."""
    return [site.view for site in plan.sites if isinstance(site, MatrixSite) and site.is_head]


def _in_a_line(error: Exception) -> str:
    """The first line of what an error says, with its type where it is not of this library."""
    first = next(iter(str(error).strip().splitlines()), "")
    own = isinstance(error, (SylinitError, CannotConcatenate))
    return first if own else f"{type(error).__name__}: {first}".removesuffix(": ")


def _distinct(plan: Plan, plan_of: Callable[[Recipe], Plan]) -> dict[str, Plan]:
    """The plans of the recipes to try, without those that do the same as an earlier one."""
    found: dict[str, Plan] = {}
    known: set[frozenset[tuple[str, Code, float, float]]] = set()
    for recipe in TRIED:
        each = plan if recipe is FALLBACK else plan_of(recipe)
        sites = [site for site in each.sites if isinstance(site, MatrixSite)]
        does = frozenset((site.name, site.code, site.deviation, site.encoding) for site in sites)
        if does not in known:
            known.add(does)
            found[recipe.name] = each
    return found


def _held_out(
    plans: Mapping[str, Plan],
    goals: Mapping[LayerView, Goal],
    model: nn.Module,
    trace: Trace,
    context: Context,
    reader: Reader,
    call: Callable[[Batch], Any],
    offload: bool | str,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """What each recipe's prediction of each held-out sample with a label is worth, in all processes, and what failed.

    The first head that is computed is judged. The same samples come in the same order for every recipe, however the
    data is cut, and each recipe gets a copy of its own: a model may write into its input. A recipe that is credibly
    worse has fewer values than the others; when one is left, or all are alike, there is nothing more to find out.
    """
    processes = context.processes
    computed = _computed(plans[OWN.name])
    head, goal = next((view, goal) for view, goal in goals.items() if view in computed)
    spread = _spread(goal, processes)
    folds = _folds(goal, processes)
    count = min(FOLDS, math.ceil(JUDGED * FOLDS / len(folds)))
    found: dict[str, list[float]] = {name: [] for name in plans}
    failed: dict[str, str] = {}
    racing = list(plans)
    for fold in range(count):
        inside, outside = _at_most(JUDGED, folds == fold), _at_most(SEEN, folds != fold)
        for name in racing:
            seen, held = (processes.together(partial(_part, which, context, reader)) for which in (outside, inside))
            parts = {view.name: seen.goal(each, processes) for view, each in goals.items()}
            wanted = replace(goal, targets=held.of(goal.targets))
            here = replace(
                context,
                data=replace(context.data, batches=seen.batches, samples=seen.samples, before=seen.before),
                positions={name: seen.of(values) for name, values in context.positions.items()},
                promises={},
            )
            try:
                _compute(plans[name], parts, here, model, trace, call, offload)
                worth = processes.agree(partial(_worth, head, wanted, spread, held, trace, call))
                found[name] += [value for values in worth for value in values]
            except SylinitError as error:  # what a recipe makes of a layer, a later one may not be able to read
                if name == OWN.name:
                    raise
                processes.announce(error)
                failed[name] = _in_a_line(error)
                found[name] += [math.nan] * (len(found[OWN.name]) - len(found[name]))
            context.transaction.rewind()
        racing = _still_racing({name: found[name] for name in racing})
        if len(racing) == 1:
            break
    return found, failed


def _still_racing(values: Mapping[str, Sequence[float]]) -> list[str]:
    """The recipes that are not credibly worse than the best so far; the best alone where all are alike.

    Source: Maron and Moore, *Hoeffding races: accelerating model selection search for classification and function
    approximation*, NIPS 1993; here with the standard error of paired differences.
    """
    known = {name: torch.tensor(each, dtype=torch.float64) for name, each in values.items()}
    best = max(known, key=lambda name: _mean(known[name]))
    if len(known[best]) < FEWEST:
        return list(values)
    if all(torch.equal(each, known[best]) for each in known.values()):
        return [best]
    behind = {name: _difference(known[best], each) for name, each in known.items()}
    return [name for name, (gap, error) in behind.items() if name == best or gap <= CREDIBLE * error]


def _compute(
    plan: Plan,
    goals: Mapping[str, Goal],
    context: Context,
    model: nn.Module,
    trace: Trace,
    call: Callable[[Batch], Any],
    offload: bool | str,
) -> None:
    """Compute a plan's sites from some of the samples."""
    told = next(iter(goals.values()))

    def goal_of(site: MatrixSite) -> Goal | None:
        return site.goal and (goals[site.name] if site.is_head else told)

    sites = [replace(site, goal=goal_of(site)) if isinstance(site, MatrixSite) else site for site in plan.sites]
    run = Pass(replace(plan, sites=tuple(sites)), context, model, trace, offload, progress=None)
    try:
        run.through(call)
    finally:
        run.end()


def _part(which: Tensor, context: Context, reader: Reader) -> Part:
    """The samples of this process that have these numbers in all data, increasing."""
    start = context.data.before
    batches, places, indices = [], [], []
    for place, batch in enumerate(context.data.batches):
        mine = which[(which >= start) & (which < start + batch.samples)] - start
        start += batch.samples
        if len(mine):
            batches.append(reader.part(batch, mine))
            places.append(place)
            indices.append(mine)
    if not batches:
        raise SylinitError("a process would have none of them")
    before = int((which < context.data.before).sum())
    return Part(tuple(batches), tuple(places), tuple(indices), len(which), before)


def _at_most(count: int, chosen: Tensor) -> Tensor:
    """The places of so many true entries at most, spread evenly over all."""
    places = chosen.nonzero().squeeze(1)
    count = min(count, len(places))
    return places[torch.arange(count) * len(places) // max(1, count)]


def _worth(
    head: LayerView, goal: Goal, spread: float, held: Part, trace: Trace, call: Callable[[Batch], Any]
) -> list[float]:
    """What the prediction of each held-out sample with a label is worth: the mean over its places."""
    outputs = [list(output_tensors(call(batch))) for batch in held.batches]
    for place, output in enumerate(trace.outputs):
        if module_name(head) not in output.made_by or any(place >= len(each) for each in outputs):
            continue
        pair = predictions(head, goal, output, [each[place] for each in outputs])
        if pair is None:
            continue
        known = [target >= 0 if goal.task.classes else ~target.isnan().all(-1) for target in goal.targets]
        counts = torch.cat([each.flatten(1).sum(1) if each.ndim > 1 else each.long() for each in known])
        values = worth_of(goal, *pair, spread).cpu().split(counts.tolist())
        return [float(each.mean()) for each in values if len(each)]
    raise SylinitError("the model's output does not have the form of its targets")


def _spread(goal: Goal, processes: Processes) -> float:
    """The variance of target values in all processes; 1 for classes."""
    if goal.task.classes:
        return 1.0
    away = torch.cat([vectors.flatten(0, -2) for vectors in goal.vectors]) - goal.mean
    sums = torch.stack([away.square().nansum(), (~away.isnan()).double().sum()])
    total, count = processes.sum_(sums).tolist()
    return total / count if total > 0 else 1.0


def _folds(goal: Goal, processes: Processes) -> Tensor:
    """A fold for each sample of all processes, with the classes spread evenly over the folds."""

    def of(target: Tensor) -> Tensor:
        if goal.task.classes:
            return target if target.ndim == 1 else torch.zeros(len(target), dtype=torch.long)
        if goal.task.of_shares and target.ndim == 2:
            return target.nan_to_num(0).argmax(1).masked_fill(target.isnan().all(1), -1)
        return target.new_zeros(len(target), dtype=torch.long)

    def strata() -> list[int]:
        return [label for target in goal.targets for label in of(target).tolist()]

    stratum = torch.tensor([label for each in processes.agree(strata) for label in each])
    order = torch.randperm(len(stratum), generator=torch.Generator().manual_seed(0))
    order = order[stratum[order].argsort(stable=True)]
    folds = torch.empty_like(order)
    folds[order] = torch.arange(len(order)) % FOLDS
    return folds


def _best(values: Mapping[str, Sequence[float]], plans: Mapping[str, Plan], failed: Mapping[str, str]) -> Choice:
    """The best of the recipes that were tried to the end; of equal ones the first, which is the model's own body."""
    known = {name: torch.tensor(each, dtype=torch.float64) for name, each in values.items()}
    most = max(map(len, known.values()))
    ordered = sorted(known, key=lambda name: (-len(known[name]), -_mean(known[name])))
    taken, scores = ordered[0], []
    for name in ordered:
        if not math.isfinite(_mean(known[name])):
            scores.append(f"{name} failed{f' ({failed[name]})' if name in failed else ''}")
            continue
        said = f"{name} {_mean(known[name]):.3f}"
        details = [] if len(known[name]) == most else [f"of {len(known[name])}"]
        if name != OWN.name and math.isfinite(_mean(known[OWN.name])):
            difference, error = _difference(known[name], known[OWN.name])
            details.insert(0, f"{difference:+.3f} ± {error:.3f}")
        scores.append(f"{said} ({', '.join(details)})" if details else said)
    note = f"code='auto' took {taken!r} ({RECIPES[taken].meaning}); scores of {most} held-out samples"
    notes = (f"{note} (over own, with the standard error): {', '.join(scores)}",)
    return Choice(plans[taken], notes, None if taken == OWN.name else _mean(known[taken]))


def _mean(values: Tensor) -> float:
    """The mean; of values that are not all finite, less than any other."""
    return float(values.mean()) if bool(values.isfinite().all()) else -math.inf


def _difference(first: Tensor, second: Tensor) -> tuple[float, float]:
    """The mean of the paired differences on the samples that both have, and its standard error."""
    count = min(len(first), len(second))
    difference = first[:count] - second[:count]
    return float(difference.mean()), float(difference.std()) / count**0.5

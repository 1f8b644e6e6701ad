"""Run experiments: each by its task, several at once in processes, tuned on held-back data before the test set."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sylinit.errors import SylinitError
from sylinit.study.data import Dataset, few_shot, held_back, load, split
from sylinit.study.experiment import Experiment
from sylinit.study.forecast import forecast
from sylinit.study.models import build
from sylinit.study.pool import Each, cores, one_by_one, pool
from sylinit.study.starts import apply_start
from sylinit.study.store import Record, Store
from sylinit.study.train import Recipe, train

GRIDS = {"sgd": (0.003, 0.01, 0.03, 0.1, 0.3), "adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
"""Learning rates that every start is tuned over, one shared grid for an optimiser."""

VALIDATION = 2000
"""At most so many training samples are held back to tune on."""

TUNING_SEED = 1000
"""Seeds for tuning begin here, so that no subset that is tuned on is the one that is reported."""

Progress = Callable[[int, int, str, float], None]
"""``(runs done, runs in all, what is going on, seconds left)``."""

Report = Callable[[str], None]
"""Takes what is going on."""


@dataclass(frozen=True)
class Plan:
    """Which starts to compare, what each is tuned over, and how often the winner of the tuning is run.

    Attributes:
        arms: one experiment for each method; learning rate and seed are filled in.
        grid: learning rates; empty means that each arm keeps its own.
        seeds: of the final runs.
        tuning_seeds: number of seeds that each learning rate is tried with.
        split: where the final runs are measured. Studies that choose the library's defaults must not see the test set.
        workers: processes; None is one a core.
    """

    arms: tuple[Experiment, ...]
    grid: tuple[float, ...] = GRIDS["sgd"]
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: int = 1
    split: str = "test"
    workers: int | None = None

    def tuning(self) -> list[Experiment]:
        """All runs that choose learning rates."""
        return [
            replace(arm, lr=lr, seed=TUNING_SEED + seed, split="validation")
            for arm in self.arms
            for lr in self.grid
            for seed in range(self.tuning_seeds)
        ]

    def final(self, chosen: dict[Experiment, float]) -> list[Experiment]:
        """All runs that are reported, of the methods whose learning rate is known."""
        return [
            replace(arm, lr=chosen.get(arm.method, arm.lr), seed=seed, split=self.split)  # type: ignore[arg-type]
            for arm in self.arms
            if not self.grid or arm.method in chosen
            for seed in self.seeds
        ]

    def __len__(self) -> int:
        """Number of runs."""
        return len(self.arms) * (len(self.grid) * self.tuning_seeds + len(self.seeds))


@dataclass(frozen=True)
class Study:
    """A plan that has been run.

    Attributes:
        plan: what was run.
        records: of the final runs.
        chosen: the learning rate of each method.
        at_edge: methods whose best learning rate is the grid's first or last: a wider grid might serve them better.
    """

    plan: Plan
    records: tuple[Record, ...]
    chosen: dict[Experiment, float]
    at_edge: tuple[Experiment, ...] = field(default=())


def run(experiment: Experiment) -> dict[str, Any]:
    """Run one experiment in this process and return its result, with the seconds that all of it took."""
    began = time.perf_counter()
    result = TASKS[experiment.task](experiment)
    return {**result, "run_seconds": time.perf_counter() - began}


def run_study(plan: Plan, store: Store, progress: Progress | None = None) -> Study:
    """Tune each arm on held-back training data, then run it on every seed with the rate that was best.

    Runs that the store already holds are not run again. A run that fails does not stop the others.

    Raises:
        SylinitError: at the end, if runs failed.
    """
    workers = plan.workers or cores()

    def report(what: str) -> None:
        if progress:
            missing, seconds = remaining(plan, store)
            progress(len(plan) - missing, len(plan), what, seconds / workers)

    with pool(workers) as each:
        failed = execute(plan.tuning(), store, each, report)
        failed |= execute(plan.final(_chosen(plan, store)), store, each, report)
    if failed:
        experiment, error = next(iter(failed.items()))
        raise SylinitError(
            f"{len(failed)} runs failed, the others are kept; the first was {experiment.label} ({experiment.model} on "
            f"{experiment.dataset}, learning rate {experiment.lr:g}, seed {experiment.seed}): "
            f"{type(error).__name__}: {error}"
        ) from error
    return read(plan, store)


def remaining(plan: Plan, store: Store) -> tuple[int, float]:
    """Runs that the store lacks, and the seconds that they are expected to take one after the other."""
    chosen = _chosen(plan, store)
    missing = [e for e in plan.tuning() if e not in store]
    # the learning rate of a method that is not tuned yet is unknown, the number of its runs is not
    untuned = [arm for arm in plan.arms if plan.grid and arm.method not in chosen]
    missing += [arm for arm in untuned for _ in plan.seeds]
    missing += [e for e in plan.final(chosen) if e not in store]
    return len(missing), forecast(missing, store.records.values())


def read(plan: Plan, store: Store) -> Study:
    """The study as far as the store has it; tuning that is incomplete leaves its method out."""
    chosen = _chosen(plan, store)
    records = [store[e] for e in plan.final(chosen) if e in store]
    edges = {plan.grid[0], plan.grid[-1]} if len(plan.grid) > 1 else set()
    return Study(plan, tuple(records), chosen, tuple(m for m, lr in chosen.items() if lr in edges))


def as_run(plan: Plan, store: Store) -> Plan:
    """The plan as far as the store has it: each task in one precision and on one schedule, whatever the start.

    Of several precisions the one of most runs; of several numbers of epochs the one that most methods were run with, of
    equals the plan's, or else the most.
    """
    plan = as_begun(plan, store)
    known: dict[Experiment, dict[int, set[str]]] = {}
    for record in store.records.values():
        e = record.experiment
        known.setdefault(_task(e), {}).setdefault(e.epochs, set()).add(e.label)

    def epochs(arm: Experiment) -> int:
        found = known.get(_task(arm), {})
        return max(found, key=lambda each: (len(found[each]), each == arm.epochs, each), default=arm.epochs)

    return replace(plan, arms=tuple(replace(arm, epochs=epochs(arm)) for arm in plan.arms))


def as_begun(plan: Plan, store: Store) -> Plan:
    """The plan with each task in the precision that the store has most of its runs in, whatever the start.

    So starts that are compared never differ in it. Tasks that the store has no run of stay as they are.
    """
    known: dict[Experiment, Counter[str]] = {}
    for record in store.records.values():
        task = _in_precision(_task(record.experiment), "")
        known.setdefault(task, Counter())[record.experiment.get("precision")] += 1
    found = {task: counts.most_common(1)[0][0] for task, counts in known.items()}
    arms = [_in_precision(e, found.get(_in_precision(_task(e), ""), e.get("precision"))) for e in plan.arms]
    return replace(plan, arms=tuple(arms))


def in_precision(plan: Plan, precision: str) -> Plan:
    """The plan with all arms that set a precision in this one."""
    return replace(plan, arms=tuple(_in_precision(arm, precision) for arm in plan.arms))


def _in_precision(experiment: Experiment, precision: str) -> Experiment:
    setting = tuple((key, precision if key == "precision" else value) for key, value in experiment.setting)
    return replace(experiment, setting=setting)


def _task(experiment: Experiment) -> Experiment:
    """What starts are compared on: all of an experiment but start and schedule."""
    dataset = Path(experiment.dataset).name
    return replace(experiment.method, start="", options=(), epochs=0, dataset=dataset)


def choose(plan: Plan, records: Iterable[Record]) -> dict[Experiment, float]:
    """The learning rate of best mean validation accuracy of each method; of equals, the lower."""
    scores: dict[Experiment, dict[float, list[float]]] = {}
    for record in records:
        by_rate = scores.setdefault(record.experiment.method, {})
        by_rate.setdefault(record.experiment.lr, []).append(record.result["after"])
    means = {m: {lr: math.fsum(v) / len(v) for lr, v in rates.items()} for m, rates in scores.items()}
    return {
        method: min(rates, key=lambda lr: (-rates[lr], lr))
        for method, rates in means.items()
        if sum(map(len, scores[method].values())) == len(plan.grid) * plan.tuning_seeds
    }


def _chosen(plan: Plan, store: Store) -> dict[Experiment, float]:
    return choose(plan, [store[e] for e in plan.tuning() if e in store])


def execute(
    experiments: Sequence[Experiment], store: Store, each: Each = one_by_one, report: Report = lambda what: None
) -> dict[Experiment, Exception]:
    """Run what the store lacks and store each result the moment it is there.

    Args:
        experiments: what to run.
        store: where results go; Ctrl-C, crashes and kills lose the runs under way, not those that ended.
        each: runs them, from `pool`.
        report: called with what is going on, at the beginning and after each run.

    Returns:
        The runs that failed, and why.
    """
    missing = [e for e in dict.fromkeys(experiments) if e not in store]
    failed: dict[Experiment, Exception] = {}
    if not missing:
        return failed
    prepare(missing, report)
    report("")
    for experiment, result in each(run, missing):
        if isinstance(result, Exception):
            failed[experiment] = result
        else:
            store.add(experiment, result)
        report(experiment.label)
    return failed


def prepare(experiments: Iterable[Experiment], report: Report) -> None:
    """Do once, here, what the workers would otherwise all do at the same moment: decode data, pretrain."""
    from sylinit.study.finetune import pretrained

    experiments = [e for e in experiments if e.task != "time"]  # which makes its own data
    for source in sorted({e.dataset for e in experiments}):
        report(f"loading {source}")
        load(source)
    for experiment in {
        replace(e.method, start="", options=()): e for e in experiments if e.task == "finetune"
    }.values():
        report(f"pretraining {experiment.model} on {experiment.get('source') or experiment.dataset}")
        pretrained(experiment)


@dataclass(frozen=True)
class Subset:
    """The samples of one run, on its device."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def subset(data: Dataset, experiment: Experiment) -> Subset:
    """The training subset of an experiment and what it is measured on."""
    y = data.train_y
    if experiment.shots is not None:
        index = few_shot(y, experiment.shots, experiment.seed)
        held = held_back(y, index, VALIDATION, experiment.seed) if experiment.split == "validation" else index[:0]
    elif experiment.split == "validation":
        index, held = split(y, min(0.1, 5000 / len(y)), experiment.seed)
    else:
        index = torch.arange(len(y))
        held = index[:0]
    if experiment.shots is None:  # few_shot mixes the classes, the others keep the data's order
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(experiment.seed))]
    if experiment.split == "validation":
        parts = data.train_x[index], y[index], data.train_x[held], y[held]
    else:
        parts = data.train_x[index], y[index], data.test_x, data.test_y
    return Subset(*(part.to(device()) for part in parts))


def device() -> torch.device:
    """Where runs take place."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def recipe(experiment: Experiment, shape: tuple[int, ...]) -> Recipe:
    """How an experiment trains. Colour images are mirrored; digits and letters must not be."""
    fields = {f.name for f in dataclasses.fields(Recipe)}
    given = {key: value for key, value in experiment.setting if key in fields}
    values = {
        "flip": len(shape) == 3 and shape[0] == 3,
        "points": 1 if experiment.split == "validation" else 5,
        **given,
    }
    return Recipe(lr=experiment.lr, optimiser=experiment.optimiser, epochs=experiment.epochs, **values)


def run_train(experiment: Experiment) -> dict[str, Any]:
    """Build, start, train, measure."""
    data = load(experiment.dataset)
    part = subset(data, experiment)
    torch.manual_seed(experiment.seed)  # parameters that no start writes, such as position embeddings
    model = build(experiment.model, data.shape, data.classes).to(device())
    seconds = apply_start(experiment.start, model, part.x, part.y, experiment.seed, dict(experiment.options))
    return fit(model, part, experiment, data, init_seconds=seconds)


def fit(
    model: nn.Module, part: Subset, experiment: Experiment, data: Dataset, *, init_seconds: float
) -> dict[str, Any]:
    """Train a started model and return the result as JSON-ready values."""
    x, test_x = part.x, part.test_x
    if x.dim() == 4:
        # 12 % faster for ResNet-20 on one thread, no slower for the plain network
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x, test_x = (t.to(memory_format=torch.channels_last) for t in (x, test_x))
    plan = recipe(experiment, data.shape)
    outcome = train(model, x, part.y, test_x, part.test_y, plan, classes=data.classes, seed=experiment.seed)
    return {
        **dataclasses.asdict(outcome),
        "init_seconds": init_seconds,
        "total_seconds": init_seconds + outcome.seconds,
        "samples": len(x),
        "evaluated": len(test_x),
    }


def _finetune(experiment: Experiment) -> dict[str, Any]:
    from sylinit.study.finetune import run_finetune

    return run_finetune(experiment)


def _timing(experiment: Experiment) -> dict[str, Any]:
    from sylinit.study.timing import run_timing

    return run_timing(experiment)


TASKS: dict[str, Callable[[Experiment], dict[str, Any]]] = {
    "train": run_train,
    "finetune": _finetune,
    "time": _timing,
}

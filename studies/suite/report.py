"""What the runs show: a table by task, and the figures that an initialization is judged by, with paired intervals.

All accuracies are shares; R2 takes their place where values are predicted. A point is a hundredth of either.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.suite.methods import METHODS, RANDOM, REFERENCES
from studies.suite.run import STEPS, TUNING_SEED
from studies.suite.tasks import TASKS

LEVEL = 0.005
"""What lies within half a point counts as level."""

NEAR = 0.05
"""A rate works for a method if it ends within five points of the method's best."""


@dataclass(frozen=True)
class Outcome:
    """A reported run.

    Attributes:
        before: value before training, on the chosen part.
        after: the same after training.
        curve: ``(step, value on the validation subset)``.
        initialization: seconds.
        training: seconds, without measuring.
    """

    before: float
    after: float
    curve: tuple[tuple[int, float], ...]
    initialization: float
    training: float


@dataclass(frozen=True)
class Interval:
    """A mean and the half-width of its 95 % t interval; the latter is NaN for a single value."""

    mean: float
    half: float


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Mean of ``first[i] - second[i]`` over seeds, and its interval ``t(0.975, n - 1) s / sqrt(n)``."""
    from scipy import stats

    differences = [a - b for a, b in zip(first, second, strict=True)]
    count = len(differences)
    if count == 1:
        return Interval(differences[0], math.nan)
    error = statistics.stdev(differences) / math.sqrt(count)
    return Interval(statistics.fmean(differences), float(stats.t.ppf(0.975, count - 1)) * error)


class Results:
    """Records of one number of steps, by what they are of."""

    def __init__(self, records: Iterable[dict[str, Any]], *, test: bool, steps: int = STEPS) -> None:
        """Sort the records.

        Args:
            records: as in a store; of two of one run, the later one counts.
            test: take the values of the test set, else those of the validation subset.
            steps: records of networks trained for another number are left out.
        """
        self.reported: dict[tuple[str, str, str], dict[int, Outcome]] = defaultdict(dict)
        self.references: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
        self.tuned: dict[tuple[str, str], dict[tuple[str, float], list[float]]] = defaultdict(lambda: defaultdict(list))
        self.commits: set[str] = set()
        latest = {
            tuple(record[key] for key in ("task", "method", "optimizer", "lr", "seed", "test")): record
            for record in records
            if record["steps"] in (0, steps)
        }
        for (task, method, optimizer, lr, seed, with_test), record in latest.items():
            self.commits.add(str(record["environment"]["commit"]))
            curve = record["result"]["curve"]
            if seed >= TUNING_SEED:
                self.tuned[task, optimizer][method, lr].append(curve[-1][1])
            elif with_test or not test:
                column = 2 if test else 1
                if method in REFERENCES:
                    self.references[group_of(task), method][seed] = curve[-1][column]
                else:
                    result = record["result"]
                    self.reported[task, method, optimizer][seed] = Outcome(
                        before=curve[0][column],
                        after=curve[-1][column],
                        curve=tuple((point[0], point[1]) for point in curve),
                        initialization=result["initialization_seconds"],
                        training=result["training_seconds"],
                    )

    def values(self, task: str, method: str, optimizer: str, what: str) -> list[float]:
        """One attribute of the outcome of each seed, in the seeds' order."""
        return [getattr(outcome, what) for _, outcome in sorted(self.reported[task, method, optimizer].items())]

    def has(self, task: str, method: str, optimizer: str) -> bool:
        """Whether there is a reported run."""
        return bool(self.reported.get((task, method, optimizer)))


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All records of some files."""
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]


def group_of(task: str) -> str:
    """What tasks on the same data share: ``cifar10-50`` of ``cifar10-50/vit``."""
    return task.rpartition("/")[0]


@dataclass(frozen=True)
class Comparison:
    """A candidate on one task.

    Attributes:
        task: its name.
        best: the random start that ends highest.
        best_after: where that ends.
        before: of the candidate.
        after: of the candidate.
        gain: after training, over `best`.
        over_pca: after training, over PCA whitening with a computed head.
        steps: share of the steps after which the candidate's mean validation curve reaches the end of that of `best`;
            infinite where it never does.
    """

    task: str
    best: str
    best_after: float
    before: float
    after: float
    gain: Interval
    over_pca: Interval | None
    steps: float


def compare(results: Results, candidate: str, optimizer: str) -> list[Comparison]:
    """The candidate against the baselines, on every task where all are there."""
    found = []
    for task in TASKS:
        random = [name for name in RANDOM if results.has(task, name, optimizer)]
        if not (random and results.has(task, candidate, optimizer)):
            continue
        best = max(random, key=lambda name: statistics.fmean(results.values(task, name, optimizer, "after")))
        found.append(
            Comparison(
                task=task,
                best=best,
                best_after=statistics.fmean(results.values(task, best, optimizer, "after")),
                before=statistics.fmean(results.values(task, candidate, optimizer, "before")),
                after=statistics.fmean(results.values(task, candidate, optimizer, "after")),
                gain=gain(results, task, candidate, best, optimizer),
                over_pca=gain(results, task, candidate, "pca-head", optimizer)
                if results.has(task, "pca-head", optimizer)
                else None,
                steps=steps_to(
                    mean_curve(results, task, candidate, optimizer), mean_curve(results, task, best, optimizer)[-1][1]
                ),
            )
        )
    return found


def gain(results: Results, task: str, first: str, second: str, optimizer: str) -> Interval:
    """What the first method ends with over the second, on the seeds that both have."""
    one, other = results.reported[task, first, optimizer], results.reported[task, second, optimizer]
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return Interval(math.nan, math.nan)
    return paired([one[seed].after for seed in seeds], [other[seed].after for seed in seeds])


def mean_curve(results: Results, task: str, method: str, optimizer: str) -> list[tuple[int, float]]:
    """The mean of the validation curves over seeds."""
    curves = [outcome.curve for outcome in results.reported[task, method, optimizer].values()]
    return [(points[0][0], statistics.fmean(value for _, value in points)) for points in zip(*curves, strict=True)]


def steps_to(curve: Sequence[tuple[int, float]], level: float) -> float:
    """Share of all steps at the first measured point that is not below `level`; infinite where none is."""
    return next((step / curve[-1][0] for step, value in curve if value >= level), math.inf)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def figures(results: Results, candidate: str, optimizer: str) -> dict[str, dict[str, float]]:
    """What must be shown, as numbers: counts, shares in [0, 1], and differences of shares."""
    compared = compare(results, candidate, optimizer)
    shown = {
        "1 after training, against the best random start": after_training(compared),
        "2 after training, against PCA whitening with a computed head": against_pca(compared),
        "3 before training, against the best random start after training": before_training(compared),
        "3 before training, on time series": on_series(results, compared, optimizer),
        "4 steps to the end of the best random start": {
            "tasks": len(compared),
            "median share": statistics.median([one.steps for one in compared]) if compared else math.nan,
            "at most a third": share(compared, lambda one: one.steps <= 1 / 3),
        },
        "5 fine-tuning": fine_tuning(compared),
        "6 learning rates that work for a baseline": at_working_rates(results, candidate),
    }
    return {title: numbers for title, numbers in shown.items() if numbers["tasks"]}


def share(items: Sequence[Any], holds: Callable[[Any], bool]) -> float:
    """Of the items, how many it holds for; NaN for none."""
    return sum(map(holds, items)) / len(items) if items else math.nan


def differences(intervals: Sequence[Interval]) -> dict[str, float]:
    """Mean, extremes and signs of paired differences over tasks."""
    means = [one.mean for one in intervals]
    return {
        "tasks": len(means),
        "mean": statistics.fmean(means) if means else math.nan,
        "worst": min(means, default=math.nan),
        "above": share(means, lambda mean: mean > 0),
        "below by more than half a point": sum(mean < -LEVEL for mean in means),
        "below by more than a point": sum(mean < -2 * LEVEL for mean in means),
        "interval above zero": sum(one.mean - one.half > 0 for one in intervals),
        "interval below zero": sum(one.mean + one.half < 0 for one in intervals),
    }


def after_training(compared: Sequence[Comparison]) -> dict[str, float]:
    """Figure 1."""
    return differences([one.gain for one in compared])


def against_pca(compared: Sequence[Comparison]) -> dict[str, float]:
    """Figure 2."""
    return differences([one.over_pca for one in compared if one.over_pca])


def before_training(compared: Sequence[Comparison]) -> dict[str, float]:
    """Figure 3."""
    return {
        "tasks": len(compared),
        "at least nine tenths": share(compared, lambda one: one.before >= 0.9 * one.best_after),
        "more": share(compared, lambda one: one.before > one.best_after),
    }


def on_series(results: Results, compared: Sequence[Comparison], optimizer: str) -> dict[str, float]:
    """Figure 3 on time series: the trained FCN is the best random start's; each network counts."""
    series = [one for one in compared if TASKS[one.task].data_set.kind == "series"]
    trained_fcn = {group_of(one.task): one.best_after for one in series if TASKS[one.task].network == "fcn"}
    against_fcn = [one for one in series if group_of(one.task) in trained_fcn]
    rocket = {
        group: statistics.fmean(values.values())
        for (group, method), values in results.references.items()
        if method == "minirocket"
    }
    over_rocket = [one.before - rocket[group_of(one.task)] for one in series if group_of(one.task) in rocket]
    return {
        "tasks": len(series),
        "at least the trained FCN": share(against_fcn, lambda one: one.before >= trained_fcn[group_of(one.task)]),
        "mean over MiniRocket": statistics.fmean(over_rocket) if over_rocket else math.nan,
    }


def fine_tuning(compared: Sequence[Comparison]) -> dict[str, float]:
    """Figure 5; the best random start of a pretrained body is its random head."""
    tuned = [one for one in compared if TASKS[one.task].pretrained]
    return {
        "tasks": len(tuned),
        "at most a third of the steps": share(tuned, lambda one: one.steps <= 1 / 3),
        "within eight points before any step": share(tuned, lambda one: one.before >= one.best_after - 0.08),
    }


def at_working_rates(results: Results, candidate: str) -> dict[str, float]:
    """Figure 6, on the validation subsets of the tuning runs, of all optimizers.

    A rate counts where some baseline ends within five points of its own best; the candidate is level if, at that rate,
    it ends no more than half a point below the best of those baselines.
    """
    gaps: list[float] = []
    tasks = set()
    for (task, _), ends in results.tuned.items():
        means = {key: statistics.fmean(values) for key, values in ends.items()}
        baselines = {name for name, _ in means if name in METHODS and name != "default"} - {candidate}
        best = {name: max(value for (other, _), value in means.items() if other == name) for name in baselines}
        for (name, lr), value in means.items():
            working = [
                means[other, lr] for other in baselines if means.get((other, lr), -math.inf) >= best[other] - NEAR
            ]
            if name == candidate and working:
                tasks.add(task)
                gaps.append(value - max(working))
    return {
        "tasks": len(tasks),
        "rates": len(gaps),
        "level or above": share(gaps, lambda gap: gap >= -LEVEL),
        "worst": min(gaps, default=math.nan),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def page(results: Results, candidate: str, optimizer: str) -> str:
    """Figures, the comparison by task, and all methods by task, in Markdown."""
    parts = [f"Candidate: {candidate}. Optimizer: {optimizer}. Commits: {', '.join(sorted(results.commits))}."]
    for title, numbers in figures(results, candidate, optimizer).items():
        parts.append(f"{title}\n\n" + "\n".join(f"- {name}: {written(name, value)}" for name, value in numbers.items()))
    heads = ["task", "best random start", "before > after", "gain", "over pca-head", "before / best", "steps"]
    rows = [
        [
            one.task,
            f"{one.best} {percent(one.best_after)}",
            f"{percent(one.before)} > {percent(one.after)}",
            points(one.gain),
            points(one.over_pca) if one.over_pca else "",
            f"{one.before / one.best_after:.2f}" if one.best_after > 0 else "",
            f"{100 * one.steps:.0f} %" if math.isfinite(one.steps) else "never",
        ]
        for one in compare(results, candidate, optimizer)
    ]
    parts += [table(heads, rows), all_methods(results, optimizer), seconds(results, optimizer)]
    return "\n\n".join(parts) + "\n"


def all_methods(results: Results, optimizer: str) -> str:
    """Mean before and after training of every method, and each task's references, by task."""
    methods = list(dict.fromkeys(method for _, method, name in results.reported if name == optimizer))
    references = list(dict.fromkeys(method for _, method in results.references))
    rows = []
    for task in TASKS:
        cells = []
        for method in methods:
            known = results.has(task, method, optimizer)
            ends = [results.values(task, method, optimizer, what) for what in ("before", "after")] if known else []
            cells.append(" > ".join(percent(statistics.fmean(values)) for values in ends))
        if not any(cells):
            continue
        for method in references:
            values = results.references.get((group_of(task), method))
            cells.append(percent(statistics.fmean(values.values())) if values else "")
        rows.append([task, *cells])
    return table(["task", *methods, *references], rows)


def seconds(results: Results, optimizer: str) -> str:
    """Median seconds over tasks and seeds, by method."""
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    for (_, method, name), seeds in results.reported.items():
        if name == optimizer:
            outcomes[method] += seeds.values()
    rows = [
        [
            method,
            f"{statistics.median(one.initialization for one in ones):.2f}",
            f"{statistics.median(one.training for one in ones):.2f}",
        ]
        for method, ones in outcomes.items()
    ]
    return table(["method", "seconds of initialization", "seconds of training"], rows)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def percent(value: float) -> str:
    """``0.123`` as ``12.3``."""
    return f"{100 * value:.1f}"


def points(interval: Interval) -> str:
    """``+1.2 ± 0.3`` in points."""
    half = "" if math.isnan(interval.half) else f" ± {100 * interval.half:.1f}"
    return f"{100 * interval.mean:+.1f}{half}"


def written(name: str, value: float) -> str:
    """A figure for a reader: counts as they are, differences in points, shares in percent."""
    if name in ("mean", "worst", "mean over MiniRocket"):
        return f"{100 * value:+.1f} points"
    return f"{value}" if isinstance(value, int) else f"{100 * value:.0f} %"

"""What a study says: one row a method, the winner in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sylinit.study.experiment import Experiment
from sylinit.study.runner import Study
from sylinit.study.statistics import Interval, interval, paired
from sylinit.study.store import Record


@dataclass(frozen=True)
class Row:
    """One method over its seeds.

    Attributes:
        method: without learning rate, seed and split.
        lr: the learning rate that its final runs used.
        records: in the order of their seeds.
        at_edge: whether the learning rate is the first or last of the grid.
    """

    method: Experiment
    lr: float
    records: tuple[Record, ...]
    at_edge: bool = False

    @property
    def label(self) -> str:
        """The start and its options."""
        return self.method.label

    def values(self, metric: str) -> list[float]:
        """One number a seed."""
        return [record.result[metric] for record in self.records if record.result.get(metric) is not None]

    def interval(self, metric: str) -> Interval:
        """Mean over seeds with its 95 % interval."""
        return interval(self.values(metric))

    @property
    def diverged(self) -> int:
        """Number of runs that diverged."""
        return sum(bool(record.result.get("diverged")) for record in self.records)


def rows(study: Study) -> list[Row]:
    """One row for each arm that has records, in the order of the plan."""
    # A plan that tunes nothing keeps its learning rates apart: they are what it asks about.
    tuned = bool(study.plan.grid)
    groups: dict[tuple[Experiment, float], list[Record]] = {}
    for record in study.records:
        e = record.experiment
        groups.setdefault((e.method, e.lr), []).append(record)
    return [
        Row(method, lr, tuple(sorted(group, key=lambda r: r.experiment.seed)), tuned and method in study.at_edge)
        for (method, lr), group in groups.items()
    ]


def ranked(rows: Iterable[Row], metric: str = "after") -> list[Row]:
    """Best first."""
    return sorted(rows, key=lambda row: -row.interval(metric).mean)


def gap(first: Row, second: Row, metric: str = "after") -> Interval | None:
    """How far the first is above the second, paired over the seeds that both have; None where there is none."""
    mine, theirs = ({r.experiment.seed: r.result.get(metric) for r in row.records} for row in (first, second))
    pairs = [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return paired([a for a, _ in known], [b for _, b in known]) if known else None


def ours(rows: Sequence[Row]) -> Row | None:
    """The row that the others are compared with: plain sylinit, or its first variant beside other starts."""
    named = [row for row in rows if row.label.startswith("sylinit")]
    plain = [row for row in named if row.label == "sylinit"]
    return next(iter(plain or (named if len(named) < len(rows) else [])), None)


def mean_curve(row: Row) -> list[tuple[float, Interval]]:
    """``(epoch, accuracy)`` at the epochs that all seeds measured."""
    curves = [dict(map(tuple, record.result["curve"])) for record in row.records]
    epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(epoch, interval([curve[epoch] for curve in curves])) for epoch in epochs]


def epochs_to(row: Row, level: float) -> float | None:
    """Epochs until the mean curve, straight between its points, first reaches `level`; None if it never does."""
    curve = [(epoch, accuracy.mean) for epoch, accuracy in mean_curve(row)]
    if curve[0][1] >= level:
        return 0.0
    for (start, low), (end, high) in pairwise(curve):
        if high >= level:
            return start + (end - start) * (level - low) / (high - low)
    return None


@dataclass(frozen=True)
class Pace:
    """How soon a start reaches an accuracy.

    Attributes:
        epochs: until the mean curve is there; None if it never is.
        seconds: until then, those of the start included.
        start: seconds of the start alone.
        whole: seconds in all.
    """

    epochs: float | None
    seconds: float | None
    start: float
    whole: float


@dataclass(frozen=True)
class Race:
    """How soon each start reaches where the best of the other starts ends.

    Attributes:
        best: that other start.
        level: where its mean curve ends.
        paces: of every start, by its label, best first.
    """

    best: Row
    level: float
    paces: dict[str, Pace]


def race(rows: Sequence[Row]) -> Race | None:
    """The race of these starts; None without sylinit, without others or without training."""
    others = [row for row in rows if not row.label.startswith("sylinit")]
    if not others or ours(rows) is None or not others[0].method.epochs:
        return None
    best = ranked(others)[0]
    level = mean_curve(best)[-1][1].mean
    paces = {}
    for row in ranked(rows):
        needed = epochs_to(row, level)
        start, whole = row.interval("init_seconds").mean, row.interval("total_seconds").mean
        spent = None if needed is None else start + (whole - start) * needed / row.method.epochs
        paces[row.label] = Pace(needed, spent, start, whole)
    return Race(best, level, paces)


def verdict(rows: Sequence[Row], metric: str = "after") -> str:
    """Which method is best, by how much over the next and how sure that is; differences are paired by seed."""
    best, *others = ranked(rows, metric)
    if not others:
        return f"Only {best.label} was run: {best.interval(metric).percent()} % after training."
    runner_up = others[0]
    lines = [
        f"Best after training: {best.label}, {best.interval(metric).percent()} %.",
        _lead(best, runner_up, metric),
    ]
    own = ours(rows)
    if own is not None and own not in (best, runner_up):
        behind = gap(best, own, metric)
        if behind is not None:
            lines.append(f"{own.label} is {behind.percent()} points behind the best.")
    edges = [row.label for row in rows if row.at_edge]
    if edges:
        lines.append(f"At the edge of the grid of learning rates, so perhaps better beyond it: {', '.join(edges)}.")
    return "\n".join(lines)


def _lead(best: Row, runner_up: Row, metric: str) -> str:
    lead = gap(best, runner_up, metric)
    if lead is None:
        return f"The next, {runner_up.label}, was run on other seeds."
    size = f"It is {lead.percent()} points above the next, {runner_up.label}"
    if lead.n < 2:
        return f"{size}. One seed says nothing of chance; run more for an interval."
    sure = "a clear winner" if lead.low > 0 else "not a clear winner, run more seeds"
    return f"{size} (paired over {lead.n} seeds, 95 % interval): {sure}."

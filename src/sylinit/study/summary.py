"""What a study says: one row a method, the winner in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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


def verdict(rows: Sequence[Row], metric: str = "after") -> str:
    """Which method is best, by how much over the next and how sure that is; differences are paired by seed."""
    best, *others = ranked(rows, metric)
    if not others:
        return f"Only {best.label} was run: {best.interval(metric).percent()} % after training."
    lines = [f"Best after training: {best.label}, {best.interval(metric).percent()} %."]
    runner_up = others[0]
    gap = paired(best.values(metric), runner_up.values(metric))
    size = f"{gap.percent()} points above the next, {runner_up.label}"
    if gap.n < 2:
        lines.append(f"It is {size}. One seed says nothing of chance; run more for an interval.")
    elif gap.low > 0:
        lines.append(f"It is {size} (paired over {gap.n} seeds, 95 % interval): a clear winner.")
    else:
        lines.append(f"It is {size} (paired over {gap.n} seeds, 95 % interval): not a clear winner, run more seeds.")
    ours = next((row for row in rows if row.label == "sylinit"), None)
    if ours is not None and ours not in (best, runner_up):
        behind = paired(best.values(metric), ours.values(metric))
        lines.append(f"sylinit is {behind.percent()} points behind the best.")
    edges = [row.label for row in rows if row.at_edge]
    if edges:
        lines.append(f"At the edge of the grid of learning rates, so perhaps better beyond it: {', '.join(edges)}.")
    return "\n".join(lines)

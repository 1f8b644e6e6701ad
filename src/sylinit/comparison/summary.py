"""What a comparison says: one row a method, the winner in plain words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sylinit.comparison.experiment import Experiment
from sylinit.comparison.plan import Comparison
from sylinit.comparison.statistics import FEW, Interval, interval, paired
from sylinit.comparison.store import Record


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
        """The initialization and its options."""
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


def rows(comparison: Comparison) -> list[Row]:
    """One row for each arm that has records, in the order of the plan."""
    # A plan that tunes nothing keeps its learning rates apart: they are what it asks about.
    tuned = bool(comparison.plan.grid)
    groups: dict[tuple[Experiment, float], list[Record]] = {}
    for record in comparison.records:
        e = record.experiment
        groups.setdefault((e.method, e.lr), []).append(record)
    return [
        Row(method, lr, tuple(sorted(group, key=lambda r: r.experiment.seed)), tuned and method in comparison.at_edge)
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
    """The row that the others are compared with: plain sylinit, or its first variant beside other initializations."""
    named = [row for row in rows if row.label.startswith("sylinit")]
    plain = [row for row in named if row.label == "sylinit"]
    return next(iter(plain or (named if len(named) < len(rows) else [])), None)


def mean_curve(row: Row) -> list[tuple[float, Interval]]:
    """``(epoch, accuracy)`` at the epochs that all seeds measured."""
    curves = [dict(map(tuple, record.result["curve"])) for record in row.records]
    epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(epoch, interval([curve[epoch] for curve in curves])) for epoch in epochs]


def text_table(rows: Sequence[Row], title: str, name: str = "accuracy") -> str:
    """A table for a terminal, best first: before, after and mean over training, learning rate, seconds.

    Args:
        rows: of a comparison.
        title: of the table.
        name: of what was measured.
    """
    head = ["initialization", "before", "after", "mean", "lr", "init s", "all s"]
    cells = [head] + [
        [
            row.label,
            row.interval("before").percent(),
            row.interval("after").percent() + (f" ({row.diverged} diverged)" if row.diverged else ""),
            row.interval("area").percent(),
            f"{row.lr:g}" + (" *" if row.at_edge else ""),
            f"{row.interval('init_seconds').mean:.2f}",
            f"{row.interval('total_seconds').mean:.1f}",
        ]
        for row in ranked(rows)
    ]
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    lines = [
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    seeds = max(len(row.records) for row in rows)
    over = f" ± 95 % interval over {seeds} seeds" if seeds >= FEW else f", {seeds} seed{'s' * (seeds > 1)}"
    foot = "mean: over training; lr: chosen on held-back data" + (
        " (*: the first or last of the grid)" if any(row.at_edge for row in rows) else ""
    )
    return "\n".join([f"{title}: test {name} (%){over}", lines[0], "-" * len(lines[0]), *lines[1:], foot])


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
    if lead.n < FEW:
        return f"{size}. With fewer than {FEW} seeds there is no interval; run more."
    sure = "a clear winner" if lead.low > 0 else "not a clear winner, run more seeds"
    return f"{size} (paired over {lead.n} seeds, 95 % interval): {sure}."

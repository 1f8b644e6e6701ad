"""How soon each initialization reaches where the best of the others ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sylinit.comparison.summary import Row, mean_curve, ours, ranked


@dataclass(frozen=True)
class Pace:
    """How soon an initialization reaches an accuracy.

    Attributes:
        epochs: until the mean curve is there; None if it never is.
        seconds: until then, those of the initialization included.
        init_seconds: of the initialization alone.
        total_seconds: of initialization and training.
    """

    epochs: float | None
    seconds: float | None
    init_seconds: float
    total_seconds: float


@dataclass(frozen=True)
class Race:
    """How soon each initialization reaches where the best of the others ends.

    Attributes:
        best: the best of the others, which sylinit is compared with.
        level: where its mean curve ends.
        paces: of every initialization, by its label, best first.
    """

    best: Row
    level: float
    paces: dict[str, Pace]


def race(rows: Sequence[Row]) -> Race | None:
    """The race of these initializations; None without sylinit, without others or without training."""
    others = [row for row in rows if not row.label.startswith("sylinit")]
    if not others or ours(rows) is None or not others[0].method.epochs:
        return None
    best = ranked(others)[0]
    level = mean_curve(best)[-1][1].mean
    paces = {}
    for row in ranked(rows):
        needed = epochs_to(row, level)
        init, total = row.interval("init_seconds").mean, row.interval("total_seconds").mean
        spent = None if needed is None else init + (total - init) * needed / row.method.epochs
        paces[row.label] = Pace(needed, spent, init, total)
    return Race(best, level, paces)


def epochs_to(row: Row, level: float) -> float | None:
    """Epochs until the mean curve, straight between its points, first reaches `level`; None if it never does."""
    curve = [(epoch, accuracy.mean) for epoch, accuracy in mean_curve(row)]
    if curve[0][1] >= level:
        return 0.0
    for (before, low), (after, high) in pairwise(curve):
        if high >= level:
            return before + (after - before) * (level - low) / (high - low)
    return None

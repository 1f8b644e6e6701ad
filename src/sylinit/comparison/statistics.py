"""Means, 95 % intervals and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from sylinit import SylinitError

FEW = 3
"""From so many values on an interval is shown: of two it is thirteen times as wide as their distance."""


@dataclass(frozen=True)
class Interval:
    """A mean with the half-width of its two-sided 95 % t interval over `n` values; NaN where they are too few."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half

    def percent(self, *, sign: bool = False) -> str:
        """As percentage: ``44.9 ± 0.8``; without interval where the values are fewer than `FEW`."""
        shown = f"{100 * self.mean:{'+' if sign else ''}.1f}"
        return shown if math.isnan(self.half) else f"{shown} ± {100 * self.half:.1f}"


def interval(values: Sequence[float]) -> Interval:
    """Mean and, of `FEW` values or more, 95 % interval: ``mean ± t(0.975, n - 1) * s / sqrt(n)``."""
    if not len(values):
        raise SylinitError("interval: expected at least one value, got none")
    array = np.asarray(values, dtype=float)
    n = len(array)
    half = float(stats.t.ppf(0.975, n - 1) * array.std(ddof=1) / math.sqrt(n)) if n >= FEW else math.nan
    return Interval(float(array.mean()), half, n)


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Mean and 95 % interval of ``first[i] - second[i]``, seed by seed."""
    if len(first) != len(second):
        raise SylinitError(f"paired: expected as many values of both, got {len(first)} and {len(second)}")
    return interval([a - b for a, b in zip(first, second, strict=True)])

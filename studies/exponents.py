"""The power with which a cost grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from sylinit import SylinitError


@dataclass(frozen=True)
class Exponent:
    """The power p of ``y = c x^p`` with the half-width of its 95 % interval, NaN for two points."""

    power: float
    half: float


def exponent(x: Sequence[float], y: Sequence[float]) -> Exponent:
    """Fit a power law by least squares on logarithms (`scipy.stats.linregress` has no interval for a constant y).

    Raises:
        SylinitError: if all sizes are equal.
    """
    if len(set(x)) < 2:
        raise SylinitError("exponent: expected at least two different sizes")
    logs, n = np.log(np.asarray(x, float)), len(x)
    power, offset = np.polyfit(logs, np.log(y), 1)
    if n < 3:
        return Exponent(float(power), math.nan)
    squares = float(np.square(np.log(y) - power * logs - offset).sum())
    error = math.sqrt(squares / (n - 2) / float(np.square(logs - logs.mean()).sum()))
    return Exponent(float(power), float(stats.t.ppf(0.975, n - 2)) * error)

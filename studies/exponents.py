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
    """Fit a power law by least squares on logarithms.

    Raises:
        SylinitError: if all sizes are equal.
    """
    if len(set(x)) < 2:
        raise SylinitError("exponent: expected at least two different sizes")
    fit = stats.linregress(np.log(x), np.log(y))
    half = stats.t.ppf(0.975, len(x) - 2) * fit.stderr if len(x) > 2 else math.nan
    return Exponent(float(fit.slope), float(half))

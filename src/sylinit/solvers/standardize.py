"""Inputs whose columns differ much in scale, or lie far from zero: a layer is then solved in standardized ones.

With ``x' = (x - mean) / deviation`` the equation of ``x'`` is solved for ``W'``; ``W = W' / deviation`` and
``b = b' - W mean`` give the same outputs from the inputs as they are. Time stamps beside ordinary columns then count
like any column, and nothing is lost to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sylinit.config import Config
from sylinit.layers.convolution import ConvView
from sylinit.solvers.fit import Fit
from sylinit.statistics.moments import Covariance
from sylinit.statistics.rows import Rows


@dataclass(frozen=True)
class Standardized(Rows):
    """The rows of one layer, each column of mean 0 and deviation 1; constant columns are 0.

    Attributes:
        mean: ``[d]``, float64, what is taken off.
        inverse: ``[d]``, float64, 1 / deviation, 0 for constant columns.
    """

    mean: Tensor | None = None
    inverse: Tensor | None = None

    def transformed(self, rows: Tensor) -> Tensor:
        """Standardized rows, float64."""
        assert self.mean is not None
        assert self.inverse is not None
        return (rows.double() - self.mean) * self.inverse

    def covariance(self, dtype: torch.dtype = torch.float64) -> Covariance:
        """In float64 always."""
        return super().covariance(torch.float64)

    def in_original_units(self, fit: Fit) -> Fit:
        """A fit for the inputs as they are."""
        assert self.mean is not None
        assert self.inverse is not None
        assert fit.bias is not None
        weight = fit.weight * self.inverse
        return replace(fit, weight=weight, bias=fit.bias - weight @ self.mean)


def standardized(rows: Rows, config: Config) -> Standardized | None:
    """The same rows standardized, where their columns differ so much that a careful user would do it; else None.

    Columns differ much if the largest deviation is more than ``config.scale_ratio`` times the median one, or that more
    than so many times the lower quartile; they lie far from zero if any mean is more than ``config.offset_ratio``
    deviations.
    """
    if isinstance(rows.view, ConvView) or rows.groups > 1 or rows.dim < 2:
        return None

    def total(values: Tensor) -> Tensor:
        return rows.processes.sum_(values)

    parts = [rows.view.rows(part.x, part.index)[0].double() for part in rows.parts]
    none = torch.zeros(rows.dim, dtype=torch.float64, device=rows.device)
    mean = total(sum((x.sum(0) for x in parts), none)) / rows.count
    deviation = (total(sum(((x - mean).square().sum(0) for x in parts), none)) / rows.count).sqrt()
    varies = deviation > 1e-14 * mean.abs()
    if not math.isfinite(float(mean.sum())) or not bool(varies.any()):
        return None
    size = deviation[varies]
    quartile, median = size.quantile(torch.tensor([0.25, 0.5], dtype=torch.float64, device=size.device))
    differ = bool((size.max() > config.scale_ratio * median) | (median > config.scale_ratio * quartile))
    far = bool((mean.abs() > config.offset_ratio * deviation.where(varies, median)).any())
    if not (differ or far):
        return None
    inverse = torch.where(varies, 1 / deviation.where(varies, 1), 0)
    fields = {name: getattr(rows, name) for name in ("name", "view", "parts", "count", "width", "device", "processes")}
    return Standardized(**fields, mean=mean, inverse=inverse)

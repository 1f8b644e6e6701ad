"""A layer's statistics in the coordinates of its principal axes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sylinit.linalg.eigh import robust_eigh
from sylinit.linalg.subspace import signs
from sylinit.statistics.moments import Covariance


@dataclass(frozen=True)
class Axes:
    """A layer's statistics in the coordinates of its principal axes: ``x' = basis^T (x - mean)``.

    Attributes:
        basis: ``[g, d, r]``, orthonormal columns.
        variances: ``[g, r]``, the variance along each axis, descending, exactly zero on null axes.
        xt: ``[g, r, c]``, the covariance of ``x'`` with the target; zero, too, on null axes.
        tt: ``[c, c]``, the covariance of the target.
    """

    basis: Tensor
    variances: Tensor
    xt: Tensor
    tt: Tensor


def principal_axes(cov: Covariance, null_variance: float) -> Axes:
    """Rotate a layer's statistics to the eigenvectors of its covariance, largest variance first.

    Args:
        cov: of the rows.
        null_variance: axes whose variance is at most this share of the largest are null axes.
    """
    variances, basis = robust_eigh(cov.xx)
    variances, basis = variances.flip(1), basis.flip(2)
    basis = basis * signs(basis)
    null = variances <= null_variance * variances[:, :1].clamp(min=0)
    xt = (basis.mT @ cov.xt).masked_fill(null.unsqueeze(2), 0)
    return Axes(basis, variances.masked_fill(null, 0), xt, cov.tt)

"""A layer's statistics in the coordinates of its principal axes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
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

    @cached_property
    def ranks(self) -> list[int]:
        """The number of axes of each group that carry data: its leading ones."""
        return (self.variances > 0).sum(1).tolist()

    @cached_property
    def whitening(self) -> Tensor:
        """``1 / sqrt(variance)`` on each axis, ``[g, r]``, zero on null axes."""
        return self.variances.rsqrt().nan_to_num_(posinf=0.0)


def principal_axes(cov: Covariance, null_variance: float) -> Axes:
    """Rotate a layer's statistics to the eigenvectors of its covariance, largest variance first.

    Args:
        cov: of the rows.
        null_variance: axes whose variance is at most this share of the largest are null axes.
    """
    variances, basis = robust_eigh(cov.xx)
    variances, basis = variances.flip(1), basis.flip(2)
    basis = basis * signs(basis)
    null = variances <= null_variance * variances[:, :1]
    xt = torch.bmm(basis.mT, cov.xt).masked_fill_(null.unsqueeze(2), 0)
    return Axes(basis, variances.masked_fill_(null, 0), xt, cov.tt)

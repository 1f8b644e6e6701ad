"""The streamed second moment of a layer's rows, from which every linear latent code is computed.

With ``z = [1, t, x]`` (a row's target and its input), everything that a linear code needs is ``G = sum z z^T``.
`Moments` holds the blocks of ``G`` as raw sums: they add, whatever the order, the batch size or the machine.
`Covariance` is what remains after centering.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Numbers that are converted to float64 at once: 32 MiB, whatever the number of rows."""

BLOCK = 192
"""Columns of ``sum x x^T`` that are formed at once, from the diagonal on: narrow, but wide enough for full speed."""

MIRRORED = 1024
"""Columns that are copied below the diagonal at once."""


@dataclass
class Moments:
    """Raw sums over rows ``x`` (d numbers) and ``s = [1, t]`` (1 and c numbers of target) for g groups.

    Float64; ``xx`` perhaps float32.

    Attributes:
        ss: ``[1 + c, 1 + c]``, the sum of ``s s^T``; its first row is the number of rows and the sum of the targets.
        xs: ``[g, d, 1 + c]``, the sum of ``x s^T``; its first column is the sum of the rows.
        xx: ``[g, d, d]``, the sum of ``x x^T``; where d is above `BLOCK`, only its upper triangle holds.
    """

    ss: Tensor
    xs: Tensor
    xx: Tensor

    @classmethod
    def zeros(
        cls,
        groups: int,
        dim: int,
        targets: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Moments:
        """The moments of no rows: ``groups`` of ``dim`` inputs and ``targets`` numbers of target; ``xx`` in ``dtype``.

        Products of rows are formed in ``dtype`` too: in float32 they take half the time and memory.
        """
        width = 1 + targets
        return cls(
            ss=torch.zeros(width, width, dtype=torch.float64, device=device),
            xs=torch.zeros(groups, dim, width, dtype=torch.float64, device=device),
            xx=torch.zeros(groups, dim, dim, dtype=dtype, device=device),
        )

    @torch.no_grad()
    def update(self, rows: Tensor, targets: Tensor | None = None, chunk: int = CHUNK) -> Moments:
        """Add rows ``[g, n, d]`` and their targets ``[n, c]``.

        Exact to the rounding of ``xx``'s dtype however the rows are cut into calls, and these into chunks of so many
        numbers.
        """
        groups, count, dim = rows.shape
        s = with_ones(self.ss.new_empty(count, len(self.ss) - 1) if targets is None else targets)
        across = s.T
        self.ss.addmm_(across, s)
        step = max(1, chunk // max(1, groups * dim))
        for start in range(0, count, step):
            piece = slice(start, start + step)
            x = rows[:, piece].to(self.xx.dtype, memory_format=torch.contiguous_format)
            self.xs += torch.bmm(across[:, piece].to(x).expand(groups, -1, -1), x).mT  # so three times as fast
            if dim <= BLOCK:
                self.xx.baddbmm_(x.mT, x)
            else:
                for column in range(0, dim, BLOCK):
                    block = slice(column, column + BLOCK)
                    self.xx[:, block, column:].baddbmm_(x[:, :, block].mT, x[:, :, column:])
        return self

    @torch.no_grad()
    def merge(self, other: Moments) -> Moments:
        """Add the sums of ``other``: the moments of both sets of rows together."""
        self.ss += other.ss
        self.xs += other.xs
        self.xx += other.xx
        return self

    def reduce(self, all_reduce: Callable[[Tensor], Any]) -> Moments:
        """Sum over processes: ``all_reduce`` sums one tensor in place over all of them."""
        for block in (self.ss, self.xs, self.xx):
            all_reduce(block)
        return self

    def covariance(self) -> Covariance:
        """Center the sums and divide them by the count."""
        count = self.ss[0, 0]
        divisor = count.clamp(min=1)
        ss, xs = self.ss / divisor, self.xs / divisor
        mean_s, mean_x = ss[0], xs[:, :, :1]
        column = mean_x.to(self.xx)
        xx = (self.xx / divisor).baddbmm_(column, column.mT, alpha=-1)
        if xx.shape[1] > BLOCK:
            _mirror(xx)
        return Covariance(
            dim=xx.shape[1],
            count=count,
            mean_x=mean_x.squeeze(2),
            mean_t=mean_s[1:],
            xx=xx,
            xt=torch.addcmul(xs, mean_x, mean_s, value=-1)[:, :, 1:],
            tt=torch.addcmul(ss, mean_s.unsqueeze(1), mean_s, value=-1)[1:, 1:],
        )


def with_ones(targets: Tensor) -> Tensor:
    """``s = [1, t]``, ``[n, 1 + c]`` float64, from targets ``[n, c]``."""
    return torch.nn.functional.pad(targets.double(), (1, 0), value=1.0)


def _mirror(matrix: Tensor) -> None:
    """Copy the upper triangle of ``[g, d, d]`` onto the lower one, in place and block by block."""
    dim = matrix.shape[1]
    for column in range(0, dim, MIRRORED):
        block = slice(column, column + MIRRORED)
        corner = matrix[:, block, block]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        if column + MIRRORED < dim:
            matrix[:, column + MIRRORED :, block] = matrix[:, block, column + MIRRORED :].mT


@dataclass(frozen=True)
class Sizes:
    """How much rows and targets vary.

    Attributes:
        rows: the sum over groups of the mean variance of a coordinate; not finite where any row is not.
        targets: ``tr(tt)``, one number, or one a group where each has its own targets.
        means: ``|mean_t|^2``, likewise.
    """

    rows: float
    targets: list[float]
    means: list[float]


@dataclass(frozen=True)
class Covariance:
    """Means and centered second moments, divided by the number of rows; float64, ``xx`` perhaps float32.

    Attributes:
        dim: d, the number of coordinates of a row.
        count: n, the number of rows, a float64 scalar.
        mean_x: ``[g, d]``.
        mean_t: ``[c]``.
        xx: ``[g, d, d]``, the covariance of the rows.
        xt: ``[g, d, c]``, the covariance of rows with targets.
        tt: ``[c, c]``, the covariance of the targets; like `mean_t` with a leading g where each group has its own.
        basis: ``[g, d, r]``, orthonormal axes in which `xx` and `xt` are given, d having become r; None for the
            coordinates of the rows themselves.
    """

    dim: int
    count: Tensor
    mean_x: Tensor
    mean_t: Tensor
    xx: Tensor
    xt: Tensor
    tt: Tensor
    basis: Tensor | None = None

    def through_origin(self, kept: Tensor) -> Covariance:
        """The same moments about zero instead of about the mean of the rows, and of targets that keep some of theirs.

        Args:
            kept: ``[c]``, of the mean of the targets; all of it for moments about zero.
        """
        mean_x = self.mean_x
        xx = self.xx + (mean_x.unsqueeze(2) * mean_x.unsqueeze(1)).to(self.xx)
        return replace(
            self,
            mean_x=torch.zeros_like(mean_x),
            mean_t=self.mean_t - kept,
            xx=xx,
            xt=self.xt + mean_x.unsqueeze(2) * kept.unsqueeze(-2),
            tt=self.tt + kept.unsqueeze(-1) * kept.unsqueeze(-2),
        )

    def from_coordinates(self, weight: Tensor) -> Tensor:
        """A weight ``[g, k, r]`` on the axes of `basis` as one on the rows themselves, ``[g, k, d]``."""
        return weight if self.basis is None else torch.bmm(weight, self.basis.mT)

    @cached_property
    def variance(self) -> Tensor:
        """Mean variance of a coordinate of ``x``, ``tr(xx) / d``, shape ``[g]``: the square of ``x``'s RMS."""
        return self.xx.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64) / self.dim

    @cached_property
    def sizes(self) -> Sizes:
        """What is looked at before anything is solved, on the host."""
        variances = self.tt.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        means = torch.linalg.vector_norm(self.mean_t, dim=-1, keepdim=True)
        rows, *others = torch.cat([self.variance.sum(0, True), variances.flatten(), means.flatten()]).tolist()
        half = len(others) // 2
        return Sizes(rows, others[:half], [mean**2 for mean in others[half:]])


def row_covariance(rows: Tensor, targets: Tensor) -> Covariance:
    """The covariance of rows that are at hand as a whole.

    Args:
        rows: ``[g, n, d]``.
        targets: ``[g, n, c]``, of each group.
    """
    count = rows.shape[1]
    mean_x, mean_t = (z.mean(1, keepdim=True, dtype=torch.float64) for z in (rows, targets))
    x, t = rows - mean_x, targets - mean_t
    return Covariance(
        dim=rows.shape[2],
        count=mean_x.new_tensor(count),
        mean_x=mean_x.squeeze(1),
        mean_t=mean_t.squeeze(1),
        xx=x.mT @ x / count,
        xt=x.mT @ t / count,
        tt=t.mT @ t / count,
    )


def sample_index(total: int, budget: int | None, generator: torch.Generator) -> Tensor | None:
    """Choose ``budget`` of ``total`` rows, spread evenly: one uniform draw from each of ``budget`` equal strata.

    The rows of all batches are numbered through, so the choice depends on their order, not on the batch size.

    Returns:
        Increasing int64 row numbers on the CPU, or None where all rows are to be read.
    """
    if budget is None or total <= budget:
        return None
    start = torch.arange(budget, dtype=torch.float64)
    draw = torch.rand(budget, dtype=torch.float64, generator=generator)
    return ((start + draw) * (total / budget)).long().clamp_(max=total - 1)

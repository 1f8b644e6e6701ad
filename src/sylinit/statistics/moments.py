"""The streamed second moment of a layer's rows, from which every linear latent code is computed.

With ``z = [1, x, t]`` (a row of input and its target), everything that a linear code needs is
``G = sum z z^T``. `Moments` holds the blocks of ``G`` as raw sums: they add, whatever the order, the batch size
or the machine. `Covariance` is what remains after centering.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Numbers that are converted to float64 at once: 32 MiB, whatever the number of rows."""

BLOCK = 192
"""Columns of ``sum x x^T`` that are formed at once, from the diagonal on: narrow, but wide enough for full speed."""


@dataclass
class Moments:
    """Raw sums over rows ``x`` (d numbers) and targets ``t`` (c numbers) for g groups; float64, ``xx`` perhaps float32.

    Attributes:
        count: number of rows seen, a float64 scalar tensor.
        sum_x: ``[g, d]``, the sum of the rows.
        sum_t: ``[c]``, the sum of the targets.
        xx: ``[g, d, d]``, the sum of ``x x^T``; only its upper triangle holds.
        xt: ``[g, d, c]``, the sum of ``x t^T``.
        tt: ``[c, c]``, the sum of ``t t^T``.
    """

    count: Tensor
    sum_x: Tensor
    sum_t: Tensor
    xx: Tensor
    xt: Tensor
    tt: Tensor

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

        def zero(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            count=zero(),
            sum_x=zero(groups, dim),
            sum_t=zero(targets),
            xx=zero(groups, dim, dim, dtype=dtype),
            xt=zero(groups, dim, targets),
            tt=zero(targets, targets),
        )

    @torch.no_grad()
    def update(self, rows: Tensor, targets: Tensor | None = None, chunk: int = CHUNK) -> Moments:
        """Add rows ``[g, n, d]`` and their targets ``[n, c]``.

        Exact to the rounding of ``xx``'s dtype however the rows are cut into calls, and these into chunks of so many
        numbers.
        """
        _, count, dim = rows.shape
        step = max(1, chunk // max(1, rows.shape[0] * dim))
        for start in range(0, count, step):
            x = rows[:, start : start + step].to(self.xx.dtype, memory_format=torch.contiguous_format)
            self.count += x.shape[1]
            self.sum_x += x.sum(1, dtype=torch.float64)
            if dim <= BLOCK:
                self.xx.baddbmm_(x.mT, x)
            else:
                for column in range(0, dim, BLOCK):
                    block = slice(column, column + BLOCK)
                    self.xx[:, block, column:].baddbmm_(x[:, :, block].mT, x[:, :, column:])
            if targets is not None and targets.shape[1]:
                t = targets[start : start + step].to(x)
                self.sum_t += t.sum(0, dtype=torch.float64)
                self.tt += t.T @ t
                self.xt += torch.bmm(x.mT, t.expand(len(x), -1, -1))
        return self

    @torch.no_grad()
    def merge(self, other: Moments) -> Moments:
        """Add the sums of ``other``: the moments of both sets of rows together."""
        for field in fields(self):
            getattr(self, field.name).add_(getattr(other, field.name))
        return self

    def reduce(self, all_reduce: Callable[[Tensor], Any]) -> Moments:
        """Sum over processes: ``all_reduce`` sums one tensor in place over all of them."""
        for field in fields(self):
            all_reduce(getattr(self, field.name))
        return self

    def covariance(self) -> Covariance:
        """Center the sums and divide them by the count."""
        count = self.count.clamp(min=1)
        mean_x, mean_t = self.sum_x / count, self.sum_t / count
        mean = mean_x.to(self.xx)
        xx = (self.xx / count).baddbmm_(mean.unsqueeze(2), mean.unsqueeze(1), alpha=-1)
        _mirror(xx)
        return Covariance(
            dim=mean_x.shape[1],
            count=self.count,
            mean_x=mean_x,
            mean_t=mean_t,
            xx=xx,
            xt=self.xt / count - mean_x.unsqueeze(2) * mean_t,
            tt=self.tt / count - torch.outer(mean_t, mean_t),
        )


def _mirror(matrix: Tensor) -> None:
    """Copy the upper triangle of ``[g, d, d]`` onto the lower one, in place and block by block."""
    dim = matrix.shape[1]
    for column in range(0, dim, BLOCK):
        block = slice(column, column + BLOCK)
        corner = matrix if dim <= BLOCK else matrix[:, block, block]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        if column + BLOCK < dim:
            matrix[:, column + BLOCK :, block] = matrix[:, block, column + BLOCK :].mT


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

    def through_origin(self, *, targets: bool) -> Covariance:
        """The same moments about zero instead of about the mean of the rows, and if asked for that of the targets."""
        mean_x, mean_t = self.mean_x, self.mean_t
        xx = self.xx + (mean_x.unsqueeze(2) * mean_x.unsqueeze(1)).to(self.xx)
        moved = replace(self, xx=xx, mean_x=torch.zeros_like(mean_x))
        if not targets:
            return moved
        return replace(
            moved,
            mean_t=torch.zeros_like(mean_t),
            xt=self.xt + mean_x.unsqueeze(2) * mean_t,
            tt=self.tt + torch.outer(mean_t, mean_t),
        )

    def from_coordinates(self, weight: Tensor) -> Tensor:
        """A weight ``[g, k, r]`` on the axes of `basis` as one on the rows themselves, ``[g, k, d]``."""
        return weight if self.basis is None else weight @ self.basis.mT

    @cached_property
    def variance(self) -> Tensor:
        """Mean variance of a coordinate of ``x``, ``tr(xx) / d``, shape ``[g]``: the square of ``x``'s RMS."""
        return self.xx.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64) / self.dim


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

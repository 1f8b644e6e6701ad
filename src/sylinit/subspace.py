"""Reductions of a layer's equation to fewer dimensions by an orthonormal basis Q: ``x -> Q^T x``, ``W = W' Q^T``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sylinit.eigh import robust_eigh

COLUMNS = 4096
"""Columns of the rows that are converted to float64 at once."""


@torch.no_grad()
def row_space(rows: Tensor, rtol: float = 1e-10) -> tuple[Tensor, Tensor]:
    """Principal axes of few rows in many dimensions, from their n x n Gram matrix; nothing d x d is formed.

    With ``X X^T = P diag(s^2) P^T``, the basis is ``Q = X^T P / s`` and the coordinates are ``X Q = P s``. Exact for
    the Sylvester equation of these rows: its minimum-norm solution has no part outside their span.

    Args:
        rows: centred, ``[n, d]``, with n < d for this to pay.
        rtol: axes whose variance is below this share of the largest are dropped.

    Returns:
        The basis ``[d, r]`` and the coordinates ``[n, r]``, float64, largest variance first; the largest entry of each
        axis is positive.
    """
    pieces = rows.split(COLUMNS, dim=1)
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for piece in pieces:
        wide = piece.double()
        gram.addmm_(wide, wide.T)
    squares, left = robust_eigh(gram)
    keep = squares > rtol * squares[-1].clamp(min=torch.finfo(gram.dtype).tiny)
    left, sizes = left[:, keep].flip(1), squares[keep].sqrt().flip(0)
    basis = torch.cat([piece.double().T @ (left / sizes) for piece in pieces])
    return basis * signs(basis), left * sizes * signs(basis)


@dataclass(frozen=True)
class Subspace:
    """The leading principal subspace of a covariance, approximately, in the coordinates of its own principal axes.

    Attributes:
        basis: ``Q``, ``[d, r]``, orthonormal columns in float32; ``Q^T Cov Q`` is diagonal.
        variances: that diagonal, ``[r]``, descending, float64.
        image: ``Cov Q``, ``[d, r]``, float32.
        rest: the mean variance of a direction outside, a float64 scalar.
    """

    basis: Tensor
    variances: Tensor
    image: Tensor
    rest: Tensor


@torch.no_grad()
def principal_subspace(covariance: Tensor, rank: int, generator: torch.Generator, *, steps: int = 2) -> Subspace:
    """Randomised subspace iteration: ``steps + 1`` products with the covariance instead of its eigendecomposition.

    The products run in float32, whose rounding costs the orthonormality and the variances their seventh digit; which
    directions near the cut are found is far less certain than that. Ask for a tenth more than are needed.

    Args:
        covariance: ``[d, d]``, symmetric positive semidefinite.
        rank: r, at most d.
        generator: on the CPU, of the random start.
        steps: of subspace iteration, at least 1; each shrinks what is beyond the cut by the ratio of the variances.

    Source: Halko, Martinsson and Tropp, *Finding structure with randomness*, 2011, algorithm 4.4.
    """
    dim = len(covariance)
    single, total = covariance.float(), covariance.diagonal().sum(dtype=torch.float64)
    basis = torch.randn(dim, min(rank, dim), generator=generator).to(single)
    for _ in range(steps):
        basis = torch.linalg.qr(single @ basis)[0]
    image = single @ basis
    inner = (basis.T @ image).double()
    variances, turn = robust_eigh((inner + inner.T) / 2)
    variances, turn = variances.flip(0).clamp(min=0), turn.flip(1).to(single)
    basis, image = basis @ turn, image @ turn
    rest = (total - variances.sum()).clamp(min=0) / max(1, dim - len(variances))
    sign = signs(basis)
    return Subspace(basis * sign, variances, image * sign, rest)


def signs(basis: Tensor) -> Tensor:
    """Signs that make the largest entry of every column positive, ``[..., 1, r]``: a rerun gives the same axes."""
    return basis.gather(-2, basis.abs().argmax(-2, keepdim=True)).sign()

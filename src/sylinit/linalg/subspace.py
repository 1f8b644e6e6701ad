"""Reductions of a layer's equation to fewer dimensions by an orthonormal basis Q: ``x -> Q^T x``, ``W = W' Q^T``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sylinit.linalg.eigh import robust_eigh


@torch.no_grad()
def row_axes(rows: Tensor, rtol: float, columns: int = 4096) -> tuple[Tensor, Tensor]:
    """Principal axes of few rows in many dimensions, from their n x n Gram matrix; nothing d x d is formed.

    With ``X X^T = P diag(s^2) P^T``, the basis is ``Q = X^T P / s`` and the coordinates are ``X Q = P s``. Exact for
    the Sylvester equation of these rows: its minimum-norm solution has no part outside their span.

    Args:
        rows: centered, ``[..., n, d]``, with n < d for this to be worth its while.
        rtol: axes whose variance is below this share of the largest are null axes.
        columns: of the rows that are converted to float64 at once.

    Returns:
        The basis ``[..., d, n]`` and the coordinates ``[..., n, n]``, float64, largest variance first, both zero on
        null axes; the largest entry of each axis is positive.
    """
    pieces = rows.split(columns, dim=-1)
    gram = rows.new_zeros(*rows.shape[:-1], rows.shape[-2], dtype=torch.float64)
    for piece in pieces:
        wide = piece.double()
        gram += wide @ wide.mT
    squares, left = robust_eigh(gram)
    squares, left = squares.flip(-1), left.flip(-1)
    null = squares <= rtol * squares[..., :1].clamp(min=torch.finfo(gram.dtype).tiny)
    sizes = squares.masked_fill(null, 0).sqrt().unsqueeze(-2)
    inverse = torch.where(sizes > 0, 1 / sizes, 0)
    basis = torch.cat([piece.double().mT @ (left * inverse) for piece in pieces], -2)
    sign = signs(basis)
    return basis * sign, left * sizes * sign


@torch.no_grad()
def row_space(rows: Tensor, rtol: float = 1e-10) -> tuple[Tensor, Tensor]:
    """The axes of `row_axes` without null axes, of one matrix of rows ``[n, d]``: ``[d, r]`` and ``[n, r]``."""
    basis, coordinates = row_axes(rows, rtol)
    keep = coordinates.any(0)
    return basis[:, keep], coordinates[:, keep]


@dataclass(frozen=True)
class Subspace:
    """The leading principal subspace of a covariance, approximately, in the coordinates of its own principal axes.

    Attributes:
        basis: ``Q``, ``[d, r]``, orthonormal columns in float32; ``Q^T Cov Q`` is diagonal.
        variances: that diagonal, ``[r]``, descending, float64.
        image: ``Cov Q``, ``[d, r]``, float32.
        rest: the mean variance of a direction outside, a float64 scalar.
        total: the trace of ``Cov``, a float64 scalar.
    """

    basis: Tensor
    variances: Tensor
    image: Tensor
    rest: Tensor
    total: Tensor


@torch.no_grad()
def principal_subspace(covariance: Tensor, rank: int, generator: torch.Generator, *, steps: int = 2) -> Subspace:
    """Randomized subspace iteration: ``steps`` products with the covariance instead of its eigendecomposition.

    The products run in float32, whose rounding costs the orthonormality and the variances their seventh digit; which
    directions near the cut are found is far less certain than that. Ask for a tenth more than are needed. The start is
    a `sketch`, which finds as much as a Gaussian one and costs next to nothing.

    Args:
        covariance: ``[d, d]``, symmetric positive semidefinite.
        rank: r, at most d.
        generator: on the CPU, of the random start.
        steps: of subspace iteration, at least 1; each shrinks what is beyond the cut by the ratio of the variances.

    Source: Halko, Martinsson and Tropp, *Finding structure with randomness*, 2011, algorithm 4.4.
    """
    dim = len(covariance)
    single, total = covariance.float(), covariance.diagonal().sum(dtype=torch.float64)
    basis = torch.linalg.qr(sketch(single, min(rank, dim), generator))[0]
    for _ in range(steps - 1):
        basis = torch.linalg.qr(single @ basis)[0]
    image = single @ basis
    inner = (basis.T @ image).double()
    variances, turn = robust_eigh((inner + inner.T) / 2)
    variances, turn = variances.flip(0).clamp(min=0), turn.flip(1).to(single)
    basis, image = basis @ turn, image @ turn
    rest = (total - variances.sum()).clamp(min=0) / max(1, dim - len(variances))
    sign = signs(basis)
    return Subspace(basis * sign, variances, image * sign, rest, total)


SPARSITY = 4
"""Columns of a sketch that each coordinate goes into: with two, directions of few coordinates can be missed."""


def sketch(matrix: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """``M R`` for symmetric M ``[d, d]`` and a random R ``[d, rank]`` with four entries of 1 or -1 in each row.

    Source: Nelson and Nguyen, *OSNAP: faster numerical linear algebra algorithms via sparser subspace embeddings*,
    2013.
    """
    dim, draws = len(matrix), min(SPARSITY, rank)
    edges = torch.arange(draws + 1) * rank // draws  # one entry in each of so many blocks of columns
    share = torch.rand(dim, draws, generator=generator)
    column = (edges[:-1] + share * edges.diff()).long().clamp(max=rank - 1)
    sign = torch.randint(2, (dim, draws), generator=generator).mul(2).sub(1)
    place = torch.stack([column.flatten(), torch.arange(dim).repeat_interleave(draws)])
    values = sign.flatten().to(matrix.dtype)
    sparse = torch.sparse_coo_tensor(place, values, (rank, dim), check_invariants=False)
    return torch.sparse.mm(sparse.to(matrix.device), matrix).mT


def signs(basis: Tensor) -> Tensor:
    """Signs that make the largest entry of every column positive, ``[..., 1, r]``: a rerun gives the same axes."""
    return basis.gather(-2, basis.abs().argmax(-2, keepdim=True)).sign()

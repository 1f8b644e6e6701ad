"""The symmetric eigendecomposition, for matrices on which the usual routine gives up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from sylinit.errors import SylinitError

T = TypeVar("T")

LARGE = 160
"""Rows from which on it saves time to do without a whole eigendecomposition, though it is a single operation."""


def robust_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh``, and where it does not converge, the same matrix in other forms.

    CUDA's float32 routine can fail, and LAPACK's divide and conquer does on some matrices of low rank. They are tried
    in float64, then on the CPU, then with the coordinates in reverse, and with eigenvalues parted within rounding.

    Args:
        matrix: symmetric, ``[..., m, m]``.

    Returns:
        Ascending eigenvalues ``[..., m]`` and eigenvectors ``[..., m, m]``, in the dtype and on the device given.

    Raises:
        SylinitError: it fails everywhere, as it does on NaN.
    """
    (values, vectors), reverse = _first(torch.linalg.eigh, matrix)
    return values.to(matrix), (vectors.flip(-2) if reverse else vectors).to(matrix)


def bordered_eigh(matrix: Tensor, border: Tensor | None) -> tuple[Tensor, Tensor]:
    """The eigendecomposition of a matrix that is a multiple ``c`` of the identity but for m rows and columns.

    Let ``Q [R; 0]`` be what these columns hold in the other rows, with Q orthogonal. All its columns but the first m
    are eigenvectors of the matrix, with eigenvalue c. What is left is ``[[c I, R], [R^T, G]]``, 2m x 2m, and of its
    eigenvalues m are at most c and m at least c, for they interlace with those of ``c I``.

    Args:
        matrix: symmetric, ``[g, k, k]``.
        border: the places of these rows, ``[m]``, on the CPU; None where the matrix is no such one.

    Returns:
        As `robust_eigh`, which serves where nothing is gained.
    """
    size, m = matrix.shape[-1], 0 if border is None else len(border)
    if border is None or size < LARGE or not 0 < 3 * m < size:
        return robust_eigh(matrix)
    inner = torch.ones(size, dtype=torch.bool).index_fill_(0, border, False).nonzero().squeeze(1)
    order = torch.cat([inner, border])
    place, back = (index.to(matrix.device) for index in (order, order.argsort()))
    columns = matrix.index_select(2, place[size - m :]).index_select(1, place)
    inside, corner = columns.split([size - m, m], 1)
    level = matrix.diagonal(dim1=1, dim2=2).index_select(1, place[: size - m]).mean(1, keepdim=True)
    q, r = torch.linalg.qr(inside, mode="complete")
    r = r[:, :m]
    upper = torch.cat([level.expand(-1, m).diag_embed(), r], 2)
    values, vectors = robust_eigh(torch.cat([upper, torch.cat([r.mT, corner], 2)], 1))
    turned = torch.cat([torch.bmm(q[:, :, :m], vectors[:, :m]), vectors[:, m:]], 1)  # [g, k, 2m]
    known = torch.nn.functional.pad(q[:, :, m:], (0, 0, 0, m))
    values = torch.cat([values[:, :m], level.expand(-1, size - 2 * m), values[:, m:]], 1)
    return values, torch.cat([turned[:, :, :m], known, turned[:, :, m:]], 2).index_select(1, back)


def robust_rank(matrix: Tensor, tolerance: float) -> Tensor:
    """The rank of symmetric positive semidefinite matrices, all together, in a fifth of the time of their eigenvalues.

    As many eigenvalues are above a limit as are positive in D, where ``L D L^T`` is the matrix less that limit
    (Sylvester's law of inertia). Of a block of D of two by two, one is positive and one negative.

    Args:
        matrix: ``[g, m, m]``.
        tolerance: eigenvalues count above this share of the largest; in large matrices, of the Frobenius norm.

    Returns:
        The sum of the matrices' numerical ranks, a float64 scalar.
    """
    if matrix.shape[-1] < LARGE:
        values = _first(torch.linalg.eigvalsh, matrix)[0]
        return (values > tolerance * values[:, -1:]).sum(dtype=torch.float64)
    less = matrix.clone()
    less.diagonal(dim1=1, dim2=2).sub_(tolerance * torch.linalg.vector_norm(matrix, dim=(1, 2)).unsqueeze(1))
    factor, pivots, _ = torch.linalg.ldl_factor_ex(less)
    positive = (factor.diagonal(dim1=1, dim2=2) > 0) & (pivots > 0)
    return positive.sum(dtype=torch.float64) + (pivots < 0).sum() / 2


def _first(decompose: Callable[[Tensor], T], matrix: Tensor) -> tuple[T, bool]:
    """What a decomposition gives of the first form of a matrix on which it converges, and whether that is reversed."""
    for form, reverse in _forms(matrix):
        try:
            return decompose(form), reverse
        except torch.linalg.LinAlgError:
            continue
    raise SylinitError(
        f"eigendecomposition of a {list(matrix.shape)} matrix failed; are there NaN or infinite entries?"
    )


def _forms(matrix: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """The matrix as it may be decomposed, and whether its coordinates are reversed."""
    yield matrix, False
    yield matrix.double(), False
    yield (wide := matrix.double().cpu()), False
    yield wide.flip(-2, -1), True
    rounding = torch.finfo(wide.dtype).eps * torch.linalg.matrix_norm(wide).unsqueeze(-1)
    parted = wide.clone()
    parted.diagonal(dim1=-2, dim2=-1).add_(rounding * torch.linspace(0, 1, wide.shape[-1], device="cpu").to(wide))
    yield parted, False

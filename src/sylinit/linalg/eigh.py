"""The symmetric eigendecomposition, for matrices on which the usual routine gives up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from sylinit.errors import SylinitError

T = TypeVar("T")


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


def robust_eigvalsh(matrix: Tensor) -> Tensor:
    """The eigenvalues alone, ascending, ``[..., m]``; as robust as `robust_eigh`."""
    return _first(torch.linalg.eigvalsh, matrix)[0].to(matrix)


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

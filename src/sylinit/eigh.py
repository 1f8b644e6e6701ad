"""The symmetric eigendecomposition, for matrices on which the device's own one gives up."""

from __future__ import annotations

import torch
from torch import Tensor

from sylinit.errors import SylinitError


def robust_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh``, in float64 and then on the CPU where it does not converge, as CUDA's float32 can fail to.

    Args:
        matrix: symmetric, ``[..., m, m]``; only its lower triangle is read.

    Returns:
        Ascending eigenvalues ``[..., m]`` and eigenvectors ``[..., m, m]``, in the dtype and on the device given.

    Raises:
        SylinitError: it fails everywhere, as it does on NaN.
    """
    for attempt in (lambda: matrix, lambda: matrix.double(), lambda: matrix.double().cpu()):
        try:
            values, vectors = torch.linalg.eigh(attempt())
        except torch.linalg.LinAlgError:
            continue
        return values.to(matrix), vectors.to(matrix)
    raise SylinitError(
        f"eigendecomposition of a {list(matrix.shape)} matrix failed; are there NaN or infinite entries?"
    )

"""Random orthonormal vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def orthogonal_rows(count: int, dim: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """``count`` random unit vectors ``[count, dim]``, orthonormal within each block of ``dim``."""
    if not count or not dim:
        return like.new_zeros(count, dim)
    size = min(count, dim)
    draw = torch.randn(math.ceil(count / size), dim, size, dtype=torch.float64, generator=generator)
    return orthonormal(draw).mT.flatten(0, 1)[:count].to(like)


def orthonormal(draw: Tensor) -> Tensor:
    """Orthonormal columns ``[..., d, m]`` that span those of Gaussian draws, every such basis being as likely."""
    q, r = torch.linalg.qr(draw)
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)

"""Random orthonormal vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonal_rows(count: int, dim: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """``count`` random unit vectors ``[count, dim]``, orthonormal within each block of ``dim``."""
    if not dim:
        return like.new_zeros(count, 0)
    blocks = []
    for start in range(0, count, dim):
        q, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))
        blocks.append((q * r.diagonal().sign())[: count - start])
    return torch.cat(blocks).to(like) if blocks else like.new_zeros(0, dim)

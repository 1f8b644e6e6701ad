"""Reductions of a layer's equation to fewer dimensions by an orthonormal basis."""

from __future__ import annotations

import torch
from torch import Tensor


def row_space(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal basis ``[d, r]`` of the space that centred rows ``[n, d]`` span, and their coordinates ``[n, r]``."""
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    keep = values > values[0] * torch.finfo(values.dtype).eps * max(rows.shape)
    return right[keep].mT, left[:, keep] * values[keep]

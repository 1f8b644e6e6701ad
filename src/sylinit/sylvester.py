"""The Sylvester equation ``A W + W B = C`` with symmetric positive semidefinite ``A`` and ``B``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sylinit.errors import SylinitError


@dataclass(frozen=True)
class Solution:
    """How a solve went.

    Attributes:
        weight: ``W``, ``[..., k, d]``.
        residual: ``||A W + W B - C|| / ||C||`` in the Frobenius norm, ``[...]``; 0 where ``C = 0``.
        rank: number of eigenvalue pairs ``a_i + b_j`` that are not numerically zero, ``[...]``.
        method: "exact", "row-space" or "projected".
    """

    weight: Tensor
    residual: Tensor
    rank: Tensor
    method: str = "exact"


def robust_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` that falls back to float64 and then to the CPU where it does not converge."""
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        pass
    try:
        values, vectors = torch.linalg.eigh(matrix.double())
    except torch.linalg.LinAlgError:
        values, vectors = torch.linalg.eigh(matrix.double().cpu())
    return values.to(matrix), vectors.to(matrix)


def solve_diagonal(a: Tensor, b: Tensor, c: Tensor, rtol: float | None = None) -> Tensor:
    """Solve ``A W + W diag(b) = C``: ``[..., k, k]``, ``[..., d]``, ``[..., k, d]``."""
    values, vectors = robust_eigh(a)
    total = values.clamp(min=0).unsqueeze(-1) + b.clamp(min=0).unsqueeze(-2)
    rtol = max(total.shape[-2:]) * torch.finfo(total.dtype).eps if rtol is None else rtol
    regular = total > rtol * total.amax((-2, -1), keepdim=True)
    return vectors @ torch.where(regular, vectors.mT @ c / total.masked_fill(~regular, 1), 0)


def solve_sylvester(a: Tensor, b: Tensor, c: Tensor) -> Solution:
    raise SylinitError("not yet")


def sylvester_(weight: Tensor, x: Tensor, s: Tensor, *, encoding_weight: float = 1.0) -> Tensor:
    raise SylinitError("not yet")

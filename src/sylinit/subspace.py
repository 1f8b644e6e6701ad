"""Reductions of a layer's equation to fewer dimensions by an orthonormal basis Q: ``x -> Q^T x``, ``W = W' Q^T``."""

from __future__ import annotations

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
    sign = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign()
    return basis * sign, left * sizes * sign

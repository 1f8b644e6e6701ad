"""Preconditioned conjugate gradients for many systems at once: each row has a matrix of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    w: Tensor,
    r: Tensor,
    finished: Callable[[Tensor], bool],
    max_steps: int,
) -> tuple[Tensor, Tensor, int]:
    """Improve ``w`` until ``finished`` says that what is left is little enough.

    Args:
        apply: multiplies each row ``[..., k, d]`` by its symmetric positive semidefinite matrix.
        precondition: multiplies each by about the inverse.
        w: a guess, ``[..., k, d]``.
        r: what it leaves of the right-hand side.
        finished: told what is left.
        max_steps: where to give up.

    Returns:
        ``w``, what it leaves, and the number of steps, one product each.

    Source: Hestenes and Stiefel, *Methods of conjugate gradients for solving linear systems*, 1952.
    """
    steps, p, rho = 0, torch.zeros_like(r), torch.ones_like(r[..., :1])
    while steps < max_steps and not finished(r):
        z = precondition(r)
        previous, rho = rho, _dot(r, z)
        p = torch.addcmul(z, _ratio(rho, previous), p)
        applied = apply(p)
        alpha = _ratio(rho, _dot(p, applied))
        w, r = torch.addcmul(w, alpha, p), torch.addcmul(r, alpha, applied, value=-1)
        steps += 1
    return w, r, steps


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of the rows of two matrices, ``[..., k, 1]``."""
    return (x * y).sum(-1, keepdim=True)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """``x / y``, 0 where ``y`` is: a row that is solved stays as it is."""
    return (x / y).masked_fill_(y <= 0, 0)

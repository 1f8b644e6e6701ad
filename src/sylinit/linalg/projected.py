"""The Sylvester equation in many dimensions: one Cholesky factor for most units, conjugate gradients for the rest.

With ``A = U diag(a) U^T`` the equation ``A W + W (lambda Cov) = C`` falls apart into k linear systems, one a row of
``U^T W``: ``(a_i + lambda Cov) w_i = c_i``. Two facts make them cheap, in float32.

* Units of equal variance that do not correlate have the same ``a``, as the principal components of the default code
  do. They share one system: one factorization, ``d^3 / 3`` operations, solves it.
* The variances of a layer's input span three or more decades, but few of its directions are large. On those, the
  leading principal subspace, any of the systems is inverted exactly; on the rest its eigenvalues lie between ``a_i``
  and ``a_i + lambda v``, with v the variance at the cut, and a few conjugate gradients suffice: ``2 k d^2`` each.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

from sylinit.linalg.conjugate_gradients import conjugate_gradients
from sylinit.linalg.eigh import bordered_eigh
from sylinit.linalg.subspace import Subspace
from sylinit.linalg.sylvester import pair_inverse


@dataclass(frozen=True)
class Approximation:
    """How an iterative solve went.

    Attributes:
        weight: ``W``, ``[k, d]``.
        remainder: ``C - A W - lambda W Cov``, ``[k, d]``.
        residual: ``||remainder|| / ||C||``, a float64 scalar; 0 where ``C = 0``.
        steps: of conjugate gradients.
    """

    weight: Tensor
    remainder: Tensor
    residual: Tensor
    steps: int


@torch.no_grad()
def solve_projected(
    a: Tensor,
    covariance: Tensor,
    c: Tensor,
    subspace: Subspace,
    *,
    encoding_weight: float,
    tolerance: float = 1e-3,
    max_steps: int = 30,
    shared_factor_inputs: int = 24,
    border: Tensor | None = None,
) -> Approximation:
    """Solve ``A W + W (lambda Cov) = C`` to a relative residual of ``tolerance``.

    Args:
        a: ``A``, ``[k, k]``, symmetric positive semidefinite.
        covariance: ``Cov``, ``[d, d]``, likewise.
        c: ``C``, ``[k, d]``.
        subspace: of ``covariance``; the better it is, the fewer steps.
        encoding_weight: lambda.
        tolerance: where to stop; float32 reaches about 1e-5.
        max_steps: where to give up. The residual tells whether it came to that: solve exactly then.
        shared_factor_inputs: one factorization is taken for more than d over this many units that share a system.
        border: see `bordered_eigh`, of ``A``.

    Returns:
        The solution in the dtype of ``c``, and its true residual.
    """
    a, u = (part.squeeze(0) for part in bordered_eigh(a.double().unsqueeze(0), border))
    *values, norm, total = torch.cat([a, c.norm().double().view(1), subspace.total.view(1)]).tolist()
    unit = sum(values) / len(c) + encoding_weight * total / len(covariance) or 1.0
    norm = norm or 1.0
    a, scale = a / unit, encoding_weight / unit  # small things are divided by it, to stay clear of float32's limits
    limit = 0.1 * tolerance * len(c) ** -0.5  # a row's part of a residual well below the tolerance

    turn = u.float()
    remainder = turn.T @ (c / norm).float()
    share = remainder.norm(dim=1)
    right = remainder.masked_fill((share <= limit).unsqueeze(1), 0)  # A of low rank has a null space: nothing to solve

    b, q, across = covariance.float(), subspace.basis, subspace.basis.T
    known = torch.cat([subspace.variances, subspace.rest.view(1)]).mul_(scale)
    inside, outside = pair_inverse(a, known).float().split([len(known) - 1, 1], 1)
    start, stop = _shared_system(values)
    a = a.float().unsqueeze(1)
    w = (inside * (right @ q)) @ across
    if shared_factor_inputs * (stop - start) > len(b):
        level = sum(values[start:stop]) / (stop - start) / encoding_weight
        together = _factorized(b, level, right[start:stop] / scale)
        if together is not None:
            w[start:stop] = together
    r = torch.addcmul(right, a, w, value=-1).addmm_(w, b, alpha=-scale)

    shares, lengths = torch.stack([share, r.norm(dim=1)]).tolist()
    left = [row for row, length in enumerate(lengths) if length > 5 * limit]
    steps = 0
    if left:
        settled = [length for length in lengths if length <= 5 * limit]
        done = math.hypot(*settled, *(length for length in shares if length <= limit))
        rows = torch.tensor(left, device=w.device)
        a, inside, outside = (part.index_select(0, rows) for part in (a, inside, outside))
        inside = inside - outside

        def apply(x: Tensor) -> Tensor:
            return torch.add(a * x, (b @ x.mT).mT, alpha=scale)  # in this order faster for few rows

        def precondition(x: Tensor) -> Tensor:
            return torch.addmm(outside * x, inside * (x @ q), across)

        def finished(x: Tensor) -> bool:
            return math.hypot(done, float(x.norm())) <= tolerance

        w[rows], r[rows], steps = conjugate_gradients(apply, precondition, w[rows], r[rows], finished, max_steps)
    weight, left_over = (turn @ torch.cat([w, r + (remainder - right)], 1)).to(c.dtype).chunk(2, 1)
    return Approximation(weight * (norm / unit), left_over * norm, left_over.norm().double(), steps)


def _shared_system(a: list[float]) -> tuple[int, int]:
    """The largest set of neighbors in ascending ``a`` that agree to a thousandth: from one index to another."""
    found = ((start, bisect_right(a, value + 1e-3 * abs(value))) for start, value in enumerate(a))
    return max(found, key=lambda span: span[1] - span[0])


def _factorized(b: Tensor, a: float, right: Tensor) -> Tensor | None:
    """``right (a + b)^-1`` by a Cholesky factor, or None where float32 does not find one."""
    diagonal = b.diagonal()
    kept = diagonal.clone()
    diagonal.add_(a)  # in place and taken back, for b is large
    factor, failed = torch.linalg.cholesky_ex(b)
    diagonal.copy_(kept)
    if bool(failed):
        return None
    return torch.cholesky_solve(right.mT, factor).mT

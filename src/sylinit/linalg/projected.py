"""The Sylvester equation in many dimensions: one Cholesky factor for most units, conjugate gradients for the rest.

With ``A = U diag(a) U^T`` the equation ``A W + W (lambda Cov) = C`` falls apart into k linear systems, one a row of
``U^T W``: ``(a_i + lambda Cov) w_i = c_i``. Two facts make them cheap, in float32.

* Units of equal variance that do not correlate have the same ``a``, as the principal components of the default code
  do. This *crowd* shares one matrix: one factorisation, ``d^3 / 3`` operations, solves it.
* The variances of a layer's input span three or more decades, but few of its directions are large. On those, the
  leading principal subspace, any of the systems is inverted exactly; on the rest its eigenvalues lie between ``a_i``
  and ``a_i + lambda v``, with v the variance at the cut, and a few conjugate gradients suffice: ``2 k d^2`` each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sylinit.linalg.conjugate_gradients import conjugate_gradients
from sylinit.linalg.eigh import robust_eigh
from sylinit.linalg.subspace import Subspace
from sylinit.linalg.sylvester import pair_inverse

TOLERANCE = 1e-3
"""The relative residual at which an approximate solution is as good as the exact one for a start of training."""


CROWD = 24
"""One factorisation is cheaper than conjugate gradients, of about four steps, for more than d / 24 systems."""


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
    tolerance: float = TOLERANCE,
    max_steps: int = 30,
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

    Returns:
        The solution in the dtype of ``c``, and its true residual.
    """
    unit = a.diagonal().mean(dtype=torch.float64) + encoding_weight * covariance.diagonal().mean(dtype=torch.float64)
    unit = torch.where(unit > 0, unit, 1)  # small things are divided by it, to stay clear of float32's limits
    norm = torch.linalg.matrix_norm(c)
    norm = torch.where(norm > 0, norm, 1)

    a, u = robust_eigh(a.double() / unit)
    turn = u.float()
    remainder = turn.T @ (c / norm).float()
    share = remainder.norm(dim=1)
    small = 0.1 * tolerance * len(c) ** -0.5  # a row's part of a residual well below the tolerance
    rows = share > small  # a code of low rank leaves nothing to solve for in the null space of A
    if not bool(rows.any()):
        return Approximation(torch.zeros_like(c), c, share.norm().double(), 0)
    right, a = remainder[rows], a[rows]

    b, q, scale = covariance.float(), subspace.basis, encoding_weight / unit  # lambda Cov / unit = scale b
    inside = pair_inverse(a, subspace.variances * scale).float()
    outside = pair_inverse(a, subspace.rest.view(1) * scale).float()
    crowd, a, scale = _crowd(a), a.float().unsqueeze(1), scale.float()
    together = None
    if CROWD * (crowd.stop - crowd.start) > len(b):
        together = _factorised(b, a[crowd].mean() / scale, right[crowd] / scale)
    alone = torch.ones(len(a), dtype=torch.bool, device=a.device)
    alone[crowd] = together is None
    w = torch.empty_like(right)
    w[alone] = (inside[alone] * (right[alone] @ q)) @ q.T
    if together is not None:
        w[crowd] = together
    r = right - a * w - scale * (w @ b)

    left = r.norm(dim=1) > 5 * small
    steps = 0
    if bool(left.any()):
        done = (share[~rows].square().sum() + r[~left].square().sum()).sqrt()

        def apply(x: Tensor) -> Tensor:
            return a[left] * x + scale * (b @ x.mT).mT  # in this order faster for few rows

        def precondition(x: Tensor) -> Tensor:
            return outside[left] * x + ((inside - outside)[left] * (x @ q)) @ q.T

        def finished(x: Tensor) -> bool:
            return bool(torch.hypot(done, x.norm()) <= tolerance)

        w[left], r[left], steps = conjugate_gradients(apply, precondition, w[left], r[left], finished, max_steps)
    remainder[rows] = r
    weight = torch.zeros_like(remainder)
    weight[rows] = w
    weight, left_over = ((turn @ x).to(c.dtype) for x in (weight, remainder))
    return Approximation(weight * (norm / unit), left_over * norm, left_over.norm().double(), steps)


def _crowd(a: Tensor) -> slice:
    """The largest set of neighbours in ascending ``a`` that agree to a thousandth."""
    stop = torch.searchsorted(a, a * 1.001, right=True)
    size = stop - torch.arange(len(a), device=a.device)
    start = int(size.argmax())
    return slice(start, int(stop[start]))


def _factorised(b: Tensor, a: Tensor, right: Tensor) -> Tensor | None:
    """``right (a + b)^-1`` by a Cholesky factor, or None where float32 does not find one."""
    diagonal = b.diagonal()
    kept = diagonal.clone()
    diagonal.add_(a)  # in place and taken back, for b is large
    factor, failed = torch.linalg.cholesky_ex(b)
    diagonal.copy_(kept)
    if bool(failed):
        return None
    half = torch.linalg.solve_triangular(factor, right.mT, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True).mT

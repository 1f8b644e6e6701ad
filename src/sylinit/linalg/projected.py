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
from sylinit.linalg.eigh import robust_eigh
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

    Returns:
        The solution in the dtype of ``c``, and its true residual.
    """
    sizes = torch.stack([a.diagonal().mean().double(), covariance.diagonal().mean().double(), c.norm().double()])
    size_a, size_b, norm = sizes.tolist()
    unit = size_a + encoding_weight * size_b or 1.0  # small things are divided by it, to stay clear of float32's limits
    norm, scale = norm or 1.0, encoding_weight / unit  # lambda Cov / unit = scale Cov
    limit = 0.1 * tolerance * len(c) ** -0.5  # a row's part of a residual well below the tolerance

    a, u = robust_eigh(a.double() / unit)
    turn = u.float()
    remainder = turn.T @ (c / norm).float()
    share = remainder.norm(dim=1, keepdim=True)
    right = remainder * (share > limit)  # a code of low rank leaves nothing to solve for in the null space of A
    ignored = remainder - right

    b, q = covariance.float(), subspace.basis
    inside = pair_inverse(a, subspace.variances * scale).float()
    outside = pair_inverse(a, subspace.rest.view(1) * scale).float()
    start, stop = _shared_system(a.tolist())
    a = a.float().unsqueeze(1)
    w = (inside * (right @ q)) @ q.T
    if shared_factor_inputs * (stop - start) > len(b):
        together = _factorized(b, float(a[start:stop].mean()) / scale, right[start:stop] / scale)
        if together is not None:
            w[start:stop] = together
    r = torch.addmm(right - a * w, w, b, alpha=-scale)

    lengths = r.norm(dim=1).tolist()
    left = [row for row, length in enumerate(lengths) if length > 5 * limit]
    steps = 0
    if left:
        done = math.hypot(float(ignored.norm()), *(length for length in lengths if length <= 5 * limit))
        rows = torch.tensor(left, device=w.device)
        a, inside, outside = a[rows], inside[rows], outside[rows]
        inside = inside - outside

        def apply(x: Tensor) -> Tensor:
            return torch.add(a * x, (b @ x.mT).mT, alpha=scale)  # in this order faster for few rows

        def precondition(x: Tensor) -> Tensor:
            return torch.addmm(outside * x, inside * (x @ q), q.T)

        def finished(x: Tensor) -> bool:
            return math.hypot(done, float(x.norm())) <= tolerance

        w[rows], r[rows], steps = conjugate_gradients(apply, precondition, w[rows], r[rows], finished, max_steps)
    weight, left_over = (turn @ torch.stack([w, r + ignored])).to(c.dtype).unbind()
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
    half = torch.linalg.solve_triangular(factor, right.mT, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True).mT

"""The Sylvester equation in many dimensions: conjugate gradients, deflated by the leading principal subspace.

With ``A = U diag(a) U^T`` the equation ``A W + W (lambda Cov) = C`` falls apart into k linear systems, one a row of
``U^T W``: ``(a_i + lambda Cov) w_i = c_i``. The variances of a layer's input span three or more decades, but few of its
directions are large. On those the system is inverted exactly; on the rest its eigenvalues lie between ``a_i`` and
``a_i + lambda v``, with v the variance at the cut, and a few steps suffice. Each is one product with the covariance,
``2 k d^2``, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sylinit.eigh import robust_eigh
from sylinit.subspace import Subspace
from sylinit.sylvester import pair_inverse

TOLERANCE = 1e-3
"""The relative residual at which an approximate solution is as good as the exact one for a start of training."""


@dataclass(frozen=True)
class Approximation:
    """How an iterative solve went.

    Attributes:
        weight: ``W``, ``[k, d]``.
        residual: ``||A W + lambda W Cov - C|| / ||C||``, a float64 scalar; 0 where ``C = 0``.
        steps: products with the covariance.
    """

    weight: Tensor
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

    Source: Hestenes and Stiefel, *Methods of conjugate gradients*, 1952; with a spectral preconditioner.
    """
    dtype, c, a = c.dtype, c.double(), a.double()
    size = a.diagonal().mean() + encoding_weight * covariance.diagonal().mean(dtype=torch.float64)
    size = torch.where(size > 0, size, 1)  # all is divided by it, to stay clear of float32's limits
    norm = torch.linalg.matrix_norm(c)
    scale = torch.where(norm > 0, norm, 1)

    a, u = robust_eigh(a / size)
    right = u.T @ (c / scale)
    share = right.norm(dim=1)
    # A code of low rank leaves nothing to solve for in the null space of A.
    kept = share > 0.01 * tolerance * len(c) ** -0.5
    dropped = share[~kept].square().sum()

    q, scaled = subspace.basis, encoding_weight / size
    b, image = (covariance * scaled).float(), subspace.image * scaled.float()
    inside = pair_inverse(a, subspace.variances * scaled)[kept].float()
    outside = pair_inverse(a, subspace.rest.view(1) * scaled)[kept].float()
    a, u, right = a[kept].float().unsqueeze(1), u[:, kept], right[kept].float()

    def precondition(x: Tensor) -> Tensor:
        return outside * x + ((inside - outside) * (x @ q)) @ q.T

    def residual() -> Tensor:
        return (r.double().square().sum() + dropped).sqrt()

    start = inside * (right @ q)
    w = start @ q.T
    r = right - a * w - start @ image.T
    steps, p, rho = 0, torch.zeros_like(r), torch.ones_like(a)
    while steps < max_steps and bool(residual() > tolerance):
        z = precondition(r)
        previous, rho = rho, _dot(r, z)
        p = z + _ratio(rho, previous) * p
        bp = a * p + p @ b
        alpha = _ratio(rho, _dot(p, bp))
        w, r = w + alpha * p, r - alpha * bp
        steps += 1
    weight = u @ w.double() * (scale / size)
    return Approximation(weight.to(dtype), residual(), steps)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of the rows of two matrices, ``[k, 1]``."""
    return (x * y).sum(1, keepdim=True)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """``x / y``, 0 where ``y`` is: a row that is solved stays as it is."""
    return torch.where(y > 0, x / torch.where(y > 0, y, 1), 0)

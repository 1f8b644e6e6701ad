"""The Sylvester equation of Das, Bhalgat and Porikli (arXiv 2105.10335) and its solution by two eigendecompositions.

``A W + W B = C`` with symmetric positive semidefinite ``A`` (k x k) and ``B`` (d x d) needs no Schur form: with
``A = U diag(a) U^T`` and ``B = V diag(b) V^T`` it falls apart into ``k d`` scalar equations,
``W = U [(U^T C V)_ij / (a_i + b_j)] V^T``. Where ``a_i + b_j`` is numerically zero the entry is zero: the least-squares
solution of minimum norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sylinit.errors import SylinitError
from sylinit.linalg.conjugate_gradients import conjugate_gradients
from sylinit.linalg.eigh import robust_eigh
from sylinit.linalg.subspace import row_space

MIXED_PRECISION_SIZE = 256
"""Rows or columns from which on a float32 eigendecomposition saves time."""

SMALLEST_PAIR = 1e-4
"""The smallest ``a_i + b_j``, as a share of the largest diagonal entries, that float32 can be refined from."""

REFINEMENT_STEPS = 8
"""Of conjugate gradients in float64, from the float32 decomposition."""

FLOAT64_RESIDUAL = 1e-13
"""A relative residual that counts as that of float64."""


@dataclass(frozen=True)
class Solution:
    """How a solve went.

    Attributes:
        weight: ``W``, ``[..., k, d]``.
        residual: ``||A W + W B - C|| / ||C||`` in the Frobenius norm, ``[...]``, of the weight as it is returned;
            0 where ``C = 0``.
        rank: number of eigenvalue pairs ``a_i + b_j`` that are not numerically zero, ``[...]``: k d if regular.
    """

    weight: Tensor
    residual: Tensor
    rank: Tensor


@torch.no_grad()
def solve_sylvester(a: Tensor, b: Tensor, c: Tensor, *, rtol: float | None = None) -> Solution:
    """Solve ``A W + W B = C`` for symmetric positive semidefinite ``A`` and ``B``.

    Singular systems give the least-squares solution of minimum norm; they are no error. Leading dimensions are a batch.
    All dtypes are computed in float64, for an ill-conditioned system leaves float32 no fifth digit.

    Args:
        a: ``A``, ``[..., k, k]``.
        b: ``B``, ``[..., d, d]``.
        c: ``C``, ``[..., k, d]``.
        rtol: pairs ``a_i + b_j`` below this share of the largest count as zero; by default what rounding makes of a
            zero, in the given dtype and in the eigendecomposition: ``max(4 eps(dtype), max(k, d) eps(float64))``.

    Returns:
        The solution, its residual and its numerical rank, in the dtype and on the device of ``c``.

    Raises:
        SylinitError: shapes that do not fit, dtypes or devices that differ, NaN or infinite entries, or an ``a`` or
            ``b`` that is not symmetric.
    """
    _check_form(a, b, c)
    dtype = c.dtype
    a, b, c = a.double(), b.double(), c.double()
    skew_a, skew_b = a - a.mT, b - b.mT
    _check_entries(a, b, c, skew_a, skew_b, torch.finfo(dtype).eps ** 0.5)
    # Divided by their sizes, no norm overflows or underflows; A and B share one size, as their sum counts.
    size, size_c = torch.maximum(_size(a), _size(b)), _size(c)
    size, size_c = torch.where(size > 0, size, 1), torch.where(size_c > 0, size_c, 1)
    a, b = (whole.sub(skew, alpha=0.5).div_(size) for whole, skew in ((a, skew_a), (b, skew_b)))
    c = c / size_c

    if rtol is None:
        rtol = max(4 * torch.finfo(dtype).eps, max(c.shape[-2:]) * torch.finfo(c.dtype).eps)
    found = _mixed_precision(a, b, c) if rtol < SMALLEST_PAIR else None
    w, rank = _double_precision(a, b, c, rtol) if found is None else found

    weight = (w * (size_c / size)).to(dtype)
    w = weight * (size / size_c)
    norm = torch.linalg.matrix_norm(c)
    residual = torch.linalg.matrix_norm(a @ w + w @ b - c) / torch.where(norm > 0, norm, 1)
    return Solution(weight, residual.to(dtype), rank)


def _double_precision(a: Tensor, b: Tensor, c: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    """By both eigendecompositions in float64, whatever the system: the solution and its rank."""
    values_a, u = robust_eigh(a)
    values_b, v = robust_eigh(b)
    inverse = pair_inverse(values_a, values_b, rtol)

    def apply_inverse(right: Tensor) -> Tensor:
        return u @ (inverse * (u.mT @ right @ v)) @ v.mT

    w = apply_inverse(c)
    w = w + apply_inverse(c - a @ w - w @ b)  # the eigenvectors are orthonormal to rounding only
    return w, (inverse != 0).sum((-2, -1))


def _mixed_precision(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor] | None:
    """By conjugate gradients in float64, with the inverse by a float32 eigendecomposition of ``B`` as preconditioner.

    That takes a third of the time of one in float64, and each step gains about four digits.

    Returns:
        The solution and its rank; None for small systems, where nothing is gained, and for those that are not regular
        enough, which a Cholesky factor tells at a fraction of the cost.
    """
    if max(c.shape[-2:]) < MIXED_PRECISION_SIZE:
        return None
    values_a, u = robust_eigh(a)
    shifted = b.float()
    shift = (
        values_a[..., :1] - SMALLEST_PAIR * (a.diagonal(0, -2, -1).amax(-1) + b.diagonal(0, -2, -1).amax(-1))[..., None]
    )
    shifted.diagonal(0, -2, -1).add_(shift.float())
    if bool(torch.linalg.cholesky_ex(shifted).info.any()):
        return None
    values_b, v = robust_eigh(b.float())
    inverse = pair_inverse(values_a.float(), values_b, 0.0)
    c = u.mT @ c
    norm = torch.linalg.matrix_norm(c)

    def apply(w: Tensor) -> Tensor:
        return values_a[..., None] * w + w @ b

    def precondition(r: Tensor) -> Tensor:
        size = r.norm(dim=(-2, -1), keepdim=True)
        size = torch.where(size > 0, size, 1)  # float32 is to see numbers of order one
        return ((inverse * ((r / size).float() @ v)) @ v.mT) * size

    def finished(r: Tensor) -> bool:
        return bool((torch.linalg.matrix_norm(r) <= FLOAT64_RESIDUAL * norm).all())

    w, r, _ = conjugate_gradients(apply, precondition, torch.zeros_like(c), c, finished, REFINEMENT_STEPS)
    if not finished(r):
        return None
    return u @ w, torch.full_like(norm, c.shape[-2] * c.shape[-1], dtype=torch.long)


def pair_inverse(a: Tensor, b: Tensor, rtol: float | None = None) -> Tensor:
    """``1 / (a_i + b_j)``, ``[..., k, d]``, and 0 where the sum is numerically zero: below ``rtol`` of the largest."""
    total = a.unsqueeze(-1) + b.unsqueeze(-2)
    limits = torch.finfo(total.dtype)
    rtol = max(total.shape[-2:]) * limits.eps if rtol is None else rtol
    size = total.abs()
    zero = size <= (rtol * size.amax((-2, -1), keepdim=True)).clamp(min=limits.tiny)
    return total.reciprocal_().masked_fill_(zero, 0)


def objective(weight: Tensor, x: Tensor, s: Tensor, encoding_weight: float = 1.0) -> Tensor:
    """The paper's loss ``||X - W^T S||^2 + lambda ||W X - S||^2`` of rows ``x [n, d]`` and their code ``s [n, k]``."""
    decode = (x - s @ weight).square().sum()
    encode = (x @ weight.mT - s).square().sum()
    return decode + encoding_weight * encode


@torch.no_grad()
def sylvester_(weight: Tensor, x: Tensor, s: Tensor, *, encoding_weight: float = 1.0) -> Tensor:
    """Fill a weight with the minimizer of ``||X - W^T S||^2 + lambda ||W X - S||^2``, in the manner of `torch.nn.init`.

    Rows and code are centered here, and the code is scaled to the root mean square of the rows.
    With fewer rows than inputs the equation is solved in the space that the rows span; no d x d matrix is formed.

    Args:
        weight: ``[k, ...]`` whose other dimensions have d entries in all; written in place.
        x: rows of input, ``[n, d]``.
        s: their latent code, ``[n, k]``.
        encoding_weight: lambda, the weight of encoding against decoding.

    Returns:
        ``weight``.

    Raises:
        SylinitError: shapes that do not fit, fewer than two rows, a negative or infinite ``encoding_weight``,
            or NaN or infinite entries.

    Source: Das, Bhalgat and Porikli, arXiv 2105.10335.
    """
    if weight.ndim < 2:
        raise SylinitError(f"sylvester_: weight must have at least 2 dimensions, [k, ...]; got {list(weight.shape)}")
    units, dim = weight.shape[0], math.prod(weight.shape[1:])
    if x.ndim != 2 or s.ndim != 2 or x.shape[1] != dim or s.shape != (len(x), units):
        raise SylinitError(
            f"sylvester_: weight {list(weight.shape)} needs x of shape [n, {dim}] and s of shape [n, {units}]; "
            f"got {list(x.shape)} and {list(s.shape)}"
        )
    if len(x) < 2:
        raise SylinitError(f"sylvester_: x has {len(x)} row; at least 2 are needed")
    if not 0 <= encoding_weight < math.inf:
        raise SylinitError(f"sylvester_: encoding_weight must be finite and not negative; got {encoding_weight}")
    for name, tensor in (("x", x), ("s", s)):
        if not bool(tensor.isfinite().all()):
            raise SylinitError(f"sylvester_: {name} holds NaN or infinite entries")
    x, s = x.double(), s.double()
    x, s = x - x.mean(0), s - s.mean(0)
    s = s * (x.square().mean() / s.square().mean().clamp(min=torch.finfo(s.dtype).tiny)).sqrt()
    basis, coordinates = row_space(x) if len(x) < dim else (None, x)
    if not coordinates.shape[1]:  # rows that do not vary say nothing
        return weight.zero_()
    w = solve_sylvester(
        s.T @ s, encoding_weight * (coordinates.T @ coordinates), (1 + encoding_weight) * (s.T @ coordinates)
    ).weight
    return weight.copy_((w if basis is None else w @ basis.mT).view(weight.shape))


def _size(matrix: Tensor) -> Tensor:
    """The largest absolute entry, ``[..., 1, 1]``; NaN or infinite where any entry is."""
    low, high = matrix.flatten(-2).aminmax(dim=-1)
    return torch.maximum(-low, high)[..., None, None]


def _check_form(a: Tensor, b: Tensor, c: Tensor) -> None:
    if (
        min(a.ndim, b.ndim, c.ndim) < 2
        or a.shape != (*c.shape[:-1], c.shape[-2])
        or b.shape != (*c.shape[:-2], c.shape[-1], c.shape[-1])
        or 0 in c.shape[-2:]
    ):
        raise SylinitError(
            "solve_sylvester: expected a [..., k, k], b [..., d, d] and c [..., k, d] with equal leading dimensions; "
            f"got a {list(a.shape)}, b {list(b.shape)}, c {list(c.shape)}"
        )
    if not (a.dtype == b.dtype == c.dtype and a.device == b.device == c.device and c.is_floating_point()):
        raise SylinitError(
            "solve_sylvester: a, b and c must have one real floating-point dtype and one device; got "
            f"{a.dtype} on {a.device}, {b.dtype} on {b.device}, {c.dtype} on {c.device}"
        )


def _check_entries(a: Tensor, b: Tensor, c: Tensor, skew_a: Tensor, skew_b: Tensor, tolerance: float) -> None:
    """All checks that need the entries in one transfer to the host; ``skew``: a matrix less its transpose."""
    finite = [_size(matrix).isfinite().all() for matrix in (a, b, c)]
    symmetric = [(_size(skew) <= tolerance * _size(matrix)).all() for matrix, skew in ((a, skew_a), (b, skew_b))]
    passed = torch.stack(finite + symmetric).tolist()
    for name, good in zip("abc", passed[:3], strict=True):
        if not good:
            raise SylinitError(f"solve_sylvester: {name} holds NaN or infinite entries")
    for name, good in zip("ab", passed[3:], strict=True):
        if not good:
            raise SylinitError(
                f"solve_sylvester: {name} is not symmetric; this solver is for covariance-like matrices, "
                "scipy.linalg.solve_sylvester takes any"
            )

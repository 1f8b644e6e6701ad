"""The Sylvester equation of Das, Bhalgat and Porikli (arXiv 2105.10335) and its solution by two eigendecompositions.

``A W + W B = C`` with symmetric positive semidefinite ``A`` (k x k) and ``B`` (d x d) needs no Schur form: with
``A = U diag(a) U^T`` and ``B = V diag(b) V^T`` it falls apart into ``k d`` scalar equations,
``W = U [(U^T C V)_ij / (a_i + b_j)] V^T``. Where ``a_i + b_j`` is numerically zero the entry is zero: the least-squares
solution of minimum norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sylinit.errors import SylinitError
from sylinit.subspace import row_space


@dataclass(frozen=True)
class Solution:
    """How a solve went.

    Attributes:
        weight: ``W``, ``[..., k, d]``.
        residual: ``||A W + W B - C|| / ||C||`` in the Frobenius norm, ``[...]``; 0 where ``C = 0``.
        rank: number of eigenvalue pairs ``a_i + b_j`` that are not numerically zero, ``[...]``: k d if regular.
    """

    weight: Tensor
    residual: Tensor
    rank: Tensor


@torch.no_grad()
def solve_sylvester(a: Tensor, b: Tensor, c: Tensor, *, rtol: float | None = None) -> Solution:
    """Solve ``A W + W B = C`` for symmetric positive semidefinite ``A`` and ``B``.

    Singular systems give the least-squares solution of minimum norm; they are no error. Leading dimensions are a batch.
    Half precision is computed in float32. In float32, one step of iterative refinement halves the digits lost.

    Args:
        a: ``A``, ``[..., k, k]``; only its symmetric part counts.
        b: ``B``, ``[..., d, d]``; likewise.
        c: ``C``, ``[..., k, d]``.
        rtol: pairs ``a_i + b_j`` below this share of the largest count as zero; default ``max(k, d) eps``.

    Returns:
        The solution, its residual and its numerical rank, in the dtype and on the device of ``c``.

    Raises:
        SylinitError: shapes that do not fit, dtypes or devices that differ, or NaN or infinite entries.
    """
    _check(a, b, c)
    dtype = c.dtype
    if dtype in (torch.float16, torch.bfloat16):
        a, b, c = a.float(), b.float(), c.float()
    a, b = _symmetric(a), _symmetric(b)
    values_a, u = robust_eigh(a)
    values_b, v = robust_eigh(b)
    inverse = pair_inverse(values_a, values_b, rtol)

    def apply_inverse(right: Tensor) -> Tensor:
        return u @ (inverse * (u.mT @ right @ v)) @ v.mT

    w = apply_inverse(c)
    w = w + apply_inverse(c - a @ w - w @ b)
    size = torch.linalg.matrix_norm(c)
    residual = torch.linalg.matrix_norm(a @ w + w @ b - c) / torch.where(size > 0, size, 1)
    return Solution(w.to(dtype), residual.to(dtype), (inverse > 0).sum((-2, -1)))


def solve_diagonal(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Solve ``A W + W diag(b) = C``: ``[..., k, k]``, ``[..., d]``, ``[..., k, d]``; for use in principal axes."""
    values, u = robust_eigh(a)
    return u @ (pair_inverse(values, b) * (u.mT @ c))


def pair_inverse(a: Tensor, b: Tensor, rtol: float | None = None) -> Tensor:
    """``1 / (a_i + b_j)``, ``[..., k, d]``, 0 where the sum is numerically zero; negative eigenvalues are rounding."""
    total = a.clamp(min=0).unsqueeze(-1) + b.clamp(min=0).unsqueeze(-2)
    rtol = max(total.shape[-2:]) * torch.finfo(total.dtype).eps if rtol is None else rtol
    regular = total > (rtol * total.amax((-2, -1), keepdim=True)).clamp(min=torch.finfo(total.dtype).tiny)
    return torch.where(regular, 1 / torch.where(regular, total, 1), 0)


def robust_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh``, in float64 and then on the CPU where it does not converge, as CUDA's float32 can fail to.

    Returns:
        Ascending eigenvalues ``[..., m]`` and eigenvectors ``[..., m, m]``, in the dtype and on the device given.
    """
    last = matrix.double().cpu
    for attempt in (lambda: matrix, matrix.double, last):
        try:
            values, vectors = torch.linalg.eigh(attempt())
        except torch.linalg.LinAlgError:
            continue
        return values.to(matrix), vectors.to(matrix)
    raise SylinitError(
        f"eigendecomposition of a {list(matrix.shape)} matrix failed; are there NaN or infinite entries?"
    )


def objective(weight: Tensor, x: Tensor, s: Tensor, encoding_weight: float = 1.0) -> Tensor:
    """The paper's loss ``||X - W^T S||^2 + lambda ||W X - S||^2`` of rows ``x [n, d]`` and their code ``s [n, k]``."""
    decode = (x - s @ weight).square().sum()
    encode = (x @ weight.mT - s).square().sum()
    return decode + encoding_weight * encode


@torch.no_grad()
def sylvester_(weight: Tensor, x: Tensor, s: Tensor, *, encoding_weight: float = 1.0) -> Tensor:
    """Fill a weight with the minimiser of ``||X - W^T S||^2 + lambda ||W X - S||^2``, in the manner of `torch.nn.init`.

    Rows and code are centred here, and the code is scaled to the root mean square of the rows.
    With fewer rows than inputs the equation is solved in the space that the rows span; no d x d matrix is formed.

    Args:
        weight: ``[k, ...]`` whose other dimensions have d entries in all; written in place.
        x: rows of input, ``[n, d]``.
        s: their latent code, ``[n, k]``.
        encoding_weight: lambda, the weight of encoding against decoding.

    Returns:
        ``weight``.

    Raises:
        SylinitError: shapes that do not fit, or fewer than two rows.

    Source: Das, Bhalgat and Porikli, arXiv 2105.10335.
    """
    units, dim = weight.shape[0], weight[0].numel()
    if x.ndim != 2 or s.ndim != 2 or x.shape[1] != dim or s.shape != (len(x), units):
        raise SylinitError(
            f"sylvester_: weight {list(weight.shape)} needs x of shape [n, {dim}] and s of shape [n, {units}]; "
            f"got {list(x.shape)} and {list(s.shape)}"
        )
    if len(x) < 2:
        raise SylinitError(f"sylvester_: x has {len(x)} row; at least 2 are needed")
    x, s = x.double(), s.double()
    x, s = x - x.mean(0), s - s.mean(0)
    s = s * (x.square().mean() / s.square().mean().clamp(min=torch.finfo(s.dtype).tiny)).sqrt()
    basis, coordinates = row_space(x) if len(x) < dim else (None, x)
    w = solve_sylvester(
        s.T @ s, encoding_weight * (coordinates.T @ coordinates), (1 + encoding_weight) * (s.T @ coordinates)
    ).weight
    return weight.copy_((w if basis is None else w @ basis.mT).view(weight.shape))


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _check(a: Tensor, b: Tensor, c: Tensor) -> None:
    shapes = f"a {list(a.shape)}, b {list(b.shape)}, c {list(c.shape)}"
    if (
        min(a.ndim, b.ndim, c.ndim) < 2
        or a.shape != (*c.shape[:-1], c.shape[-2])
        or b.shape != (*c.shape[:-2], c.shape[-1], c.shape[-1])
    ):
        raise SylinitError(f"solve_sylvester: expected a [..., k, k], b [..., d, d] and c [..., k, d]; got {shapes}")
    if not (a.dtype == b.dtype == c.dtype and a.device == b.device == c.device and c.is_floating_point()):
        raise SylinitError(
            "solve_sylvester: a, b and c must have one real floating-point dtype and one device; got "
            f"{a.dtype} on {a.device}, {b.dtype} on {b.device}, {c.dtype} on {c.device}"
        )
    for name, matrix in (("a", a), ("b", b), ("c", c)):
        if not bool(matrix.isfinite().all()):
            raise SylinitError(f"solve_sylvester: {name} holds NaN or infinite entries")

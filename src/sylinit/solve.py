"""One layer's equation before calibration, by one of two routes: all principal axes, or the leading ones only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sylinit.codes.registry import NULL, Axes, Code, LinearCode
from sylinit.linalg.cross_validation import least_error_weight
from sylinit.linalg.eigh import robust_eigh
from sylinit.linalg.projected import solve_projected
from sylinit.linalg.subspace import principal_subspace, signs
from sylinit.linalg.sylvester import solve_diagonal
from sylinit.statistics.moments import Covariance

SMALL = 256
"""Below this d a decomposition takes a few milliseconds, and the exact answer is as good as free."""

SINGLE = 1e-5
"""Float32 tells an axis from rounding if its variance is at least this share of the largest second moment."""

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Problem:
    """What is to be solved for one layer, beside its data.

    Attributes:
        name: the layer's name, for messages.
        code: the latent code.
        units: k, the units of each group.
        encoding_weight: lambda; None for the one of least cross-validation error, which the exact route finds.
        variance: of each unit's output after calibration.
        seed: of everything random.
        role: what its outputs are: "units", "directions" (units whose scale a normalisation will undo, and which
            training is to move little), "logits" or "values".
    """

    name: str
    code: Code
    units: int
    encoding_weight: float | None
    variance: float
    seed: int
    role: str = "units"

    def generator(self) -> torch.Generator:
        """A fresh generator: the same draws whichever process or route solves the layer."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Fit:
    """A weight before calibration: the solution of ``A W + W B = C`` for the layer's code ``S``.

    ``A = S S^T / n``, ``B = lambda X X^T / n``, ``C = (1 + lambda) S X^T / n``, with ``S`` scaled to the root mean
    square of ``X``.

    Attributes:
        weight: ``W``, ``[g, k, d]``.
        encoding_weight: lambda.
        residual: ``||A W + W B - C|| / ||C||`` over all groups.
        encoding_error: ``||W X - S||^2 / ||S||^2``.
        decoding_error: ``||X - W^T S||^2 / ||X||^2``.
        route: "exact" or "projected".
    """

    weight: Tensor
    encoding_weight: float
    residual: Tensor
    encoding_error: Tensor
    decoding_error: Tensor
    route: str


def fit_exact(cov: Covariance, problem: Problem) -> Fit:
    """By all principal axes: in them ``B`` is diagonal, so only ``A`` (k x k) is left to decompose."""
    axes = principal_axes(cov)
    code, gram = _scaled(_code(problem, axes), axes, cov)
    cross = code.on_x * axes.variances.unsqueeze(1) + code.on_t @ axes.xt.mT
    made_of = torch.cat([code.on_x, code.on_t], 2)  # E of S = E [x, t]
    span = torch.linalg.qr(made_of)[0] if made_of.shape[1] > made_of.shape[2] else None
    encoding_weight = problem.encoding_weight
    if encoding_weight is None:
        a, u = robust_eigh(gram)
        encoding_weight = least_error_weight(a, axes.variances, u.mT @ cross, cov.count)
    weight = solve_diagonal(gram, encoding_weight * axes.variances, (1 + encoding_weight) * cross, span)
    weight, cross = weight @ axes.basis.mT, cross @ axes.basis.mT
    return _judged(weight, gram @ weight, weight @ cov.xx, gram, cross, cov, encoding_weight, "exact")


def fit_projected(cov: Covariance, problem: Problem) -> Fit | None:
    """By the leading principal axes, from a randomised subspace, and conjugate gradients for what lies outside.

    Args:
        cov: the layer's covariance, of which float32 is enough.
        problem: one whose code reads the leading axes only.

    Returns:
        None where an axis is so weak that float32 cannot tell it from rounding.
    """
    components, generator = leading_components(problem.code, problem.units), problem.generator()
    encoding_weight = problem.encoding_weight
    assert components is not None
    assert encoding_weight is not None
    found = [principal_subspace(xx, subspace_rank(components), generator) for xx in cov.xx]
    basis, image = (torch.stack([getattr(each, part) for each in found]) for part in ("basis", "image"))
    variances = torch.stack([each.variances for each in found])
    largest = variances[:, 0] + cov.mean_x.square().sum(1)  # of the sums, before the mean was taken off
    if bool((variances[:, -1] <= SINGLE * largest).any()):
        return None
    basis = basis.double()
    axes = Axes(basis, variances, basis.mT @ cov.xt, cov.tt)
    code, gram = _scaled(_code(problem, axes), axes, cov)
    cross = code.on_x.to(image) @ image.mT + (code.on_t @ cov.xt.mT).to(image)  # large: float32 from here on
    right = (1 + encoding_weight) * cross
    solved = [
        solve_projected(a, xx, c, subspace, encoding_weight=encoding_weight)
        for a, xx, c, subspace in zip(gram, cov.xx, right, found, strict=True)
    ]
    weight, remainder = (torch.stack([getattr(each, part) for each in solved]) for part in ("weight", "remainder"))
    decoded = gram.to(weight) @ weight
    encoded = (right - remainder - decoded) / encoding_weight  # W Cov, without another product
    return _judged(weight, decoded, encoded, gram, cross, cov, encoding_weight, "projected")


def projected_pays(code: Code, units: int, dim: int) -> bool:
    """Whether the projected route is open to a code, and at least twice as fast as the exact one.

    By counts of operations: the exact route is an eigendecomposition in float64, about 9 d^3; the projected one is
    products in float32: ``4 d^2 r`` for the subspace of rank r, about ``6 d^2 k`` for the steps after it, and
    ``16 d r^2`` inside. On CPUs and GPUs alike an operation of the former takes two to three times as long.

    Args:
        code: which must read leading principal components only.
        units: k.
        dim: d.
    """
    components = leading_components(code, units)
    if components is None:
        return False
    rank = subspace_rank(components)
    exact = 2.5 * 9 * dim**3
    projected = dim**2 * (4 * rank + 6 * components) + 16 * dim * rank**2 + 2.5 * 9 * rank**3
    return dim >= SMALL and 2 * projected < exact


def leading_components(code: Code, units: int) -> int | None:
    """How many leading principal components a code of ``units`` units reads, or None if it may read any."""
    return None if code.leading is None else math.ceil(code.leading * units)


def subspace_rank(components: int) -> int:
    """The rank of subspace from which ``components`` principal components are read: a tenth more, and ten."""
    return components + components // 10 + 10


def principal_axes(cov: Covariance) -> Axes:
    """Rotate a layer's statistics to the eigenvectors of its covariance, largest variance first."""
    variances, basis = robust_eigh(cov.xx)
    variances, basis = variances.flip(1), basis.flip(2)
    basis = basis * signs(basis)
    null = variances <= NULL * variances[:, :1].clamp(min=0)
    return Axes(basis, variances.masked_fill(null, 0), basis.mT @ cov.xt, cov.tt)


def _code(problem: Problem, axes: Axes) -> LinearCode:
    if problem.role == "logits" and problem.units == 1:
        sign = axes.tt.new_tensor([-1.0, 1.0]).view(1, 1, 2)  # one logit: the second class against the first
        return LinearCode(axes.variances.new_zeros(1, 1, axes.variances.shape[1]), sign)
    return problem.code.function(axes, problem.units, problem.generator())


def _scaled(code: LinearCode, axes: Axes, cov: Covariance) -> tuple[LinearCode, Tensor]:
    """The code, scaled to the root mean square of the rows, and ``A``, its covariance ``[g, k, k]``."""
    cross = code.on_x * axes.variances.unsqueeze(1) + code.on_t @ axes.xt.mT  # S x'^T
    gram = cross @ code.on_x.mT + (code.on_x @ axes.xt + code.on_t @ axes.tt) @ code.on_t.mT  # S S^T
    size = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=_TINY)
    scale = (cov.variance.clamp(min=0) / size).sqrt().view(-1, 1, 1)
    return LinearCode(code.on_x * scale, code.on_t * scale), gram * scale.square()


def _judged(
    weight: Tensor,
    decoded: Tensor,
    encoded: Tensor,
    gram: Tensor,
    cross: Tensor,
    cov: Covariance,
    encoding_weight: float,
    route: str,
) -> Fit:
    """Measure how far ``W`` satisfies its equation and what it leaves of code and rows.

    ``decoded`` is ``A W`` and ``encoded`` is ``W Cov``.
    """
    right = (1 + encoding_weight) * cross
    left = decoded + encoding_weight * encoded
    agreement = 2 * (weight * cross).sum(dtype=torch.float64)
    code_energy = gram.diagonal(dim1=1, dim2=2).sum().clamp(min=_TINY)
    row_energy = (cov.variance.sum() * cov.dim).clamp(min=_TINY)
    return Fit(
        weight=weight.double(),
        encoding_weight=encoding_weight,
        residual=(left - right).norm() / right.norm().clamp(min=_TINY),
        encoding_error=1 + ((encoded * weight).sum(dtype=torch.float64) - agreement) / code_energy,
        decoding_error=1 + ((decoded * weight).sum(dtype=torch.float64) - agreement) / row_energy,
        route=route,
    )

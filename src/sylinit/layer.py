"""One layer's equation: its statistics and a latent code in, its calibrated weight and how well it fits out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sylinit.calibrate import Calibrated, calibrate_directions, calibrate_logits, calibrate_regression, calibrate_units
from sylinit.codes import CODES, NULL, Axes, Code, LinearCode, call, select_target
from sylinit.errors import SylinitError
from sylinit.moments import Covariance, Moments
from sylinit.subspace import row_space
from sylinit.sylvester import robust_eigh, solve_diagonal


@dataclass(frozen=True)
class Problem:
    """What is to be solved for one layer, beside its data.

    Attributes:
        name: the layer's name, for messages.
        code: the latent code.
        units: k, the units of each group.
        encoding_weight: lambda.
        variance: of each unit's output after calibration.
        seed: of everything random.
        role: what its outputs are: "units", "directions" (units whose scale a normalisation will undo), "logits" or
            "values".
    """

    name: str
    code: Code
    units: int
    encoding_weight: float
    variance: float
    seed: int
    role: str = "units"

    def generator(self) -> torch.Generator:
        """A fresh generator: the same draws whichever process or route solves the layer."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Solution:
    """The solution of one layer.

    Attributes:
        weight: ``[g, k, d]``, calibrated.
        bias: ``[g, k]``, calibrated.
        dead: ``[g, k]``, units that are zero.
        alive: ``[g]``, groups whose input varies; the others have no meaningful weight here.
        residual: ``||A W + W B - C|| / ||C||``, the largest of the groups that were solved together.
        encoding_error: ``||W X - S||^2 / ||S||^2``.
        decoding_error: ``||X - W^T S||^2 / ||X||^2``.
        route: "exact", "row-space" or "projected".
        note: what a user should know.
    """

    weight: Tensor
    bias: Tensor
    dead: Tensor
    alive: Tensor
    residual: Tensor
    encoding_error: Tensor
    decoding_error: Tensor
    route: str = "exact"
    note: str = ""


def solve_layer(cov: Covariance, problem: Problem) -> Solution:
    """Covariance -> principal axes -> latent code -> Sylvester equation -> calibrated weight."""
    axes = principal_axes(cov)
    code, note = _with_varied_targets(problem, cov)
    problem = replace(problem, code=code)
    raw, residual, encoding_error, decoding_error = solve_code(cov, axes, _code(problem, axes), problem.encoding_weight)
    done = _calibrate(raw, cov, problem)
    return Solution(
        weight=done.weight,
        bias=done.offset - (done.weight @ cov.mean_x.unsqueeze(2)).squeeze(2),
        dead=done.dead,
        alive=cov.variance > 1e-12 * cov.mean_x.square().mean(1) + 1e-30,
        residual=residual,
        encoding_error=encoding_error,
        decoding_error=decoding_error,
        note=note,
    )


def solve_layer_from_rows(rows: Tensor, targets: Tensor, problem: Problem) -> Solution:
    """The same from the rows themselves: for fewer rows than dimensions, and for codes that are fitted on rows.

    Args:
        rows: ``[g, n, d]``.
        targets: ``[n, c]``, c = 0 for none.
        problem: what to solve.
    """
    groups = [_solve_group(group, targets, problem) for group in rows]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(group, name) for group in groups])

    return Solution(
        weight=joined("weight"),
        bias=joined("bias"),
        dead=joined("dead"),
        alive=joined("alive"),
        residual=torch.stack([group.residual for group in groups]).max(),
        encoding_error=torch.stack([group.encoding_error for group in groups]).mean(),
        decoding_error=torch.stack([group.decoding_error for group in groups]).mean(),
        route=groups[0].route,
        note=groups[0].note,
    )


def _solve_group(rows: Tensor, targets: Tensor, problem: Problem) -> Solution:
    """One group: centre, code, go to the row space where that is smaller, solve, come back."""
    mean = rows.mean(0, dtype=torch.float64)
    x = rows - mean.to(rows)
    if problem.code.needs == "rows":
        known = targets if targets.shape[1] else None
        targets = call(problem.code, problem.name, x.double(), known, problem.units, problem.generator())
        problem = replace(problem, code=replace(problem.code, function=select_target, needs="moments"))
    count, dim = x.shape
    basis = None
    if count < dim:
        basis, x = row_space(x)
        if not basis.shape[1]:  # constant rows: one axis of zeros
            basis, x = basis.new_zeros(dim, 1), x.new_zeros(count, 1)
    sums = Moments.zeros(1, x.shape[1], targets.shape[1], x.device).update(x.unsqueeze(0), targets)
    cov = replace(sums.covariance(), dim=dim)
    solution = solve_layer(cov, problem)
    weight = solution.weight if basis is None else solution.weight @ basis.mT.to(solution.weight)
    return replace(
        solution,
        weight=weight,
        bias=solution.bias - weight @ mean,
        # Centred rows have no mean to judge their variance by.
        alive=cov.variance > 1e-12 * mean.square().mean() + 1e-30,
        route="exact" if basis is None else "row-space",
    )


def principal_axes(cov: Covariance) -> Axes:
    """Rotate a layer's statistics to the eigenvectors of its covariance, largest variance first."""
    variances, basis = robust_eigh(cov.xx)
    variances, basis = variances.flip(1), basis.flip(2)
    # An eigenvector's sign is arbitrary; the largest entry is made positive, so that a rerun gives the same filters.
    largest = basis.abs().argmax(1, keepdim=True)
    basis = basis * basis.gather(1, largest).sign()
    null = variances <= NULL * variances[:, :1].clamp(min=0)
    return Axes(basis, variances.masked_fill(null, 0), basis.mT @ cov.xt, cov.tt)


def solve_code(
    cov: Covariance, axes: Axes, code: LinearCode, encoding_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve ``A W + W B = C`` for a linear code.

    ``A = S S^T / n``, ``B = lambda X X^T / n``, ``C = (1 + lambda) S X^T / n``, with the code ``S`` scaled to the root
    mean square of ``X``. In principal axes ``B`` is diagonal, so only ``A`` (k x k) is decomposed.

    Args:
        cov: the layer's covariance, for the true residual.
        axes: the same in principal axes.
        code: the latent code, in principal axes.
        encoding_weight: lambda, the weight of encoding against decoding.

    Returns:
        ``weight [g, k, d]``, relative residual, encoding error and decoding error.
    """
    tiny = torch.finfo(torch.float64).tiny
    cross = code.on_x * axes.variances.unsqueeze(1) + code.on_t @ axes.xt.mT  # S x'^T
    gram = cross @ code.on_x.mT + (code.on_x @ axes.xt + code.on_t @ axes.tt) @ code.on_t.mT  # S S^T
    scale = (cov.variance.clamp(min=0) / gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=tiny)).sqrt().view(-1, 1, 1)
    gram, cross = gram * scale.square(), cross * scale
    made_of = torch.cat([code.on_x, code.on_t], 2)  # E of S = E [x, t]
    span = torch.linalg.qr(made_of)[0] if made_of.shape[1] > made_of.shape[2] else None
    rotated = solve_diagonal(gram, encoding_weight * axes.variances, (1 + encoding_weight) * cross, span)
    weight = rotated @ axes.basis.mT

    right = (1 + encoding_weight) * (cross @ axes.basis.mT)
    left = gram @ weight + encoding_weight * (weight @ cov.xx)
    agreement = 2 * (rotated * cross).sum()
    encoded = (rotated.square() * axes.variances.unsqueeze(1)).sum()
    decoded = (gram @ rotated * rotated).sum()
    code_energy = gram.diagonal(dim1=1, dim2=2).sum().clamp(min=tiny)
    row_energy = (cov.variance.sum() * cov.dim).clamp(min=tiny)
    return (
        weight,
        (left - right).norm() / right.norm().clamp(min=tiny),
        1 + (encoded - agreement) / code_energy,
        1 + (decoded - agreement) / row_energy,
    )


def _with_varied_targets(problem: Problem, cov: Covariance) -> tuple[Code, str]:
    """The code itself, or what it falls back to where all rows have the same target, which then tells nothing."""
    code = problem.code
    same = bool(cov.tt.trace() <= 1e-12 * cov.mean_t.square().sum())
    if not same or not code.labels or problem.role in ("logits", "values") or code.function is select_target:
        return code, ""
    if code.fallback is None:
        raise SylinitError(
            f"layer {problem.name!r}: the code {code.name!r} needs labels that differ, and all rows have the same one; "
            "pass samples of more classes, or a code without labels such as code='pca'"
        )
    return CODES[code.fallback], "all its rows have the same label, so no labels were used"


def _code(problem: Problem, axes: Axes) -> LinearCode:
    if problem.role == "logits" and problem.units == 1:
        sign = axes.tt.new_tensor([-1.0, 1.0]).view(1, 1, 2)  # one logit: the second class against the first
        return LinearCode(axes.variances.new_zeros(1, 1, axes.variances.shape[1]), sign)
    return problem.code.function(axes, problem.units, problem.generator())


def _calibrate(weight: Tensor, cov: Covariance, problem: Problem) -> Calibrated:
    if problem.role == "logits":
        return calibrate_logits(weight, cov)
    if problem.role == "values":
        return calibrate_regression(weight, cov)
    if problem.role == "directions":
        return calibrate_directions(weight)
    return calibrate_units(weight, cov, problem.variance)

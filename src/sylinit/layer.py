"""One layer's equation: its statistics and a latent code in, its calibrated weight and how well it fits out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sylinit.codes.registry import Code, call, select_target
from sylinit.linalg.projected import TOLERANCE
from sylinit.linalg.subspace import row_space
from sylinit.scaling import Calibrated, calibrate_directions, calibrate_logits, calibrate_regression, calibrate_units
from sylinit.solve import Fit, Problem, fit_exact, fit_projected
from sylinit.statistics.moments import Covariance, Moments


@dataclass(frozen=True)
class Solution:
    """The solution of one layer.

    Attributes:
        weight: ``[g, k, d]``, calibrated.
        bias: ``[g, k]``, calibrated.
        dead: ``[g, k]``, units that are zero.
        alive: ``[g]``, groups whose input varies; the others have no meaningful weight here.
        rank: numerical rank of the weight, summed over groups.
        encoding_weight: lambda; of the last group where each has its own.
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
    rank: int
    encoding_weight: float
    residual: Tensor
    encoding_error: Tensor
    decoding_error: Tensor
    route: str = "exact"
    note: str = ""


def solve_layer(cov: Covariance, problem: Problem) -> Solution:
    """Covariance -> latent code -> Sylvester equation -> calibrated weight."""
    solution = _solve(cov, problem, fit_exact)
    assert solution is not None
    return solution


def approximate_layer(cov: Covariance, problem: Problem) -> tuple[Solution | None, str]:
    """The same by the projected route; None and the reason where that does not serve."""
    solution = _solve(cov, problem, fit_projected)
    if solution is None:
        return None, ""
    if not solution.residual <= TOLERANCE:
        reason = f"solved exactly, for the projected solver stopped at a residual of {float(solution.residual):.0e}"
        return None, reason
    return solution, ""


def _solve(cov: Covariance, problem: Problem, fit: Callable[[Covariance, Problem], Fit | None]) -> Solution | None:
    same = bool(cov.tt.trace() <= 1e-12 * cov.mean_t.square().sum())
    if same:  # what is left of the targets' covariance is rounding
        cov = replace(cov, xt=torch.zeros_like(cov.xt), tt=torch.zeros_like(cov.tt))
    code, note = _with_varied_targets(problem, same)
    found = fit(cov, replace(problem, code=code))
    if found is None:
        return None
    done = _calibrate(found.weight, cov, problem)
    return Solution(
        weight=done.weight,
        bias=done.offset - (done.weight @ cov.mean_x.unsqueeze(2)).squeeze(2),
        dead=done.dead,
        alive=cov.variance > 1e-12 * cov.mean_x.square().mean(1) + 1e-30,
        rank=_rank(done.weight),
        encoding_weight=found.encoding_weight,
        residual=found.residual,
        encoding_error=found.encoding_error,
        decoding_error=found.decoding_error,
        route=found.route,
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
        rank=sum(group.rank for group in groups),
        encoding_weight=groups[-1].encoding_weight,
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


def _with_varied_targets(problem: Problem, same: bool) -> tuple[Code, str]:
    """The code itself, or what it falls back to where all rows have the `same` target, which then tells nothing."""
    code = problem.code
    if same and problem.role in ("logits", "values"):
        return code, "all its rows have the same target, so it predicts that"
    if not same or not code.labels or code.function is select_target:
        return code, ""
    reason = "all its rows have the same label"
    remedy = "pass samples of more classes, or a code without labels such as code='pca'"
    return code.without_labels(problem.name, reason, remedy), f"{reason}, so no labels were used"


def _rank(weight: Tensor) -> int:
    """Numerical rank of ``[g, k, d]``, summed over groups, from the smaller of the two Gram matrices."""
    small = weight if weight.shape[1] <= weight.shape[2] else weight.mT
    return int(torch.linalg.matrix_rank(small @ small.mT, hermitian=True, rtol=1e-10).sum())


def _calibrate(weight: Tensor, cov: Covariance, problem: Problem) -> Calibrated:
    if problem.role == "logits":
        return calibrate_logits(weight, cov)
    if problem.role == "values":
        return calibrate_regression(weight, cov)
    if problem.role == "directions":
        return calibrate_directions(weight)
    return calibrate_units(weight, cov, problem.variance)

"""The row-space solver: for fewer rows than inputs, the space that the rows span."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sylinit.config import Config
from sylinit.linalg.subspace import row_axes
from sylinit.solvers.equation import equation_of, judged, solve_in_axes, with_varied_targets
from sylinit.solvers.fit import Fit
from sylinit.solvers.problem import Problem, Source
from sylinit.statistics.axes import Axes
from sylinit.statistics.moments import Covariance


class RowSpace:
    """Finds the principal axes from the n x n Gram matrix of few rows, so that nothing d x d is formed. Exact."""

    name = "row-space"

    def applies(self, problem: Problem, source: Source, config: Config) -> bool:
        """Where there are fewer rows than inputs."""
        return source.count < source.dim

    def solve(self, problem: Problem, source: Source, config: Config) -> Fit:
        """From the rows themselves."""
        rows, targets = source.rows()
        return source.together(lambda: fit_in_row_space(rows, targets, problem, config))


def fit_in_row_space(rows: Tensor, targets: Tensor, problem: Problem, config: Config) -> Fit:
    """By the principal axes of fewer rows than inputs, of all groups at once.

    Args:
        rows: ``[g, n, d]``.
        targets: ``[n, c]`` or ``[g, n, c]``, c = 0 for none.
        problem: what to solve.
        config: the constants of the method.
    """
    count = rows.shape[1]
    mean = rows.mean(1, keepdim=True, dtype=torch.float64)
    if not problem.intercept:
        mean = torch.zeros_like(mean)
    basis, coordinates = row_axes(rows - mean.to(rows), config.null_variance)
    rank = max(1, count - problem.intercept)  # at most: the mean takes one
    basis, coordinates = basis[:, :, :rank], coordinates[:, :, :rank]
    variances = coordinates.square().sum(1) / count
    targets = targets.double()
    mean_t = targets.mean(-2, keepdim=True)
    mean_t = mean_t - problem.kept_mean(mean_t, config)
    t = targets - mean_t
    cov = Covariance(
        dim=rows.shape[2],
        count=mean.new_tensor(count),
        mean_x=mean.squeeze(1),
        mean_t=mean_t.squeeze(-2),
        xx=variances.diag_embed(),
        xt=coordinates.mT @ t / count,
        tt=t.mT @ t / count,
        basis=basis,
    )
    problem, cov, note = with_varied_targets(problem, cov, config)
    axes = Axes(basis, variances, cov.xt, cov.tt)
    equation = equation_of(problem, axes, cov, config)
    weight, encoding_weight = solve_in_axes(problem, axes, equation, cov.count, config)
    weight, decoded, encoded, cross = equation.of_all_units(
        weight, torch.bmm(equation.gram, weight), weight * variances.unsqueeze(1), equation.cross
    )
    fit = judged(weight, decoded, encoded, cross, equation, cov, encoding_weight, RowSpace.name, config)
    return replace(fit, note=note)

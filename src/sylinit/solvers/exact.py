"""The exact solver: all principal axes of the rows."""

from __future__ import annotations

from dataclasses import replace

import torch

from sylinit.config import Config
from sylinit.solvers.equation import equation_of, judged, solve_in_axes, with_varied_targets
from sylinit.solvers.fit import Fit
from sylinit.solvers.problem import Problem, Source
from sylinit.statistics.axes import principal_axes
from sylinit.statistics.moments import Covariance


class Exact:
    """Rotates the rows to their principal axes, by an eigendecomposition in float64. It serves every layer."""

    name = "exact"

    def applies(self, problem: Problem, source: Source, config: Config) -> bool:
        """Always."""
        return True

    def solve(self, problem: Problem, source: Source, config: Config) -> Fit:
        """From the second moments of all rows."""
        cov = source.covariance(torch.float64)
        if not problem.intercept:
            cov = cov.through_origin(problem.kept_mean(cov.mean_t, config))
        return source.together(lambda: fit_exact(cov, problem, config))


def fit_exact(cov: Covariance, problem: Problem, config: Config) -> Fit:
    """By all principal axes: in them ``B`` is diagonal, so only ``A`` (k x k) is left to decompose."""
    problem, cov, note = with_varied_targets(problem, cov, config)
    axes = principal_axes(cov, config.null_variance)
    equation = equation_of(problem, axes, cov, config)
    weight, encoding_weight = solve_in_axes(problem, axes, equation, cov.count, config)
    back = axes.basis.mT
    weight, cross = torch.bmm(weight, back), torch.bmm(equation.cross, back)
    decoded, encoded = torch.bmm(equation.gram, weight), torch.bmm(weight, cov.xx)
    weight, decoded, encoded, cross = equation.of_all_units(weight, decoded, encoded, cross)
    fit = judged(weight, decoded, encoded, cross, equation, cov, encoding_weight, Exact.name, config)
    return replace(fit, note=note)

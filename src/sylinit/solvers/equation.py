"""What all solvers share: the code of a layer as a matrix equation, and the check of a solution."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sylinit.codes.linear import LinearCode, linear_code
from sylinit.config import Config
from sylinit.linalg.cross_validation import least_error_weight
from sylinit.linalg.eigh import bordered_eigh
from sylinit.linalg.sylvester import pair_inverse
from sylinit.solvers.fit import Fit
from sylinit.solvers.problem import Problem
from sylinit.statistics.axes import Axes
from sylinit.statistics.moments import Covariance

VALUE_INFLATION = 1.2
"""By how much the degrees of freedom of a head of values count for more in cross-validation: with fewer rows than
features it would else explain all of them, the noise included."""

_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Equation:
    """A layer's code and the matrices that are made of it, once it is scaled to the root mean square of the rows.

    Attributes:
        code: the code in principal axes, before it is scaled.
        scale: its factor, ``[g, 1, 1]``.
        gram: ``A = S S^T / n``, ``[g, k, k]``.
        cross: ``S X'^T / n`` in principal axes, ``[g, k, r]``.
        units: where there are more units than numbers that a code is made of, ``Q [g, units, k]`` with orthonormal
            columns: the code above is ``S' = Q^T S``, and the weight of all units is ``Q W'``. No matrix of units by
            units is formed then.
    """

    code: LinearCode
    scale: Tensor
    gram: Tensor
    cross: Tensor
    units: Tensor | None = None

    def of_all_units(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Matrices ``[g, k, ...]`` of the code's dimensions, for all units."""
        if self.units is None:
            return parts
        return torch.bmm(self.units.to(parts[0]), torch.cat(parts, 2)).split([part.shape[2] for part in parts], 2)


def equation_of(problem: Problem, axes: Axes, cov: Covariance, config: Config) -> Equation:
    """Draw the code of a layer and form its equation."""
    code = _code(problem, axes, config)
    on_x, on_t, border, units = code.on_x, code.on_t, code.border, None
    if on_x.shape[1] > on_x.shape[2] + on_t.shape[2]:
        units, made_of = torch.linalg.qr(torch.cat([on_x, on_t], 2))
        border = None
        on_x, on_t = made_of.split([on_x.shape[2], on_t.shape[2]], 2)
    cross = torch.baddbmm(on_x * axes.variances.unsqueeze(1), on_t, axes.xt.mT)
    on_target = torch.baddbmm(torch.bmm(on_x, axes.xt), on_t, axes.tt.expand(len(on_t), -1, -1))  # S t^T
    gram = torch.baddbmm(torch.bmm(on_target, on_t.mT), cross, on_x.mT)
    size = gram.diagonal(dim1=1, dim2=2).mean(1)
    if units is not None:
        size.mul_(units.shape[2] / units.shape[1])  # the mean over all units
    square = (cov.variance / size.clamp_(min=_TINY)).clamp_(min=0).view(-1, 1, 1)
    scale = square.sqrt()
    return Equation(LinearCode(on_x, on_t, border), scale, gram.mul_(square), cross.mul_(scale), units)


def solve_in_axes(
    problem: Problem, axes: Axes, equation: Equation, count: Tensor, config: Config
) -> tuple[Tensor, float]:
    """The exact solution in principal axes, where ``B`` is diagonal and only ``A`` (k x k) is left to decompose.

    Returns:
        ``W``, ``[g, k, r]``, and lambda.
    """
    a, u = bordered_eigh(equation.gram, equation.code.border)
    cross, encoding_weight = torch.bmm(u.mT, equation.cross), problem.encoding_weight(config)
    if encoding_weight is None:
        values = problem.role == "values"
        errors, inflation = (config.value_standard_errors, VALUE_INFLATION) if values else (0.0, 1.0)
        encoding_weight = least_error_weight(a, axes.variances, cross, count, config.chunk, errors, inflation)
    inverse = pair_inverse(a, encoding_weight * axes.variances)
    return torch.bmm(u, inverse.mul_(cross).mul_(1 + encoding_weight)), encoding_weight


def judged(
    weight: Tensor,
    decoded: Tensor,
    encoded: Tensor,
    cross: Tensor,
    equation: Equation,
    cov: Covariance,
    encoding_weight: float,
    solver: str,
    config: Config,
) -> Fit:
    """Measure how far ``W`` satisfies its equation and what it leaves of code and rows.

    Args:
        weight: ``W``, ``[g, k, r]``.
        decoded: ``A W``.
        encoded: ``W Cov``.
        cross: ``S X^T / n``, in the coordinates of ``W``.
        equation: holds ``A``.
        cov: of the rows, in the coordinates of ``W``.
        encoding_weight: lambda.
        solver: its name.
        config: the constants of the method.
    """
    energies = torch.stack([encoded, decoded, cross]).mul_(weight).sum(3, dtype=torch.float64)  # [3, g, k]
    difference = torch.add(decoded, encoded, alpha=encoding_weight).sub_(cross, alpha=1 + encoding_weight)
    measured = [
        torch.linalg.vector_norm(difference, dtype=torch.float64),
        torch.linalg.vector_norm(cross, dtype=torch.float64),
        equation.gram.diagonal(dim1=1, dim2=2).sum(),
        *energies.sum((1, 2)).unbind(),
    ]
    remainder, size, code, encoded_energy, decoded_energy, agreement = torch.stack(measured).tolist()
    return Fit(
        weight=weight.double(),
        encoding_weight=encoding_weight,
        residual=remainder / max((1 + encoding_weight) * size, _TINY),
        encoding_error=1 + (encoded_energy - 2 * agreement) / max(code, _TINY),
        decoding_error=1 + (decoded_energy - 2 * agreement) / max(cov.sizes.rows * cov.dim, _TINY),
        solver=solver,
        alive=torch.sub(cov.variance, cov.mean_x.square().mean(1), alpha=config.constant_variance) > 1e-30,
        statistics=cov,
        scale=equation.scale,
        output_variance=energies[0].clamp_(min=0),
    )


def with_varied_targets(problem: Problem, cov: Covariance, config: Config) -> tuple[Problem, Covariance, str]:
    """Problem and statistics, or what takes their place where all rows have the same target, which then tells nothing.

    Returns:
        Both, and a note for the report.
    """
    sizes = zip(cov.sizes.targets, cov.sizes.means, strict=True)
    same = [variance <= config.constant_variance * mean for variance, mean in sizes]
    if not any(same):
        return problem, cov, ""
    # What is left of the targets' covariance is rounding.
    gone = torch.tensor(same, device=cov.tt.device).view(*cov.tt.shape[:-2], 1, 1)
    cov = replace(cov, xt=cov.xt.masked_fill(gone, 0), tt=cov.tt.masked_fill(gone, 0))
    if problem.is_head:
        return problem, cov, "all its rows have the same target, so it predicts that"
    if not problem.code.labels:
        return problem, cov, ""
    reason = "all its rows have the same label"
    remedy = "pass samples of more classes, or a code without labels such as code='pca'"
    code = problem.code.without_labels(problem.name, reason, remedy)
    return replace(problem, code=code), cov, f"{reason}, so no labels were used"


def _code(problem: Problem, axes: Axes, config: Config) -> LinearCode:
    if problem.role == "logits" and problem.units == 1:
        sign = axes.tt.new_tensor([-1.0, 1.0]).view(1, 1, 2)  # one logit: the second class against the first
        return LinearCode(axes.variances.new_zeros(1, 1, axes.variances.shape[1]), sign)
    return linear_code(problem.code, problem.name, axes, problem.units, problem.generator(), config)

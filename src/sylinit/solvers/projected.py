"""The projected solver: the leading principal axes, and conjugate gradients for what lies outside of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from sylinit.config import Config
from sylinit.linalg.projected import solve_projected
from sylinit.linalg.subspace import principal_subspace
from sylinit.solvers.equation import equation_of, judged, with_varied_targets
from sylinit.solvers.fit import Fit
from sylinit.solvers.problem import Declined, Problem, Source
from sylinit.statistics.axes import Axes
from sylinit.statistics.moments import Covariance


class Projected:
    """Finds the leading principal axes in float32, for wide layers whose code reads no others."""

    name = "projected"

    def applies(self, problem: Problem, source: Source, config: Config) -> bool:
        """Where the code reads few enough axes, and lambda is known, for to choose it takes all axes."""
        components = problem.code.leading_components(problem.units)
        return (
            config.solver == "auto"
            and problem.encoding_weight(config) is not None
            and components is not None
            and is_faster(components, source.dim, config)
        )

    def solve(self, problem: Problem, source: Source, config: Config) -> Fit | Declined:
        """From second moments in float32."""
        cov = source.covariance(torch.float32)
        if not problem.intercept:
            cov = cov.through_origin(problem.kept_mean(cov.mean_t, config))
        return source.together(lambda: fit_projected(cov, problem, config))


def fit_projected(cov: Covariance, problem: Problem, config: Config) -> Fit | Declined:
    """By the leading principal axes, from a randomized subspace, and conjugate gradients for what lies outside.

    Args:
        cov: the layer's covariance, of which float32 is enough.
        problem: one whose code reads the leading axes only.
        config: the constants of the method.

    Returns:
        Nothing where an axis is so weak that float32 cannot tell it from rounding, or where the residual is too large.
    """
    components = problem.code.leading_components(problem.units)
    encoding_weight = problem.encoding_weight(config)
    assert components is not None
    assert encoding_weight is not None
    problem, cov, note = with_varied_targets(problem, cov, config)
    generator = problem.generator()
    rank, steps = subspace_rank(components), config.subspace_steps
    found = [principal_subspace(xx, rank, generator, steps=steps) for xx in cov.xx]
    basis, image = (torch.stack([getattr(each, part) for each in found]) for part in ("basis", "image"))
    variances = torch.stack([each.variances for each in found])
    largest = variances[:, 0] + cov.mean_x.square().sum(1)  # of the sums, before the mean was taken off
    if bool((variances[:, -1] <= config.float32_variance * largest).any()):
        return Declined()
    basis = basis.double()
    axes = Axes(basis, variances, torch.bmm(basis.mT, cov.xt), cov.tt)
    equation = equation_of(problem, axes, cov, config)
    code, gram = equation.code, equation.gram
    on_t = torch.bmm(code.on_t, cov.xt.mT).to(image)
    cross = torch.baddbmm(on_t, code.on_x.to(image), image.mT).mul_(equation.scale)  # large: float32 from here on
    right = (1 + encoding_weight) * cross
    solved = [
        solve_projected(
            a,
            xx,
            c,
            subspace,
            encoding_weight=encoding_weight,
            tolerance=config.residual_tolerance,
            max_steps=config.max_steps,
            shared_factor_inputs=config.shared_factor_inputs,
            border=code.border,
        )
        for a, xx, c, subspace in zip(gram, cov.xx, right, found, strict=True)
    ]
    weight, remainder = (torch.stack([getattr(each, part) for each in solved]) for part in ("weight", "remainder"))
    decoded = torch.bmm(gram.to(weight), weight)
    encoded = (right - remainder).sub_(decoded).div_(encoding_weight)  # W Cov, without another product
    weight, decoded, encoded, cross = equation.of_all_units(weight, decoded, encoded, cross)
    fit = judged(weight, decoded, encoded, cross, equation, cov, encoding_weight, Projected.name, config)
    if not fit.residual <= config.residual_tolerance:
        return Declined(f"solved exactly, for the projected solver stopped at a residual of {fit.residual:.0e}")
    return replace(fit, note=note)


def is_faster(components: int, dim: int, config: Config) -> bool:
    """Whether the projected solver is `Config.projected_gain` times faster than the exact one.

    By counts of operations: the exact solver is an eigendecomposition in float64, about 9 d^3; the projected one is
    products in float32: ``4 d^2 r`` for the subspace of rank r, about ``6 d^2 k`` for the steps after it, and
    ``16 d r^2`` inside. On CPUs and GPUs alike an operation of the former takes two to three times as long.

    Args:
        components: leading principal components that the code reads.
        dim: d.
        config: the constants of the method.
    """
    rank, cost = subspace_rank(components), config.exact_operation_cost
    exact = cost * 9 * dim**3
    projected = dim**2 * (4 * rank + 6 * components) + 16 * dim * rank**2 + cost * 9 * rank**3
    return dim >= config.min_projected_inputs and config.projected_gain * projected < exact


def subspace_rank(components: int) -> int:
    """The rank of subspace from which ``components`` principal components are read: a tenth more, and ten."""
    return components + components // 10 + 10

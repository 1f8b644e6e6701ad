"""After the solve: the scale of each unit, its bias, and the head's temperature."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sylinit.config import Config
from sylinit.linalg.eigh import robust_eigvalsh
from sylinit.solvers.fit import Fit
from sylinit.solvers.problem import Role


def rescale(fit: Fit, role: Role, config: Config) -> Fit:
    """Scale each unit of a solution and give it the bias that centers it.

    * "units": output variance `Config.variance`, by ``w sqrt(variance) / (|w| s)`` with
      ``s^2 = max(u^T Cov u, variance_floor tr(Cov) / d)`` and ``u = w / |w|``; mean output zero.
    * "directions": Euclidean length `Config.filter_length`; mean output zero.
    * "logits": one scale for all, so that their centered root mean square is `Config.logit_deviation`.
    * "values": each output's least-squares slope on its target, ``cov(t, y) / var(y)``; its mean is the target's.

    Args:
        fit: as a solver returned it.
        role: what the outputs are.
        config: the constants of the method.

    Returns:
        The fit with ``weight [g, k, d]``, bias, dead units and rank.
    """
    cov, spread, weight = fit.statistics, fit.output_variance, fit.weight
    assert cov is not None
    assert spread is not None
    tiny = torch.finfo(weight.dtype).tiny
    offset: Tensor | float = 0.0
    if role == "logits":
        dead = spread <= 0
        factor = config.logit_deviation / spread.mean().clamp(min=tiny).sqrt().expand_as(spread)
    elif role == "values":
        dead = spread <= 0
        factor = (weight * cov.xt.mT).sum(2) / spread.clamp(min=tiny)
        offset = cov.mean_t
    else:
        length = weight.norm(dim=2)
        dead = length <= tiny
        length = length.masked_fill(dead, 1)
        if role == "directions" and config.filter_length is not None:
            factor = config.filter_length / length
        else:
            floor = (config.variance_floor * cov.variance).clamp(min=tiny).unsqueeze(1)
            factor = (config.variance / torch.maximum(spread / length.square(), floor)).sqrt() / length
    weight = weight * factor.unsqueeze(2)
    rank = numerical_rank(weight)
    weight = cov.from_coordinates(weight)
    bias = offset - (weight @ cov.mean_x.unsqueeze(2)).squeeze(2)
    return replace(fit, weight=weight, bias=bias, dead=dead, rank=rank, statistics=None, output_variance=None)


def numerical_rank(weight: Tensor) -> int:
    """Numerical rank of ``[g, k, d]``, summed over groups, from the smaller of the two Gram matrices."""
    small = weight if weight.shape[1] <= weight.shape[2] else weight.mT
    values = robust_eigvalsh(torch.bmm(small, small.mT))
    return int((values > 1e-10 * values[:, -1:]).sum())

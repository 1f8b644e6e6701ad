"""After the solve: the scale of each unit, its bias, and the head's temperature."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sylinit.config import Config
from sylinit.linalg.eigh import robust_rank
from sylinit.solvers.fit import Fit
from sylinit.solvers.problem import Role, above_chance


def rescale(fit: Fit, role: Role, config: Config, deviation: float = 1.0, exclusive: bool = True) -> Fit:
    """Scale each unit of a solution and give it the bias that centers it.

    * "units": output variance `Config.variance`, by ``w sqrt(variance) / s`` with
      ``s^2 = max(w^T Cov w, variance_floor |w|^2 tr(Cov) / d)``; mean output zero.
    * "directions": Euclidean length `Config.filter_length`; mean output zero.
    * "logits": one scale for all, so that their centered root mean square is `Config.logit_deviation`; their mean is
      `Config.prior` times `frequencies` on that scale, or less (`carried`).
    * "values": each output's least-squares slope on its target, ``cov(t, y) / var(y)``; its mean is the target's.

    Args:
        fit: as a solver returned it.
        role: what the outputs are.
        config: the constants of the method.
        deviation: of "units", over what `Config.variance` gives.
        exclusive: whether "logits" are of classes that exclude each other, rather than of labels.

    Returns:
        The fit with ``weight [g, k, d]``, bias, dead units and rank.
    """
    cov, spread, weight = fit.statistics, fit.output_variance, fit.weight
    assert cov is not None
    assert spread is not None
    tiny = torch.finfo(weight.dtype).tiny
    offset: Tensor | float = 0.0
    prior = None
    if role == "logits":
        dead = spread <= 0
        factor = config.logit_deviation / spread.mean().clamp(min=tiny).sqrt().expand_as(spread)
        whole = factor * frequencies(fit, exclusive)
        prior = carried(whole, cov.mean_t, exclusive, config)
        offset = prior * whole
    elif role == "values":
        dead = spread <= 0
        factor = (weight * cov.xt.mT).sum(2) / spread.clamp(min=tiny)
        offset = cov.mean_t
    else:
        length = weight.norm(dim=2)
        dead = length <= tiny
        if role == "directions" and config.filter_length is not None:
            factor = config.filter_length / length.masked_fill_(dead, 1)
        else:
            floor = config.variance_floor * cov.variance.unsqueeze(1) * length.square()
            factor = torch.maximum(spread, floor).clamp_(min=tiny).rsqrt_().mul_(deviation * config.variance**0.5)
    weight = weight * factor.unsqueeze(2)
    rank = numerical_rank(weight)
    weight = cov.from_coordinates(weight)
    bias = offset - torch.bmm(weight, cov.mean_x.unsqueeze(2)).squeeze(2)
    return replace(
        fit,
        weight=weight,
        bias=bias,
        dead=dead,
        rank=rank,
        prior=prior,
        statistics=None,
        scale=None,
        output_variance=None,
    )


def frequencies(fit: Fit, exclusive: bool) -> Tensor:
    """How frequent classes or labels are, in the logits of a solution before they are scaled, ``[g, k]``.

    A least-squares fit of a target ``t`` is ``y + mean(t)`` with ``y`` the solution's centered output over
    ``(1 + lambda) / lambda`` times the code's scale, and decides where it passes ``1/c`` of c classes, 1/2 of a label.
    """
    cov = fit.statistics
    assert cov is not None
    assert fit.scale is not None
    share = above_chance(cov.mean_t, exclusive)
    if fit.weight.shape[1] < share.shape[-1]:  # one logit: the second class against the first
        share = share[..., 1:] - share[..., :1]
    return fit.scale.squeeze(2) * share * ((1 + fit.encoding_weight) / max(fit.encoding_weight, 1e-12))


def carried(whole: Tensor, share: Tensor, exclusive: bool, config: Config) -> Tensor:
    """What part of the frequencies a head's bias carries: `Config.prior`, or less where features tell next to nothing.

    The scale that brings the logits of such features to `Config.logit_deviation` would blow the frequencies up beyond
    any that training could take back. The bias of the most frequent class is therefore at most the logarithm of how
    many times it is as frequent as at chance, ``log(c max(p))``; that of a label, or of one logit, ``log(2 max(p))``.
    The loss of the biases alone is then no larger than that of a uniform guess.

    Args:
        whole: `frequencies` on the scale of the logits, ``[g, k]``.
        share: of each class or label, ``[g, c]`` or ``[c]``.
        exclusive: whether they exclude each other.
        config: the constants of the method.

    Returns:
        ``[g, 1]`` of classes, ``[g, k]`` of labels.
    """
    if exclusive:
        ratio = share.shape[-1] * share.amax(-1, keepdim=True)
        size = whole.abs() if whole.shape[1] == 1 else whole.amax(1, keepdim=True)
    else:
        ratio, size = 2 * torch.maximum(share, 1 - share), whole.abs()
    return (ratio.log().clamp(min=0) / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(max=config.prior)


def numerical_rank(weight: Tensor) -> Tensor:
    """Numerical rank of ``[g, k, d]``, summed over groups: of the smaller of the two Gram matrices, to 1e-10."""
    small = weight if weight.shape[1] <= weight.shape[2] else weight.mT
    return robust_rank(torch.bmm(small, small.mT), 1e-10)

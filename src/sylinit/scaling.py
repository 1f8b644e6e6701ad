"""After the solve: the scale of each unit, its bias, the head's temperature, the statistics of normalization layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from sylinit.config import Config
from sylinit.errors import SylinitError
from sylinit.fit import Fit
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
    return int(torch.linalg.matrix_rank(small @ small.mT, hermitian=True, rtol=1e-10).sum())


NORM_SCALE = 0.5
"""Weight of a normalisation layer at the start, instead of one, where training samples are few.

Between layers that are calibrated after it this changes no function, and it shrinks what residual blocks add up to. So
the head's weights start longer and its input shorter: the same step of training turns it less.
"""

NORM_OFFSET = 0.5
"""Mean output of a normalisation layer at the start, in standard deviations of it, where training samples are few.

A rectifier behind it then passes 69 % of a Gaussian signal instead of a half. Each rectifier drops part of what the
units told apart; in a deep network that adds up. Where no rectifier follows, the next layer takes the offset off again.
"""


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer with running statistics: BatchNorm, SyncBatchNorm or InstanceNorm."""
    return isinstance(module, (_BatchNorm, _InstanceNorm)) and module.running_mean is not None


def check_channels(name: str, module: Any, x: Tensor) -> None:
    """Refuse an input whose channels are not those of a normalisation layer.

    Raises:
        SylinitError: naming the layer.
    """
    if _batched(module, x).shape[1:2] != (module.num_features,):
        raise SylinitError(
            f"layer {name!r} ({type(module).__name__}): expected {module.num_features} channels in its input, "
            f"got shape {list(x.shape)}; make the layer or the data fit"
        )


def norm_sums(module: Any, x: Tensor) -> Tensor:
    """``[3, channels]`` float64: count, sum and sum of squares of each channel, over samples and positions.

    Sums over the positions of a sample run in float32, all others in float64: the cut into batches changes nothing.
    """
    rows = _batched(module, x)
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    count = rows.numel() / module.num_features
    each = rows.reshape(*rows.shape[:2], -1)
    total = each.sum(2).double().sum(0)
    squares = torch.linalg.vector_norm(each, dim=2).double().square().sum(0)
    if bool((1.01 * total.square() > count * squares).any()):
        # A mean ten deviations from zero: float32 squares would lose the variance. Slower, this accumulates in double.
        mean, variance = (part.double() for part in torch.batch_norm_update_stats(rows, None, None, 0.0))
        total, squares = mean * count, (variance + mean.square()) * count
    return torch.stack([torch.full_like(total, count), total, squares])


def _batched(module: nn.Module, x: Tensor) -> Tensor:
    """The input as ``[samples, channels, ...]``: InstanceNorm takes single samples, too."""
    dims = next((dims for dims in (1, 2, 3) if type(module).__name__.endswith(f"{dims}d")), 0)
    return x.unsqueeze(0) if isinstance(module, _InstanceNorm) and x.ndim == dims + 1 else x


@torch.no_grad()
def write_statistics(module: Any, sums: Tensor) -> None:
    """Set the running mean and (unbiased) variance of a normalisation layer to those of the pooled sums."""
    count, total, squares = sums
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0) * count / (count - 1).clamp(min=1)
    module.running_mean.copy_(mean)
    module.running_var.copy_(variance)


@torch.no_grad()
def start_fresh(module: Any, scale: float = NORM_SCALE, offset: float = NORM_OFFSET) -> bool:
    """Set weight and bias of a normalisation layer that is as PyTorch makes it: weight one, bias zero.

    The weight becomes ``scale``, the bias ``offset`` of it.

    Returns:
        Whether it was; one that has been trained, frozen or started otherwise (at zero, say) is left as it is.
    """
    weight, bias = module.weight, module.bias
    if weight is None or not weight.requires_grad or bool((weight != 1).any() | (bias != 0).any()):
        return False
    weight.fill_(scale)
    if bias.requires_grad:
        bias.fill_(offset * scale)
    return True

"""After the solve: the scale of each unit, its bias, the head's temperature, the statistics of normalisation layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from sylinit.errors import SylinitError
from sylinit.statistics.moments import Covariance

FLOOR = 0.1
"""Variance along a unit's direction is taken to be at least this share of the mean over all directions."""

LOGIT_DEVIATION = 0.5
"""Root mean square of a classifier's centred logits at the start."""

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


@dataclass(frozen=True)
class Calibrated:
    """Scaled ``weight [g, k, d]``, the ``offset [g, k]`` of its mean output, and which units are ``dead [g, k]``."""

    weight: Tensor
    offset: Tensor
    dead: Tensor


def calibrate_units(weight: Tensor, cov: Covariance, variance: float) -> Calibrated:
    """Scale each unit to output variance ``variance`` on the calibration rows; its mean output is to be zero.

    ``w <- w sqrt(variance) / (|w| s)`` with ``s^2 = max(u^T Cov u, FLOOR tr(Cov) / d)``, ``u = w / |w|``.
    The floor keeps a direction of noise from being blown up.

    Args:
        weight: ``[g, k, d]``.
        cov: of the rows.
        variance: of each unit's output; positive.
    """
    tiny = torch.finfo(weight.dtype).tiny
    length = weight.norm(dim=2, keepdim=True)
    direction = weight / length.clamp(min=tiny)
    along = output_variance(direction, cov).unsqueeze(2)
    floor = (FLOOR * cov.variance).clamp(min=tiny).view(-1, 1, 1)
    scaled = direction * (variance / torch.maximum(along, floor)).sqrt()
    return Calibrated(scaled, torch.zeros_like(scaled[:, :, 0]), (length <= tiny).squeeze(2))


def calibrate_directions(weight: Tensor, length: float = 2**0.5) -> Calibrated:
    """Give every unit the Euclidean length that He's start gives it, sqrt(2), where training should move it little.

    Normalisation undoes their scale, so it changes nothing in the function. But the longer a unit, the smaller its step
    in training: a unit along a strong direction, scaled to unit variance, would be short and move far at each step.
    """
    size = weight.norm(dim=2, keepdim=True)
    tiny = torch.finfo(weight.dtype).tiny
    return Calibrated(
        weight * (length / size.clamp(min=tiny)), torch.zeros_like(weight[:, :, 0]), (size <= tiny).squeeze(2)
    )


def calibrate_logits(weight: Tensor, cov: Covariance, deviation: float = LOGIT_DEVIATION) -> Calibrated:
    """Keep the head's direction: one scale for all logits, so that their centred root mean square is ``deviation``."""
    spread = output_variance(weight, cov)
    scale = deviation / spread.mean().clamp(min=torch.finfo(weight.dtype).tiny).sqrt()
    return Calibrated(weight * scale, torch.zeros_like(spread), spread <= 0)


def calibrate_regression(weight: Tensor, cov: Covariance) -> Calibrated:
    """Scale each output to its least-squares slope on the target, ``cov(t, y) / var(y)``; its mean is the target's."""
    spread = output_variance(weight, cov)
    slope = (weight * cov.xt.mT).sum(2) / spread.clamp(min=torch.finfo(weight.dtype).tiny)
    return Calibrated(weight * slope.unsqueeze(2), cov.mean_t.expand_as(spread), spread <= 0)


def output_variance(weight: Tensor, cov: Covariance) -> Tensor:
    """Output variance of each unit, ``diag(W Cov W^T)``, shape ``[g, k]``."""
    return ((weight.to(cov.xx) @ cov.xx) * weight).sum(2).clamp(min=0)


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
def start_fresh(module: Any) -> bool:
    """Set weight and bias of a normalisation layer that is as PyTorch makes it: weight one, bias zero.

    The weight becomes `NORM_SCALE`, the bias `NORM_OFFSET` of it.

    Returns:
        Whether it was; one that has been trained, frozen or started otherwise (at zero, say) is left as it is.
    """
    weight, bias = module.weight, module.bias
    if weight is None or not weight.requires_grad or bool((weight != 1).any() | (bias != 0).any()):
        return False
    weight.fill_(NORM_SCALE)
    if bias.requires_grad:
        bias.fill_(NORM_OFFSET * NORM_SCALE)
    return True

"""Normalization layers with running statistics: the sums that they need, and what is written into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from sylinit.errors import SylinitError


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a module is a normalization layer with running statistics: BatchNorm, SyncBatchNorm or InstanceNorm."""
    return isinstance(module, (_BatchNorm, _InstanceNorm)) and module.running_mean is not None


def check_channels(name: str, module: Any, x: Tensor) -> None:
    """Refuse an input whose channels are not those of a normalization layer.

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
    total, length = rows, rows
    if rows.ndim > 2:
        each = rows.flatten(2)
        total, length = each.sum(2), torch.linalg.vector_norm(each, dim=2)
    total, squares = total.sum(0, dtype=torch.float64), length.double().square().sum(0)
    sums = torch.stack([torch.full_like(total, count), total, squares])
    _, totals, energies = sums.tolist()
    if any(1.01 * total**2 > count * energy for total, energy in zip(totals, energies, strict=True)):
        # A mean ten deviations from zero: float32 squares would lose the variance. Slower, this accumulates in double.
        exact = rows.double() if rows.ndim == 2 else rows  # which it does not where there are no positions
        mean, variance = (part.double() for part in torch.batch_norm_update_stats(exact, None, None, 0.0))
        sums[1], sums[2] = mean * count, (variance + mean.square()) * count
    return sums


def _batched(module: nn.Module, x: Tensor) -> Tensor:
    """The input as ``[samples, channels, ...]``: InstanceNorm takes single samples, too."""
    dims = next((dims for dims in (1, 2, 3) if type(module).__name__.endswith(f"{dims}d")), 0)
    return x.unsqueeze(0) if isinstance(module, _InstanceNorm) and x.ndim == dims + 1 else x


@torch.no_grad()
def write_statistics(module: Any, sums: Tensor) -> None:
    """Set the running mean and (unbiased) variance of a normalization layer to those of the pooled sums."""
    count, total, squares = sums
    mean = total / count
    variance = torch.addcmul(squares, total, mean, value=-1).clamp_(min=0)
    module.running_mean.copy_(mean)
    module.running_var.copy_(variance.div_((count - 1).clamp_(min=1)))


@torch.no_grad()
def start_fresh(module: Any, scale: float, offset: float) -> bool:
    """Set weight and bias of a normalization layer that is as PyTorch makes it: weight one, bias zero.

    Args:
        module: the layer.
        scale: its new weight.
        offset: its new bias, in deviations of its output.

    Returns:
        Whether it was; one that has been trained, frozen or started otherwise (at zero, say) is left as it is.
    """
    weight, bias = module.weight, module.bias
    if weight is None or not weight.requires_grad:
        return False
    weights, biases = torch.stack([weight, bias]).tolist()
    if any(value != 1 for value in weights) or any(biases):
        return False
    weight.fill_(scale)
    if bias.requires_grad:
        bias.fill_(offset * scale)
    return True

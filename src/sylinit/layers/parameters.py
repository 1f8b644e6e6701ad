"""Reading and writing a module's parameters, plain or parametrized, without leaving a trace."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sylinit.errors import UnsupportedLayerError


def leaves(module: nn.Module, name: str) -> tuple[nn.Parameter, ...]:
    """The leaf parameters behind an attribute: itself, or the originals of its parametrization."""
    if parametrize.is_parametrized(module, name):
        return tuple(_parametrization(module, name).parameters())
    value = module._parameters.get(name)
    return () if value is None else (value,)


def _parametrization(module: nn.Module, name: str) -> nn.Module:
    return module.parametrizations[name]  # type: ignore[index, return-value]


@torch.no_grad()
def value(module: nn.Module, name: str) -> Tensor:
    """The tensor that an attribute stands for; reading it changes nothing."""
    if not parametrize.is_parametrized(module, name):
        return getattr(module, name)
    steps = list(_parametrization(module, name).modules())
    modes = [step.training for step in steps]
    try:
        for step in steps:  # in training mode, spectral_norm iterates whenever it is read
            step.training = False
        return getattr(module, name)
    finally:
        for step, mode in zip(steps, modes, strict=True):
            step.training = mode


def assign(module: nn.Module, name: str, numbers: Tensor) -> None:
    """Give a parameter new numbers in place; a parametrized one through its right inverse, if that is exact."""
    old = value(module, name)
    if not parametrize.is_parametrized(module, name):
        old.copy_(numbers)
        return
    numbers = numbers.to(old)
    # A norm has no direction at zero: zeros become numbers too small to be seen beside the others.
    precision, largest = torch.finfo(old.dtype).eps, numbers.abs().max()
    numbers = torch.where(numbers == 0, precision**2 * largest, numbers)
    try:
        setattr(module, name, numbers)
        error, cause = (value(module, name) - numbers).abs().max(), None
    except Exception as failure:  # a parametrization is anybody's code
        error, cause = largest.new_tensor(math.nan), failure
    if not error <= 16 * precision * largest:
        steps = ", ".join(type(step).__name__ for step in _parametrization(module, name).children())
        raise UnsupportedLayerError(f"its parametrization ({steps}) cannot represent a given {name}") from cause


@contextmanager
def all_or_nothing(module: nn.Module) -> Iterator[None]:
    """Undo every change to a module's tensors if the body fails, and keep them where they are in memory.

    A right inverse gives its tensors new memory, which would cut them off from whatever shares the old.
    """
    slots: list[dict[str, Any]] = [slot for part in module.modules() for slot in (part._parameters, part._buffers)]
    held = [(slot, name) for slot in slots for name, tensor in slot.items() if tensor is not None]
    tensors = [slot[name] for slot, name in held]
    places = [tensor.data for tensor in tensors]
    before = [place.clone() for place in places]
    try:
        yield
        after = [slot[name].detach().clone() for slot, name in held]
    except BaseException:
        after = before
        raise
    finally:
        for (slot, name), tensor, place, numbers in zip(held, tensors, places, after, strict=True):
            slot[name] = tensor
            tensor.data = place
            place.copy_(numbers)

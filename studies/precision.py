"""The precision that networks are trained and measured in: float32, or mixed with bfloat16 on any processor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sylinit import SylinitError
from sylinit.comparison import store

PRECISIONS = ("float32", "bfloat16")
"""Of training steps and measurements."""


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Mixed precision on `device` where `precision` is ``"bfloat16"``, nothing where it is ``"float32"``.

    Where `rounds` says so, convolutions and linear layers go through `RoundedProducts`.
    """
    if precision not in PRECISIONS:
        raise SylinitError(f"precision: expected 'float32' or 'bfloat16', got {precision!r}")
    mixed = precision == "bfloat16"
    products = RoundedProducts() if mixed and rounds(device) else nullcontext()
    with torch.autocast(device.type, torch.bfloat16, enabled=mixed), products:
        yield


class RoundedProducts(TorchFunctionMode):
    """Convolutions and linear layers of numbers rounded to bfloat16, computed in float32.

    A product of two bfloat16 numbers is exact in float32, and instructions for bfloat16 add such products up in float32
    as well. So outputs and gradients are theirs up to the order of the sums, at the speed of float32; PyTorch's own
    emulation is far slower.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, on rounded arguments where it multiplies."""
        kwargs = kwargs or {}
        if func not in (torch.conv1d, torch.conv2d, torch.conv3d, F.linear):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*map(_rounded, args), **{name: _rounded(value) for name, value in kwargs.items()}).bfloat16()


def _rounded(value: Any) -> Any:
    # the way back rounds the gradient as well: a cast's gradient has the type that the cast began with
    return value.bfloat16().float() if isinstance(value, Tensor) else value


def rounds(device: torch.device) -> bool:
    """Whether mixed precision on `device` is `RoundedProducts`: on a processor without bfloat16 instructions."""
    able: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch has none
    return device.type == "cpu" and not (able.get("avx512_bf16") or able.get("amx_bf16"))


def fast_precision(device: torch.device) -> str:
    """``"bfloat16"``, but ``"float32"`` on a GPU that would have to emulate it, which is slower than that."""
    slow = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "float32" if slow else "bfloat16"


@functools.cache
def environment() -> dict[str, Any]:
    """What a result was made with; ``bfloat16`` says whether mixed precision is native or that of `RoundedProducts`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {**store.environment(), "bfloat16": "rounded" if rounds(device) else "native"}

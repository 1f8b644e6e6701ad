"""PyTorch's process-wide switches: read, compared, put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Switch = tuple[Callable[[], Any], Callable[[Any], Any]]
"""How a switch is read and set."""

OF_THE_PROCESS: dict[str, Switch] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "the use of deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "attention's fast path": (torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    "flash attention": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    "memory-efficient attention": (
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.enable_mem_efficient_sdp,
    ),
    "plain attention": (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    "cuDNN's attention": (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
}
"""The switches that all threads share, by name."""

OF_THE_THREAD: dict[str, Switch] = {
    "gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "autocast's cache": (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    "autocast on the CPU": (
        lambda: torch.is_autocast_enabled("cpu"),
        lambda value: torch.set_autocast_enabled("cpu", value),
    ),
    "autocast's dtype on the CPU": (
        lambda: torch.get_autocast_dtype("cpu"),
        lambda value: torch.set_autocast_dtype("cpu", value),
    ),
    "autocast on CUDA devices": (
        lambda: torch.is_autocast_enabled("cuda"),
        lambda value: torch.set_autocast_enabled("cuda", value),
    ),
    "autocast's dtype on CUDA devices": (
        lambda: torch.get_autocast_dtype("cuda"),
        lambda value: torch.set_autocast_dtype("cuda", value),
    ),
}
"""The switches that each thread has of its own, by name."""

SWITCHES = OF_THE_PROCESS | OF_THE_THREAD


def read_flags() -> dict[str, Any]:
    """The present state of every switch."""
    return {name: get() for name, (get, _) in SWITCHES.items()}


def restore_flags(flags: dict[str, Any]) -> None:
    """Set every switch that is not as it was."""
    for name, value in flags.items():
        get, set_ = SWITCHES[name]
        if get() != value:
            set_(value)


def changed_flags(flags: dict[str, Any]) -> list[str]:
    """The names of the process-wide switches that are not as they were."""
    return [name for name, (get, _) in OF_THE_PROCESS.items() if get() != flags[name]]

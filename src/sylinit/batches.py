"""What a user may pass as calibration data, read into one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sylinit.errors import SylinitError


@dataclass(frozen=True)
class Batch:
    """One calibration batch.

    Attributes:
        raw: as the user gave it, on the model's device: what ``forward=`` receives.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        target: class indices, soft labels or real values, or None.
        samples: the size of the leading dimension.
    """

    raw: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor | None
    samples: int


def read_batches(batches: Any, device: torch.device, dtype: torch.dtype | None, *, custom: bool) -> list[Batch]:
    """Read all batches, move them to ``device`` and check that they fit together.

    Args:
        batches: a tensor, or an iterable of batches: ``x``, ``(x, y)``, ``(x1, x2, y)`` or a mapping with the target
            under ``labels``.
        device: the model's device.
        dtype: floating-point inputs are cast to it; None leaves them.
        custom: the user has a ``forward=``, so only the target and the size are read.

    Raises:
        SylinitError: no batches, an empty batch, batches of different widths, or targets of another length.
    """
    if isinstance(batches, Tensor):
        raise SylinitError(
            "batches: expected an iterable of batches, got a single tensor; pass [x] or [(x, y)], or a DataLoader"
        )
    if not isinstance(batches, Iterable):
        raise SylinitError(f"batches: expected an iterable of batches, got {type(batches).__name__}; pass [(x, y)]")
    read = [_read(batch, number, device, dtype, custom) for number, batch in enumerate(batches)]
    if not read:
        raise SylinitError(
            "batches: there are none; a generator or an iterator that was used before is exhausted: pass a fresh one"
        )
    _agree(read)
    return read


def _read(batch: Any, number: int, device: torch.device, dtype: torch.dtype | None, custom: bool) -> Batch:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    target: Any = None
    moved = _move(batch, device, dtype)
    if isinstance(moved, Mapping):
        kwargs = dict(moved)
        target = kwargs.get("labels")
    elif isinstance(moved, (tuple, list)):
        if len(moved) == 0:
            raise SylinitError(f"batches: batch {number} is an empty {type(batch).__name__}; expected x or (x, y)")
        args = tuple(moved[:-1]) if len(moved) > 1 else tuple(moved)
        # The target must come as the user made it: casting would round real-valued targets.
        target = _move(batch[-1], device, None) if len(moved) > 1 else None
    else:
        args = (moved,)
    inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 0]
    if not inputs and not custom:
        raise SylinitError(
            f"batches: batch {number} holds no tensor of input (it is {_describe(batch)}); "
            "expected x, (x, y) or a mapping, or pass forward=lambda model, batch: ..."
        )
    samples = inputs[0].shape[0] if inputs else 0
    if inputs and samples == 0:
        raise SylinitError(f"batches: batch {number} is empty (its input has shape {list(inputs[0].shape)}); drop it")
    if target is not None:
        target = torch.as_tensor(target, device=device)
        if custom and not inputs:
            samples = target.shape[0]
        if target.ndim == 0 or target.shape[0] != samples:
            raise SylinitError(
                f"batches: batch {number} has {samples} samples and a target of shape {list(target.shape)}; "
                "the target's first dimension must count the samples"
            )
        if target.is_complex():
            raise SylinitError(f"batches: batch {number} has a complex target; pass real values or class indices")
    return Batch(moved, args, kwargs, target, samples)


def _agree(batches: list[Batch]) -> None:
    """Batches must have the same kind of input and target; lengths of sequences and images may differ."""
    first = batches[0]
    for number, batch in enumerate(batches):
        if (batch.target is None) != (first.target is None):
            raise SylinitError(
                f"batches: batch {0 if first.target is None else number} has no target while others have one"
            )
        if len(batch.args) != len(first.args) or batch.kwargs.keys() != first.kwargs.keys():
            raise SylinitError(f"batches: batch {number} has other inputs than batch 0")
        pairs = zip((*batch.args, *batch.kwargs.values()), (*first.args, *first.kwargs.values()), strict=True)
        for mine, other in pairs:
            if not (isinstance(mine, Tensor) and isinstance(other, Tensor)):
                continue
            different_width = mine.ndim == 2 and mine.is_floating_point() and mine.shape[1] != other.shape[1]
            different_channels = mine.ndim >= 4 and mine.shape[1] != other.shape[1]
            if mine.ndim != other.ndim or different_width or different_channels:
                raise SylinitError(
                    f"batches: batch {number} has input of shape {list(mine.shape)}, batch 0 of shape "
                    f"{list(other.shape)}; all batches must have the same width"
                )
        mine_t, first_t = batch.target, first.target
        if mine_t is None or first_t is None:
            continue
        if mine_t.is_floating_point() != first_t.is_floating_point() or mine_t.shape[1:] != first_t.shape[1:]:
            raise SylinitError(
                f"batches: the target of batch {number} is {_describe(mine_t)}, that of batch 0 {_describe(first_t)}; "
                "all targets must be of one kind"
            )


def _move(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, Tensor):
        cast = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return value.to(device=device, dtype=cast)
    if isinstance(value, Mapping):
        return {key: _move(item, device, dtype) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_move(item, device, dtype) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_move(item, device, dtype) for item in value)
    return value


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}".replace("torch.", "")
    return f"a {type(value).__name__}"

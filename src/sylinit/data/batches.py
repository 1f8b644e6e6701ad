"""What a user may pass as calibration data, read into one form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
        samples: the size of the leading dimension; with a ``forward=`` that of the target, where there is one.
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
        SylinitError: no batches, an empty batch, batches of different dimensions, or targets of another length.
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
    _agree(read, custom)
    return read


def _read(batch: Any, number: int, device: torch.device, dtype: torch.dtype | None, custom: bool) -> Batch:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    target: Any = None
    moved = _move(batch, device, dtype)
    # The target must come as the user made it: casting would round real-valued targets.
    if isinstance(moved, Mapping):
        kwargs = dict(moved)
        target = _move(batch.get("labels"), device, None)
    elif isinstance(moved, (tuple, list)):
        if len(moved) == 0:
            raise SylinitError(f"batches: batch {number} is an empty {type(batch).__name__}; expected x or (x, y)")
        args = tuple(moved[:-1]) if len(moved) > 1 else tuple(moved)
        target = _move(batch[-1], device, None) if len(moved) > 1 else None
    else:
        args = (moved,)
    inputs = [value for value in _tensors((args, kwargs)) if value.ndim > 0]
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
        if custom and target.ndim:  # only the user's own function knows how the inputs lie
            samples = target.shape[0]
        if target.ndim == 0 or target.shape[0] != samples:
            raise SylinitError(
                f"batches: batch {number} has {samples} samples and a target of shape {list(target.shape)}; "
                "the target's first dimension must count the samples (if the input's second does, pass "
                "forward=lambda model, batch: model(batch[0]))"
            )
        if target.is_complex():
            raise SylinitError(f"batches: batch {number} has a complex target; pass real values or class indices")
    return Batch(moved, args, kwargs, target, samples)


def _agree(batches: list[Batch], custom: bool) -> None:
    """Batches must have the same kind of input and target; lengths of sequences and images may differ.

    Features that do not fit are refused by the layer that meets them.
    """
    first = batches[0]
    for number, batch in enumerate(batches):
        if (batch.target is None) != (first.target is None):
            raise SylinitError(
                f"batches: batch {0 if first.target is None else number} has no target while others have one"
            )
        if not custom:  # else the inputs are the affair of the user's own function
            _require_like(batch, first, number)
        mine, other = batch.target, first.target
        if mine is not None and other is not None and _form(mine) != _form(other):
            raise SylinitError(
                f"batches: the target of batch {number} is {_describe(mine)}, that of batch 0 {_describe(other)}; "
                "all targets must be of one kind"
            )


def _require_like(batch: Batch, first: Batch, number: int) -> None:
    """Refuse a batch with other inputs than the first."""
    if len(batch.args) != len(first.args) or batch.kwargs.keys() != first.kwargs.keys():
        raise SylinitError(f"batches: batch {number} has other inputs than batch 0")
    pairs = zip((*batch.args, *batch.kwargs.values()), (*first.args, *first.kwargs.values()), strict=True)
    for mine, other in pairs:
        if not (isinstance(mine, Tensor) and isinstance(other, Tensor)):
            continue
        if mine.ndim != other.ndim or (mine.ndim >= 4 and mine.shape[1] != other.shape[1]):
            raise SylinitError(
                f"batches: batch {number} has input of shape {list(mine.shape)}, batch 0 of shape "
                f"{list(other.shape)}; all batches must have the same dimensions and channels"
            )


def _form(target: Tensor) -> tuple[bool, int, int]:
    """What targets must agree in: class indices may come at any number of positions, values in one width."""
    real = target.is_floating_point()
    return real, target.ndim, target.shape[-1] if real and target.ndim > 1 else 0


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors inside, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


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

"""Batches as nested structures of tensors: parts are concatenated to one batch, samples are picked from it.

Types are kept: tuples with names, mappings of any class, subclasses of tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sylinit.layers.inputs import tensors

__all__ = ["MASKS", "PADDING", "CannotConcatenate", "concatenate", "map_leaves", "select", "tensors"]

MASKS = ("attention_mask",)
"""Keys of a mapping under which 1 marks the places of a sequence that hold data and 0 its padding."""

PADDING = {"labels": -100, "label": -100, "target": -100, "targets": -100, "y": -100}
"""What fills the places that are added to sequences of targets; everything else gets zeros."""


class CannotConcatenate(Exception):
    """Why parts cannot become one batch."""


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same structure with every leaf changed; the very same object where nothing changes."""
    if isinstance(value, Mapping):
        parts = {key: map_leaves(item, change) for key, item in value.items()}
        return value if all(parts[key] is value[key] for key in value) else _mapping_like(value, parts)
    if isinstance(value, (tuple, list)):
        items = [map_leaves(item, change) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else _sequence_like(value, items)
    return change(value)


def concatenate(parts: Sequence[Any], sizes: Sequence[int], *, strict: bool, pad: int = 0) -> Any:
    """One batch of all parts.

    A tensor whose first dimension counts the samples is concatenated along it; what is equal in all parts is kept;
    sequences of different lengths in a mapping with a mask are padded.

    Args:
        parts: of equal structure.
        sizes: number of samples of each.
        strict: refuse tensors of which two dimensions might count the samples.
        pad: what fills added places of ``input_ids``.

    Raises:
        CannotConcatenate: the parts differ in something else than their samples.
    """
    first = parts[0]
    if any(type(part) is not type(first) for part in parts):
        raise CannotConcatenate("their types differ")
    if isinstance(first, Mapping):
        if any(part.keys() != first.keys() for part in parts):
            raise CannotConcatenate("their keys differ")
        parts = _padded(parts, pad)
        joined = {key: concatenate([part[key] for part in parts], sizes, strict=strict) for key in first}
        return _mapping_like(first, joined)
    if isinstance(first, (tuple, list)):
        if _is_list_of_samples(first) and all(len(part) == size for part, size in zip(parts, sizes, strict=True)):
            return _sequence_like(first, [item for part in parts for item in part])
        if any(len(part) != len(first) for part in parts):
            raise CannotConcatenate("their lengths differ")
        items = [concatenate(list(each), sizes, strict=strict) for each in zip(*parts, strict=True)]
        return _sequence_like(first, items)
    if isinstance(first, Tensor):
        return _concatenated(parts, sizes, strict)
    if _is_array(first):
        return _concatenated([torch.as_tensor(part, device="cpu") for part in parts], sizes, strict).numpy()
    if all(part is first for part in parts) or (isinstance(first, (int, float, str)) and len(set(parts)) == 1):
        return first
    raise CannotConcatenate(f"they hold a {type(first).__name__}")


def select(value: Any, index: Tensor, samples: int) -> Any:
    """The chosen samples of a batch.

    Args:
        value: the batch.
        index: int64 ``[n]``, on the CPU.
        samples: how many the batch holds: tensors of another first dimension belong to all samples.
    """

    def change(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.size(0) == samples:
            if leaf.is_nested:
                return torch.nested.as_nested_tensor([leaf[i] for i in index.tolist()], layout=leaf.layout)
            if leaf.layout is not torch.strided:
                return leaf.to_dense().index_select(0, index.to(leaf.device)).to_sparse(layout=leaf.layout)
            return leaf.index_select(0, index.to(leaf.device))
        if _is_array(leaf) and leaf.shape[:1] == (samples,):
            return leaf[index.numpy()]
        return leaf

    if isinstance(value, (tuple, list)) and _is_list_of_samples(value) and len(value) == samples:
        return _sequence_like(value, [value[i] for i in index.tolist()])
    if isinstance(value, Mapping):
        return _mapping_like(value, {key: select(item, index, samples) for key, item in value.items()})
    if isinstance(value, (tuple, list)):
        return _sequence_like(value, [select(item, index, samples) for item in value])
    return change(value)


def _concatenated(parts: Sequence[Tensor], sizes: Sequence[int], strict: bool) -> Tensor:
    first = parts[0]
    if any(part.dtype != first.dtype or part.layout != first.layout or part.is_nested for part in parts):
        raise CannotConcatenate("the dtypes or layouts of their tensors differ")
    if any(part.shape[1:] != first.shape[1:] for part in parts):
        raise CannotConcatenate(f"they hold tensors of shape {_shapes(parts)}")
    counted = all(part.ndim and part.shape[0] == size for part, size in zip(parts, sizes, strict=True))
    shared = first.ndim == 2 and first.shape[0] == first.shape[1] > 1  # a mask [T, T] belongs to all samples
    if not counted or shared:
        if all(part is first or (part.shape == first.shape and bool((part == first).all())) for part in parts):
            return first
        if not counted:
            raise CannotConcatenate(f"they hold tensors of shape {_shapes(parts)} that are not counted by samples")
    if strict and first.ndim > 1 and len(set(sizes)) == 1 and sizes[0] in first.shape[1:] and sizes[0] > 1:
        raise CannotConcatenate(f"which dimension of {list(first.shape)} counts the samples is not certain")
    return torch.cat(list(parts))


def _padded(parts: Sequence[Mapping[str, Any]], pad: int) -> list[Mapping[str, Any]]:
    """Sequences of different lengths brought to the longest one, where the mapping has a mask to say so."""
    key = next((key for key in MASKS if key in parts[0]), None)
    masks = [] if key is None else [part[key] for part in parts]
    if not masks or not all(isinstance(mask, Tensor) and mask.ndim == 2 for mask in masks):
        return list(parts)
    longest = max(mask.shape[1] for mask in masks)
    if all(mask.shape[1] == longest for mask in masks):
        return list(parts)
    left = any(bool((mask[:, 0] == 0).any()) for mask in masks)

    def lengthened(name: str, value: Any, mask: Tensor) -> Any:
        if not isinstance(value, Tensor) or value.shape[:2] != mask.shape:
            return value
        room = list(value.shape)
        room[1] = longest - mask.shape[1]
        filling = pad if name == "input_ids" else 0 if value.is_floating_point() else PADDING.get(name, 0)
        added = value.new_full(room, filling)
        return torch.cat([added, value] if left else [value, added], 1)

    return [
        _mapping_like(part, {name: lengthened(name, value, mask) for name, value in part.items()})
        for part, mask in zip(parts, masks, strict=True)
    ]


def _is_array(value: Any) -> bool:
    """Whether something is a numpy array of at least one dimension."""
    return hasattr(value, "__array_interface__") and bool(getattr(value, "shape", None))


def _is_list_of_samples(value: Sequence[Any]) -> bool:
    """Whether a list holds one plain thing for each sample (names, numbers) rather than parts of a structure."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, (str, int, float)) for item in value)


def _mapping_like(value: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    if type(value) is dict:
        return parts
    made = copy.copy(value)
    if not isinstance(made, MutableMapping):
        raise CannotConcatenate(f"a {type(value).__name__} cannot be changed")
    for key, part in parts.items():
        made[key] = part
    return made


def _sequence_like(value: Sequence[Any], items: list[Any]) -> Any:
    if hasattr(value, "_fields"):
        return type(value)(*items)
    return type(value)(items)  # type: ignore[call-arg]


def _shapes(parts: Sequence[Tensor]) -> str:
    return " and ".join(dict.fromkeys(str(list(part.shape)) for part in parts))

"""What a user may pass as calibration data, read into one form: one batch wherever the parts allow it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sylinit.data.tree import MASKS, CannotConcatenate, concatenate, map_leaves, select, tensors
from sylinit.errors import SylinitError

TARGET_KEYS = ("labels", "label", "target", "targets", "y")
"""Keys of a mapping under which a target is looked for, in this order."""


@dataclass(frozen=True)
class Batch:
    """One calibration batch.

    Attributes:
        raw: as the user made it, on the model's device: what ``forward=`` receives.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        targets: class indices, soft labels or real values, by the name of the head that they are for; "" is for the
            head that is found.
        samples: the size of the leading dimension; with a ``forward=`` that of the target, where there is one.
        mask: bool ``[samples, length]``, true where a sequence holds data; None where there is no padding.
    """

    raw: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: dict[str, Tensor]
    samples: int
    mask: Tensor | None = None


@dataclass(frozen=True)
class Read:
    """What was read.

    Attributes:
        batches: one, unless its parts cannot be concatenated or are to stay apart.
        train_size: how many samples there are to train on, as far as the user's data tells.
        notes: what the user should know.
    """

    batches: tuple[Batch, ...]
    train_size: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """How batches are read.

    Attributes:
        model: its device decides where inputs go, its signature how they are passed.
        samples: at most so many are read.
        targets: by the name of the head ("" for the one that is found) where its target lies: a key, an index among
            several targets, a function of the batch, or a tensor of all samples; None for the usual places.
        mask: the key of the mask in a mapping, or a function of the batch; "auto" for the usual keys, None for none.
        custom: the user has a ``forward=``, so only the target and the number of samples are read.
        apart: batches stay as they are cut.
    """

    model: nn.Module
    samples: int
    targets: Mapping[str, Any] = field(default_factory=lambda: {"": None})
    mask: str | Callable[[Any], Any] | None = "auto"
    custom: bool = False
    apart: bool = False

    def read(self, batches: Any) -> Read:
        """Read batches up to the number of samples wanted, check that they fit together, and join them.

        Args:
            batches: an iterable of batches: ``x``, ``(x, y)``, ``(x1, x2, y)``, ``((x1, x2), y)`` or mappings.

        Raises:
            SylinitError: no batches, an empty batch, batches of different dimensions, or targets of another length.
        """
        _require_iterable(batches)
        in_memory = isinstance(batches, (list, tuple))
        _require_no_pair(batches)
        read: list[Batch] = []
        cut = False
        for raw in batches:
            if not in_memory and sum(batch.samples for batch in read) >= self.samples:
                cut = True
                break
            parsed = self.parse(raw, len(read))
            read.append(self._with_given(parsed, sum(batch.samples for batch in read)))
        if not read:
            raise SylinitError(
                "batches: there are none; a generator or iterator that was used before is exhausted: pass a fresh one"
            )
        _require_alike(read, self.custom)
        total = sum(batch.samples for batch in read)
        self._require_given(total, cut)
        size = _dataset_size(batches) or total
        notes = []
        if cut or total > self.samples:
            read = self._thinned(read, evenly=in_memory)
            kept = sum(batch.samples for batch in read)
            which = "spread evenly over all" if in_memory else "the first that came"
            of = f" of {max(size, total):,}" if size > total or in_memory else ""
            notes.append(f"read {kept:,}{of} samples, {which}; samples= reads more")
        if unused := self._unused(read[0]):
            notes.append(f"the model's forward takes no {', '.join(map(repr, unused))}: left out of the call")
        return Read(self._joined(read), size, tuple(notes))

    def parse(self, raw: Any, number: int = 0) -> Batch:
        """Tell inputs from targets in one batch."""
        raw = map_leaves(raw, lambda leaf: leaf.to(self._device) if isinstance(leaf, Tensor) else leaf)
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        found = {name: self._target(raw, spec, number) for name, spec in self.targets.items()}
        if isinstance(raw, Mapping):
            kwargs = {key: value for key, value in raw.items() if not self._is_only_target(key)}
        elif isinstance(raw, (tuple, list)):
            if len(raw) == 0:
                raise SylinitError(f"batches: batch {number} is an empty {type(raw).__name__}; expected x or (x, y)")
            args = tuple(raw[:-1]) if len(raw) > 1 else tuple(raw)
            args = self._spread(args)
        else:
            args = (raw,)
        args, kwargs = map_leaves(args, self._as_tensor), map_leaves(kwargs, self._as_tensor)
        inputs = [value for value in tensors((args, kwargs)) if value.ndim > 0]
        if not self.custom:
            self._require_tensors(raw, args, kwargs, inputs, number)
        samples = inputs[0].size(0) if inputs else 0
        if inputs and samples == 0:
            shape = list(inputs[0].shape)
            raise SylinitError(f"batches: batch {number} is empty (its input has shape {shape}); drop it")
        targets = {name: self._checked_target(t, number) for name, t in found.items() if t is not None}
        if self.custom and (counting := [t for t in targets.values() if t.ndim]):
            samples = counting[0].shape[0]  # only the user's own function knows how the inputs lie
        for target in targets.values():
            if target.ndim == 0 or target.shape[0] != samples:
                raise SylinitError(
                    f"batches: batch {number} has {samples} samples and a target of shape {list(target.shape)}; "
                    "the target's first dimension must count the samples (if the input's second does, pass "
                    "forward=lambda model, batch: model(batch[0])); for more than one batch pass a list of (x, y)"
                )
        return Batch(raw, args, kwargs, targets, samples, self._mask(raw, samples))

    def part(self, batch: Batch, index: Tensor) -> Batch:
        """Some samples of a batch.

        Args:
            batch: as this reader has read it.
            index: int64 ``[n]``, on the CPU.
        """
        part = self.parse(select(batch.raw, index, batch.samples))
        if any(len(target) != len(index) for target in part.targets.values()):
            raise CannotConcatenate(f"samples cannot be picked from {_describe(batch.raw)}")
        targets = {name: target[index.to(target.device)] for name, target in batch.targets.items()}
        return replace(part, targets={**targets, **part.targets})

    def _target(self, raw: Any, spec: Any, number: int) -> Any:
        """A target of a batch, wherever it lies; None for one that is given for all samples at once."""
        if isinstance(spec, Tensor):
            return None
        if callable(spec):
            return spec(raw)
        own = raw[-1] if isinstance(raw, (tuple, list)) and len(raw) > 1 else None
        if spec is None:
            if isinstance(raw, Mapping):
                return next((raw[key] for key in TARGET_KEYS if key in raw and not self._is_input(key)), None)
            return own
        holders = [own, raw] if isinstance(raw, Mapping) or own is not None else [raw]
        for holder in holders:
            if isinstance(holder, Mapping) and spec in holder:
                return holder[spec]
            if isinstance(spec, int) and isinstance(holder, (tuple, list)) and -len(holder) <= spec < len(holder):
                return holder[spec]
        keys = [key for holder in holders if isinstance(holder, Mapping) for key in holder]
        has = f"it has {', '.join(map(repr, keys))}" if keys else f"it is {_describe(raw)}, which has no keys"
        raise SylinitError(f"target={spec!r}: batch {number} has no such key; {has}")

    def _with_given(self, batch: Batch, start: int) -> Batch:
        """The batch with its part of the targets that are given for all samples at once."""
        given = {
            name: self._checked_target(spec[start : start + batch.samples], 0)
            for name, spec in self.targets.items()
            if isinstance(spec, Tensor)
        }
        return replace(batch, targets={**batch.targets, **given}) if given else batch

    def _require_given(self, total: int, cut: bool) -> None:
        """Refuse a target given for all samples that has another number of them."""
        for name, spec in self.targets.items():
            if isinstance(spec, Tensor) and (len(spec) < total or (len(spec) != total and not cut)):
                raise SylinitError(
                    f"head={{{name!r}: tensor}}: it has {len(spec)} rows, the batches hold {total} samples"
                )

    def _unused(self, batch: Batch) -> list[str]:
        """Keys of a mapping that are neither input of the model nor target nor mask."""
        known = {*TARGET_KEYS, *MASKS, "src_key_padding_mask", self.mask}
        known.update(_taken(self.model, batch.kwargs))
        return [] if self.custom else [key for key in batch.kwargs if key not in known]

    def _is_input(self, key: str) -> bool:
        """Whether the model needs a key of that name, so that it is no target."""
        parameter = inspect.signature(self.model.forward).parameters.get(key)
        return parameter is not None and parameter.default is parameter.empty and not self.custom

    def _is_only_target(self, key: Any) -> bool:
        """Whether `target=` or `head=` names this key, and the model takes no argument of that name."""
        named = [spec for spec in self.targets.values() if isinstance(spec, str)]
        return key in named and not (self.custom or _taken(self.model, [key]))

    def _mask(self, raw: Any, samples: int) -> Tensor | None:
        """Which places of each sequence hold data, as far as the batch says."""
        if callable(self.mask):
            found = self.mask(raw)
        elif self.mask is None or (self.mask == "auto" and not isinstance(raw, Mapping)):
            return None
        elif not isinstance(raw, Mapping):
            raise SylinitError(
                f"mask={self.mask!r}: the batch is {_describe(raw)}, which has no keys; pass a function of the batch "
                "that returns the mask, or mappings"
            )
        elif self.mask == "auto":
            found = next((raw[key] for key in MASKS if key in raw), None)
            if found is None and isinstance(padding := raw.get("src_key_padding_mask"), Tensor):
                found = ~padding if padding.dtype == torch.bool else padding == 0
        elif self.mask not in raw:
            raise SylinitError(f"mask={self.mask!r}: the batch has no such key; it has {', '.join(map(repr, raw))}")
        else:
            found = raw[self.mask]
        if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[0] != samples:
            if found is not None and self.mask != "auto":
                raise SylinitError(
                    f"mask: expected a tensor [{samples} samples, length] that is true where there is data, got "
                    f"{_describe(found)}"
                )
            return None
        mask = found != 0
        return None if bool(mask.all()) else mask

    def _spread(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs of ``((x1, x2), y)`` one by one, where the model takes so many."""
        if self.custom or len(args) != 1 or not isinstance(args[0], (tuple, list)) or len(args[0]) < 2:
            return args
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        takes = [p for p in inspect.signature(self.model.forward).parameters.values() if p.kind in kinds]
        needs = sum(p.default is p.empty for p in takes)
        given = takes[: len(args[0])]
        optional = all(p.default in (p.empty, None) for p in given)  # a mask or lengths, but no switch
        return tuple(args[0]) if needs <= len(args[0]) == len(given) and optional else args

    def _require_tensors(
        self, raw: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], number: int
    ) -> None:
        """Refuse inputs that no model of tensors can read."""
        for name, value in (*((f"input {place}", arg) for place, arg in enumerate(args)), *kwargs.items()):
            if name not in TARGET_KEYS and (
                isinstance(value, str) or (isinstance(value, (tuple, list)) and value and isinstance(value[0], str))
            ):
                raise SylinitError(
                    f"batches: {name!r} of batch {number} holds strings; turn them into tensors first (a tokenizer, an "
                    "encoder), or pass forward=lambda model, batch: ..."
                )
        if not inputs:
            raise SylinitError(
                f"batches: batch {number} holds no tensor of input (it is {_describe(raw)}); "
                "expected x, (x, y) or a mapping, or pass forward=lambda model, batch: ..."
            )

    def _checked_target(self, target: Any, number: int) -> Tensor:
        """A target as one tensor on the model's device."""
        several = (
            f"batches: the target of batch {number} is {_describe(target)}; expected one tensor: choose one by target= "
            "(a key of the batch, or a function of it that returns a tensor), or name the target of each head by "
            "head={'layer': key or index, ...}"
        )
        if isinstance(target, Mapping) or (
            isinstance(target, (tuple, list)) and any(isinstance(v, (Tensor, Mapping, tuple, list)) for v in target)
        ):
            raise SylinitError(several)
        try:
            found = torch.as_tensor(target, device=self._device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SylinitError(
                f"batches: the target of batch {number} is {_describe(target)}, which holds no numbers; pass class "
                "indices or real values as a tensor"
            ) from error
        found = found.as_subclass(Tensor)
        if found.is_complex():
            raise SylinitError(f"batches: batch {number} has a complex target; pass real values or class indices")
        return found

    def _thinned(self, read: list[Batch], *, evenly: bool) -> list[Batch]:
        """As many samples as are wanted: evenly from all batches, or the first."""
        total = sum(batch.samples for batch in read)
        place = torch.arange(self.samples, dtype=torch.float64, device="cpu")
        index = (place * (total / self.samples)).long() if evenly else place.long()
        thinned, start = [], 0
        for batch in read:
            mine = index[(index >= start) & (index < start + batch.samples)] - start
            start += batch.samples
            if not len(mine):
                continue
            if len(mine) == batch.samples:
                thinned.append(batch)
                continue
            thinned.append(self.part(batch, mine))
        return thinned

    def _joined(self, read: list[Batch]) -> tuple[Batch, ...]:
        """One batch where that gives the model what it would get from each."""
        if len(read) == 1 or self.apart:
            return tuple(read)
        if any(not batch.targets for batch in read) and _has_sequence_first_layers(self.model):
            return tuple(read)  # nothing tells whether the first dimension counts samples
        sizes = [batch.samples for batch in read]
        pad = getattr(getattr(self.model, "config", None), "pad_token_id", None) or 0
        try:
            raw = concatenate([batch.raw for batch in read], sizes, strict=self.custom, pad=pad)
        except CannotConcatenate:
            return tuple(read)
        joined = self.parse(raw, 0)
        if joined.samples != sum(sizes):
            return tuple(read)
        given = [name for name, spec in self.targets.items() if isinstance(spec, Tensor)]
        targets = {name: torch.cat([batch.targets[name] for batch in read]) for name in given}
        return (replace(joined, targets={**joined.targets, **targets}),)

    def _as_tensor(self, leaf: Any) -> Any:
        """A numpy array as a tensor on the model's device; everything else as it is."""
        is_array = hasattr(leaf, "__array_interface__") and math.prod(getattr(leaf, "shape", (0,)))
        return torch.as_tensor(leaf, device=self._device) if is_array and leaf.dtype.kind in "biuf" else leaf

    @property
    def _device(self) -> torch.device:
        parameters = (p for p in self.model.parameters() if not isinstance(p, nn.parameter.UninitializedParameter))
        return next((p.device for p in parameters if not p.is_meta), torch.device("cpu"))


def call_model(model: nn.Module, batch: Batch) -> Any:
    """Call the model as its batch is: positional inputs, or what it takes of a mapping."""
    kwargs = {key: batch.kwargs[key] for key in _taken(model, batch.kwargs)}
    if batch.kwargs and not (kwargs or batch.args):
        names = ", ".join(inspect.signature(model.forward).parameters)
        raise SylinitError(
            f"batches: none of the keys {', '.join(map(repr, batch.kwargs))} is an argument of the model's "
            f"forward({names}); name them alike, or pass forward=lambda model, batch: ..."
        )
    return model(*batch.args, **kwargs)


def _taken(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """The keys that a model's forward has arguments of; all of them where it takes any."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return [key for key in keys if takes_any or key in parameters]


def some_samples(batch: Batch, reader: Reader, count: int) -> Batch | None:
    """A few samples, spread evenly over a batch; None where the batch cannot be cut."""
    if batch.samples < 1:
        return None
    count = min(count, batch.samples)
    index = (torch.arange(count, device="cpu") * batch.samples) // count
    try:
        return reader.parse(select(batch.raw, index, batch.samples), 0)
    except (CannotConcatenate, SylinitError):
        return None


def _require_iterable(batches: Any) -> None:
    if isinstance(batches, Tensor):
        raise SylinitError(
            "batches: expected an iterable of batches, got a single tensor; pass [x] or [(x, y)], or a DataLoader"
        )
    if isinstance(batches, Mapping):
        raise SylinitError("batches: expected an iterable of batches, got a single mapping; pass [batch]")
    if isinstance(batches, torch.utils.data.Dataset) and not isinstance(batches, Iterable):
        raise SylinitError("batches: got a Dataset; pass torch.utils.data.DataLoader(dataset, batch_size=...)")
    if not isinstance(batches, Iterable):
        raise SylinitError(f"batches: expected an iterable of batches, got {type(batches).__name__}; pass [(x, y)]")


def _require_no_pair(batches: Any) -> None:
    """Refuse ``(X, Y)`` and arrays in the place of a list of batches, and data sets that stream single samples."""
    arrays = (
        [part for part in batches if isinstance(part, Tensor) or hasattr(part, "__array_interface__")]
        if (isinstance(batches, (tuple, list)) and len(batches) == 2)
        else []
    )
    if len(arrays) == 2 and len(arrays[0].shape) > len(arrays[1].shape) > 0 and len(arrays[0]) == len(arrays[1]):
        raise SylinitError(
            "batches: expected an iterable of batches, got a pair of inputs and targets; pass [(x, y)], or a DataLoader"
        )
    if hasattr(batches, "__array_interface__") and not isinstance(batches, Tensor):
        raise SylinitError("batches: expected an iterable of batches, got a numpy array; pass [x] or [(x, y)]")
    if isinstance(batches, torch.utils.data.IterableDataset):
        raise SylinitError(
            "batches: got a Dataset of single samples; pass torch.utils.data.DataLoader(dataset, batch_size=64)"
        )


def _has_sequence_first_layers(model: nn.Module) -> bool:
    return any(getattr(module, "batch_first", True) is False for module in model.modules())


def _dataset_size(batches: Any) -> int | None:
    """How many samples the data set behind a loader has, if it says so."""
    dataset = getattr(batches, "dataset", None)
    try:
        return None if dataset is None else len(dataset)
    except TypeError:  # an iterable data set
        return None


def _require_alike(batches: Sequence[Batch], custom: bool) -> None:
    """Batches must have the same kind of input and target; lengths of sequences and images may differ.

    Features that do not fit are refused by the layer that meets them.
    """
    first = batches[0]
    for number, batch in enumerate(batches):
        if batch.targets.keys() != first.targets.keys():
            missing = 0 if len(first.targets) < len(batch.targets) else number
            raise SylinitError(f"batches: batch {missing} has no target while others have one")
        if not custom:  # else the inputs are the affair of the user's own function
            _require_like_inputs(batch, first, number)
        for name, mine in batch.targets.items():
            other = first.targets[name]
            if _form(mine) != _form(other):
                raise SylinitError(
                    f"batches: the target of batch {number} is {_describe(mine)}, that of batch 0 {_describe(other)}; "
                    "all targets must be of one kind"
                )


def _require_like_inputs(batch: Batch, first: Batch, number: int) -> None:
    """Refuse a batch with other inputs than the first."""
    if len(batch.args) != len(first.args) or batch.kwargs.keys() != first.kwargs.keys():
        raise SylinitError(f"batches: batch {number} has other inputs than batch 0")
    pairs = zip((*batch.args, *batch.kwargs.values()), (*first.args, *first.kwargs.values()), strict=True)
    for mine, other in pairs:
        if not (isinstance(mine, Tensor) and isinstance(other, Tensor)):
            continue
        if mine.ndim != other.ndim or (mine.ndim == 4 and mine.shape[1] != other.shape[1]):
            raise SylinitError(
                f"batches: batch {number} has input of shape {list(mine.shape)}, batch 0 of shape "
                f"{list(other.shape)}; all batches must have the same dimensions and channels"
            )


def _form(target: Tensor) -> tuple[bool, int, int]:
    """What targets must agree in: class indices may come at any number of positions, values in one width."""
    real = target.is_floating_point()
    return real, target.ndim, target.shape[-1] if real and target.ndim == 2 else 0


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}".replace("torch.", "")
    if isinstance(value, (tuple, list)) and value:
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    return f"a {type(value).__name__}"

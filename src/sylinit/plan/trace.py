"""A trial run on a few samples, before the pass: what each module computes, where samples lie, what makes the output.

Nothing is read off a class or an order of registration that the run itself can show:

* whether a module's output is ``rows(x) @ weight.mT + bias`` is compared on the rows of its first call;
* the layers that produced the model's output, and those that end a residual branch, are found by following tensors
  through every operation;
* where the samples lie in a layer's rows is seen by changing one sample and looking which rows change;
* whether the output is that of one position of a sequence is seen by looking for it among all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from sylinit.data.tree import MASKS, map_leaves, tensors
from sylinit.layers.inputs import plain, require_plain_rows
from sylinit.layers.registry import is_stock
from sylinit.layers.view import LayerView
from sylinit.runtime.interrupts import held_interrupts
from sylinit.statistics.alignment import Layout, layout_of

SAMPLES = 5
"""Of the trial run; a prime, so that few other dimensions look like a multiple of it."""

MARKED = 1
"""The sample that is changed."""


@dataclass(frozen=True)
class Candidate:
    """A module that may be a layer.

    Attributes:
        name: in the model.
        module: the module.
        hypotheses: ways to see it as matrices, the likeliest first.
    """

    name: str
    module: nn.Module
    hypotheses: tuple[tuple[LayerView, ...], ...]


@dataclass(frozen=True)
class Output:
    """One tensor of the model's output.

    Attributes:
        shape: of it.
        real: whether it holds floating-point numbers.
        made_by: names of the modules whose outputs it was made of without another layer in between.
        rectified: those of them behind which a rectifier came.
        probabilities: those behind which a sigmoid or a softmax came.
    """

    shape: tuple[int, ...]
    real: bool
    made_by: frozenset[str]
    rectified: frozenset[str] = frozenset()
    probabilities: frozenset[str] = frozenset()


@dataclass
class Trace:
    """What a trial run showed. Names are those of modules.

    Attributes:
        seen: by module, the number of the hypothesis that holds; -1 where none does. Unreached modules are missing.
        order: the modules in the order of their first calls.
        outputs: the tensors of the model's output.
        layouts: by view, where samples lie in its rows; missing where nothing was seen.
        shapes: by module, the shape of its first output.
        sample_bytes: of the largest output of a module, for each sample.
        entries: modules that read the model's input before any layer has changed it.
        ends: modules that end a residual branch: what they make is added to what they were made from, the output of
            another module.
        made: names of modules that the forward pass created.
        picked: modules that give outputs at each position, of which the model's output is one for each sample, or in
            several streams, of which it is one.
    """

    seen: dict[str, int] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    layouts: dict[str, Layout] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sample_bytes: int = 0
    entries: set[str] = field(default_factory=set)
    ends: set[str] = field(default_factory=set)
    made: list[str] = field(default_factory=list)
    picked: set[str] = field(default_factory=set)


def trace(
    model: nn.Module,
    candidates: Mapping[nn.Module, Candidate],
    run: Callable[[Any], Any],
    batch: Any,
    samples: int,
    rewind: Callable[[], None],
) -> Trace:
    """Run a model on a few samples, and again with one of them changed.

    Args:
        model: in eval mode.
        candidates: modules that may be layers.
        run: ``run(batch)`` calls the model.
        batch: the inputs of a few samples, a nested structure of tensors.
        samples: how many.
        rewind: puts the model's state back after each run.
    """
    found = Trace()
    known = dict(model.named_modules())
    inputs: dict[str, Any] = {}
    watch = _Watch(candidates, found, inputs)
    with watch.on():
        output = run(batch)
        found.outputs = [watch.described(tensor) for tensor in output_tensors(output)]
        found.picked = {
            name
            for tensor, described in zip(output_tensors(output), found.outputs, strict=True)
            for name in described.made_by
            if picked(watch.given.get(name), tensor) is not None
        }
    found.ends = watch.ends
    found.sample_bytes = max((tensor.nbytes for tensor in watch.given.values()), default=0) // max(samples, 1)
    found.made = [name for name, module in model.named_modules() if known.get(name) is not module]
    rewind()
    if samples <= MARKED + 1:
        return found
    marked = _marked(batch, samples)
    if marked is None:
        return found
    again: dict[str, Any] = {}
    with _Inputs(candidates, found, again).on():
        run(marked)
    rewind()
    for name, (view, x) in inputs.items():
        lead = _lead(view, x)
        if name not in again or _lead(view, again[name][1]) != lead:
            continue
        layout = layout_of(view.changed(x, again[name][1]), lead, samples, MARKED)
        if layout is not None:
            found.layouts[name] = layout
    return found


def picked(given: Tensor | None, output: Tensor) -> Tensor | None:
    """The positions whose outputs the model's output consists of.

    Args:
        given: what a module gave, ``[n, length, k]``, or ``[n, ..., k]`` with several streams in one of the dimensions.
        output: the model's output, ``[n, k]``, or of one stream.

    Returns:
        Bool ``[n, length]``, true at one position of each sample, the last where several are equal; ``[n, ...]`` with
        one stream true; None where the output is at none of them, or where there is nothing to choose from.
    """
    if given is None or given.ndim < 3 or output.ndim != given.ndim - 1 or output.shape[-1] != given.shape[-1]:
        return None
    if given.ndim > 3:
        return _picked_stream(given, output)
    if len(output) != len(given) or given.shape[1] < 2:
        return None
    same = (given.to(output.dtype) == output.unsqueeze(1)).all(2)
    if not bool(same.any(1).all()) or bool(same.all()):
        return None
    last = same.shape[1] - 1 - same.flip(1).long().argmax(1)
    return torch.zeros_like(same).scatter(1, last.unsqueeze(1), True)


def _picked_stream(given: Tensor, output: Tensor) -> Tensor | None:
    """The stream, ``[n, ...]``, that the model's output is; None where there is none, or all are alike."""
    for dim in range(1, given.ndim - 1):
        streams = given.unbind(dim)
        same = [stream.shape == output.shape and torch.equal(stream.to(output.dtype), output) for stream in streams]
        if any(same) and not all(same):
            mask = torch.zeros(given.shape[:-1], dtype=torch.bool, device=given.device)
            mask.select(dim, same.index(True)).fill_(True)
            return mask
    return None


def picked_positions(module: nn.Module, run: Callable[[], Any]) -> Tensor | None:
    """The positions of a module's outputs that the model's output consists of, seen by running the model.

    Args:
        module: one of those in `Trace.picked`.
        run: runs the model and returns its output.
    """
    given: list[Tensor] = []
    hook = module.register_forward_hook(lambda module, args, output: given.append(output))
    try:
        output = run()
    finally:
        hook.remove()
    found = (picked(given[-1], tensor) for tensor in output_tensors(output) if given)
    return next((positions for positions in found if positions is not None), None)


def _lead(view: LayerView, x: Any) -> tuple[int, ...]:
    samples, positions = view.positions(x)
    return (samples, *positions)


def output_tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of an output, logits first."""
    if not isinstance(output, (Tensor, Mapping, tuple, list)) and hasattr(output, "__dict__"):
        output = vars(output)
    if isinstance(output, Mapping):
        output = {key: output[key] for key in sorted(output, key=lambda key: key not in ("logits", "out"))}
    return tensors(output)


class _Inputs:
    """Keeps what each view read at the first call of its module.

    Args:
        candidates: the modules.
        found: which hypothesis of each module holds.
        inputs: filled with (view, input) by the name of the view.
    """

    def __init__(self, candidates: Mapping[nn.Module, Candidate], found: Trace, inputs: dict[str, Any]) -> None:
        self.candidates = candidates
        self.found = found
        self.inputs = inputs
        self._hooks: list[Any] = []

    @contextmanager
    def on(self) -> Iterator[None]:
        """Look at every call of the modules inside; Ctrl-C leaves nothing of it behind, whenever it comes."""
        try:
            self._start()
            yield
        finally:
            with held_interrupts():
                self._stop()

    def _start(self) -> None:
        for module, candidate in self.candidates.items():
            self._hooks.append(module.register_forward_hook(self._behind(candidate), prepend=True, with_kwargs=True))

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _behind(self, candidate: Candidate) -> Callable[..., None]:
        def behind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            number = self.found.seen.get(candidate.name, -1)
            if number >= 0:
                self.keep(candidate.hypotheses[number], args, kwargs, output)

        return behind

    def keep(self, views: tuple[LayerView, ...], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep the inputs of a module's views, unless an earlier call has brought them."""
        for view in views:
            if view.name not in self.inputs:
                x = view.traced_input(args, kwargs, output)
                with torch.no_grad():
                    self.inputs[view.name] = view, map_leaves(x, torch.clone)


class _Watch(_Inputs):
    """Follows tensors from layer to layer and settles what each module computes."""

    def __init__(self, candidates: Mapping[nn.Module, Candidate], found: Trace, inputs: dict[str, Any]) -> None:
        super().__init__(candidates, found, inputs)
        self.given: dict[str, Tensor] = {}
        self._follow = _Follow()

    def _start(self) -> None:
        super()._start()
        self._follow.__enter__()

    def _stop(self) -> None:
        if self._follow in _get_current_dispatch_mode_stack():
            self._follow.__exit__(None, None, None)
        super()._stop()

    @property
    def ends(self) -> set[str]:
        """The modules that end a residual branch."""
        return self._follow.ends

    def described(self, tensor: Tensor) -> Output:
        """One tensor of the model's output."""
        makers = self._follow.made_by(tensor)
        return Output(
            tuple(tensor.shape),
            tensor.is_floating_point(),
            frozenset(name for name, _ in makers),
            frozenset(name for name, behind in makers if behind == RECTIFIER),
            frozenset(name for name, behind in makers if behind == PROBABILITY),
        )

    def _behind(self, candidate: Candidate) -> Callable[..., None]:
        def behind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            require_plain_rows(candidate.name, (args, kwargs))
            with self._follow.paused():
                if candidate.name not in self.found.seen:
                    args, kwargs, given = plain(args), plain(kwargs), plain(output)
                    number = _hypothesis(candidate, args, kwargs, given)
                    self.found.seen[candidate.name] = number
                    self.found.order.append(candidate.name)
                    if isinstance(given, Tensor):
                        self.found.shapes[candidate.name] = tuple(given.shape)
                    if not self._follow.arrive(candidate.name, tensors((args, kwargs))):
                        self.found.entries.add(candidate.name)
                    if number >= 0:
                        self.keep(candidate.hypotheses[number], args, kwargs, given)
                if isinstance(output, Tensor):
                    self.given[candidate.name] = output
                if self.found.seen[candidate.name] >= 0:
                    for tensor in tensors(output):
                        self._follow.mark(tensor, candidate.name)

        return behind


def _hypothesis(candidate: Candidate, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    """The first way to see a module that agrees with what it gave; -1 if none does."""
    if is_stock(candidate.module):
        return 0
    for number, views in enumerate(candidate.hypotheses):
        if all(view.agrees(args, kwargs, output) for view in views):
            return number
    return -1


RECTIFIER, PROBABILITY = "rectifier", "probability"

RECTIFIERS = ("relu", "gelu", "silu", "elu", "leaky_relu", "hardswish", "hardtanh", "mish", "threshold", "softplus")
"""Operations behind which no logits or predictions come."""

BEHIND = {**dict.fromkeys(RECTIFIERS, RECTIFIER), **dict.fromkeys(("sigmoid", "_softmax"), PROBABILITY)}
"""What an operation makes of a layer's outputs."""

ADDITIONS = ("add.Tensor", "add_.Tensor")
"""Operations that join a residual branch to its stream."""

Maker = tuple[str, str]
"""The name of a module, and what of `BEHIND` came behind it last, "" for nothing."""


class _Follow(TorchDispatchMode):
    """Tells of each tensor which modules it was made by without another layer in between.

    Attributes:
        ends: modules whose outputs were added to what their inputs were made of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ends: set[str] = set()
        self._before: dict[str, frozenset[str]] = {}  # by module, all modules that its input was made by
        self._made_by: dict[int, frozenset[Maker]] = {}
        self._alive: list[UntypedStorage] = []  # so that no other storage gets the number of a former one
        self._paused = False

    def paused(self) -> _Follow._Pause:
        """Do not follow what happens inside."""
        return _Follow._Pause(self)

    def mark(self, tensor: Tensor, name: str) -> None:
        """Note the module that made a tensor."""
        for storage in _storages(tensor):
            self._made_by[storage._cdata] = frozenset(((name, ""),))
            self._alive.append(storage)

    def arrive(self, name: str, inputs: Iterator[Tensor]) -> bool:
        """Note what a module reads, and return whether any module made it."""
        makers = frozenset(maker for tensor in inputs for maker, _ in self.made_by(tensor))
        self._before[name] = makers.union(*(self._before.get(maker, frozenset()) for maker in makers))
        return bool(makers)

    def made_by(self, tensor: Tensor) -> frozenset[Maker]:
        """Of which modules' outputs a tensor was made."""
        return frozenset().union(*(self._made_by.get(storage._cdata, frozenset()) for storage in _storages(tensor)))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """To keep its compiler out of here, PyTorch would import it, which takes seconds; nothing is compiled here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ADDITIONS and not self._paused:
            self._add(*args[:2])
        result = func(*args, **(kwargs or {}))
        if self._paused:
            return result
        read = {s._cdata: s for tensor in _flat((args, kwargs or {})) for s in _storages(tensor)}
        sources: frozenset[Maker] = frozenset().union(*(self._made_by.get(key, frozenset()) for key in read))
        if behind := BEHIND.get(func.__name__.partition(".")[0].rstrip("_")):
            sources = frozenset((name, behind) for name, _ in sources)
        for tensor in _flat(result):
            for storage in _storages(tensor):
                if sources and self._made_by.get(storage._cdata) != sources:
                    self._made_by[storage._cdata] = sources
                    self._alive.append(storage)
                elif not sources and storage._cdata not in read:
                    self._made_by.pop(storage._cdata, None)
        return result

    def _add(self, first: Any, second: Any) -> None:
        """Of a sum of two tensors, look whether one was made from the other."""
        if not (isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape == second.shape):
            return
        for stream, branch in ((first, second), (second, first)):
            from_here = {name for name, _ in self.made_by(stream)} - self.ends  # which other branches have added
            ends = {name for name, behind in self.made_by(branch) if not behind}
            if from_here and ends and all(from_here <= self._before.get(name, frozenset()) for name in ends):
                self.ends |= ends

    class _Pause:
        def __init__(self, follow: _Follow) -> None:
            self._follow = follow

        def __enter__(self) -> None:
            self._follow._paused = True

        def __exit__(self, *error: object) -> None:
            self._follow._paused = False


def _flat(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _flat(value)
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _flat(value)


def _storages(tensor: Tensor) -> Iterator[UntypedStorage]:
    """The memory behind a tensor."""
    if tensor.is_nested:
        tensor = tensor.values()
    if tensor.layout is torch.strided:
        yield tensor.untyped_storage()
    elif tensor.layout is torch.sparse_coo:
        yield tensor._values().untyped_storage()


def _marked(batch: Any, samples: int) -> Any:
    """The batch with one sample changed: its real numbers, or else its integers; None if it has neither."""
    masks = {id(batch[key]) for key in MASKS if isinstance(batch, Mapping) and key in batch}
    counted = [
        tensor
        for tensor in tensors(batch)
        if tensor.ndim and tensor.size(0) == samples and tensor.layout is torch.strided and not tensor.is_nested
    ]
    real = [t for t in counted if t.is_floating_point() and t.ndim > 1 and id(t) not in masks]
    whole = [t for t in counted if t.dtype in (torch.int64, torch.int32, torch.uint8) and t.ndim > 1]
    whole = [t for t in whole if id(t) not in masks and bool((t[MARKED] != t[MARKED + 1]).any())]
    chosen = {id(tensor) for tensor in real or whole}
    if not chosen:
        return None

    def change(leaf: Any) -> Any:
        if id(leaf) not in chosen:
            return leaf
        changed = leaf.clone()
        if leaf.is_floating_point():
            size = leaf.float().abs().mean().clamp(min=1e-3).to(leaf.dtype)
            changed[MARKED] = 0.7 * leaf[MARKED] + 0.3 * size
        else:
            changed[MARKED] = leaf[MARKED + 1]
        return changed

    return map_leaves(batch, change)

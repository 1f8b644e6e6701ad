"""Everything that running a model may disturb, put back bit for bit: all or nothing."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from sylinit.runtime.flags import read_flags, restore_flags
from sylinit.runtime.interrupts import held_interrupts

REGISTRIES = ("_parameters", "_buffers", "_modules")
"""Where a module keeps its tensors and parts."""


class Transaction:
    """The state of a model, of the random number generators and of PyTorch's switches before a pass.

    Buffers and trainable parameters are copied at once, since a forward pass may write into any of them; so are the
    frozen parameters of modules whose own ``train()`` may rewrite them, as adapters that merge do. Training needs as
    much memory again for the gradients. Other frozen parameters, which may be most of a large model, are not copied:
    what a model's own forward writes into those, as a momentum encoder's does, stays.

    Args:
        model: the model.
        generator: the caller's generator, if any.
    """

    def __init__(self, model: nn.Module, generator: torch.Generator | None) -> None:
        self._model = model
        self._modes = [(module, module.training) for module in model.modules()]
        plain = [module for module, _ in self._modes if not isinstance(module, torch.jit.ScriptModule)]
        self._hooks = [(table, dict(table)) for module in plain for table in _hook_tables(module)]
        self._parts = self._working_parts = _Parts(plain)
        self._numbers = _copies((*_rewritable(model), *self._parts.plainly_held()))
        self._working_numbers: list[tuple[Tensor, Tensor]] = []
        self._generator = generator
        self._generator_state = None if generator is None else generator.get_state()
        self._random = _random_states()
        self._flags = read_flags()
        self._kept: dict[int, Tensor] = {}

    def keep(self, *tensors: Tensor) -> None:
        """Parameters and buffers whose new values are results, to stay when the pass succeeds."""
        self._kept.update({id(tensor): tensor for tensor in tensors})

    def keeps(self, tensor: Tensor) -> bool:
        """Whether a tensor's new values are results."""
        return id(tensor) in self._kept

    def begin(self) -> None:
        """Note the parts that the model works with, to which `rewind` goes back: sharded ones may have become whole."""
        self._working_parts = _Parts([m for m in self._model.modules() if not isinstance(m, torch.jit.ScriptModule)])
        known = {id(tensor) for tensor, _ in self._numbers}
        self._working_numbers = _copies(tensor for tensor in _rewritable(self._model) if id(tensor) not in known)

    def rewind(self) -> None:
        """Undo what a trial run of the model has changed, and stay in the pass: modes and switches stay as they are."""
        self._kept.clear()
        with torch.no_grad(), held_interrupts():
            self._working_parts.restore()
            _restore((*self._numbers, *self._working_numbers), {})
            _set_random_states(self._random)

    def restore(self, *, succeeded: bool) -> None:
        """Put everything back: all of it after a failure; after success all but the results."""
        with torch.no_grad(), held_interrupts():
            kept = self._kept if succeeded else {}
            self._restore_hooks()
            self._restore_modes()
            self._parts.restore()  # after it, for a module's own train() reads and sets flags of its own
            _restore(self._numbers, kept)
            if not succeeded and self._generator is not None and self._generator_state is not None:
                self._generator.set_state(self._generator_state)
            _set_random_states(self._random)
            torch.clear_autocast_cache()  # casts of what the weights were meanwhile
        restore_flags(self._flags)

    def _restore_hooks(self) -> None:
        """Those of the pass take themselves off; an interrupt may have come in between."""
        for table, entries in self._hooks:
            if table.keys() != entries.keys():
                table.clear()
                table.update(entries)

    def _restore_modes(self) -> None:
        """Through ``train()``, which in some modules does more than to set a flag: adapters merge and unmerge there."""
        root, training = self._modes[0]
        if any(module.training != mode for module, mode in self._modes):
            root.train(training)
            for module, mode in self._modes:
                if module.training != mode:
                    module.train(mode)
            for module, mode in self._modes:  # train() of a part has reached the parts inside
                if module.training != mode:
                    module.training = mode


class _Parts:
    """What modules hold, and a forward pass may replace, add or drop: tensors, parts, and plain attributes.

    What lists, dicts and sets among the attributes hold is part of it.

    Args:
        modules: whose.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._registered: list[tuple[Any, dict[str, Any]]] = [
            (registry, dict(registry)) for module in modules for registry in _registries(module)
        ]
        self._attributes = [(module, _attributes(module)) for module in modules]
        self._contents = [(value, _content(value)) for _, held in self._attributes for value in _containers(held)]
        configs = {id(held["config"]): held["config"] for _, held in self._attributes if "config" in held}
        self._configs = [(vars(c), dict(vars(c))) for c in configs.values() if hasattr(c, "__dict__")]

    def plainly_held(self) -> Iterator[Tensor]:
        """Tensors that are plain attributes, or lie in a container that is one."""
        return (value for _, held in self._attributes for value in _held_inside(held) if type(value) is Tensor)

    def restore(self) -> None:
        """Put every one of them back where it was."""
        for registry, entries in self._registered:
            if registry.keys() != entries.keys() or any(registry[key] is not value for key, value in entries.items()):
                registry.clear()
                registry.update(entries)
        for module, held in self._attributes:
            now = vars(module)
            for key in _attributes(module).keys() - held.keys():
                del now[key]
            for key, value in held.items():
                if key not in now or now[key] is not value:
                    now[key] = value
        for container, content in self._contents:
            _refill(container, content)
        for now, held in self._configs:  # Transformers notes the kind of labels there
            if now.keys() != held.keys() or any(now[key] is not value for key, value in held.items()):
                now.clear()
                now.update(held)


@torch.no_grad()
def _copies(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Tensors beside what they hold now."""
    return [(tensor, _memory(tensor).clone()) for tensor in tensors if not isinstance(tensor, UninitializedTensorMixin)]


def _restore(copies: Iterable[tuple[Tensor, Tensor]], kept: Mapping[int, Tensor]) -> None:
    """Give tensors their former numbers, but those that are kept, and those that are other views of the same memory."""
    results: dict[int, list[range]] = {}
    for tensor in kept.values():
        if (place := _place(tensor)) is not None:
            results.setdefault(place[0], []).append(place[1])
    together: list[tuple[Tensor, Tensor]] = []
    for tensor, before in copies:
        place = _place(tensor)
        shared = place is not None and any(_overlap(place[1], other) for other in results.get(place[0], ()))
        if id(tensor) in kept or shared:
            continue
        if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference():
            together.append((_memory(tensor), before))
        else:
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():  # the first ends the second
                _memory(tensor).copy_(before)
    if together:
        torch._foreach_copy_([tensor for tensor, _ in together], [before for _, before in together])


def _place(tensor: Tensor) -> tuple[int, range] | None:
    """A tensor's storage, and the bytes from its first number to its last; None for kinds that have none to name."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or not tensor.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = tensor.storage_offset(), tensor.element_size()
    return tensor.untyped_storage().data_ptr(), range(start * size, (start + last + 1) * size)


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


def _rewritable(model: nn.Module) -> Iterator[Tensor]:
    """The tensors that a forward pass, or a change of mode, may write into; each once."""
    seen: set[int] = set()
    for module in model.modules():
        switches = _switches(type(module))
        parameters = module.parameters(recurse=switches)  # an adapter merges into the layer that it wraps
        for tensor in (*module._buffers.values(), *(p for p in parameters if switches or p.requires_grad)):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


def _switches(kind: type[nn.Module]) -> bool:
    """Whether a class changes its mode in its own way; that of Transformers' models rewrites no parameter."""
    return any(
        own is not plain and not own.__module__.startswith("transformers.")
        for own, plain in ((kind.train, nn.Module.train), (kind.eval, nn.Module.eval))
    )


def _registries(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return tuple(vars(module)[name] for name in REGISTRIES)


def _hook_tables(module: nn.Module) -> Iterator[dict[Any, Any]]:
    return (value for key, value in vars(module).items() if "_hooks" in key and isinstance(value, dict))


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The plain attributes of a module: neither its registries nor its hooks, and not its mode."""
    return {
        key: value
        for key, value in vars(module).items()
        if key not in REGISTRIES and key != "training" and "_hooks" not in key
    }


def _containers(attributes: dict[str, Any]) -> Iterator[Any]:
    """The containers among the attributes, and those inside of these; each once."""
    return (value for value in _held_inside(attributes) if isinstance(value, (list, dict, set, deque)))


def _held_inside(attributes: dict[str, Any]) -> Iterator[Any]:
    """The attributes, and what lies in containers among them, however deep; each container is looked into once."""
    seen: set[int] = set()
    waiting: list[Any] = [attributes]
    while waiting:
        container = waiting.pop()
        for value in container.values() if isinstance(container, dict) else container:
            yield value
            if isinstance(value, (list, dict, set, deque, tuple)) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)


def _content(container: Any) -> Any:
    """Its items, in a plain container."""
    kind = next(kind for kind in (list, dict, set, deque) if isinstance(container, kind))
    return list(container) if kind is deque else kind(container)


def _refill(container: Any, content: Any) -> None:
    """Give a list, dict or set its former items, where they are others now."""
    if isinstance(container, dict):
        same = list(container) == list(content) and all(container[key] is content[key] for key in content)
    elif isinstance(container, (list, deque)):
        same = len(container) == len(content) and all(a is b for a, b in zip(container, content, strict=True))
    else:
        same = container == content
    if not same:
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(content)


def _memory(tensor: Tensor) -> Tensor:
    """Every number of a tensor once: `expand` shows the same memory many times, into which nothing can be copied."""
    if tensor.layout is not torch.strided:
        return tensor
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        states["numpy"] = sys.modules["numpy"].random.get_state()
    return states


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
    if "numpy" in states:
        sys.modules["numpy"].random.set_state(states["numpy"])

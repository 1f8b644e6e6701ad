"""Everything that a pass may disturb, put back bit for bit."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from sylinit.runtime.interrupts import held_interrupts


class Snapshot:
    """The state of a model and of the random number generators before a pass.

    Buffers and trainable parameters are copied at once, since a forward pass may write into any of them. Training needs
    as much memory again for the gradients. Frozen parameters, which may be most of a large model, are not copied:
    what a model's own forward writes into those, as a momentum encoder's does, stays.

    Args:
        model: the model.
        generator: the caller's generator, if any.
    """

    def __init__(self, model: nn.Module, generator: torch.Generator | None) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        # A forward pass may replace, add or drop buffers, not only write into them.
        self._registered: list[tuple[Any, dict[str, Any]]] = [
            (registry, dict(registry))
            for module in model.modules()
            for registry in (module._parameters, module._buffers)
        ]
        self._numbers = [
            (tensor, _memory(tensor).detach().clone())
            for tensor in (*model.buffers(), *(p for p in model.parameters() if p.requires_grad))
            if not isinstance(tensor, UninitializedTensorMixin)
        ]
        self._generator = generator
        self._generator_state = None if generator is None else generator.get_state()
        self._random = _random_states()
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        self._kept: set[int] = set()

    def keep(self, *tensors: Tensor) -> None:
        """Parameters and buffers whose new values are results, to stay when the pass succeeds."""
        self._kept.update(map(id, tensors))

    def keeps(self, tensor: Tensor) -> bool:
        """Whether a tensor's new values are results."""
        return id(tensor) in self._kept

    def restore(self, *, succeeded: bool) -> None:
        """Put everything back: all of it after a failure; after success all but the results."""
        with torch.no_grad(), held_interrupts():
            self._restore(succeeded)

    def _restore(self, succeeded: bool) -> None:
        for module, training in self._modes:
            module.training = training
        for registry, entries in self._registered:
            registry.clear()
            registry.update(entries)
        if not succeeded and self._generator is not None and self._generator_state is not None:
            self._generator.set_state(self._generator_state)
        _set_random_states(self._random)
        torch.backends.mha.set_fastpath_enabled(self._fast_path)
        for tensor, before in self._numbers:
            if not (succeeded and self.keeps(tensor)):
                with torch.inference_mode(tensor.is_inference()):
                    _memory(tensor).copy_(before)
        torch.clear_autocast_cache()  # casts of what the weights were meanwhile


def _memory(tensor: Tensor) -> Tensor:
    """Every number of a tensor once: `expand` shows the same memory many times, into which nothing can be copied."""
    if tensor.layout is not torch.strided:
        return tensor
    tensor = tensor.detach()
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

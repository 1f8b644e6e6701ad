"""What a forward pass leaves behind in Python: attributes of modules, of what their hooks belong to, and held locks.

Tensors are compared by identity, numbers and strings by value, containers and plain objects by what they hold. Nothing
is copied.
"""

from __future__ import annotations

import functools
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

DEPTH = 4
"""How far containers and objects inside one another are followed."""

LOCKS = (type(threading.Lock()), type(threading.RLock()), threading.Condition, threading.Semaphore)

_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class State:
    """The Python state that modules reach.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before: dict[str, Any] = {}

    def read(self) -> None:
        """Take the present state as the one to compare with."""
        self._before = dict(self._entries())

    def changed(self) -> list[str]:
        """The names of what has changed since `read`."""
        now = dict(self._entries())
        return [name for name in {**self._before, **now} if self._before.get(name, _ABSENT) != now.get(name, _ABSENT)]

    def held_locks(self) -> list[str]:
        """The names of the locks that somebody holds and that were free at `read`."""
        return [name for name, value in self._entries() if value == _HELD and self._before.get(name) != _HELD]

    def _entries(self) -> Iterator[tuple[str, Any]]:
        """Everything that is reachable, by name; each object once."""
        seen: set[int] = set()
        for name, module in self._model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            place = f"{name or type(module).__name__}"
            for key, value in vars(module).items():
                if key in ("_parameters", "_modules", "training"):
                    continue
                if "_hooks" in key:
                    hooks = value.values() if isinstance(value, dict) else ()
                    for hook in hooks:
                        if str(getattr(hook, "__module__", "")).startswith("sylinit."):
                            continue
                        yield from _walk(f"a hook of {place}", hook, DEPTH, seen)
                else:
                    yield from _walk(f"{place}.{key}", value, DEPTH, seen)
            for global_name, value in _globals_used(type(module)):
                if isinstance(value, LOCKS):
                    yield from _walk(global_name, value, DEPTH, seen)


_ABSENT = object()
_HELD = "held"


def _walk(name: str, value: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, _PLAIN):
        yield name, value
        return
    if isinstance(value, LOCKS):
        yield name, _HELD if _locked(value) else "free"
        return
    written = isinstance(value, torch.Tensor) and not value.is_inference()
    yield name, (id(value), value._version if written else 0)
    if not depth or id(value) in seen or isinstance(value, (torch.Tensor, nn.Module, type, types.ModuleType)):
        return
    seen.add(id(value))
    for label, part in _parts(value):
        yield from _walk(f"{name}{label}", part, depth - 1, seen)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds."""
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in list(value.items()))
    elif isinstance(value, (list, tuple, deque)):
        yield "", len(value)
        yield from ((f"[{place}]", part) for place, part in enumerate(list(value)))
    elif isinstance(value, (set, frozenset)):
        yield "", len(value)
    elif isinstance(value, functools.partial):
        yield from (("", value.func), ("", value.args), ("", value.keywords))
    elif isinstance(value, types.MethodType):
        yield "", value.__self__
    elif isinstance(value, types.FunctionType):
        for key, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f" ({key})", cell.cell_contents
            except ValueError:  # not filled yet
                continue
    elif hasattr(value, "__dict__"):
        yield from ((f".{key}", part) for key, part in list(vars(value).items()))


def _globals_used(kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """The global variables that the forward of a class names."""
    forward: Callable[..., Any] = kind.forward
    if isinstance(forward, types.FunctionType) and not forward.__module__.startswith("torch.nn."):
        for name in forward.__code__.co_names:
            if name in forward.__globals__:
                yield name, forward.__globals__[name]


def _locked(lock: Any) -> bool:
    """Whether anybody holds a lock."""
    if isinstance(lock, threading.Semaphore):
        return lock._value == 0
    inner = getattr(lock, "_lock", lock)  # of a Condition
    if hasattr(inner, "locked"):
        return bool(inner.locked())
    if inner.acquire(blocking=False):  # reentrant: held by a worker's thread, it cannot be had here
        inner.release()
        return False
    return True

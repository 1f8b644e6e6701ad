"""Which layers a user means: by name pattern, by type, by predicate."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from sylinit.errors import SylinitError


def matches(pattern: str, name: str) -> bool:
    """Whether a name, or the name of a module that contains it, fits a shell-style pattern."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def selector(layers: Any, names: Sequence[str], argument: str = "layers") -> Callable[[str, nn.Module], bool]:
    """Read ``layers=``: None (all), a pattern, a module type, a predicate ``(name, module) -> bool``, or a list.

    Args:
        layers: what the user passed.
        names: every name that a pattern may match.
        argument: the argument's name, for messages.

    Raises:
        SylinitError: a pattern that matches nothing (with the nearest names), or something that cannot select.
    """
    if layers is None:
        return lambda name, module: True
    if isinstance(layers, str):
        pattern = layers
        require_match(pattern, names, argument)
        return lambda name, module: matches(pattern, name)
    if isinstance(layers, type) and issubclass(layers, nn.Module):
        kind = layers
        return lambda name, module: isinstance(module, kind)
    if isinstance(layers, Iterable):
        parts = [selector(part, names, argument) for part in layers]
        return lambda name, module: any(part(name, module) for part in parts)
    if callable(layers) and not isinstance(layers, type):
        return lambda name, module: bool(layers(name, module))
    raise SylinitError(
        f"{argument}= takes a name pattern, a module type, a predicate (name, module) -> bool, or a list of them; "
        f"got {type(layers).__name__}"
    )


def require_match(pattern: str, names: Sequence[str], argument: str) -> None:
    """Raise a `SylinitError` naming the nearest layers where a pattern matches none."""
    if any(matches(pattern, name) for name in names):
        return
    known = list(dict.fromkeys(names))
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3) or known[:5]
    raise SylinitError(f"{argument}: no layer matches {pattern!r}; the nearest names are {', '.join(map(repr, near))}")

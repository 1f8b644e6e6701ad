"""What a latent code is, and the registry of codes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from sylinit.config import Config
from sylinit.errors import SylinitError

Needs = Literal["moments", "rows"]


@dataclass(frozen=True)
class Code:
    """A latent code: its function and what it needs.

    Attributes:
        name: as shown in the report.
        function: for ``needs="moments"``, ``(axes, ...) -> LinearCode``, which may name any of ``units``,
            ``generator``, ``label_share`` and ``config`` beside the axes; for ``needs="rows"``, ``(x, ...) -> s [n,
            k]``, which may name any of ``target``, ``units``, ``generator`` and ``config`` beside the rows.
        needs: ``"moments"`` or ``"rows"``.
        labels: whether it is meaningless without targets.
        fallback: the name of the code that takes its place without targets, if any.
        leading: how many principal components of the rows it reads, as a share of the units, if those are the leading
            ones; a function of the share of label units where it depends on that; None where it may read any. It
            decides whether a large layer can do without the others.
        label_share: the share of label units; None leaves it to the `Config`.
        values: a code given as numbers, ``[samples, m]``: it takes the place of the targets.
    """

    name: str
    function: Callable[..., Any]
    needs: Needs = "rows"
    labels: bool = False
    fallback: str | None = None
    leading: float | Callable[[float], float] | None = None
    label_share: float | None = None
    values: Tensor | None = None

    def with_label_share(self, config: Config, *, normalized: bool) -> Code:
        """The code with its own share of label units, or the configured one.

        Args:
            config: holds the shares.
            normalized: whether the layer feeds a normalization and training samples are few.
        """
        share = config.normalized_label_share if normalized else config.label_share
        return replace(self, label_share=share) if self.label_share is None else self

    def leading_components(self, units: int) -> int | None:
        """How many leading principal components a code of ``units`` units reads, or None if it may read any."""
        share = self.leading
        if callable(share):
            share = None if self.label_share is None else share(self.label_share)
        return None if share is None else math.ceil(share * units)

    def without_labels(self, layer: str, reason: str, remedy: str) -> Code:
        """What takes its place in a layer where its labels tell nothing.

        Args:
            layer: the layer's name, for the message.
            reason: why they tell nothing.
            remedy: what the user can do.

        Raises:
            SylinitError: it has no fallback.
        """
        if self.fallback is None:
            raise SylinitError(f"layer {layer!r}: the code {self.name!r} needs labels, and {reason}; {remedy}")
        return CODES[self.fallback]

    def call(self, layer: str, given: Any, **offered: Any) -> Any:
        """Call the function with ``given`` and those of the offered arguments that it names.

        Args:
            layer: the layer's name, for the message.
            given: its first argument.
            offered: the others.

        Raises:
            SylinitError: it asks for something else.
        """
        try:
            parameters = inspect.signature(self.function).parameters
        except ValueError:  # some built-in functions have no signature
            return self.function(given)
        _, *others = parameters.values()
        unknown = [
            p.name
            for p in others
            if p.name not in offered and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if unknown:
            first = "rows" if self.needs == "rows" else "axes"
            raise SylinitError(
                f"layer {layer!r}: the code {self.name!r} asks for {', '.join(map(repr, unknown))}; "
                f"after the {first} it may name any of {', '.join(map(repr, offered))}"
            )
        return self.function(given, **{p.name: offered[p.name] for p in others if p.name in offered})


CODES: dict[str, Code] = {}
"""Every registered code by name."""


def register_code(
    name: str,
    *,
    needs: Needs = "rows",
    labels: bool = False,
    fallback: str | None = None,
    leading: float | Callable[[float], float] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function a latent code under ``name``; use as a decorator.

    Args:
        name: what ``code=`` will call it.
        needs: ``"rows"`` for ``f(x, target, units, generator, config) -> s``, with ``x [n, d]`` centered rows,
            ``target [n, c]`` or None, and ``s [n, units]``; ``"moments"`` for ``f(axes, units, generator, label_share,
            config) -> LinearCode``, with `Axes` and the share of label units that this layer is to have. Of the
            arguments after the first, name only those that you use.
        labels: whether it needs targets.
        fallback: the registered code to use instead where there are no targets.
        leading: for ``needs="moments"``, the share of the units that are leading principal components (or mixtures of
            them), where the code reads no others; perhaps a function of ``label_share``.

    Raises:
        SylinitError: the name is taken.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in CODES:
            raise SylinitError(
                f"register_code: the name {name!r} is taken; choose another, or delete CODES[{name!r}] first"
            )
        CODES[name] = Code(name, function, needs, labels, fallback, leading)
        return function

    return register

"""A module seen as matrices: the rows that each of its weights multiplies, and how to write a weight back.

For every view, ``rows(x) @ weight.mT + bias`` is what the module computes from ``x``.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sylinit.errors import SylinitError
from sylinit.layers.parameters import all_or_nothing, assign, leaves, value

Shape = tuple[int, tuple[int, ...]]
"""(samples, positions of each sample): how a layer's rows are numbered."""


PROBED_ROWS = 256
"""Rows at most on which a module's output is compared with what its view says."""

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, less their whole parts, spread evenly over 0 to 1, in step with no grid of rows."""


def close(given: Tensor, expected: Tensor) -> bool:
    """Whether two results are equal within the rounding of their dtype."""
    if given.shape != expected.shape or not given.is_floating_point():
        return False
    given, expected = given.to(expected.dtype), expected
    error = (given - expected).abs().amax()
    tolerance = 0.02 if expected.dtype in (torch.float16, torch.bfloat16) else 1e-3
    return bool(error <= tolerance * expected.abs().amax())


class LayerView:
    """One weight of a module as ``groups`` matrices of ``units x dim`` that multiply rows of ``dim`` numbers.

    This class itself serves `torch.nn.Linear`. What `input` returns is passed on to `positions` and `rows` as it is:
    a tensor, or a tuple of tensors.

    Args:
        module: the module whose forward is met.
        name: the layer's name, for the report.
        weight: the attribute of ``owner`` that holds the weight.
        bias: the attribute of ``owner`` that holds the bias, if it is not None.
        owner: the module that holds both, where it is another one.

    Attributes:
        kind: the type of the module.
        attributes: the names of weight and bias.
        owner: the module that holds them.
        groups: g.
        units: k, the outputs of each group.
        dim: d, the inputs of each group.
        has_bias: whether there is a bias to write.
        parameters: the leaf parameters that `write` changes; of a parametrized weight, the originals.
    """

    groups: int = 1
    units: int
    dim: int

    def __init__(
        self,
        module: nn.Module,
        name: str,
        weight: str = "weight",
        bias: str = "bias",
        owner: nn.Module | None = None,
    ) -> None:
        self.module = module
        self.name = name
        self.kind = parametrize.type_before_parametrizations(module).__name__
        self.attributes = (weight, bias)
        self.owner: Any = owner or module
        self._weight = weight
        self._bias = bias
        self.has_bias = getattr(self.owner, bias, None) is not None
        self.parameters = (*leaves(self.owner, weight), *leaves(self.owner, bias))
        self._measure(value(self.owner, weight))

    def _measure(self, weight: Tensor) -> None:
        """Read g, k and d off the module and its weight."""
        self.units, self.dim = weight.shape[0], math.prod(weight.shape[1:])

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the weight multiplies, from the arguments of the module's forward: the first of them."""
        return args[0] if args else next(iter(kwargs.values()))

    def check(self, x: Any) -> None:
        """Refuse what the module's own forward would refuse, in words that name the layer.

        Args:
            x: what `input` returned.

        Raises:
            SylinitError: the number of features does not fit.
        """
        self._check_features(x, self.dim)

    def _check_features(self, x: Tensor, features: int, which: str = "") -> None:
        if not x.ndim or x.shape[-1] != features:
            raise SylinitError(
                f"layer {self.name!r} ({self.kind}): expected {features} features in the last dimension of its "
                f"{which}input, got shape {list(x.shape)}; make the layer or the data fit"
            )

    def positions(self, x: Any) -> Shape:
        """(samples, positions of each sample); row number ``sample * positions + position``."""
        return (x.shape[0], tuple(x.shape[1:-1])) if x.ndim > 1 else (1, ())

    def rows(self, x: Any, index: Tensor | None = None) -> Tensor:
        """The rows that the weight multiplies, in the dtype of ``x``.

        Nothing here waits for a CUDA device.

        Args:
            x: what `input` returned.
            index: int64 row numbers ``[n]`` on the device of ``x``, in any order; None for all rows in order.

        Returns:
            ``[g, n, d]``.
        """
        return take(x, index).unsqueeze(0)

    def traced_input(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What the weight multiplied, when the module has given its output."""
        return self.input(args, kwargs)

    def changed(self, x: Any, other: Any) -> Tensor:
        """Which rows differ between two inputs of one shape: bool, one dimension for each of those of `positions`."""
        samples, positions = self.positions(x)
        if isinstance(x, Tensor) and x.shape[:-1] == (samples, *positions):  # a row at each
            return (x != other).any(-1)
        return (self.rows(x) != self.rows(other)).any((0, 2)).view(samples, *positions)

    def outputs(self, y: Any, index: Tensor) -> Tensor:
        """What the module gave for some rows, ``[g, n, k]``: the counterpart of `rows` in its output.

        Args:
            y: the output of the module's forward.
            index: int64 row numbers ``[n]``.
        """
        return take(y, index).unflatten(1, (self.groups, self.units)).transpose(0, 1)

    def agrees(self, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> bool:
        """Whether ``rows(x) @ weight.mT + bias`` is what the module gave, on a few rows and within rounding.

        Args:
            args: positional arguments of the module's forward.
            kwargs: its keyword arguments.
            y: its output.
        """
        x = self.input(args, kwargs)
        try:
            self.check(x)
        except SylinitError:  # which the module has read all the same
            return False
        samples, positions = self.positions(x)
        total = samples * math.prod(positions)
        if not isinstance(y, Tensor) or not total:
            return False
        index = torch.arange(min(total, PROBED_ROWS), device=y.device)
        if total > PROBED_ROWS:
            index = (index.double() * GOLDEN % 1 * total).long()
        expected = self.rows(x, index) @ self.weight().mT
        if (bias := self.bias()) is not None:
            expected = expected + bias.unsqueeze(1)
        try:
            given = self.outputs(y, index)
        except (RuntimeError, IndexError):  # an output of another shape
            return False
        return close(given, expected)

    def weight(self) -> Tensor:
        """The present weight, ``[g, k, d]``."""
        return self._pack(value(self.owner, self._weight).detach())

    def bias(self) -> Tensor | None:
        """The present bias, ``[g, k]``."""
        return value(self.owner, self._bias).detach().view(self.groups, self.units) if self.has_bias else None

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Write ``weight [g, k, d]`` and ``bias [g, k]`` (None: keep it) in place, in the parameters' own dtype.

        Raises:
            UnsupportedLayerError: a parametrization cannot represent the weight; nothing is changed then.
        """
        with all_or_nothing(self.owner) if parametrize.is_parametrized(self.owner) else nullcontext():
            assign(self.owner, self._weight, self._unpack(weight, value(self.owner, self._weight).shape))
            if bias is not None:
                assign(self.owner, self._bias, bias.reshape(-1))

    def _pack(self, parameter: Tensor) -> Tensor:
        """From the parameter's own shape to ``[g, k, d]``."""
        return parameter.reshape(self.groups, self.units, self.dim)

    def _unpack(self, weight: Tensor, shape: torch.Size) -> Tensor:
        """From ``[g, k, d]`` to the parameter's own shape."""
        return weight.reshape(shape)


class TransposedLinearView(LayerView):
    """A linear layer whose weight is stored as ``[d, k]``: ``Conv1D`` of Transformers' GPT-2 family."""

    def _measure(self, weight: Tensor) -> None:
        self.dim, self.units = weight.shape

    def _pack(self, parameter: Tensor) -> Tensor:
        return parameter.mT.unsqueeze(0)

    def _unpack(self, weight: Tensor, shape: torch.Size) -> Tensor:
        return weight[0].mT


class BilinearView(LayerView):
    """``y = x1^T W x2 + b``: its rows are the outer products of its two inputs."""

    module: Any

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Both inputs."""
        first = args[0] if args else kwargs["input1"]
        return first, args[1] if len(args) > 1 else kwargs["input2"]

    def check(self, x: Any) -> None:
        """Both inputs have features of their own."""
        self._check_features(x[0], self.module.in1_features, "first ")
        self._check_features(x[1], self.module.in2_features, "second ")

    def positions(self, x: Any) -> Shape:
        """As those of the first input."""
        return super().positions(x[0])

    def rows(self, x: Any, index: Tensor | None = None) -> Tensor:
        """Rows ``[1, n, d1 d2]``."""
        first, second = (take(part, index) for part in x)
        return (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1).unsqueeze(0)


def take(x: Tensor, index: Tensor | None) -> Tensor:
    """Rows ``[n, d]`` of ``[..., d]``, without copying what is not asked for."""
    if index is None or x.ndim == 1:
        flat = x.reshape(-1, x.shape[-1])
        return flat if index is None else flat[index]
    return x[unravel(index, x.shape[:-1])]


def unravel(number: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Coordinates in ``shape`` of flat positions.

    `torch.unravel_index` copies the shape to the device and waits; its first call takes half a second of imports.
    """
    coordinates = []
    for size in reversed(shape):
        coordinates.append(number % size)
        number = number.div(size, rounding_mode="floor")
    return tuple(reversed(coordinates))

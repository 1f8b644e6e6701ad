"""A module seen as matrices: the rows that each of its weights multiplies, and how to write a weight back.

For every view, ``rows(x) @ weight.mT + bias`` is what the module computes from ``x``.
To serve another kind of layer, write a `View` for it and add one line to `VIEWS`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from sylinit.errors import UnsupportedLayerError

Shape = tuple[int, tuple[int, ...]]
"""(samples, positions of each sample): how a layer's rows are numbered."""


class View:
    """One weight of a module as ``groups`` matrices of ``units x dim`` that multiply rows of ``dim`` numbers.

    Args:
        module: the module whose forward is met.
        name: the layer's name, for the report.
        weight: name of the parameter in ``owner``.
        owner: the module that holds the parameters, if it is another one.

    Attributes:
        groups: g.
        units: k, the outputs of each group.
        dim: d, the inputs of each group.
        has_bias: whether there is a bias to write.
        parameters: the leaf parameters that `write` changes.
    """

    groups: int = 1
    units: int
    dim: int

    def __init__(self, module: nn.Module, name: str, weight: str = "weight", owner: nn.Module | None = None) -> None:
        self.module = module
        self.name = name
        self.kind = type(module).__name__
        self._owner = owner or module
        self._weight = weight
        self.has_bias = getattr(self._owner, "bias", None) is not None
        self.parameters = _leaves(self._owner, weight) + (_leaves(self._owner, "bias") if self.has_bias else ())
        self._measure(getattr(self._owner, weight))

    def _measure(self, weight: Tensor) -> None:
        """Read g, k and d off the parameter."""
        self.units, self.dim = weight.shape[0], math.prod(weight.shape[1:])

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The tensor (or tuple of tensors) that the weight multiplies, from the arguments of the module's forward."""
        return args[0] if args else kwargs["input"]

    def positions(self, x: Any) -> Shape:
        """(samples, positions of each sample); row number ``sample * positions + position``."""
        return (x.shape[0], tuple(x.shape[1:-1])) if x.ndim > 1 else (1, ())

    def rows(self, x: Any, index: Tensor | None = None) -> Tensor:
        """Rows ``[g, n, d]``: those numbered ``index`` (int64, any order), or all of them in order."""
        flat = x.reshape(-1, self.dim)
        return (flat if index is None else flat[index]).unsqueeze(0)

    def weight(self) -> Tensor:
        """The present weight, ``[g, k, d]``."""
        return self._pack(getattr(self._owner, self._weight).detach())

    def bias(self) -> Tensor | None:
        """The present bias, ``[g, k]``."""
        return self._owner.bias.detach().view(self.groups, self.units) if self.has_bias else None

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Write ``weight [g, k, d]`` and ``bias [g, k]`` in place, in the parameters' own dtype and device.

        Raises:
            UnsupportedLayerError: a parametrisation that cannot represent the weight; nothing is changed then.
        """
        _assign(self._owner, self._weight, self._unpack(weight, getattr(self._owner, self._weight)))
        if bias is not None:
            _assign(self._owner, "bias", bias.reshape(-1))

    def _pack(self, parameter: Tensor) -> Tensor:
        return parameter.reshape(self.groups, self.units, self.dim)

    def _unpack(self, weight: Tensor, like: Tensor) -> Tensor:
        return weight.reshape(like.shape)


class TransposedLinearView(View):
    """A linear layer whose weight is stored as ``[d, k]``, as in the GPT-2 family."""

    def _measure(self, weight: Tensor) -> None:
        self.dim, self.units = weight.shape

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Its argument is called ``x``."""
        return args[0] if args else kwargs["x"]

    def _pack(self, parameter: Tensor) -> Tensor:
        return parameter.mT.unsqueeze(0)

    def _unpack(self, weight: Tensor, like: Tensor) -> Tensor:
        return weight[0].mT


class BilinearView(View):
    """``y = x1^T W x2 + b``: its rows are the outer products of its two inputs."""

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Both inputs."""
        first = args[0] if args else kwargs["input1"]
        return first, args[1] if len(args) > 1 else kwargs["input2"]

    def positions(self, x: Any) -> Shape:
        """As those of the first input."""
        return super().positions(x[0])

    def rows(self, x: Any, index: Tensor | None = None) -> Tensor:
        """Rows ``[1, n, d1 d2]``."""
        first, second = (part.reshape(-1, part.shape[-1]) for part in x)
        if index is not None:
            first, second = first[index], second[index]
        return (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1).unsqueeze(0)


class ConvView(View):
    """A convolution over its patches.

    In each spatial dimension a table says which input position (-1: a zero) each tap of the kernel reads for each
    output position. Strides, dilation, padding and its modes are all in the tables; a patch is gathered through them.
    """

    module: Any

    def _measure(self, weight: Tensor) -> None:
        self.groups = self.module.groups
        self.units = self.module.out_channels // self.groups
        self._channels = self.module.in_channels // self.groups
        self.dim = self._channels * math.prod(self.module.kernel_size)

    def tables(self, x: Tensor) -> list[Tensor]:
        """For each spatial dimension, the input position of each tap: int64 ``[out, kernel]`` on the CPU."""
        return [self._table(size, axis) for axis, size in enumerate(self._batched(x).shape[2:])]

    def positions(self, x: Any) -> Shape:
        """Output positions."""
        return self._batched(x).shape[0], tuple(len(table) for table in self.tables(x))

    def rows(self, x: Any, index: Tensor | None = None) -> Tensor:
        """Patches, gathered straight from the input."""
        x = self._batched(x)
        tables = self.tables(x)
        places = tuple(len(table) for table in tables)
        size = math.prod(places)
        flat = x.flatten(2)
        if index is None:
            sample: Any = slice(None)
            position = torch.unravel_index(torch.arange(size, device=x.device), places)
        else:
            sample = (index // size).unsqueeze(1)
            position = torch.unravel_index(index % size, places)
        taps, zero = self._taps(tables, position, x)
        if index is None:
            patches = flat[:, :, taps].movedim(1, -1).flatten(0, 1)  # [B P, K, C]
            zero = None if zero is None else zero.repeat(len(flat), 1)
        else:
            patches = flat[sample, :, taps]  # [n, K, C]
        if zero is not None:
            patches = patches.masked_fill_(zero.unsqueeze(2), 0)
        count, kernel = patches.shape[:2]
        patches = patches.view(count, kernel, self.groups, self._channels)
        return patches.permute(2, 0, 3, 1).reshape(self.groups, count, self.dim)

    def _taps(self, tables: list[Tensor], position: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Flat input position ``[n, K]`` of every tap, and where it is a zero (None: nowhere)."""
        count = len(position[0])
        taps = torch.zeros(count, 1, dtype=torch.long, device=x.device)
        zero: Tensor | None = None
        for table, place, size in zip(tables, position, x.shape[2:], strict=True):
            chosen = table.to(x.device)[place]
            taps = (taps.unsqueeze(2) * size + chosen.clamp(min=0).unsqueeze(1)).flatten(1)
            outside = (chosen < 0).unsqueeze(1) if bool((table < 0).any()) else None
            if zero is not None or outside is not None:
                before = torch.zeros(count, 1, dtype=torch.bool, device=x.device) if zero is None else zero
                before = before.expand(count, taps.shape[1] // table.shape[1]).unsqueeze(2)
                here = outside if outside is not None else torch.zeros_like(chosen, dtype=torch.bool).unsqueeze(1)
                zero = (before | here).flatten(1)
        return taps, zero

    def _table(self, size: int, axis: int) -> Tensor:
        conv = self.module
        kernel, stride, dilation = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
        reach = dilation * (kernel - 1)
        if conv.padding == "same":
            before, after = reach // 2, reach - reach // 2
        else:
            before = after = 0 if conv.padding == "valid" else conv.padding[axis]
        out = (size + before + after - reach - 1) // stride + 1
        place = torch.arange(out).unsqueeze(1) * stride - before + torch.arange(kernel) * dilation
        if conv.padding_mode == "reflect":
            place = (size - 1) - ((size - 1) - place.abs()).abs()
        elif conv.padding_mode == "replicate":
            place = place.clamp(0, size - 1)
        elif conv.padding_mode == "circular":
            place = place % size
        return place.masked_fill((place < 0) | (place >= size), -1)

    def _batched(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.ndim == len(self.module.kernel_size) + 1 else x


class ConvTransposeView(ConvView):
    """A transposed convolution: a tap reads an input position where the stride divides its distance, else a zero.

    An ``output_size`` given to its forward changes how many positions there are at the far edge; they are not read.
    """

    def _table(self, size: int, axis: int) -> Tensor:
        conv = self.module
        kernel, stride, dilation = conv.kernel_size[axis], conv.stride[axis], conv.dilation[axis]
        padding = conv.padding[axis]
        out = (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + conv.output_padding[axis] + 1
        place = torch.arange(out).unsqueeze(1) + padding - torch.arange(kernel) * dilation
        inside = (place % stride == 0) & (place >= 0) & (place < size * stride)
        return torch.where(inside, place.div(stride, rounding_mode="floor"), -1)

    def _pack(self, parameter: Tensor) -> Tensor:
        split = parameter.reshape(self.groups, self._channels, self.units, -1)
        return split.transpose(1, 2).reshape(self.groups, self.units, self.dim)

    def _unpack(self, weight: Tensor, like: Tensor) -> Tensor:
        split = weight.reshape(self.groups, self.units, self._channels, -1)
        return split.transpose(1, 2).reshape(like.shape)


class AttentionInputView(View):
    """The query, key or value projection of `torch.nn.MultiheadAttention`, packed with the others or on its own."""

    module: Any

    def __init__(self, module: nn.MultiheadAttention, name: str, part: int) -> None:
        self._part = part
        self._packed = module.in_proj_weight is not None
        word = ("query", "key", "value")[part]
        super().__init__(module, f"{name}.in_proj.{word}".lstrip("."), self._parameter(part))
        self.has_bias = module.in_proj_bias is not None
        if self.has_bias:
            self.parameters += _leaves(module, "in_proj_bias")

    def _parameter(self, part: int) -> str:
        return "in_proj_weight" if self._packed else ("q_proj_weight", "k_proj_weight", "v_proj_weight")[part]

    def _measure(self, weight: Tensor) -> None:
        self.units, self.dim = self.module.embed_dim, weight.shape[1]

    @property
    def _slice(self) -> slice:
        return slice(self._part * self.units, (self._part + 1) * self.units)

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The query, key or value, batch first."""
        x = args[self._part] if len(args) > self._part else kwargs[("query", "key", "value")[self._part]]
        return _batch_first(self.module, x)

    def bias(self) -> Tensor | None:
        """A slice of the packed bias."""
        return self.module.in_proj_bias.detach()[self._slice].unsqueeze(0) if self.has_bias else None

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Write into the slice of the packed parameters."""
        whole = getattr(self.module, self._weight)
        if self._packed:
            new = whole.detach().clone()
            new[self._slice] = weight[0].to(new)
        else:
            new = weight[0]
        _assign(self.module, self._weight, new)
        if bias is not None:
            self.module.in_proj_bias[self._slice] = bias[0].to(self.module.in_proj_bias)

    def _pack(self, parameter: Tensor) -> Tensor:
        return (parameter[self._slice] if self._packed else parameter).unsqueeze(0)


class AttentionOutputView(View):
    """``out_proj`` of `torch.nn.MultiheadAttention`, whose forward is never called as a module."""

    module: Any

    def __init__(self, module: nn.MultiheadAttention, name: str) -> None:
        super().__init__(module, f"{name}.out_proj".lstrip("."), owner=module.out_proj)

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The concatenated heads: the module's own output with ``out_proj`` replaced by the identity meanwhile."""
        kept = dict(self._owner._parameters)
        weight = self._owner.weight
        eye = torch.eye(self.dim, dtype=weight.dtype, device=weight.device)
        try:
            self._owner._parameters["weight"] = nn.Parameter(eye, requires_grad=False)
            if self.has_bias:
                self._owner._parameters["bias"] = nn.Parameter(torch.zeros_like(eye[0]), requires_grad=False)
            heads = self.module.forward(*args, **kwargs)[0]
        finally:
            self._owner._parameters.update(kept)
        return _batch_first(self.module, heads)


def _batch_first(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    if x.ndim == 2:
        return x.unsqueeze(0)
    return x if module.batch_first else x.transpose(0, 1)


def _attention(module: nn.Module, name: str) -> list[View]:
    assert isinstance(module, nn.MultiheadAttention)
    if parametrize.is_parametrized(module) or parametrize.is_parametrized(module.out_proj):
        raise UnsupportedLayerError("attention under a parametrisation")
    return [*(AttentionInputView(module, name, part) for part in range(3)), AttentionOutputView(module, name)]


def _one(view: Callable[[nn.Module, str], View]) -> Callable[[nn.Module, str], list[View]]:
    return lambda module, name: [view(module, name)]


VIEWS: dict[type[nn.Module], Callable[[nn.Module, str], list[View]]] = {
    nn.MultiheadAttention: _attention,
    _ConvTransposeNd: _one(ConvTransposeView),
    _ConvNd: _one(ConvView),
    nn.Bilinear: _one(BilinearView),
    nn.Linear: _one(View),
}
"""How each kind of module is seen; the first kind that fits serves."""

REASONS: dict[type[nn.Module], str] = {
    nn.Embedding: "a lookup table: its input is an index, not a row of numbers",
    nn.EmbeddingBag: "a lookup table: its input is an index, not a row of numbers",
    nn.RNNBase: "recurrent: its weights meet their inputs inside one call",
    nn.RNNCellBase: "recurrent: its weights meet their inputs inside one call",
    nn.PReLU: "an activation: its parameter multiplies no row",
}
"""Why each kind of module is left alone."""


def views_of(module: nn.Module, name: str) -> list[View]:
    """See a module as matrices.

    Args:
        module: any module with parameters of its own.
        name: its name in the model.

    Raises:
        UnsupportedLayerError: it cannot be seen so; the message is the reason.
    """
    if any(isinstance(p, UninitializedParameter) for p in module.parameters(recurse=False)):
        raise UnsupportedLayerError("lazy and not materialised yet; run one batch through the model first")
    if "quantized" in type(module).__module__:
        raise UnsupportedLayerError("quantised: its weight is no floating-point parameter")
    for kind, reason in REASONS.items():
        if isinstance(module, kind):
            raise UnsupportedLayerError(reason)
    make = next((make for kind, make in VIEWS.items() if isinstance(module, kind)), None)
    if make is None and type(module).__name__ == "Conv1D" and getattr(module, "nf", None) is not None:
        make = _one(TransposedLinearView)
    if make is None:
        own = ", ".join(key for key, value in module._parameters.items() if value is not None)
        raise UnsupportedLayerError(f"how its parameters ({own}) act on its input is not known")
    for key, value in module._parameters.items():
        if value is not None and not value.is_floating_point():
            raise UnsupportedLayerError(f"its parameter {key!r} is {str(value.dtype).removeprefix('torch.')}, not real")
    if not isinstance(module, nn.MultiheadAttention) and not _has_weight(module):
        raise UnsupportedLayerError(
            "its weight is no parameter (torch.nn.utils.weight_norm and its like recompute it from others); "
            "use torch.nn.utils.parametrizations instead"
        )
    return make(module, name)


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("weight"), nn.Parameter) or parametrize.is_parametrized(module, "weight")


def _leaves(module: nn.Module, name: str) -> tuple[nn.Parameter, ...]:
    """The leaf parameters behind an attribute: itself, or the originals of its parametrisation."""
    if parametrize.is_parametrized(module, name):
        return tuple(module.parametrizations[name].parameters())  # type: ignore[index, union-attr, operator]
    value = module._parameters.get(name)
    return () if value is None else (value,)


@torch.no_grad()
def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter new numbers in place; a parametrised one through its right inverse, if that is exact."""
    old = getattr(module, name)
    value = value.to(dtype=old.dtype, device=old.device)
    if not parametrize.is_parametrized(module, name):
        old.copy_(value)
        return
    kept = [(leaf, leaf.detach().clone()) for leaf in itertools.chain(_leaves(module, name))]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.parametrizations.buffers()]  # type: ignore[union-attr]
    try:
        setattr(module, name, value)
        same = torch.allclose(getattr(module, name), value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))
    except (NotImplementedError, ValueError, RuntimeError):
        same = False
    if not same:
        for leaf, before in (*kept, *buffers):
            leaf.copy_(before)
        kinds = ", ".join(type(step).__name__ for step in module.parametrizations[name])  # type: ignore[index, union-attr]
        raise UnsupportedLayerError(f"its parametrisation ({kinds}) cannot represent a given weight")

"""A module seen as matrices: the rows that each of its weights multiplies, and how to write a weight back.

For every view, ``rows(x) @ weight.mT + bias`` is what the module computes from ``x``.
To serve another kind of layer, write a `View` for it and add one line to `VIEWS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from sylinit.errors import SylinitError, UnsupportedLayerError

Shape = tuple[int, tuple[int, ...]]
"""(samples, positions of each sample): how a layer's rows are numbered."""


class View:
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
        groups: g.
        units: k, the outputs of each group.
        dim: d, the inputs of each group.
        has_bias: whether there is a bias to write.
        parameters: the leaf parameters that `write` changes; of a parametrised weight, the originals.
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
        self._owner: Any = owner or module
        self._weight = weight
        self._bias = bias
        self.has_bias = getattr(self._owner, bias, None) is not None
        self.parameters = (*_leaves(self._owner, weight), *_leaves(self._owner, bias))
        self._measure(_value(self._owner, weight))

    def _measure(self, weight: Tensor) -> None:
        """Read g, k and d off the module and its weight."""
        self.units, self.dim = weight.shape[0], math.prod(weight.shape[1:])

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the weight multiplies, from the arguments of the module's forward."""
        return args[0] if args else kwargs["input"]

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
        return _take(x, index).unsqueeze(0)

    def weight(self) -> Tensor:
        """The present weight, ``[g, k, d]``."""
        return self._pack(_value(self._owner, self._weight).detach())

    def bias(self) -> Tensor | None:
        """The present bias, ``[g, k]``."""
        return _value(self._owner, self._bias).detach().view(self.groups, self.units) if self.has_bias else None

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Write ``weight [g, k, d]`` and ``bias [g, k]`` (None: keep it) in place, in the parameters' own dtype.

        Raises:
            UnsupportedLayerError: a parametrisation cannot represent the weight; nothing is changed then.
        """
        with _all_or_nothing(self._owner) if parametrize.is_parametrized(self._owner) else nullcontext():
            _assign(self._owner, self._weight, self._unpack(weight, _value(self._owner, self._weight).shape))
            if bias is not None:
                _assign(self._owner, self._bias, bias.reshape(-1))

    def _pack(self, parameter: Tensor) -> Tensor:
        """From the parameter's own shape to ``[g, k, d]``."""
        return parameter.reshape(self.groups, self.units, self.dim)

    def _unpack(self, weight: Tensor, shape: torch.Size) -> Tensor:
        """From ``[g, k, d]`` to the parameter's own shape."""
        return weight.reshape(shape)


class TransposedLinearView(View):
    """A linear layer whose weight is stored as ``[d, k]``: ``Conv1D`` of Transformers' GPT-2 family."""

    def _measure(self, weight: Tensor) -> None:
        self.dim, self.units = weight.shape

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Its argument is called ``x``."""
        return args[0] if args else kwargs["x"]

    def _pack(self, parameter: Tensor) -> Tensor:
        return parameter.mT.unsqueeze(0)

    def _unpack(self, weight: Tensor, shape: torch.Size) -> Tensor:
        return weight[0].mT


class BilinearView(View):
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
        first, second = (_take(part, index) for part in x)
        return (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1).unsqueeze(0)


class ConvView(View):
    """A convolution over its patches.

    In each spatial dimension, `sources` says which input position every tap of the kernel reads for an output
    position. Stride, dilation, padding and its mode are all in there; a patch is gathered through it.
    """

    module: Any

    def _measure(self, weight: Tensor) -> None:
        self.groups = self.module.groups
        self.units = self.module.out_channels // self.groups
        self.channels = self.module.in_channels // self.groups
        self.dim = self.channels * math.prod(self.module.kernel_size)

    def positions(self, x: Any) -> Shape:
        """Output positions."""
        return len(self.images(x)), self.places(x)

    def rows(self, x: Any, index: Tensor | None = None) -> Tensor:
        """Patches, gathered straight from the input: neither padded nor unfolded."""
        images, places = self.images(x), self.places(x)
        if index is None:
            index = torch.arange(len(images) * math.prod(places), device=images.device)
        sample, *position = unravel(index, (len(images), *places))
        taps = torch.zeros_like(sample).unsqueeze(1)  # [n, K]: each tap's position in a flattened image
        inside = torch.ones_like(taps, dtype=torch.bool)
        for axis, (place, size) in enumerate(zip(position, images.shape[2:], strict=True)):
            source = self.sources(place, size, axis)
            here = (source >= 0) & (source < size)
            taps = (taps.unsqueeze(2) * size + source.clamp(0, size - 1).unsqueeze(1)).flatten(1)
            inside = (inside.unsqueeze(2) & here.unsqueeze(1)).flatten(1)
        patches = images.flatten(2)[sample.unsqueeze(1), :, taps]  # [n, K, C]
        if self._reads_zeros:
            patches.masked_fill_(~inside.unsqueeze(2), 0)
        patches = patches.unflatten(2, (self.groups, self.channels))
        return patches.permute(2, 0, 3, 1).reshape(self.groups, len(index), self.dim)

    def check(self, x: Any) -> None:
        """Channels, number of dimensions, and room for at least one output."""
        images, channels, dims = self.images(x), self.groups * self.channels, len(self.module.kernel_size)
        if images.ndim != dims + 2 or images.shape[1] != channels:
            raise SylinitError(
                f"layer {self.name!r} ({self.kind}): expected an input of {channels} channels and {dims} spatial "
                f"dimensions, got shape {list(images.shape)}; make the layer or the data fit"
            )
        if min(self.places(x)) < 1:
            raise SylinitError(
                f"layer {self.name!r} ({self.kind}): its kernel {list(self.module.kernel_size)} does not fit into an "
                f"input of shape {list(images.shape)}; give it larger inputs"
            )

    def images(self, x: Any) -> Tensor:
        """The input as ``[samples, channels, *sizes]``."""
        return x.unsqueeze(0) if x.ndim == len(self.module.kernel_size) + 1 else x

    def places(self, x: Any) -> tuple[int, ...]:
        """Number of output positions in each spatial dimension."""
        conv = self.module
        return tuple(
            (size + sum(self.padding(axis)) - conv.dilation[axis] * (conv.kernel_size[axis] - 1) - 1)
            // conv.stride[axis]
            + 1
            for axis, size in enumerate(self.images(x).shape[2:])
        )

    def padding(self, axis: int) -> tuple[int, int]:
        """Padding before and after the input in one spatial dimension."""
        padding = self.module.padding
        if padding == "valid":
            return 0, 0
        if padding == "same":
            reach = self.module.dilation[axis] * (self.module.kernel_size[axis] - 1)
            return reach // 2, reach - reach // 2
        return padding[axis], padding[axis]

    def sources(self, place: Tensor, size: int, axis: int) -> Tensor:
        """The input positions that the taps of the kernel read in one spatial dimension.

        Args:
            place: int64 output positions ``[n]``.
            size: the input's size.
            axis: which spatial dimension.

        Returns:
            int64 ``[n, kernel]``; a position outside the input stands for a zero.
        """
        conv = self.module
        taps = torch.arange(conv.kernel_size[axis], device=place.device) * conv.dilation[axis]
        source = place.unsqueeze(1) * conv.stride[axis] - self.padding(axis)[0] + taps
        if conv.padding_mode == "reflect":
            return (size - 1) - ((size - 1) - source.abs()).abs()
        if conv.padding_mode == "replicate":
            return source.clamp(0, size - 1)
        if conv.padding_mode == "circular":
            return source % size
        return source

    @property
    def _reads_zeros(self) -> bool:
        """Whether any tap can fall outside the input."""
        padded = any(any(self.padding(axis)) for axis in range(len(self.module.kernel_size)))
        return padded and self.module.padding_mode == "zeros"


class ConvTransposeView(ConvView):
    """A transposed convolution over the patches that its outputs are made of.

    A tap reads an input position where the stride divides its distance from the output position, else a zero.
    """

    _reads_zeros = True

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The tensor; with an ``output_size`` also an empty tensor ``[0, *output_size]`` that carries it."""
        x = super().input(args, kwargs)
        size = args[1] if len(args) > 1 else kwargs.get("output_size")
        return x if size is None else (x, x.new_empty(0, *size[-len(self.module.kernel_size) :]))

    def images(self, x: Any) -> Tensor:
        """The input as ``[samples, channels, *sizes]``."""
        return super().images(x[0] if isinstance(x, tuple) else x)

    def places(self, x: Any) -> tuple[int, ...]:
        """Number of output positions in each spatial dimension."""
        if isinstance(x, tuple):
            return tuple(x[1].shape[1:])
        conv = self.module
        return tuple(
            (size - 1) * conv.stride[axis]
            - 2 * conv.padding[axis]
            + conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            + conv.output_padding[axis]
            + 1
            for axis, size in enumerate(self.images(x).shape[2:])
        )

    def sources(self, place: Tensor, size: int, axis: int) -> Tensor:
        """The input positions that the taps of the kernel read in one spatial dimension."""
        conv = self.module
        taps = torch.arange(conv.kernel_size[axis], device=place.device) * conv.dilation[axis]
        distance = place.unsqueeze(1) + conv.padding[axis] - taps
        source = distance.div(conv.stride[axis], rounding_mode="floor")
        return source.masked_fill(distance % conv.stride[axis] != 0, -1)

    def _pack(self, parameter: Tensor) -> Tensor:
        split = parameter.reshape(self.groups, self.channels, self.units, -1)
        return split.transpose(1, 2).reshape(self.groups, self.units, self.dim)

    def _unpack(self, weight: Tensor, shape: torch.Size) -> Tensor:
        split = weight.reshape(self.groups, self.units, self.channels, -1)
        return split.transpose(1, 2).reshape(shape)


class AttentionInputView(View):
    """The query, key or value projection of `torch.nn.MultiheadAttention`, packed with the others or on its own."""

    module: Any

    def __init__(self, module: nn.MultiheadAttention, name: str, part: int) -> None:
        self._part = part
        self._argument = ("query", "key", "value")[part]
        self._packed = module.in_proj_weight is not None
        super().__init__(
            module,
            f"{name}.in_proj.{self._argument}".lstrip("."),
            weight="in_proj_weight" if self._packed else f"{self._argument[0]}_proj_weight",
            bias="in_proj_bias",
        )

    def _measure(self, weight: Tensor) -> None:
        self.units, self.dim = self.module.embed_dim, weight.shape[1]
        self._slice = slice(self._part * self.units, (self._part + 1) * self.units)

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The query, key or value, batch first."""
        x = args[self._part] if len(args) > self._part else kwargs[self._argument]
        return _batch_first(self.module, x)

    def bias(self) -> Tensor | None:
        """A slice of the packed bias."""
        return self.module.in_proj_bias.detach()[self._slice].unsqueeze(0) if self.has_bias else None

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Write into the slices of the packed parameters."""
        self.weight().copy_(weight)
        if bias is not None:
            self.module.in_proj_bias[self._slice].copy_(bias[0])

    def _pack(self, parameter: Tensor) -> Tensor:
        return (parameter[self._slice] if self._packed else parameter).unsqueeze(0)


class AttentionOutputView(View):
    """``out_proj`` of `torch.nn.MultiheadAttention`, whose forward is never called as a module.

    Its input, the concatenated heads, is the module's own output with the identity for ``out_proj`` meanwhile. So
    masks, added keys and whatever else the module was called with hold by themselves. Inside a pass, `strip` before the
    module's forward and `dress` after it make one computation of attention serve both the heads and the output.
    """

    module: Any

    def __init__(self, module: nn.MultiheadAttention, name: str) -> None:
        super().__init__(module, f"{name}.out_proj".lstrip("."), owner=module.out_proj)
        self._kept: dict[str, Tensor | None] | None = None

    @torch.no_grad()
    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The concatenated heads, by a forward of their own."""
        self.strip()
        try:
            output = self.module.forward(*args, **kwargs)
        finally:
            self.dress()
        return self.heads(output)

    @torch.no_grad()
    def strip(self) -> None:
        """Put the identity in the place of ``out_proj``."""
        held = self._owner._parameters
        self._kept = dict(held)
        held["weight"] = nn.Parameter(torch.eye(self.dim, dtype=held["weight"].dtype, device=held["weight"].device))
        if self.has_bias:
            held["bias"] = nn.Parameter(torch.zeros_like(held["bias"]))

    def dress(self) -> bool:
        """Put ``out_proj`` back; whether it was away."""
        kept, self._kept = self._kept, None
        self._owner._parameters.update(kept or {})
        return kept is not None

    def heads(self, output: Any) -> Tensor:
        """The concatenated heads, batch first, from the output of the stripped module."""
        return _batch_first(self.module, output[0])

    def project(self, output: Any) -> Any:
        """The output of the module as it is now, from that of the stripped module."""
        return nn.functional.linear(output[0], self._owner.weight, self._owner.bias), *output[1:]


def _batch_first(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    if x.ndim == 2:
        return x.unsqueeze(0)
    return x if module.batch_first else x.transpose(0, 1)


def _attention(module: nn.Module, name: str) -> list[View]:
    assert isinstance(module, nn.MultiheadAttention)
    if parametrize.is_parametrized(module) or parametrize.is_parametrized(module.out_proj):
        raise UnsupportedLayerError("an attention layer under a parametrisation; remove the parametrisation first")
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

    Returns:
        One view for each weight, in the order in which the data meets them.

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
    own = ", ".join(key for key, value in module._parameters.items() if value is not None)
    if make is None and type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        make = _one(TransposedLinearView)
    elif make is None:
        raise UnsupportedLayerError(f"how its parameters ({own}) act on its input is not known")
    elif _computes_otherwise(module):
        raise UnsupportedLayerError(
            f"{type(module).__name__} has a forward of its own, so how its parameters ({own}) act on its input "
            "is not known"
        )
    for key, value in module.named_parameters():
        if not value.is_floating_point():
            raise UnsupportedLayerError(f"its parameter {key!r} is {str(value.dtype).removeprefix('torch.')}, not real")
        if hasattr(value, "__tensor_flatten__"):  # a tensor made of others: sharded, quantised
            raise UnsupportedLayerError(f"its parameter {key!r} is a {type(value).__name__}, not one plain tensor")
    for key in () if isinstance(module, nn.MultiheadAttention) else ("weight", "bias"):
        if not _leaves(module, key) and (key == "weight" or getattr(module, key, None) is not None):
            raise UnsupportedLayerError(
                f"its {key} is no parameter (torch.nn.utils.weight_norm, torch.nn.utils.prune and their like recompute "
                "it from others); use torch.nn.utils.parametrizations, or prune afterwards"
            )
    return make(module, name)


def _computes_otherwise(module: nn.Module) -> bool:
    """Whether a subclass of one of PyTorch's layers replaces what that layer computes."""
    stock = next(kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules."))
    return any(
        getattr(type(module), method, None) is not getattr(stock, method, None)
        for method in ("forward", "_conv_forward")
    )


def _take(x: Tensor, index: Tensor | None) -> Tensor:
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


def _leaves(module: nn.Module, name: str) -> tuple[nn.Parameter, ...]:
    """The leaf parameters behind an attribute: itself, or the originals of its parametrisation."""
    if parametrize.is_parametrized(module, name):
        return tuple(_parametrization(module, name).parameters())
    value = module._parameters.get(name)
    return () if value is None else (value,)


def _parametrization(module: nn.Module, name: str) -> nn.Module:
    return module.parametrizations[name]  # type: ignore[index, return-value]


@torch.no_grad()
def _value(module: nn.Module, name: str) -> Tensor:
    """The tensor that an attribute stands for; reading it changes nothing."""
    if not parametrize.is_parametrized(module, name):
        return getattr(module, name)
    steps = list(_parametrization(module, name).modules())
    modes = [step.training for step in steps]
    try:
        for step in steps:  # in training mode, spectral_norm iterates whenever it is read
            step.training = False
        return getattr(module, name)
    finally:
        for step, mode in zip(steps, modes, strict=True):
            step.training = mode


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter new numbers in place; a parametrised one through its right inverse, if that is exact."""
    old = _value(module, name)
    if not parametrize.is_parametrized(module, name):
        old.copy_(value)
        return
    value = value.to(old)
    # A norm has no direction at zero: zeros become numbers too small to be seen beside the others.
    precision, largest = torch.finfo(old.dtype).eps, value.abs().max()
    value = torch.where(value == 0, precision**2 * largest, value)
    try:
        setattr(module, name, value)
        error, cause = (_value(module, name) - value).abs().max(), None
    except Exception as failure:  # a parametrisation is anybody's code
        error, cause = largest.new_tensor(math.nan), failure
    if not error <= 16 * precision * largest:
        steps = ", ".join(type(step).__name__ for step in _parametrization(module, name).children())
        raise UnsupportedLayerError(f"its parametrisation ({steps}) cannot represent a given {name}") from cause


@contextmanager
def _all_or_nothing(module: nn.Module) -> Iterator[None]:
    """Undo every change to a module's tensors if the body fails, and keep them where they are in memory.

    A right inverse gives its tensors new memory, which would cut them off from whatever shares the old.
    """
    slots: list[dict[str, Any]] = [slot for part in module.modules() for slot in (part._parameters, part._buffers)]
    held = [(slot, name) for slot in slots for name, tensor in slot.items() if tensor is not None]
    tensors = [slot[name] for slot, name in held]
    places = [tensor.data for tensor in tensors]
    before = [place.clone() for place in places]
    try:
        yield
        after = [slot[name].detach().clone() for slot, name in held]
    except BaseException:
        after = before
        raise
    finally:
        for (slot, name), tensor, place, numbers in zip(held, tensors, places, after, strict=True):
            slot[name] = tensor
            tensor.data = place
            place.copy_(numbers)

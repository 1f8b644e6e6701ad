"""Convolutions as matrices over their patches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sylinit.errors import SylinitError
from sylinit.layers.view import LayerView, Shape, unravel


class ConvView(LayerView):
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

    def changed(self, x: Any, other: Any) -> Tensor:
        """Which images differ: their positions are not told apart."""
        here, there = self.images(x), self.images(other)
        return (here != there).flatten(1).any(1).view(-1, *(1 for _ in here.shape[2:]))

    def outputs(self, y: Any, index: Tensor) -> Tensor:
        """The channels at some output positions, ``[g, n, k]``."""
        sample, place = unravel(index, (len(self.images(y)), math.prod(self.images(y).shape[2:])))
        return self.images(y).flatten(2)[sample, :, place].unflatten(1, (self.groups, self.units)).transpose(0, 1)

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

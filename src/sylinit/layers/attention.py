"""`torch.nn.MultiheadAttention` as four matrices: the query, key, value and output projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sylinit.errors import UnsupportedLayerError
from sylinit.layers.view import LayerView, close


class AttentionInputView(LayerView):
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

    def agrees(self, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> bool:
        """Whether the module computes what PyTorch's attention does."""
        return _is_attention(self.module, args, kwargs, y)

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Write into the slices of the packed parameters."""
        self.weight().copy_(weight)
        if bias is not None:
            self.module.in_proj_bias[self._slice].copy_(bias[0])

    def _pack(self, parameter: Tensor) -> Tensor:
        return (parameter[self._slice] if self._packed else parameter).unsqueeze(0)


class AttentionOutputView(LayerView):
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

    def agrees(self, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> bool:
        """Whether the module computes what PyTorch's attention does."""
        return _is_attention(self.module, args, kwargs, y)

    def traced_input(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The module's own output, whose leading dimensions are those of the heads."""
        return _batch_first(self.module, output[0])

    @torch.no_grad()
    def strip(self) -> None:
        """Put the identity in the place of ``out_proj``."""
        held = self.owner._parameters
        self._kept = dict(held)
        held["weight"] = nn.Parameter(torch.eye(self.dim, dtype=held["weight"].dtype, device=held["weight"].device))
        if self.has_bias:
            held["bias"] = nn.Parameter(torch.zeros_like(held["bias"]))

    def dress(self) -> bool:
        """Put ``out_proj`` back; whether it was away."""
        kept, self._kept = self._kept, None
        self.owner._parameters.update(kept or {})
        return kept is not None

    def heads(self, output: Any) -> Tensor:
        """The concatenated heads, batch first, from the output of the stripped module."""
        return _batch_first(self.module, output[0])

    def project(self, output: Any) -> Any:
        """The output of the module as it is now, from that of the stripped module."""
        return nn.functional.linear(output[0], self.owner.weight, self.owner.bias), *output[1:]


def _is_attention(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> bool:
    """Whether a module gives what the forward of `torch.nn.MultiheadAttention` gives for the same arguments."""
    expected = nn.MultiheadAttention.forward(module, *args, **kwargs)[0]
    return isinstance(y, tuple) and isinstance(y[0], Tensor) and close(y[0], expected)


def _batch_first(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    if x.ndim == 2:
        return x.unsqueeze(0)
    return x if module.batch_first else x.transpose(0, 1)


def attention_views(module: nn.Module, name: str) -> list[LayerView]:
    """The four matrices of an attention layer, in the order in which the data meets them."""
    assert isinstance(module, nn.MultiheadAttention)
    if parametrize.is_parametrized(module) or parametrize.is_parametrized(module.out_proj):
        raise UnsupportedLayerError("an attention layer under a parametrization; remove the parametrization first")
    return [*(AttentionInputView(module, name, part) for part in range(3)), AttentionOutputView(module, name)]

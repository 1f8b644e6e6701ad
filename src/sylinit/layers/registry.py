"""Which modules are seen as matrices, and how: the registry of layer views.

A class is a hint only. Whether a module computes ``rows(x) @ weight.mT + bias`` is checked on the first rows that reach
it (`LayerView.agrees`), unless its forward is PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from sylinit.errors import SylinitError, UnsupportedLayerError
from sylinit.layers.attention import attention_views
from sylinit.layers.convolution import ConvTransposeView, ConvView
from sylinit.layers.parameters import leaves
from sylinit.layers.view import BilinearView, LayerView, TransposedLinearView

Views = list[LayerView]
MakeView = Callable[[nn.Module, str], LayerView]
MakeViews = Callable[[nn.Module, str], Views]


def _one(make: MakeView) -> MakeViews:
    return lambda module, name: [make(module, name)]


LAYERS: dict[type[nn.Module], MakeViews] = {
    nn.Linear: _one(LayerView),
    nn.Bilinear: _one(BilinearView),
    _ConvNd: _one(ConvView),
    _ConvTransposeNd: _one(ConvTransposeView),
    nn.MultiheadAttention: attention_views,
}
"""How each kind of module is seen. The last kind registered that fits serves, so a user's own comes first."""

REASONS: dict[type[nn.Module], str] = {
    nn.Embedding: "a lookup table: its input is an index, not a row of numbers",
    nn.EmbeddingBag: "a lookup table: its input is an index, not a row of numbers",
    nn.RNNBase: "recurrent: its weights meet their inputs inside one call",
    nn.RNNCellBase: "recurrent: its weights meet their inputs inside one call",
    nn.PReLU: "an activation: its parameter multiplies no row",
    nn.LayerNorm: "normalization without running statistics",
    nn.GroupNorm: "normalization without running statistics",
    nn.RMSNorm: "normalization without running statistics",
    nn.modules.batchnorm._NormBase: "normalization without running statistics",
}
"""Why each kind of module is left alone."""


def register_layer(kind: type[nn.Module], view: MakeView = LayerView) -> None:
    """Serve a layer of your own: say how its weight is seen as a matrix.

    For the view, ``rows(x) @ weight.mT + bias`` must be what the module computes. That is checked on the first rows
    that reach it, and a module that computes something else is left alone, with that reason in the report.

    Args:
        kind: the class of the module; its subclasses are seen in the same way.
        view: called with ``(module, name)``: `LayerView` itself for a layer that multiplies the last dimension of its
            first argument by ``module.weight [k, d]`` and adds ``module.bias [k]`` (or None), or a subclass of it.

    Raises:
        SylinitError: ``kind`` is no class of modules, or ``view`` is not callable.
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise SylinitError(f"register_layer: kind must be a class of torch.nn.Module, got {kind!r}; pass type(module)")
    if not callable(view):
        raise SylinitError(f"register_layer: view must be a LayerView subclass or (module, name) -> view, got {view!r}")
    LAYERS.pop(kind, None)
    LAYERS[kind] = _one(view)


def hypotheses(module: nn.Module, name: str) -> list[Views]:
    """The ways in which a module may be seen as matrices, the likeliest first.

    Args:
        module: any module with parameters of its own.
        name: its name in the model.

    Returns:
        Alternatives, each with one view for each weight, in the order in which the data meets them.

    Raises:
        UnsupportedLayerError: it cannot be seen so; the message is the reason.
    """
    _require_plain(module)
    makers = _makers(module)
    for key, parameter in module.named_parameters():
        if not parameter.is_floating_point():
            kind = str(parameter.dtype).removeprefix("torch.")
            raise UnsupportedLayerError(f"its parameter {key!r} is {kind}, not real")
        if hasattr(parameter, "__tensor_flatten__"):  # a tensor made of others: sharded, quantized
            raise UnsupportedLayerError(f"its parameter {key!r} is a {type(parameter).__name__}, not one plain tensor")
    found = [make(module, name) for make in makers]
    for views in found:
        _require_writable(module, views)
        if any(view.groups * view.units * view.dim == 0 for view in views):
            raise UnsupportedLayerError("its weight has no entries")
    return found


def is_stock(module: nn.Module) -> bool:
    """Whether a module runs the forward of one of PyTorch's own layers, so that what it computes is known."""
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return False
    stock = (kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules."))
    base = next(stock, None)
    return (
        base is not None
        and any(issubclass(base, kind) for kind in _STOCK)
        and all(
            getattr(type(module), method, None) is getattr(base, method, None)
            for method in ("forward", "_conv_forward")
        )
    )


_STOCK = tuple(LAYERS)


def is_lazy(module: nn.Module) -> bool:
    """Whether a module has parameters or buffers without a shape yet."""
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return any(isinstance(tensor, (UninitializedParameter, UninitializedBuffer)) for tensor in tensors)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module computes with integers instead of real weights."""
    return "quantized" in type(module).__module__ or any(
        not (p.is_floating_point() or p.is_complex()) and p.dtype != torch.bool
        for p in module._parameters.values()
        if p is not None and not isinstance(p, UninitializedParameter)
    )


def _makers(module: nn.Module) -> list[MakeViews]:
    """How to see a module: as its class is registered, or as either layout of a linear layer."""
    for kind, make in reversed(LAYERS.items()):
        if isinstance(module, kind):
            return [make]
    for kind, reason in REASONS.items():
        if isinstance(module, kind):
            raise UnsupportedLayerError(reason)
    own = {key: value for key, value in module._parameters.items() if value is not None}
    weight = own.get("weight")
    if weight is not None and weight.ndim == 2 and own.keys() <= {"weight", "bias"} and not module._modules:
        return [_one(LayerView), _one(TransposedLinearView)]
    if own and all(value.ndim <= 1 for value in own.values()):
        raise UnsupportedLayerError(f"its parameters ({', '.join(own)}) scale or shift single features")
    raise UnsupportedLayerError(
        f"how its parameters ({', '.join(own)}) act on its input is not known; sylinit.register_layer can say it"
    )


def _require_plain(module: nn.Module) -> None:
    """Refuse modules whose class or state alone says that no weight can be written."""
    if is_lazy(module):
        raise UnsupportedLayerError("lazy and not materialized yet; run one batch through the model first")
    if "quantized" in type(module).__module__:
        raise UnsupportedLayerError("quantized: its weight is no floating-point parameter")


def _require_writable(module: nn.Module, views: Views) -> None:
    """Refuse weights that are no parameters: whatever is written into them is computed anew at the next call."""
    if isinstance(module, nn.MultiheadAttention):
        return
    for view in views:
        for key in view.attributes:
            if not leaves(module, key) and (key == view.attributes[0] or getattr(module, key, None) is not None):
                raise UnsupportedLayerError(
                    f"its {key} is no parameter (torch.nn.utils.weight_norm, torch.nn.utils.prune and their like "
                    "recompute it from others); use torch.nn.utils.parametrizations, or prune afterwards"
                )

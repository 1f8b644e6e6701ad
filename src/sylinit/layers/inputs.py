"""The inputs of layers: dense tensors of no subclass, in a dtype that the layer reads."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sylinit.errors import SylinitError


def plain(value: Any) -> Any:
    """Nested arguments with every tensor as a dense `torch.Tensor` of no subclass, sharing its memory where it can."""
    if isinstance(value, Tensor):
        value = value.to_dense() if value.layout is not torch.strided else value
        return value if type(value) is Tensor else value.detach().as_subclass(Tensor)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(plain(item) for item in value)
    return value


def require_plain_rows(name: str, values: Any) -> None:
    """Refuse nested tensors, and those of `torch.vmap` and its like, which hide all samples but one.

    Raises:
        SylinitError: naming the layer.
    """
    for tensor in tensors(values):
        if tensor.is_nested:
            raise SylinitError(
                f"layer {name!r} meets a nested tensor, whose rows are not numbered by sample; pass padded tensors "
                "(torch.nested.to_padded_tensor) and their mask"
            )
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise SylinitError(
                f"layer {name!r} is called under torch.vmap or another transform of torch.func, which hides its rows; "
                "let forward= call the model on whole batches"
            )


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors inside nested arguments, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


@contextmanager
def readable_inputs(model: nn.Module, layers: Collection[nn.Module]) -> Iterator[None]:
    """Give layers their inputs in the dtype of their parameters, where they could not read them otherwise.

    The model's own call with such an input would fail: float64 data, float32 data in a half-precision
    model. The input itself stays as the user made it for everything else that reads it, such as times and masks.

    Args:
        model: whose parts.
        layers: those that multiply their input by a matrix; PyTorch's other layers take what is narrower than they are.
    """
    hooks = []
    for name, module in model.named_modules():
        own = next((p.dtype for p in module.parameters(recurse=False) if p.is_floating_point()), None)
        stock = type(module).__module__.startswith("torch.nn.modules.")
        if own is not None and (module in layers or stock) and not isinstance(module, torch.jit.ScriptModule):
            hook = _Cast(name, own, narrower=module in layers)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


class _Cast:
    """A hook that casts tensors to ``dtype``; ``narrower``: those that are narrower, too."""

    def __init__(self, name: str, dtype: torch.dtype, *, narrower: bool) -> None:
        self._name = name
        self._dtype = dtype
        self._narrower = narrower

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._narrower and any(isinstance(v, Tensor) and v.dtype == torch.uint8 for v in (*args, *kwargs.values())):
            raise SylinitError(
                f"layer {self._name!r} meets unsigned bytes (uint8), which it cannot multiply; pass real numbers, "
                "scaled as they will be in training, such as x.float() / 255"
            )
        if not any(map(self._unreadable, (*args, *kwargs.values()))):
            return None
        return tuple(map(self._cast, args)), {key: self._cast(value) for key, value in kwargs.items()}

    def _unreadable(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.dtype == self._dtype or value.layout is torch.sparse_csr:
            return False
        if not value.is_floating_point() or torch.is_autocast_enabled(value.device.type):
            return False
        return self._narrower or torch.finfo(value.dtype).bits > torch.finfo(self._dtype).bits

    def _cast(self, value: Any) -> Any:
        return value.to(self._dtype) if self._unreadable(value) else value

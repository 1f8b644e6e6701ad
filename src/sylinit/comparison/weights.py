"""Weights in safetensors files that know how they were made: model, data, normalization, names of classes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sylinit import SylinitError

KEY = "sylinit"
"""The entry of a file's metadata that holds the description, as JSON."""


def save_weights(model: nn.Module, path: Path, description: dict[str, Any]) -> None:
    """Write a model's weights and their description, at once or not at all.

    Args:
        model: its state goes into the file; tensors that share memory are written once.
        path: of the safetensors file; what is there is replaced.
        description: what JSON can hold.
    """
    from safetensors.torch import save_model

    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_model(model, str(partial), metadata={KEY: json.dumps(description)})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_description(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The description of a weights file (empty if it has none), and the shape of each tensor in it.

    Raises:
        SylinitError: the file is missing or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise SylinitError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return json.loads((file.metadata() or {}).get(KEY, "{}")), shapes
    except SafetensorError as error:
        raise SylinitError(f"{path}: not a safetensors file ({error}); `sylinit init` writes one") from error


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Load what a file has for a model; a layer of another shape, such as a new head, keeps what it has.

    Args:
        model: changed in place.
        path: a safetensors file, or a state dictionary that `torch.save` wrote.

    Returns:
        The names of parameters and buffers that the file has nothing for.

    Raises:
        SylinitError: the file cannot be read, or nothing in it fits.
    """
    if not path.is_file():
        raise SylinitError(f"--weights {path}: no such file")
    given = _read(path)
    own = model.state_dict()
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    if not any(value.dim() > 1 for value in fitting.values()):
        raise SylinitError(
            f"--weights {path}: no weight in it fits the model; it has {_some(given)}, the model {_some(own)}"
        )
    model.load_state_dict(fitting, strict=False)
    shared = {own[name].data_ptr() for name in fitting if own[name].numel()}
    return [name for name, value in own.items() if name not in fitting and value.data_ptr() not in shared]


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError:
        pass  # then it may be what torch.save wrote
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling meets
        raise SylinitError(
            f"--weights {path}: neither a safetensors file nor a state dictionary of torch.save "
            f"({type(error).__name__}); write one with torch.save(model.state_dict(), path)"
        ) from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):  # a checkpoint of Lightning's kind
        found = found["state_dict"]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise SylinitError(f"--weights {path}: holds no state dictionary; write model.state_dict() with torch.save")
    return found


def _some(state: dict[str, Tensor]) -> str:
    shown = [f"{name} {list(value.shape)}" for name, value in state.items()]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")

"""`save` and `load`: a model's weights with the report of how they came about, in one safetensors file."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from sylinit.errors import SylinitError, require
from sylinit.report import Report, report_from_dict
from sylinit.version import __version__

FORMAT = "1"
"""Of what is beside the weights; a file of another format is refused."""


@dataclass(frozen=True)
class Saved:
    """What a file holds beside the weights.

    Attributes:
        report: what `initialize_` did; its ``config`` holds the constants of the method.
        normalization: how inputs are brought into the form that the model expects, as it was given to `save`: numbers
            and nested lists by name.
        versions: of sylinit, torch and Python when the file was written.
    """

    report: Report
    normalization: dict[str, Any]
    versions: dict[str, str]


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    report: Report,
    *,
    normalization: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's parameters and buffers and the report to one safetensors file.

    Report, configuration, normalization and versions are JSON text in the file's metadata; nothing is pickled, so that
    reading the file runs no code of its writer. The file appears as a whole or not at all. Tensors that share memory
    (tied weights) are written once. Needs ``sylinit[save]``.

    Args:
        path: of the file, which is overwritten if it exists.
        model: whose ``state_dict()`` is written, on any device and of any dtype.
        report: what `initialize_` returned.
        normalization: how inputs are brought into the form that the model expects, for example
            ``{"mean": x.mean(0), "scale": x.std(0)}``: numbers, tensors or arrays by name.

    Raises:
        MissingPackageError: safetensors is not installed.
        SylinitError: the model holds something else than plain tensors, or the normalization something else than
            numbers.
    """
    safetensors = require("safetensors.torch", "save", "sylinit.save")
    target = Path(path)
    state = _state(model, "save")
    first: dict[tuple[Any, ...], str] = {}
    shared = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        owner = first.setdefault(place, name) if tensor.numel() else name
        if owner != name:
            shared[name] = owner
    metadata = {
        "sylinit.format": FORMAT,
        "sylinit.report": report.to_json(),
        "sylinit.normalization": json.dumps(_numbers(normalization or {}, "normalization")),
        "sylinit.versions": json.dumps(_versions()),
        "sylinit.shared": json.dumps(shared),
    }
    # Copies of what is left: views of one memory are no error then.
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.items() if name not in shared}
    written = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        safetensors.save_file(tensors, written, metadata)
        os.replace(written, target)
    finally:
        written.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], model: nn.Module) -> Saved:
    """Read a file of `save` into a model, in place.

    Names and shapes are compared before anything is written: after an error the model is what it was. Numbers are
    converted to the dtype of the model's own tensors. Needs ``sylinit[save]``.

    Args:
        path: of the file.
        model: one of the same architecture.

    Returns:
        The report and what else the file holds beside the weights.

    Raises:
        MissingPackageError: safetensors is not installed.
        SylinitError: the file was not written by `save`, or its names or shapes are not those of the model.
    """
    safetensors = require("safetensors", "save", "sylinit.load")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except safetensors.SafetensorError as error:
        raise SylinitError(f"load: {os.fspath(path)!r} is no safetensors file ({error})") from error
    if metadata.get("sylinit.format") != FORMAT:
        found = metadata.get("sylinit.format")
        raise SylinitError(
            f"load: {os.fspath(path)!r} "
            + (f"has format {found!r}, this version reads {FORMAT!r}" if found else "was not written by sylinit.save")
        )
    for name, owner in json.loads(metadata["sylinit.shared"]).items():
        tensors[name] = tensors[owner]
    saved = Saved(
        report_from_dict(json.loads(metadata["sylinit.report"])),
        json.loads(metadata["sylinit.normalization"]),
        json.loads(metadata["sylinit.versions"]),
    )
    _require_alike(_state(model, "load"), tensors)
    model.load_state_dict(tensors)
    return saved


def _state(model: nn.Module, what: str) -> dict[str, Tensor]:
    """The model's parameters and buffers, if they are plain tensors with numbers."""
    if not isinstance(model, nn.Module):
        raise SylinitError(f"{what}: model must be a torch.nn.Module, got {type(model).__name__}")
    state = model.state_dict()
    for name, value in state.items():
        if isinstance(value, (UninitializedParameter, UninitializedBuffer)):
            raise SylinitError(f"{what}: {name!r} has no shape yet; run one batch through the model first")
        if not isinstance(value, Tensor):
            raise SylinitError(f"{what}: {name!r} of the model's state is a {type(value).__name__}, not a tensor")
        if hasattr(value, "__tensor_flatten__") or value.is_meta or value.layout is not torch.strided:
            remedy = "gather a sharded model first, for example with get_model_state_dict(full_state_dict=True)"
            raise SylinitError(f"{what}: {name!r} is no plain tensor with numbers ({type(value).__name__}); {remedy}")
    return state


def _require_alike(own: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Refuse other names or shapes than the model's, naming the first few."""
    wrong = [f"{name!r} is missing in the file" for name in own if name not in read]
    wrong += [f"{name!r} is not in the model" for name in read if name not in own]
    wrong += [
        f"{name!r} has shape {list(read[name].shape)} in the file and {list(tensor.shape)} in the model"
        for name, tensor in own.items()
        if name in read and read[name].shape != tensor.shape
    ]
    if wrong:
        more = f", and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise SylinitError(f"load: the file is of another model: {'; '.join(wrong[:5])}{more}; nothing was changed")


def _numbers(value: Any, name: str) -> Any:
    """Tensors and arrays as nested lists, mappings and sequences likewise."""
    if isinstance(value, Mapping):
        return {str(key): _numbers(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_numbers(item, name) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    raise SylinitError(f"save: {name} must hold numbers, tensors or arrays, got {type(value).__name__}")


def _versions() -> dict[str, str]:
    return {"sylinit": __version__, "torch": str(torch.__version__), "python": platform.python_version()}

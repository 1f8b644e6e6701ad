"""What a model holds: modules that may be layers, normalizations with statistics, and everything that is neither."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from sylinit.errors import ROOT, SylinitError, UnsupportedLayerError
from sylinit.layers.normalization import keeps_statistics
from sylinit.layers.registry import hypotheses, is_lazy, is_quantized
from sylinit.plan.trace import Candidate
from sylinit.report import LayerReport

STATISTICS = re.compile(r"(^|_)(running|moving|mean|var|std|ema|avg)(_|$)")
"""Names of buffers that look like running statistics."""


@dataclass(frozen=True)
class Inventory:
    """The parts of a model.

    Attributes:
        candidates: modules that may be layers.
        norms: normalizations with running statistics, by name.
        left_alone: everything else that holds parameters, with the reason.
    """

    candidates: tuple[Candidate, ...]
    norms: dict[str, nn.Module]
    left_alone: tuple[LayerReport, ...]


def take_inventory(model: nn.Module) -> Inventory:
    """Look at every module of a model once.

    Raises:
        SylinitError: a module whose parameters have no numbers yet.
    """
    candidates: list[Candidate] = []
    norms: dict[str, nn.Module] = {}
    left: list[LayerReport] = []
    inside: set[str] = set()  # parts of a layer that is seen as a whole
    for name, module in model.named_modules():
        if "parametrizations" in name.split(".") or name in inside:
            continue
        own = any(value is not None for value in module._parameters.values())
        if isinstance(module, torch.jit.ScriptModule):  # Python sees the tensors, not how they are used
            if next(module.parameters(recurse=False), None) is not None:
                left.append(left_alone(name, module, "scripted or traced: initialize the model before that"))
            continue
        _require_materialized(name, module)
        if keeps_statistics(module):
            norms[name] = module
        elif own or hasattr(module, "parametrizations") or is_quantized(module) or _holds_matrices(module):
            try:
                found = tuple(tuple(views) for views in hypotheses(module, name))
            except UnsupportedLayerError as error:
                left.append(left_alone(name, module, str(error)))
            else:
                candidates.append(Candidate(name, module, found))
                inside.update(view.name for view in found[0] if view.name != name)
        elif names := [key for key in module._buffers if STATISTICS.search(key)]:
            reason = f"its buffers ({', '.join(names)}) may be running statistics; they are not computed"
            left.append(left_alone(name, module, reason))
    return Inventory(tuple(candidates), norms, tuple(left))


def _require_materialized(name: str, module: nn.Module) -> None:
    """Refuse modules without numbers: running the model would fail, or fill them at random in each process."""
    if is_lazy(module):
        raise SylinitError(
            f"layer {name!r} ({type(module).__name__}) is lazy and not materialized yet; run one batch through the "
            "model first"
        )
    if any(parameter is not None and parameter.is_meta for parameter in module._parameters.values()):
        raise SylinitError(
            f"layer {name!r} is on the meta device and has no numbers; materialize the model first, for example with "
            "model.to_empty(device=...) or by loading its weights"
        )


def left_alone(name: str, module: nn.Module, reason: str) -> LayerReport:
    """The record of a module to which nothing is done."""
    return LayerReport(name or ROOT, type(module).__name__, "left alone", reason)


def _holds_matrices(module: nn.Module) -> bool:
    """Whether a module without parameters of its own is seen as a layer: attention with separate projections."""
    return isinstance(module, nn.MultiheadAttention)

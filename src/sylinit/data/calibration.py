"""The calibration data of one pass: this process's batches, and what all processes agree their targets are."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sylinit.data.batches import Batch, read_batches
from sylinit.data.targets import TargetKind, Targets, describe, encode
from sylinit.errors import SylinitError
from sylinit.runtime.processes import Processes


@dataclass(frozen=True)
class Data:
    """The calibration data of this process.

    Attributes:
        batches: one a lane.
        kind: what the targets are, in all processes together.
        targets: as vectors, or None where there are none.
        samples: number of samples in all processes.
        before: number of samples in processes of lower rank.
        seed: of everything random, the same in all processes.
        processes: the group.
    """

    batches: tuple[Batch, ...]
    kind: TargetKind
    targets: Targets | None
    samples: int
    before: int
    seed: int
    processes: Processes

    def one_hot(self, classes: int) -> Targets:
        """The targets of a head with ``classes`` outputs."""
        return _encode(self.batches, TargetKind(classes=classes), self.processes, one_hot=True)

    def given(self, values: Tensor) -> Targets:
        """A code given as numbers, one row for each sample of all processes in order, in the place of targets."""
        if len(values) != self.samples:
            raise SylinitError(
                f"code= as a tensor has {len(values)} rows, there are {self.samples} calibration samples"
            )
        sizes = [batch.samples for batch in self.batches]
        mine = values[self.before : self.before + sum(sizes)].double()
        device = next((t.device for t in _tensors(self.batches[0])), values.device)
        return Targets(tuple(mine.to(device).split(sizes)), values.double().mean(0).to(device))


def read_data(model: nn.Module, batches: Any, processes: Processes, seed: int, *, custom: bool) -> Data:
    """Read this process's batches and agree with the others on what the targets are.

    Args:
        model: its device and dtype decide where inputs go.
        batches: what the user passed.
        processes: the group.
        seed: that of the first process is used by all.
        custom: whether the user has a ``forward=`` of their own.
    """
    device, dtype = _place(model)

    def local() -> tuple[tuple[Batch, ...], TargetKind]:
        read = tuple(read_batches(batches, device, dtype, custom=custom))
        return read, describe([batch.target for batch in read if batch.target is not None])

    read, own = processes.together(local)
    # A process all of whose labels are ignored says nothing about their kind; the others do.
    silent = not own.present and read[0].target is not None
    agreed = processes.agree(lambda: (sum(batch.samples for batch in read), None if silent else own, seed))
    said = [kind for _, kind, _ in agreed if kind is not None] or [own]
    kind = TargetKind(max(k.classes for k in said), said[0].width, all(k.soft for k in said))
    differ = any((bool(k.classes), k.width) != (bool(kind.classes), kind.width) for k in said)
    if differ or (kind.width and len(said) < len(agreed)):
        raise SylinitError("batches: the targets of the processes of the group are of different kinds or widths")
    return Data(
        batches=read,
        kind=kind,
        targets=_encode(read, kind, processes) if kind.present else None,
        samples=sum(samples for samples, _, _ in agreed),
        before=sum(samples for samples, _, _ in agreed[: processes.rank]),
        seed=agreed[0][2],
        processes=processes,
    )


def call_model(model: nn.Module, batch: Batch) -> Any:
    """Call the model as its batch is: positional inputs or a mapping, ``labels`` only where the model takes them."""
    parameters = inspect.signature(model.forward).parameters
    takes_labels = "labels" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    kwargs = batch.kwargs if takes_labels else {key: v for key, v in batch.kwargs.items() if key != "labels"}
    return model(*batch.args, **kwargs)


def _encode(batches: tuple[Batch, ...], kind: TargetKind, processes: Processes, *, one_hot: bool = False) -> Targets:
    vectors = tuple(encode(b.target, kind, one_hot=one_hot) for b in batches if b.target is not None)
    known = torch.cat([v.flatten(0, -2) for v in vectors])
    known = known[known.isfinite().all(1)]
    sums = processes.sum_(torch.cat([known.sum(0), known.new_tensor([float(len(known))])]))
    return Targets(vectors, sums[:-1] / sums[-1].clamp(min=1))


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Where inputs are to go, and the dtype of floating-point inputs (None under autocast: as they are)."""
    parameters = [p for p in model.parameters() if not isinstance(p, nn.parameter.UninitializedParameter)]
    device = next((p.device for p in parameters if not p.is_meta), torch.device("cpu"))
    floating = next((p.dtype for p in parameters if p.is_floating_point()), None)
    return device, None if torch.is_autocast_enabled(device.type) else floating


def _tensors(batch: Batch) -> list[Tensor]:
    return [v for v in (*batch.args, *batch.kwargs.values()) if isinstance(v, Tensor)]

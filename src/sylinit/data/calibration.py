"""The calibration set of one pass: this process's batches, and what all processes agree their targets are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sylinit.data.batches import Batch, Read
from sylinit.data.targets import TargetKind, Targets, describe, encode
from sylinit.data.tree import tensors
from sylinit.errors import SylinitError
from sylinit.runtime.processes import Processes


@dataclass(frozen=True)
class CalibrationSet:
    """The calibration data of this process.

    Attributes:
        batches: one, unless its parts cannot be concatenated.
        kind: what the targets are, in all processes together.
        targets: as vectors, or None where there are none.
        samples: number of samples in all processes.
        before: number of samples in processes of lower rank.
        train_size: how many samples there are to train on, as far as the data tells.
        seed: of everything random, the same in all processes.
        processes: the group.
        notes: what the user should know of the data.
    """

    batches: tuple[Batch, ...]
    kind: TargetKind
    targets: Targets | None
    samples: int
    before: int
    train_size: int
    seed: int
    processes: Processes
    notes: tuple[str, ...]

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
        first = self.batches[0]
        device = next((t.device for t in tensors((first.args, first.kwargs))), values.device)
        return Targets(tuple(mine.to(device).split(sizes)), values.double().mean(0).to(device))


def calibration_set(read: Read, processes: Processes, seed: int) -> CalibrationSet:
    """Agree with the other processes on what the targets are.

    Args:
        read: this process's batches.
        processes: the group.
        seed: that of the first process is used by all.
    """
    batches = read.batches
    own = processes.agree(lambda: describe([batch.target for batch in batches if batch.target is not None]))
    mine = own[processes.rank]
    # A process all of whose labels are ignored says nothing about their kind; the others do.
    silent = not mine.present and batches[0].target is not None
    facts = (sum(batch.samples for batch in batches), None if silent else mine, seed, read.train_size)
    agreed = processes.agree(lambda: facts)
    said = [kind for _, kind, _, _ in agreed if kind is not None] or [mine]
    kind = TargetKind(max(k.classes for k in said), said[0].width, all(k.soft for k in said))
    differ = any((bool(k.classes), k.width) != (bool(kind.classes), kind.width) for k in said)
    if differ or (kind.width and len(said) < len(agreed)):
        raise SylinitError("batches: the targets of the processes of the group are of different kinds or widths")
    return CalibrationSet(
        batches=batches,
        kind=kind,
        targets=_encode(batches, kind, processes) if kind.present else None,
        samples=sum(samples for samples, *_ in agreed),
        before=sum(samples for samples, *_ in agreed[: processes.rank]),
        train_size=sum(size for *_, size in agreed),
        seed=agreed[0][2],
        processes=processes,
        notes=read.notes,
    )


def _encode(batches: tuple[Batch, ...], kind: TargetKind, processes: Processes, *, one_hot: bool = False) -> Targets:
    vectors = tuple(encode(b.target, kind, one_hot=one_hot) for b in batches if b.target is not None)
    known = torch.cat([v.flatten(0, -2) for v in vectors])
    known = known[known.isfinite().all(1)]
    sums = processes.sum_(torch.cat([known.sum(0), known.new_tensor([float(len(known))])]))
    return Targets(vectors, sums[:-1] / sums[-1].clamp(min=1))

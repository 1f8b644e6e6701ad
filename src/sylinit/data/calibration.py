"""The calibration set of one pass: this process's batches, and what all processes agree on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sylinit.data.batches import TARGET_KEYS, Batch, Read
from sylinit.data.goals import Goal, make_goal
from sylinit.data.tasks import Facts, HeadShape, facts_of, infer_task, merged
from sylinit.data.tree import tensors
from sylinit.errors import SylinitError
from sylinit.runtime.processes import Processes


@dataclass(frozen=True)
class CalibrationSet:
    """The calibration data of this process.

    Attributes:
        batches: one, unless its parts cannot be concatenated.
        samples: number of samples in all processes.
        before: number of samples in processes of lower rank.
        train_size: how many samples there are to train on, as far as the data tells.
        seed: of everything random, the same in all processes.
        processes: the group.
        ignore_index: the class index that means "no label here".
        notes: what the user should know of the data.
    """

    batches: tuple[Batch, ...]
    samples: int
    before: int
    train_size: int
    seed: int
    processes: Processes
    ignore_index: int
    notes: tuple[str, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of samples by batch."""
        return tuple(batch.samples for batch in self.batches)

    @property
    def masks(self) -> tuple[Tensor | None, ...]:
        """By batch, which places of its sequences hold data."""
        return tuple(batch.mask for batch in self.batches)

    def facts(self, name: str = "") -> Facts | None:
        """What all processes know of a target; None where there is none, or none with a value.

        Args:
            name: of the head that it is for.

        Raises:
            SylinitError: processes differ, or no target holds a value.
        """
        mine = [batch.targets[name] for batch in self.batches if name in batch.targets]
        ids = [_ids(batch) for batch in self.batches]
        found = self.processes.agree(lambda: facts_of(mine, ids, self.ignore_index) if mine else None)
        said = [each for each in found if each is not None]
        if not said:
            return None
        if len(said) < len(found):
            raise SylinitError("batches: some processes of the group have targets and others have none")
        whole = merged(said)
        if not whole.finite:
            raise SylinitError(
                "batches: the targets hold infinite numbers; drop those samples, or use NaN for missing ones"
            )
        if not whole.known and whole.real:
            raise SylinitError(
                "batches: the targets hold no value, they are all missing (NaN); pass task='none' or drop them"
            )
        return whole if whole.known else None

    def goal(self, head: HeadShape, name: str, facts: Facts, task: str, classes: int | None) -> Goal:
        """What a head is to predict.

        Args:
            head: its outputs.
            name: under which its targets lie.
            facts: of these.
            task: as the user asked for it.
            classes: likewise.
        """
        found = infer_task(facts, head, task, classes)
        targets = [batch.targets[name] for batch in self.batches]
        return make_goal(found, targets, self.masks, self.ignore_index, self.processes)

    def reconstruction(self, head: HeadShape, task: str) -> Goal:
        """The input as the target of an autoencoder."""
        inputs = [reconstructed(batch) for batch in self.batches]
        if any(x is None for x in inputs):
            raise SylinitError("task='reconstruction': the batches hold no real-valued input; pass target=")
        known = [x for x in inputs if x is not None]
        facts = merged(self.processes.agree(lambda: facts_of(known, [None] * len(known), self.ignore_index)))
        found = infer_task(facts, head, "reconstruction", None)
        return make_goal(found, known, self.masks, self.ignore_index, self.processes)

    def next_tokens(self, head: HeadShape) -> Goal:
        """The input ids, shifted, as the target of a causal model."""
        ids = [_ids(batch) for batch in self.batches]
        known = [each for each in ids if each is not None]
        if len(known) < len(ids):
            raise SylinitError("task='next-token': the batches hold no input ids of shape [n, length]; pass target=")
        facts = merged(self.processes.agree(lambda: facts_of(known, ids, self.ignore_index)))
        found = infer_task(facts, head, "next-token", None)
        return make_goal(found, known, self.masks, self.ignore_index, self.processes)

    def given(self, values: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """A code given as numbers, one row for each sample of all processes in order, and its mean."""
        if len(values) != self.samples:
            raise SylinitError(
                f"code= as a tensor has {len(values)} rows, there are {self.samples} calibration samples"
            )
        mine = values[self.before : self.before + sum(self.sizes)].double()
        first = self.batches[0]
        device = next((t.device for t in tensors((first.args, first.kwargs))), values.device)
        return tuple(mine.to(device).split(self.sizes)), values.double().mean(0).to(device)


def calibration_set(read: Read, processes: Processes, seed: int, ignore_index: int) -> CalibrationSet:
    """Count the samples of all processes.

    Args:
        read: this process's batches.
        processes: the group.
        seed: that of the first process is used by all.
        ignore_index: the class index that means "no label here".
    """
    mine = (sum(batch.samples for batch in read.batches), seed, read.train_size)
    agreed = processes.agree(lambda: mine)
    return CalibrationSet(
        batches=read.batches,
        samples=sum(samples for samples, *_ in agreed),
        before=sum(samples for samples, *_ in agreed[: processes.rank]),
        train_size=sum(size for *_, size in agreed),
        seed=agreed[0][1],
        processes=processes,
        ignore_index=ignore_index,
        notes=read.notes,
    )


def reconstructed(batch: Batch) -> Tensor | None:
    """The input that an autoencoder would give back: the first real-valued one."""
    real = (t for t in tensors((batch.args, batch.kwargs)) if t.is_floating_point() and t.ndim > 1)
    return next(real, None)


def _ids(batch: Batch) -> Tensor | None:
    """The model's integer input: ``input_ids``, or the first of its kind."""
    named = batch.kwargs.get("input_ids")
    if isinstance(named, Tensor):
        return named
    inputs = [value for key, value in batch.kwargs.items() if key not in TARGET_KEYS]
    targets = {target.data_ptr() for target in batch.targets.values()}
    found = (t for t in tensors((batch.args, inputs)) if t.dtype in (torch.int64, torch.int32) and t.ndim == 2)
    return next((t for t in found if t.data_ptr() not in targets or len(batch.args) > 0), None)

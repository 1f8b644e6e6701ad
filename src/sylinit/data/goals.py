"""Goals: the targets of one head as vectors beside each sample, and how well a model meets them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sylinit.data.tasks import Task
from sylinit.runtime.processes import Processes

EMBEDDED = 512
"""Beyond so many classes, layers before the head are told a fixed random vector of signs for each class."""


@dataclass(frozen=True)
class Goal:
    """What a head is to predict.

    Attributes:
        task: what is asked for.
        targets: by batch: class indices int64 ``[n, *positions]``, -1 where there is none, or values
            ``[n, *positions, c]``, NaN where there is none.
        vectors: by batch, ``[n, *positions, c]`` float64: what layers before the head are told; NaN where missing.
        mean: ``[c]``, the mean of the vectors over all processes.
        share: ``[c]``, of the labeled places, in how many each entry is known.
        present: of class indices, the classes that occur in any process, increasing.
    """

    task: Task
    targets: tuple[Tensor, ...]
    vectors: tuple[Tensor, ...]
    mean: Tensor
    share: Tensor
    present: Tensor

    @cached_property
    def gaps(self) -> bool:
        """Whether any target of this process is missing."""
        return any(bool(vectors.isnan().any()) for vectors in self.vectors)

    def of_part(self, targets: tuple[Tensor, ...], vectors: tuple[Tensor, ...], processes: Processes) -> Goal:
        """The same of some of the samples, whose targets and vectors these are."""
        mean, share = _mean(vectors, processes)
        return replace(self, targets=targets, vectors=vectors, mean=mean, share=share)

    def of_head(self, units: int, processes: Processes) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """The vectors that a head's outputs are fitted to, their mean, and, for wide heads, which outputs they are.

        The one-hot vectors of many classes have an entry for each class that occurs only: the others would be zero.
        """
        if not self.task.classes:
            return self.vectors, self.mean, None
        classes = max(2, units)
        if classes == self.task.classes <= EMBEDDED:
            return self.vectors, self.mean, None
        chosen = None if classes <= EMBEDDED else self.present
        columns = torch.arange(classes, device=self.present.device) if chosen is None else chosen
        vectors = tuple(_one_hot(target, columns) for target in self.targets)
        return vectors, _mean(vectors, processes)[0], chosen


def make_goal(
    task: Task, raw: Sequence[Tensor], masks: Sequence[Tensor | None], ignore_index: int, processes: Processes
) -> Goal:
    """Bring targets to one form and encode them.

    Args:
        task: what is asked for.
        raw: the targets by batch, as the user made them.
        masks: by batch, which places of its sequences hold data: targets elsewhere do not count.
        ignore_index: the class index that means "no label here".
        processes: the group.
    """

    def counted(target: Tensor, mask: Tensor | None) -> Tensor:
        if task.name == "next-token":  # what lies in the padding is no token, and the last place has no next one
            target = _within(target.long(), mask)
        return _within(_canonical(target, task, ignore_index), mask)

    targets = tuple(counted(target, mask) for target, mask in zip(raw, masks, strict=True))
    none = torch.zeros(0, dtype=torch.long, device=raw[0].device)
    if not task.classes:
        vectors = tuple(target.double() for target in targets)
        return Goal(task, targets, vectors, *_mean(vectors, processes), none)
    mine = torch.cat([target.unique() for target in targets]).unique()
    found = processes.agree(lambda: mine[mine >= 0].tolist())
    present = torch.tensor(sorted(set().union(*found)), dtype=torch.long, device=raw[0].device)
    vectors = tuple(_class_vectors(target, task.classes, present) for target in targets)
    return Goal(task, targets, vectors, *_mean(vectors, processes), present)


def constant_logits(goal: Goal, units: int, outputs: Tensor | None) -> Tensor:
    """The logits, up to a factor, of outputs whose target never changes, ``[1, k]``: no feature can tell them.

    Args:
        goal: of a head with logits.
        units: outputs of the head.
        outputs: the classes that are fitted; None for all.
    """
    if not goal.task.classes:
        return (2 * goal.mean - 1).unsqueeze(0)
    if outputs is not None or goal.task.classes > EMBEDDED:  # a wide head
        return goal.mean.new_zeros(1, units if outputs is None else len(outputs))
    if units == 1:
        return (goal.mean[1] - goal.mean[0]).view(1, 1)
    return (goal.mean - goal.mean.mean()).unsqueeze(0)


def _canonical(target: Tensor, task: Task, ignore_index: int) -> Tensor:
    """Class indices with -1 for none, or values with NaN for none and channels last."""
    if task.name == "next-token":
        shifted = target.long()[:, 1:]
        shifted = torch.nn.functional.pad(shifted, (0, 1), value=ignore_index)
        return shifted.masked_fill(shifted == ignore_index, -1)
    if task.classes:
        if target.ndim == task.positions + 2:  # a dimension of size 1 for the class
            target = target.squeeze(1 if task.channels_first else -1)
        missing = target.isnan() if target.is_floating_point() else target == ignore_index
        return target.nan_to_num(0).long().masked_fill(missing, -1)
    missing = torch.zeros_like(target, dtype=torch.bool)
    if not target.is_floating_point() and target.dtype != torch.bool:
        missing = target == ignore_index
    values = target.double().masked_fill(missing, math.nan)
    if task.flat:
        return values.flatten(1)
    if values.ndim == task.positions + 1:
        return values.unsqueeze(-1)
    return values.movedim(1, -1) if task.channels_first else values


def _one_hot(index: Tensor, columns: Tensor) -> Tensor:
    """``[..., c]``: 1 where the class is that of the column; NaN where there is none."""
    return (index.unsqueeze(-1) == columns).double().masked_fill((index < 0).unsqueeze(-1), math.nan)


def _class_vectors(index: Tensor, classes: int, present: Tensor) -> Tensor:
    """One-hot vectors of few classes; of many, of those that occur, or a fixed vector of signs for each of these."""
    if classes <= EMBEDDED:
        return _one_hot(index, torch.arange(classes, device=index.device))
    if len(present) <= EMBEDDED:
        return _one_hot(index, present)
    source = torch.Generator().manual_seed(0)
    table = torch.randint(0, 2, (len(present), EMBEDDED), generator=source, dtype=torch.int8, device="cpu")
    place = torch.searchsorted(present, index.clamp(min=0)).clamp(max=len(present) - 1)
    signs = 2.0 * table.to(index.device)[place].double() - 1.0
    return signs.masked_fill((index < 0).unsqueeze(-1), math.nan)


def _within(target: Tensor, mask: Tensor | None) -> Tensor:
    """A target whose places in the padding are missing, where it has one for each place of the sequence."""
    if mask is None or target.shape[:2] != mask.shape:
        return target
    padding = ~mask.view(*mask.shape, *(1 for _ in target.shape[2:]))
    return target.masked_fill(padding, math.nan if target.is_floating_point() else -1)


def _mean(vectors: Sequence[Tensor], processes: Processes) -> tuple[Tensor, Tensor]:
    """The mean of each entry over what is known of it, and in which share of the labeled places that is."""
    flat = torch.cat([vector.flatten(0, -2) for vector in vectors])
    known = ~flat.isnan()
    labeled = known.any(1).double().sum().expand(flat.shape[1])
    sums = processes.sum_(torch.stack([flat.nan_to_num(0).sum(0), known.double().sum(0), labeled]))
    return sums[0] / sums[1].clamp(min=1), sums[1] / sums[2].clamp(min=1)

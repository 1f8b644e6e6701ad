"""Targets: what the user calls labels, as real vectors beside each row of each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sylinit.errors import SylinitError, warn
from sylinit.layers.views import unravel

IGNORED = -100
"""A class index that means "no label here", as in ``torch.nn.functional.cross_entropy``."""

MAX_CLASSES = 512
"""Up to this many classes the target is one-hot; beyond it, a fixed random vector of +-1 for each class."""


@dataclass(frozen=True)
class TargetKind:
    """How targets become vectors; the same for every batch and process.

    Attributes:
        classes: the number of classes, or 0 for soft labels and real values.
        width: the length of a soft label or real-valued target, or 0.
        soft: whether real-valued targets are soft labels: non-negative and of sum one.
    """

    classes: int = 0
    width: int = 0
    soft: bool = False

    @property
    def present(self) -> bool:
        """Whether there are any targets."""
        return self.classes > 0 or self.width > 0

    @property
    def categorical(self) -> bool:
        """Whether the outputs of a head are logits rather than predicted values."""
        return self.classes > 0 or self.soft


@dataclass(frozen=True)
class Targets:
    """The targets of every batch of this process as vectors of one length.

    Attributes:
        vectors: ``[samples, *positions, c]`` for each batch; NaN where there is no label.
        mean: ``[c]``, the mean over all labelled samples of all processes: what a row without a label gets.
    """

    vectors: tuple[Tensor, ...]
    mean: Tensor

    @property
    def width(self) -> int:
        """c, the length of a target vector."""
        return self.mean.shape[0]

    def of_rows(self, batch: int, shape: tuple[int, tuple[int, ...]], index: Tensor | None) -> Tensor | None:
        """The targets ``[n, c]`` of a layer's rows; ``shape`` is its (samples, positions); see `for_rows`."""
        t = for_rows(self.vectors[batch], *shape, index)
        return None if t is None else self._known(t)

    def of_samples(self, batch: int, samples: int) -> Tensor | None:
        """The targets ``[samples, c]`` where all rows of a sample share one, else None."""
        vectors = self.vectors[batch]
        return self._known(vectors) if vectors.ndim == 2 and len(vectors) == samples else None

    def _known(self, t: Tensor) -> Tensor:
        return torch.where(t.isnan(), self.mean.to(t), t)


def describe(targets: list[Tensor]) -> TargetKind:
    """Read off what kind of targets a process has.

    Raises:
        SylinitError: NaN or infinite values, or a negative class index other than `IGNORED`.
    """
    if not targets:
        return TargetKind()
    first = targets[0]
    if not first.is_floating_point():
        classes = _largest_class(targets) + 1
        if (
            first.ndim == 2
            and first.shape[1] > 1
            and classes == 2
            and all(bool((t.sum(1) == 1).all()) for t in targets)
        ):
            warn(
                f"batches: integer targets of shape {list(first.shape)} are read as class 0 or 1 at {first.shape[1]} "
                "positions; if they are one-hot, pass class indices (y.argmax(1)) or real numbers (y.float())"
            )
        return TargetKind(classes=classes)
    for number, target in enumerate(targets):
        if not bool(target.isfinite().all()):
            raise SylinitError(
                f"batches: the target of batch {number} holds NaN or infinite numbers; drop those samples"
            )
    width = 1 if first.ndim == 1 else first.shape[-1]
    soft = width > 1 and all(bool((t >= 0).all() and ((t.sum(-1) - 1).abs() < 1e-3).all()) for t in targets)
    return TargetKind(width=width, soft=soft)


def _largest_class(targets: list[Tensor]) -> int:
    """The largest class index, -1 for targets that are not class indices.

    Raises:
        SylinitError: a negative index other than `IGNORED`.
    """
    largest = -1
    for number, target in enumerate(targets):
        if target.is_floating_point() or target.numel() == 0:
            continue
        index = target.long()
        wrong = index[(index < 0) & (index != IGNORED)]
        if wrong.numel():
            raise SylinitError(
                f"batches: batch {number} has the label {int(wrong[0])}; class indices start at 0 "
                f"({IGNORED} means ignored)"
            )
        largest = max(largest, int(index.max()))
    return largest


def encode(target: Tensor, kind: TargetKind, *, one_hot: bool = False) -> Tensor:
    """One batch's targets as vectors ``[samples, *positions, c]``; ignored labels become NaN.

    Args:
        target: class indices ``[samples, *positions]`` or real values ``[samples]`` or ``[samples, *positions, c]``.
        kind: from all batches together.
        one_hot: one-hot even for more than `MAX_CLASSES` classes (the head needs that).
    """
    if not kind.classes:
        return (target.unsqueeze(1) if target.ndim == 1 else target).double()
    index = target.long()
    ignored = (index == IGNORED).unsqueeze(-1)
    index = index.clamp(min=0)
    if kind.classes <= MAX_CLASSES or one_hot:
        vectors = torch.nn.functional.one_hot(index, kind.classes).double()
    else:
        source, size = torch.Generator().manual_seed(0), (kind.classes, MAX_CLASSES)
        table = torch.randint(0, 2, size, generator=source, dtype=torch.int8, device="cpu")
        vectors = (2.0 * table.double() - 1.0).to(index.device)[index]
    return vectors.masked_fill(ignored, math.nan)


def for_rows(vectors: Tensor, samples: int, positions: tuple[int, ...], index: Tensor | None) -> Tensor | None:
    """The target of each of a layer's rows.

    A layer's rows are numbered ``sample * positions + position``. A target for the whole sample goes to all of its
    rows; a target for each position (token, pixel) goes to the row at the nearest position; a layer without positions
    gets the mean over positions. Where a model folds time or windows into the batch, each fold gets its
    sample's target; sequence-first layouts are recognised by the place of the batch size.

    Args:
        vectors: ``[batch, *target positions, c]``.
        samples: the leading dimension of the layer's input.
        positions: the other dimensions that number its rows.
        index: the rows that were read, or None for all.

    Returns:
        ``[n, c]``, NaN for rows without a label, or None where the layer's rows cannot be told apart by sample.
    """
    batch, *spots, _ = vectors.shape
    lead = (samples, *positions)
    if index is None:
        index = torch.arange(math.prod(lead), device=vectors.device)
    where = list(unravel(index.to(vectors.device), lead))
    if samples == batch:
        sample = where.pop(0)
        spread = list(positions)
    elif positions and positions[0] == batch:
        sample = where.pop(1)
        spread = [samples, *positions[1:]]
    elif batch and samples % batch == 0:
        sample = where.pop(0) // (samples // batch)
        spread = list(positions)
        vectors, spots = _pooled(vectors), []
    else:
        return None
    if not spots:
        return vectors[sample]
    if len(spots) != len(spread):
        return _pooled(vectors)[sample]
    nearest = [place * spot // size for place, spot, size in zip(where, spots, spread, strict=True)]
    place = (sample, *nearest)
    return vectors[place]


def _pooled(vectors: Tensor) -> Tensor:
    """Mean over positions, without the ignored ones."""
    return vectors.flatten(1, -2).nanmean(1) if vectors.ndim > 2 else vectors

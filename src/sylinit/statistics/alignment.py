"""Which sample, and which place in it, each of a layer's rows belongs to.

A layer's rows are numbered through its leading dimensions, ``lead = (samples, *positions)`` of its view. One of these
counts the samples of the batch, alone or folded with something else: windows, frames, views, time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sylinit.layers.view import unravel


@dataclass(frozen=True)
class Layout:
    """Where the samples lie: dimension ``axis`` of ``lead`` has ``outer * samples * inner`` entries.

    Attributes:
        axis: of the leading dimensions.
        outer: entries counted before the sample (time-major folds, concatenated views).
        inner: entries counted after it (windows or frames of one sample beside each other).
    """

    axis: int = 0
    outer: int = 1
    inner: int = 1

    def in_batch(self, lead: tuple[int, ...], samples: int) -> Layout | None:
        """The same layout in a batch of other sequences or windows: more or fewer entries beside each sample."""
        if self.axis >= len(lead) or lead[self.axis] % samples:
            return None
        fold = lead[self.axis] // samples
        if fold == self.outer * self.inner:
            return self
        if fold > 1 and self.outer == 1 < self.inner:
            return Layout(self.axis, 1, fold)
        return Layout(self.axis, fold, 1) if fold > 1 and self.inner == 1 < self.outer else None

    def samples_of(self, lead: tuple[int, ...], samples: int, index: Tensor) -> Tensor:
        """The sample of each row; arguments as those of `locate`."""
        sample = index.div(math.prod(lead[self.axis + 1 :]) * self.inner, rounding_mode="floor")
        return sample if math.prod(lead[: self.axis]) * self.outer == 1 else sample % samples

    def locate(self, lead: tuple[int, ...], samples: int, index: Tensor) -> tuple[Tensor, list[Tensor], list[int]]:
        """The sample of each row, its other coordinates, and their sizes.

        Args:
            lead: the leading dimensions of the layer's input.
            samples: of the batch.
            index: int64 row numbers ``[n]``.
        """
        places, sizes = list(unravel(index, lead)), list(lead)
        sample, along = self.samples_of(lead, samples, index), places[self.axis]
        folded = [
            (along.div(self.inner * samples, rounding_mode="floor"), self.outer),
            (along % self.inner, self.inner),
        ]
        kept = [(place, size) for place, size in folded if size > 1]
        places[self.axis : self.axis + 1] = [place for place, _ in kept]
        sizes[self.axis : self.axis + 1] = [size for _, size in kept]
        return sample, places, sizes


UNKNOWN = Layout(axis=-1)
"""Rows that were seen to follow no pattern of samples."""


def layout_of(changed: Tensor, lead: tuple[int, ...], samples: int, marked: int) -> Layout | None:
    """Read the layout off the rows that changed when one sample did.

    Args:
        changed: bool, ``lead`` or of size 1 where that is not told apart.
        lead: the leading dimensions of the layer's input.
        samples: of the batch.
        marked: the sample that was changed.

    Returns:
        The layout; `UNKNOWN` where the rows that changed fit none; None where no row changed, or all did because the
        model mixes its samples, which tells nothing.
    """
    axes = [axis for axis, size in enumerate(lead) if size % samples == 0 and changed.shape[axis] == size]
    profiles = [_profile(changed, axis) for axis in axes] or [[bool(changed.any())]]
    if not any(profiles[0]) or (all(map(all, profiles)) and bool(changed.all())):
        return None
    partial = None
    for axis, profile in zip(axes, profiles, strict=False):
        fold = lead[axis] // samples
        for inner in (n for n in range(1, fold + 1) if fold % n == 0):
            layout = Layout(axis, fold // inner, inner)
            expected = [place // inner % samples == marked for place in range(lead[axis])]
            if profile == expected:
                return layout
            if partial is None and not any(here and not there for here, there in zip(profile, expected, strict=True)):
                partial = layout
    return partial or UNKNOWN


def _profile(changed: Tensor, axis: int) -> list[bool]:
    """At which places of an axis anything changed."""
    others = [dim for dim, size in enumerate(changed.shape) if dim != axis and size > 1]
    return (changed.any(others) if others else changed).flatten().tolist()


def align(lead: tuple[int, ...], samples: int, layout: Layout | None) -> Layout | None:
    """The layout of a layer's rows: as it was seen, else where a leading dimension counts the samples, else None."""
    if layout is not None:
        return None if layout == UNKNOWN else layout.in_batch(lead, samples)
    return next((Layout(axis) for axis in (0, 1) if axis < len(lead) and lead[axis] == samples), None)


def targets_of_rows(vectors: Tensor, lead: tuple[int, ...], layout: Layout, index: Tensor | None) -> Tensor:
    """The target of each of a layer's rows.

    A target for the whole sample goes to all of its rows; a target for each position (token, pixel) to the row at the
    nearest position; a layer without such positions gets the mean over positions, which is nothing for a head
    (`has_positions`).

    Args:
        vectors: ``[batch, *target positions, c]``.
        lead: the leading dimensions of the layer's input.
        layout: where the samples lie in them.
        index: the rows that were read, or None for all.

    Returns:
        ``[n, c]``, NaN for rows without a label.
    """
    samples, *spots, _ = vectors.shape
    if not spots and lead == (samples,):
        return vectors if index is None else vectors[index.to(vectors.device)]
    if index is None:
        index = torch.arange(math.prod(lead), device=vectors.device)
    index = index.to(vectors.device)
    if not spots:
        return vectors[layout.samples_of(lead, samples, index)]
    sample, places, sizes = layout.locate(lead, samples, index)
    nearest = _nearest(spots, places, sizes)
    if nearest is None:
        return vectors.flatten(1, -2).nanmean(1)[sample]
    place = (sample, *nearest)
    return vectors[place]


def has_positions(spots: tuple[int, ...], lead: tuple[int, ...], samples: int, layout: Layout) -> bool:
    """Whether each of a layer's rows is at one of the targets' positions.

    Args:
        spots: sizes of the targets' positions; none for one target a sample.
        lead: the leading dimensions of the layer's input.
        samples: of the batch.
        layout: where the samples lie in them.
    """
    _, places, sizes = layout.locate(lead, samples, torch.zeros(1, dtype=torch.long))
    return _nearest(list(spots), places, sizes) is not None


def _nearest(spots: list[int], places: list[Tensor], sizes: list[int]) -> list[Tensor] | None:
    """The targets' position nearest to each row; None where the rows have other kinds of positions.

    The rows have as many dimensions, coarser or finer; or more, of which those of the targets' sizes count (streams,
    heads beside each other); or a flattened grid of the targets' shape.

    Args:
        spots: sizes of the targets' positions.
        places: the rows' own coordinates beside their sample.
        sizes: of these.
    """
    if len(sizes) > len(spots):
        found = [i for i, size in enumerate(sizes) if size in spots]
        places, sizes = [places[i] for i in found], [sizes[i] for i in found]
        if spots and sizes != spots:
            return None
    elif len(sizes) == 1 and len(spots) == 2:
        height = round((sizes[0] * spots[0] / spots[1]) ** 0.5)
        width = sizes[0] // max(height, 1)
        if height * width != sizes[0] or height * spots[1] != width * spots[0]:
            return None
        places, sizes = [places[0] // width, places[0] % width], [height, width]
    if len(sizes) != len(spots):
        return None
    return [place * spot // size for place, spot, size in zip(places, spots, sizes, strict=True)]


def kept_rows(mask: Tensor, lead: tuple[int, ...], layout: Layout) -> Tensor | None:
    """The rows that hold data rather than padding.

    Args:
        mask: bool ``[samples, length]``, true where there is data, or ``[samples, ...]`` with all positions.
        lead: the leading dimensions of the layer's input.
        layout: where the samples lie in them.

    Returns:
        Increasing int64 row numbers, or None where no dimension of the rows is the sequence's.
    """
    samples, *lengths = mask.shape
    sample, places, sizes = layout.locate(lead, samples, torch.arange(math.prod(lead), device=mask.device))
    if len(lengths) > 1:
        place = (sample, *places)
        return mask[place].nonzero().squeeze(1) if sizes == lengths else None
    length = lengths[0]
    if sizes.count(length) != 1:
        return None
    return mask[sample, places[sizes.index(length)]].nonzero().squeeze(1)

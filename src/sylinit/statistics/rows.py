"""What waits at a layer, as the layer's rows: which are read, with which targets, and their statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sylinit.errors import SylinitError
from sylinit.layers.convolution import ConvView
from sylinit.layers.view import LayerView
from sylinit.runtime.processes import Processes
from sylinit.statistics.alignment import Layout, align, has_positions, kept_rows, targets_of_rows
from sylinit.statistics.moments import CHUNK, Covariance, Moments, sample_index
from sylinit.statistics.patch_moments import equal_cost_share, patch_moments, serves

NONE = torch.zeros(0)
"""The mean of no targets."""

ALL = torch.ones(())
"""The share of what is known where all of it is."""


@dataclass(frozen=True)
class Known:
    """What is known of the samples of this process.

    Attributes:
        vectors: targets by batch, ``[samples, *positions, c]``, NaN where there is none; empty without targets.
        mean: ``[c]``, the mean over all labeled samples of all processes: what a row without a label gets.
        share: ``[c]``, in which share of the labeled places each entry is known.
        masks: by batch, bool ``[samples, length]``, true where there is data; None where all of it is.
        sizes: number of samples by batch.
        labeled_only: whether rows without any label are left out.
        gaps: whether any target may be missing.
    """

    vectors: tuple[Tensor, ...] = ()
    mean: Tensor = NONE
    share: Tensor = ALL
    masks: tuple[Tensor | None, ...] = ()
    sizes: tuple[int, ...] = ()
    labeled_only: bool = False
    gaps: bool = True

    @property
    def width(self) -> int:
        """c, the length of a target vector; 0 without targets."""
        return len(self.mean) if self.vectors else 0

    def filled(self, targets: Tensor) -> Tensor:
        """Targets with the mean in the place of those that are missing.

        Where rows without any label are left out, what is known counts for what is not: its deviations are divided by
        its share, so that the covariance with the rows is that of complete targets.
        """
        mean, known = self.mean.to(targets), targets
        if self.labeled_only:
            known = mean + (targets - mean) / self.share.to(targets).clamp(min=1e-9)
        return torch.where(targets.isnan(), mean, known) if self.gaps else known

    def matched(self, batch: int, lead: tuple[int, ...], layout: Layout | None) -> Layout | None:
        """Where a batch's samples lie in the rows; None where that, or a head's position, cannot be told."""
        samples = self.sizes[batch]
        found = align(lead, samples, layout)
        if found is None or not (self.labeled_only and self.vectors):
            return found
        spots = tuple(self.vectors[batch].shape[1:-1])
        return found if has_positions(spots, lead, samples, found) else None

    def kept(self, batch: int, lead: tuple[int, ...], layout: Layout | None) -> Tensor | None:
        """The rows of a batch that hold data, and a label if that is asked for; None for all."""
        if layout is None:
            return None
        mask = self.masks[batch] if self.masks else None
        rows = None if mask is None else kept_rows(mask, lead, layout)
        if not (self.labeled_only and self.vectors and self.gaps):
            return rows
        missing = self.vectors[batch].isnan().all(-1, keepdim=True)
        if not bool(missing.any()):
            return rows
        unlabeled = targets_of_rows(missing.double(), lead, layout, rows).squeeze(1) == 1
        labeled = (~unlabeled).nonzero().squeeze(1)
        return labeled if rows is None else rows[labeled]


@dataclass(frozen=True)
class Part:
    """What one batch brought.

    Attributes:
        x: its input.
        index: the rows to read of it, or None for all.
        count: how many those are.
        targets: of the rows, ``[count, c]``.
        shared: of the samples, ``[samples, c]``, where all rows are read and those of a sample share one target.
    """

    x: Any
    index: Tensor | None
    count: int
    targets: Tensor | None
    shared: Tensor | None = None

    def row_targets(self, view: LayerView) -> Tensor:
        """The targets of the rows, ``[count, c]``."""
        if self.targets is not None:
            return self.targets
        assert self.shared is not None
        return self.shared.repeat_interleave(math.prod(view.positions(self.x)[1]), 0)


@dataclass(frozen=True)
class Rows:
    """The rows of one layer, in all batches of this process, and their statistics over all processes.

    Attributes:
        name: of the layer, for messages.
        view: the layer as a matrix.
        parts: by batch.
        count: number of rows read in all processes.
        width: length of the targets, 0 for none.
        device: of the layer.
        processes: the group.
    """

    name: str
    view: LayerView
    parts: tuple[Part, ...]
    count: int
    width: int
    device: torch.device
    processes: Processes

    @property
    def groups(self) -> int:
        """G."""
        return self.view.groups

    @property
    def dim(self) -> int:
        """D."""
        return self.view.dim

    def agree(self, good: bool) -> bool:
        """Whether something holds in all processes."""
        return all(self.processes.agree(lambda: good))

    def together(self, work: Callable[[], Any]) -> Any:
        """Do some local work; if it fails in one process, raise in all."""
        return self.processes.together(work)

    def transformed(self, rows: Tensor) -> Tensor:
        """The rows as they are counted: here, as they are."""
        return rows

    def covariance(self, dtype: torch.dtype = torch.float64) -> Covariance:
        """Stream the rows into moments, add those of the other processes, and center; ``dtype``: of `Moments.xx`."""

        def local() -> Moments:
            whole = [(part.x, part.shared) for part in self.parts if part.shared is not None]
            if whole:
                sums = patch_moments(self.view, whole, dtype)
            else:
                sums = Moments.zeros(self.view.groups, self.view.dim, self.width, self.device, dtype)
            for part in self.parts:
                if part.shared is not None:
                    continue
                for rows, targets in _pieces(self.view, part):
                    sums.update(self.transformed(rows), targets)
            return sums

        cov = self.processes.together(local).reduce(self.processes.sum_).covariance()
        if not math.isfinite(cov.sizes.rows):  # what is not finite shows in its own square
            raise SylinitError(not_finite(self.name))
        return cov

    def rows(self) -> tuple[Tensor, Tensor]:
        """The rows themselves ``[g, n, d]`` and their targets ``[n, c]``, of all processes."""

        def local() -> tuple[Tensor, Tensor]:
            rows = [self.transformed(self.view.rows(part.x, part.index)).transpose(0, 1) for part in self.parts]
            targets = [part.row_targets(self.view) for part in self.parts if self.width]
            x = torch.cat(rows) if rows else torch.zeros(0, self.view.groups, self.view.dim, device=self.device)
            x = x if x.dtype == torch.float64 else x.float()
            if not bool(x.isfinite().all()):
                raise SylinitError(not_finite(self.name))
            none = torch.zeros(len(x), self.width, dtype=torch.float64, device=self.device)
            return x, torch.cat(targets) if targets else none

        x, t = self.processes.together(local)
        counts = self.processes.agree(lambda: len(x))
        return self.processes.gather(x, counts).transpose(0, 1), self.processes.gather(t, counts)


def collect(
    name: str,
    view: LayerView,
    waiting: Mapping[int, Any],
    known: Known,
    layout: Layout | None,
    budget: Callable[[int, float | None], int | None],
    generator: torch.Generator,
    processes: Processes,
    device: torch.device,
    least: int = 2,
) -> Rows | None:
    """Choose the rows to read of everything that waits at a layer, the same rows however it is cut into batches.

    Args:
        name: of the layer.
        view: the layer as a matrix.
        waiting: the layer's input by batch.
        known: of the samples of this process.
        layout: where the samples were seen to lie in the layer's rows, None if that is not known.
        budget: number of rows to read, from the number there is and, where there is a short way to all of them, the
            share that costs as much; None for all.
        generator: the same in every process.
        processes: the group.
        device: of the layer.
        least: fewer rows than this in all are none.

    Returns:
        The rows, or None where there are too few in all.
    """
    shapes = {batch: view.positions(x) for batch, x in waiting.items()}
    leads = {batch: (samples, *positions) for batch, (samples, positions) in shapes.items()}
    layouts = {batch: known.matched(batch, leads[batch], layout) for batch in waiting}
    kept = {batch: known.kept(batch, leads[batch], layouts[batch]) for batch in waiting}
    lengths = {b: math.prod(leads[b]) if (rows := kept[b]) is None else len(rows) for b in waiting}
    short = all(kept[batch] is None and serves(view, x) for batch, x in waiting.items())
    met = processes.agree(lambda: (sum(lengths.values()), short))
    counts = [count for count, _ in met]
    total = sum(counts)
    if total < least:
        return None
    share = equal_cost_share(view) if isinstance(view, ConvView) and all(short for _, short in met) else None
    index = sample_index(total, budget(total, share), generator)
    start = sum(counts[: processes.rank])
    parts = []
    for batch, x in waiting.items():
        at = (x[0] if isinstance(x, tuple) else x).device
        mine, rows, found = None, kept[batch], layouts[batch]
        if index is not None:
            mine = (index[(index >= start) & (index < start + lengths[batch])] - start).to(at)
        start += lengths[batch]
        mine = mine if rows is None else rows if mine is None else rows[mine]
        count = lengths[batch] if mine is None else len(mine)
        shared = targets = None
        vectors = known.vectors[batch] if known.vectors else None
        # Where all patches of a convolution are read, their moments need the targets of the samples only.
        if mine is None and isinstance(view, ConvView) and (vectors is None or vectors.ndim == 2):
            if vectors is None:
                shared = torch.zeros(leads[batch][0], 0, dtype=torch.float64, device=device)
            elif found == Layout():
                shared = known.filled(vectors)
        if shared is None and vectors is not None and found is not None:
            targets = known.filled(targets_of_rows(vectors, leads[batch], found, mine))
        parts.append(Part(x, mine, count, targets, shared))
    # Where any batch's rows cannot be matched to samples, no batch of any process has targets.
    wanted = bool(known.vectors)
    matched = all(part.targets is not None or part.shared is not None for part in parts)
    if not all(processes.agree(lambda: wanted and matched)):
        parts = [_without_targets(part, device) for part in parts]
        wanted = False
    width = known.width if wanted else 0
    return Rows(name, view, tuple(parts), total if index is None else len(index), width, device, processes)


def _without_targets(part: Part, device: torch.device) -> Part:
    none = None if part.shared is None else torch.zeros(len(part.shared), 0, dtype=torch.float64, device=device)
    return replace(part, targets=None, shared=none)


def _pieces(view: LayerView, part: Part) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A batch's rows and their targets in pieces of bounded size."""
    step = max(1, 4 * CHUNK // (view.groups * view.dim))
    if part.count <= step:
        yield view.rows(part.x, part.index), part.targets
        return
    device = (part.x[0] if isinstance(part.x, tuple) else part.x).device
    index = torch.arange(part.count, device=device) if part.index is None else part.index
    for start in range(0, part.count, step):
        piece = slice(start, start + step)
        yield view.rows(part.x, index[piece]), None if part.targets is None else part.targets[piece]


def require_finite(name: str, x: Any) -> None:
    """Raise a `SylinitError` naming the layer where its input holds NaN or Inf."""
    if not all(bool(tensor.isfinite().all()) for tensor in (x if isinstance(x, tuple) else (x,))):
        raise SylinitError(not_finite(name))


def not_finite(name: str) -> str:
    """The message for a layer that met NaN or Inf."""
    return (
        f"layer {name!r}: its input holds NaN or infinite numbers; clean the calibration data, or look for an overflow "
        "in the layers before it"
    )

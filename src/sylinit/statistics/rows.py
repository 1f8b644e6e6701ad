"""What waits at a layer's door, as the layer's rows: which are read, with which targets, and their statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sylinit.data.targets import Targets
from sylinit.errors import SylinitError
from sylinit.layers.views import ConvView, View
from sylinit.runtime.processes import Processes
from sylinit.statistics.moments import CHUNK, Covariance, Moments, sample_index
from sylinit.statistics.patch_moments import equal_cost_share, patch_moments, serves

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """What one lane brought.

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

    def row_targets(self, view: View) -> Tensor:
        """The targets of the rows, ``[count, c]``."""
        if self.targets is not None:
            return self.targets
        assert self.shared is not None
        return self.shared.repeat_interleave(math.prod(view.positions(self.x)[1]), 0)


@dataclass(frozen=True)
class Gathered:
    """The rows of one layer, in all lanes of this process.

    Attributes:
        name: of the layer, for messages.
        view: the layer as a matrix.
        parts: by lane.
        count: number of rows read in all processes.
        width: length of the targets, 0 for none.
        device: of the layer.
        processes: the group.
    """

    name: str
    view: View
    parts: tuple[Part, ...]
    count: int
    width: int
    device: torch.device
    processes: Processes

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.view.groups

    @property
    def dim(self) -> int:
        """Inputs of each group."""
        return self.view.dim

    def together(self, work: Callable[[], T]) -> T:
        """Do local work; if it fails in one process, raise in all."""
        return self.processes.together(work)

    def agree(self, held: bool) -> bool:
        """Whether it holds in all processes."""
        return all(self.processes.agree(lambda: held))

    def covariance(self, dtype: torch.dtype = torch.float64) -> Covariance:
        """Stream the rows into moments, add those of the other processes, and centre; ``dtype``: of `Moments.xx`."""

        def local() -> Moments:
            whole = [(part.x, part.shared) for part in self.parts if part.shared is not None]
            if whole:
                sums = patch_moments(self.view, whole, dtype)
            else:
                sums = Moments.zeros(self.view.groups, self.view.dim, self.width, self.device, dtype)
            for part in self.parts:
                if part.shared is not None:
                    continue
                for rows, piece in _pieces(self.view, part):
                    sums.update(rows, None if part.targets is None else part.targets[piece])
            return sums

        cov = self.processes.together(local).reduce(self.processes.sum_).covariance()
        if not math.isfinite(float(cov.variance.sum())):  # what is not finite shows in its own square
            raise SylinitError(not_finite(self.name))
        return cov

    def rows(self) -> tuple[Tensor, Tensor]:
        """The rows themselves ``[g, n, d]`` and their targets ``[n, c]``, of all processes."""

        def local() -> tuple[Tensor, Tensor]:
            rows = [self.view.rows(part.x, part.index).transpose(0, 1) for part in self.parts]
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


def gather(
    name: str,
    view: View,
    waiting: Mapping[int, Any],
    targets: Targets | None,
    budget: Callable[[int, float | None], int | None],
    generator: torch.Generator,
    processes: Processes,
    device: torch.device,
) -> Gathered:
    """Choose the rows to read of everything that waits at a door, the same rows however it is cut into batches.

    Args:
        name: of the layer.
        view: the layer as a matrix.
        waiting: the layer's input by lane.
        targets: of this process's batches, or None.
        budget: number of rows to read, from the number there is and, where there is a short way to all of them, the
            share that costs as much; None for all.
        generator: the same in every process.
        processes: the group.
        device: of the layer.

    Raises:
        SylinitError: fewer than two rows in all.
    """
    shapes = {lane: view.positions(x) for lane, x in waiting.items()}
    lengths = {lane: samples * math.prod(positions) for lane, (samples, positions) in shapes.items()}
    met = processes.agree(lambda: (sum(lengths.values()), all(serves(view, x) for x in waiting.values())))
    counts = [count for count, _ in met]
    total = sum(counts)
    if total < 2:
        raise SylinitError(
            f"layer {name!r} has met {total} row of input; a layer is computed from at least 2: pass more samples"
        )
    short_way = equal_cost_share(view) if isinstance(view, ConvView) and all(short for _, short in met) else None
    index = sample_index(total, budget(total, short_way), generator)
    start = sum(counts[: processes.rank])
    parts = []
    for lane, x in waiting.items():
        mine = None
        if index is not None:
            mine = index[(index >= start) & (index < start + lengths[lane])] - start
            mine = mine.to((x[0] if isinstance(x, tuple) else x).device)
        # Where all patches of a convolution are read, their moments need the targets of the samples only.
        shared = None
        if index is None and isinstance(view, ConvView):
            shared = targets.of_samples(lane, shapes[lane][0]) if targets else _none(shapes[lane][0], device)
        t = targets.of_rows(lane, shapes[lane], mine) if shared is None and targets is not None else None
        parts.append(Part(x, mine, lengths[lane] if mine is None else len(mine), t, shared))
        start += lengths[lane]
    # Where any lane's rows cannot be matched to samples, no lane of any process has targets.
    known = all(part.targets is not None or part.shared is not None for part in parts)
    matched = all(processes.agree(lambda: targets is not None and known))
    if not matched:
        parts = [
            replace(part, targets=None, shared=_none(len(part.shared), device) if part.shared is not None else None)
            for part in parts
        ]
    width = targets.width if targets is not None and matched else 0
    return Gathered(name, view, tuple(parts), total if index is None else len(index), width, device, processes)


def _none(samples: int, device: torch.device) -> Tensor:
    """The targets of samples that have none, ``[samples, 0]``."""
    return torch.zeros(samples, 0, dtype=torch.float64, device=device)


def _pieces(view: View, part: Part) -> Iterator[tuple[Tensor, slice]]:
    """A lane's rows in pieces of bounded size."""
    step = max(1, 4 * CHUNK // (view.groups * view.dim))
    if part.index is None and part.count <= step:
        yield view.rows(part.x, None), slice(None)
        return
    for start in range(0, part.count, step):
        piece = slice(start, min(start + step, part.count))
        device = (part.x[0] if isinstance(part.x, tuple) else part.x).device
        chosen = torch.arange(piece.start, piece.stop, device=device) if part.index is None else part.index[piece]
        yield view.rows(part.x, chosen), piece


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

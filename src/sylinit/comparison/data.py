"""Data sets as normalized tensors, few labeled samples of them, and samples held back."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sylinit import SylinitError
from sylinit.comparison import sources
from sylinit.comparison.sources import Raw, cache_directory

__all__ = ["Dataset", "Normalization", "cache_directory", "few_shot", "held_back", "load", "make_dataset", "split"]

TEST_SHARE = 0.2
"""Share of each class that becomes the test part of data that comes in one piece."""

NORMALIZE = ("standard", "scale", "none")
"""Ways of normalizing: each channel or feature to mean 0 and variance 1; bytes to 0..1; nothing."""

TASKS = ("auto", "classification", "regression")


@dataclass(frozen=True)
class Normalization:
    """What was done to samples: ``(x / divisor - mean) / std``.

    Attributes:
        kind: one of `NORMALIZE`.
        divisor: 255 for images of bytes, as torchvision's ``ToTensor`` divides them; else 1.
        mean: of each channel or feature of ``x / divisor`` over the training part; empty if nothing was subtracted.
        std: its standard deviation, 1 where it is constant; empty if nothing was divided.
    """

    kind: str = "none"
    divisor: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __str__(self) -> str:
        """One line for a terminal."""
        scaled = "x / 255" if self.divisor != 1 else "x"
        if not self.mean:
            return "none" if self.divisor == 1 else scaled
        return f"({scaled} - {_shown(self.mean)}) / {_shown(self.std)}"


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        name: what was asked for.
        train_x: float32 ``[n, channels, ...]`` or ``[n, features]``, normalized as `normalization` says.
        train_y: int64 ``[n]`` of classes, or float32 ``[n, values]``.
        test_x: as `train_x`, normalized by the *training* statistics.
        test_y: as `train_y`.
        classes: number of classes, or of values in a regression: what the model has as outputs.
        note: where the test part came from.
        normalization: what was done to the samples.
        class_names: by index; empty in a regression.
        features: names of the columns of a table.
        notes: what a user should know, such as columns that were left out.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    note: str = ""
    normalization: Normalization = Normalization()
    class_names: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def task(self) -> Literal["classification", "regression"]:
        """What is to be predicted."""
        return "regression" if self.train_y.is_floating_point() else "classification"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.train_x.shape[1:])

    @property
    def fingerprint(self) -> str:
        """Tells data from other data of the same name: a hash of all labels and of some thousand samples."""
        digest = hashlib.sha256()
        for part in (self.train_y, self.test_y, self.train_x, self.test_x):
            step = max(1, len(part) // 1000) if part.is_floating_point() else 1
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part[::step].contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=4)
def load(source: str, label: str | None = None, task: str = "auto", normalize: str = "standard") -> Dataset:
    """Load a data set, normalized by its training part; the last ones stay in memory.

    Args:
        source: ``"digits"`` (scikit-learn's), a name in `sources.ALIASES`, a directory of Parquet or CSV files or of
            image folders, the id of a data set on the Hugging Face hub, a ``.csv`` file with a header, a ``.npz`` file
            with ``x`` and ``y`` (and, if it has them, ``x_test`` and ``y_test``), or ``aeon:`` and the name of a time
            series classification set that the aeon package contains.
        label: the column that holds the target; by default one with a usual name.
        task: one of `TASKS`; "auto" takes real numbers that are not whole for a regression.
        normalize: one of `NORMALIZE`.

    Raises:
        SylinitError: what is missing or malformed, and what to do.
    """
    for option, value, known in (("--task", task, TASKS), ("--normalize", normalize, NORMALIZE)):
        if value not in known:
            raise SylinitError(f"{option} {value}: expected one of {', '.join(known)}")
    return make_dataset(source, sources.read(source, label, task), normalize)


def make_dataset(name: str, raw: Raw, normalize: str = "standard") -> Dataset:
    """Split off a test part where there is none, and normalize.

    Args:
        name: what messages call the data.
        raw: the data as it was found; its tensors are not changed.
        normalize: one of `NORMALIZE`.

    Raises:
        SylinitError: too few samples, shapes that differ, or numbers that are none.
    """
    x, y, test_x, test_y = raw.x, raw.y, raw.test_x, raw.test_y
    if len(x) < 2 or len(x) != len(y):
        raise SylinitError(f"--data {name}: {len(x)} samples and {len(y)} labels; expected at least 2, one label each")
    note = "test part as the data set has it"
    if test_x is None or test_y is None:
        train, test = split(y, TEST_SHARE)
        x, y, test_x, test_y = x[train], y[train], x[test], y[test]
        share = f"{TEST_SHARE:.0%}" if y.is_floating_point() else f"{TEST_SHARE:.0%} of each class"
        note = f"no test part in the data: {share} was split off, seed 0"
    if x.shape[1:] != test_x.shape[1:]:
        raise SylinitError(
            f"--data {name}: training samples of shape {list(x.shape[1:])}, test samples {list(test_x.shape[1:])}"
        )
    for part in (x, test_x):
        if part.is_floating_point() and not part.isfinite().all():
            rows = int((~part.flatten(1).isfinite()).any(1).sum())
            raise SylinitError(f"--data {name}: {rows} samples hold NaN or infinite values; remove or replace them")
    divisor = 255.0 if x.dtype == torch.uint8 and x.dim() == 4 else 1.0
    x, test_x = x.to(torch.float32, copy=True), test_x.to(torch.float32, copy=True)
    normalization = _normalize(x, test_x, divisor, normalize)
    return Dataset(
        name, x, y, test_x, test_y, raw.outputs, note, normalization, raw.class_names, raw.features, tuple(raw.notes)
    )


def _normalize(x: Tensor, test_x: Tensor, divisor: float, kind: str) -> Normalization:
    """Normalize in place: the large sets fill a good part of a small machine's memory."""
    if kind != "standard":
        divisor = divisor if kind == "scale" else 1.0
        for part in (x, test_x):
            part.div_(divisor)
        return Normalization(kind, divisor)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    std, mean = torch.std_mean(x, dim=axes, keepdim=True, correction=0)
    std = torch.where(std > 1e-6 * std.max().clamp(min=1e-30), std, torch.ones_like(std))
    for part in (x, test_x):
        part.sub_(mean).div_(std)
    return Normalization(
        kind, divisor, *(tuple(float(f"{v:.7g}") for v in (part / divisor).flatten().tolist()) for part in (mean, std))
    )


def _shown(values: tuple[float, ...]) -> str:
    if len(values) == 1:
        return f"{values[0]:.4g}"
    text = ", ".join(f"{value:.4g}" for value in values[:4])
    return f"[{text}]" if len(values) <= 4 else f"[{text}, ... {len(values)} in all]"


def few_shot(y: Tensor, shots: int, seed: int) -> Tensor:
    """Draw a balanced subset; in a regression, any subset.

    Args:
        y: int64 ``[n]``, the labels; or float ``[n, values]``.
        shots: samples per class; in a regression, samples in all.
        seed: of the draw; equal seeds give nested subsets (those of fewer shots lie in those of more).

    Returns:
        int64 ``[classes * shots]``: one of each class in turn, so that every leading part is nearly balanced.

    Raises:
        SylinitError: if a class has fewer samples than asked for.
    """
    if shots < 1:
        raise SylinitError(f"shots: expected at least 1 sample a class, got {shots}")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    if y.is_floating_point():
        if len(y) < shots:
            raise SylinitError(f"shots: asked for {shots} samples, there are {len(y)}; ask for fewer")
        return order[:shots]
    chosen = []
    for label in y.unique():
        members = order[y[order] == label]
        if len(members) < shots:
            raise SylinitError(
                f"shots: asked for {shots} samples of each class, class {int(label)} has {len(members)}; ask for fewer"
            )
        chosen.append(members[:shots])
    return torch.stack(chosen, dim=1).flatten()


def held_back(y: Tensor, taken: Tensor, size: int, seed: int) -> Tensor:
    """Draw validation samples from the training data that `taken` leaves over.

    Args:
        y: int64 ``[n]``, all training labels.
        taken: indices in use for training.
        size: at most so many.
        seed: of the draw.

    Returns:
        Indices disjoint from `taken`.

    Raises:
        SylinitError: if nothing is left over.
    """
    free = torch.ones(len(y), dtype=torch.bool)
    free[taken] = False
    rest = free.nonzero().flatten()
    if not len(rest):
        raise SylinitError("shots: no training data is left over to tune the learning rate on; ask for fewer shots")
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
    return rest[order[:size]]


def split(y: Tensor, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cut indices into two parts, class by class, the second with `share` of each class (at least one sample)."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    if y.is_floating_point():
        cut = max(1, round(share * len(y)))
        return order[cut:].sort().values, order[:cut].sort().values
    first, second = [], []
    for label in y.unique():
        members = order[y[order] == label]
        cut = max(1, round(share * len(members)))
        second.append(members[:cut])
        first.append(members[cut:])
    return torch.cat(first).sort().values, torch.cat(second).sort().values

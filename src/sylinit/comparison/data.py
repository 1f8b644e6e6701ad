"""Data sets as tensors: built-in digits, `datasets` directories and hub ids, and ``.npz`` files."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sylinit import SylinitError

TEST_SHARE = 0.2
"""Share of each class that becomes the test part of data that comes in one piece."""

ALIASES = {"cifar10": "uoft-cs/cifar10", "fashion-mnist": "zalando-datasets/fashion_mnist"}
"""Short names of hub data sets; the environment variable ``SYLINIT_CIFAR10`` (and so on) names a local copy."""

LABEL_NAMES = ("label", "labels", "y", "target", "class", "fine_label")


@dataclass(frozen=True)
class Dataset:
    """A classification data set in memory.

    Attributes:
        name: what was asked for.
        train_x: float32 ``[n, channels, height, width]`` or ``[n, features]``, each channel (feature) of mean 0 and
            variance 1 over the training part.
        train_y: int64 ``[n]``.
        test_x: as `train_x`, normalized by the *training* statistics.
        test_y: as `train_y`.
        classes: number of classes.
        note: where the test part came from.
    """

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int
    note: str = ""

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


@functools.lru_cache(maxsize=2)
def load(source: str) -> Dataset:
    """Load a data set, normalized by its training part; the last two stay in memory.

    Args:
        source: ``"digits"`` (scikit-learn's), a name in `ALIASES`, a directory of Parquet files or image folders, the
            id of a data set on the Hugging Face hub, or a ``.npz`` file with ``x`` and ``y`` (and, if it has them,
            ``x_test`` and ``y_test``).

    Raises:
        SylinitError: what is missing or malformed, and what to do.
    """
    name = source
    if name in ALIASES:
        source = os.environ.get("SYLINIT_" + name.upper().replace("-", "_"), ALIASES[name])
    path = Path(source)
    if source == "digits":
        raw = _digits()
    elif path.suffix == ".npz":
        raw = _npz(path)
    elif path.is_file():
        raise SylinitError(f"--data {source}: expected 'digits', a directory, a hub id or a .npz file, got a file")
    else:
        raw = _from_datasets(source)
    return _finish(name, *raw)


def few_shot(y: Tensor, shots: int, seed: int) -> Tensor:
    """Draw a balanced subset.

    Args:
        y: int64 ``[n]``, the labels.
        shots: samples per class.
        seed: of the draw; equal seeds give nested subsets (those of fewer shots lie in those of more).

    Returns:
        int64 ``[classes * shots]``: one of each class in turn, so that every leading part is nearly balanced.

    Raises:
        SylinitError: if a class has fewer samples than asked for.
    """
    if shots < 1:
        raise SylinitError(f"shots: expected at least 1 sample a class, got {shots}")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
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
    first, second = [], []
    for label in y.unique():
        members = order[y[order] == label]
        cut = max(1, round(share * len(members)))
        second.append(members[:cut])
        first.append(members[cut:])
    return torch.cat(first).sort().values, torch.cat(second).sort().values


_Raw = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None", int]


def _finish(name: str, x: Tensor, y: Tensor, test_x: Tensor | None, test_y: Tensor | None, classes: int) -> Dataset:
    if len(x) < 2 or len(x) != len(y):
        raise SylinitError(f"--data {name}: {len(x)} samples and {len(y)} labels; expected at least 2, one label each")
    note = "test part as the data set has it"
    if test_x is None or test_y is None:
        train, test = split(y, TEST_SHARE)
        x, y, test_x, test_y = x[train], y[train], x[test], y[test]
        note = f"no test part in the data: {TEST_SHARE:.0%} of each class was split off, seed 0"
    if x.shape[1:] != test_x.shape[1:]:
        raise SylinitError(
            f"--data {name}: training samples of shape {list(x.shape[1:])}, test samples {list(test_x.shape[1:])}"
        )
    if any(part.is_floating_point() and not part.isfinite().all() for part in (x, test_x)):
        raise SylinitError(f"--data {name}: the data holds NaN or infinite values; remove or replace them")
    x, test_x = x.to(torch.float32, copy=True), test_x.to(torch.float32, copy=True)
    axes = [0, 2, 3] if x.dim() == 4 else [0]
    std, mean = torch.std_mean(x, dim=axes, keepdim=True, correction=0)
    std = torch.where(std > 1e-6 * std.max().clamp(min=1e-30), std, torch.ones_like(std))
    for part in (x, test_x):
        part.sub_(mean).div_(std)  # in place: the large sets fill a good part of a small machine's memory
    return Dataset(name, x, y.long(), test_x, test_y.long(), classes, note)


def _digits() -> _Raw:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.from_numpy(digits.images).unsqueeze(1), torch.from_numpy(digits.target)
    return x, y, None, None, 10


def _npz(path: Path) -> _Raw:
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
    except FileNotFoundError as error:
        raise SylinitError(f"--data {path}: no such file") from error
    except (OSError, ValueError) as error:
        raise SylinitError(f"--data {path}: cannot be read as .npz ({error})") from error
    if not {"x", "y"} <= set(arrays):
        raise SylinitError(f"--data {path}: expected arrays 'x' and 'y', found {', '.join(arrays) or 'none'}")
    x = _samples(arrays["x"], f"{path}: x")
    test_x = _samples(arrays["x_test"], f"{path}: x_test") if "x_test" in arrays else None
    (y, test_y), classes = _classes([arrays["y"], arrays.get("y_test")], str(path))
    if (test_x is None) != (test_y is None):
        raise SylinitError(f"--data {path}: 'x_test' and 'y_test' go together, only one of them is there")
    assert y is not None
    return x, y, test_x, test_y, classes


def _samples(x: np.ndarray, where: str) -> Tensor:
    """``[n, features]`` as it is; images as ``[n, channels, height, width]`` (trailing 1, 3 or 4 are channels)."""
    if x.ndim not in (2, 3, 4) or x.dtype.kind not in "biuf":
        raise SylinitError(
            f"--data {where}: expected numbers of shape [n, features], [n, height, width], [n, channels, height, "
            f"width] or [n, height, width, channels], got {x.dtype} {list(x.shape)}"
        )
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[1] not in (1, 3, 4) and x.shape[-1] in (1, 3, 4):
        x = x.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(x.astype(np.float32)))


def _classes(parts: list[Any], where: str) -> tuple[list[Tensor | None], int]:
    """Labels of any type as 0 .. classes - 1, the same numbers in every part."""
    arrays = [None if part is None else np.asarray(part) for part in parts]
    known = [a for a in arrays if a is not None]
    if any(a.ndim != 1 or a.dtype.kind not in "biuUST" for a in known):
        raise SylinitError(
            f"--data {where}: labels must be integers or names, one a sample, got "
            + " and ".join(f"{a.dtype} {list(a.shape)}" for a in known)
        )
    names = np.unique(np.concatenate(known))
    if len(names) < 2:
        raise SylinitError(f"--data {where}: there is only one class; classification needs at least two")
    return [None if a is None else torch.from_numpy(np.searchsorted(names, a)) for a in arrays], len(names)


def _from_datasets(source: str) -> _Raw:
    import datasets

    if Path(source).is_dir() and not any(Path(source).iterdir()):
        raise SylinitError(f"--data {source}: the directory is empty")
    # what goes wrong is said once, below, not by each retry
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        parts = datasets.load_dataset(source)
    except Exception as error:  # the library raises a dozen types; all mean that the source cannot be read
        reason = (str(error).splitlines() or ["no message"])[0]
        raise SylinitError(
            f"--data {source}: neither 'digits', a .npz file, nor anything that datasets.load_dataset can read "
            f"({type(error).__name__}: {reason})"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    train = parts["train"] if "train" in parts else parts[next(iter(parts))]
    test = next((parts[name] for name in ("test", "validation", "valid") if name in parts), None)
    test = None if test is train else test
    columns = _columns(train.features, source)
    cache = _cache_file(train, test)
    if cache.exists():
        from safetensors.torch import load_file

        stored = load_file(cache)
    else:
        stored = _decode(train, test, *columns, source)
        _save(stored, cache)
    return stored["x"], stored["y"], stored.get("test_x"), stored.get("test_y"), int(stored["classes"])


def _columns(features: Any, source: str) -> tuple[str | None, str]:
    """The image column (None for a table of numbers) and the label column, by type."""
    from datasets import ClassLabel, Image, Value

    images = [name for name, kind in features.items() if isinstance(kind, Image)]
    labels = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    labels += [n for n in LABEL_NAMES if n in features and n not in labels and isinstance(features[n], Value)]
    if not labels:
        raise SylinitError(
            f"--data {source}: no label column; expected a ClassLabel column or one named "
            f"{', '.join(LABEL_NAMES)}; it has {', '.join(features)}"
        )
    label = next((name for name in LABEL_NAMES if name in labels), labels[0])
    if len(images) > 1:
        raise SylinitError(f"--data {source}: several image columns ({', '.join(images)}); keep one")
    return (images[0] if images else None), label


def _decode(train: Any, test: Any, image: str | None, label: str, source: str) -> dict[str, Tensor]:
    raw = [None if part is None else np.asarray(part.data[label].to_numpy()) for part in (train, test)]
    if any(a is not None and a.dtype.kind == "f" and np.isnan(a).any() for a in raw):
        raise SylinitError(f"--data {source}: column {label!r} has rows without a label; remove them")
    raw = [None if a is None else a.astype(str) if a.dtype.kind == "O" else a for a in raw]
    named = getattr(train.features[label], "num_classes", None)
    if named is None:
        labels, classes = _classes(raw, source)
    else:  # a named class may be absent from the rows; its number stays
        labels, classes = [None if a is None else torch.tensor(a) for a in raw], named
    if any(y is not None and len(y) and int(y.min()) < 0 for y in labels):
        raise SylinitError(f"--data {source}: some rows have no label (-1); remove them or the part they are in")
    read = functools.partial(_images, column=image) if image else functools.partial(_table, label=label)
    stored = {"classes": torch.tensor(classes), "x": read(train, source=source), "y": labels[0]}
    if test is not None:
        stored |= {"test_x": read(test, source=source), "test_y": labels[1]}
    return {key: value for key, value in stored.items() if value is not None}


def _images(part: Any, *, column: str, source: str) -> Tensor:
    """All images of a part, uint8 ``[n, channels, height, width]``, decoded by all cores at once."""
    from datasets import Image as ImageFeature
    from PIL import Image

    part = part.select_columns([column]).cast_column(column, ImageFeature(decode=False))

    def raw() -> Iterator[Any]:
        for batch in part.iter(batch_size=1000):
            yield from batch[column]

    def read(item: Any) -> np.ndarray:
        # Pillow releases the interpreter lock while it decodes, so threads do run side by side.
        with Image.open(io.BytesIO(item["bytes"]) if item["bytes"] is not None else item["path"]) as picture:
            pixels = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(read, raw()))
    shapes = {picture.shape for picture in pictures}
    if len(shapes) != 1:
        raise SylinitError(
            f"--data {source}: images of {len(shapes)} shapes, such as "
            f"{' and '.join(map(str, sorted(shapes)[:2]))}; resize them to one"
        )
    # as the cache gives it back: in another layout, sums would round otherwise
    return torch.from_numpy(np.ascontiguousarray(np.stack(pictures)))


def _table(part: Any, *, label: str, source: str) -> Tensor:
    from datasets import Value

    numbers = [
        name
        for name, kind in part.features.items()
        if name != label and isinstance(kind, Value) and kind.dtype.startswith(("int", "uint", "float"))
    ]
    if not numbers:
        raise SylinitError(f"--data {source}: neither an image column nor columns of numbers beside {label!r}")
    return torch.from_numpy(np.stack([part.data[name].to_numpy().astype(np.float32) for name in numbers], axis=1))


def cache_directory() -> Path:
    """Where decoded data and pretrained weights are kept: ``$XDG_CACHE_HOME/sylinit`` or ``~/.cache/sylinit``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sylinit"


def _cache_file(train: Any, test: Any) -> Path:
    # `datasets` derives a fingerprint from the files' identity and every step applied to them
    identity = f"1 {train._fingerprint} {train.num_rows} {test._fingerprint if test is not None else ''}"
    return cache_directory() / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.safetensors"


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write at once or not at all: a half-written cache would be worse than none."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({key: value.contiguous() for key, value in tensors.items()}, partial)
    partial.replace(path)

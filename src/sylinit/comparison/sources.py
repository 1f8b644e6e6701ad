"""Where data comes from: scikit-learn's digits, ``.npz`` and CSV files, directories, the Hugging Face hub, aeon."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import io
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sylinit import SylinitError
from sylinit.comparison import tables

ALIASES = {"cifar10": "uoft-cs/cifar10", "fashion-mnist": "zalando-datasets/fashion_mnist"}
"""Short names of hub data sets; the environment variable ``SYLINIT_CIFAR10`` (and so on) names a local copy."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""What the hub calls a data set: ``owner/name``."""

HUB_SECONDS = 10.0
"""Patience with the hub's first answer."""


@dataclass(frozen=True)
class Raw:
    """Data as it was found.

    Attributes:
        x: samples, ``[n, ...]`` numbers.
        y: targets: int64 ``[n]`` of classes, or float32 ``[n, values]``.
        test_x: of the test part, if the data has one.
        test_y: of the test part.
        outputs: number of classes, or of values.
        class_names: by index.
        features: names of the columns of a table.
        notes: what a user should know.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor | None
    test_y: Tensor | None
    outputs: int
    class_names: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def read(name: str, label: str | None, task: str) -> Raw:
    """Read data by name; see `data.load`."""
    source = os.environ.get("SYLINIT_" + name.upper().replace("-", "_"), ALIASES[name]) if name in ALIASES else name
    path = Path(source).expanduser()
    if source == "digits":
        return _digits()
    if source.startswith("aeon:"):
        return _aeon(source.removeprefix("aeon:"))
    if path.suffix.lower() in (".npz", ".csv", ".tsv") and not path.is_dir():
        if not path.exists():
            raise SylinitError(f"--data {source}: no such file")
        return _npz(path, task) if path.suffix.lower() == ".npz" else _csv(path, label, task)
    if path.is_file():
        raise SylinitError(
            f"--data {source}: expected 'digits', a .npz or .csv file, a directory or a hub id, got a file"
        )
    if path.is_dir():
        if not any(path.iterdir()):
            raise SylinitError(f"--data {source}: the directory is empty")
    elif not HUB_ID.fullmatch(source) or source.startswith("."):
        near = difflib.get_close_matches(source, ["digits", *ALIASES], n=1)
        raise SylinitError(
            f"--data {source}: no such file or directory, and no built-in name (digits, {', '.join(ALIASES)}); "
            "a data set of the Hugging Face hub is named owner/name" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    else:
        _look_up(source)
    return _from_datasets(str(path) if path.is_dir() else source, label, task)


def cache_directory() -> Path:
    """Where decoded data and pretrained weights are kept: ``$XDG_CACHE_HOME/sylinit`` or ``~/.cache/sylinit``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sylinit"


def _digits() -> Raw:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.from_numpy(digits.images).unsqueeze(1), torch.from_numpy(digits.target)
    return Raw(x, y, None, None, 10, tuple("0123456789"))


def _aeon(name: str) -> Raw:
    """A time series classification set among those that the ``aeon`` package contains, ``[n, channels, length]``."""
    found = importlib.util.find_spec("aeon")
    if found is None or not found.submodule_search_locations:
        raise SylinitError(f"--data aeon:{name}: the aeon package is not installed: pip install aeon")
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data"
    files = [folder / name / f"{name}_{part}.ts" for part in ("TRAIN", "TEST")]
    if not all(file.exists() for file in files):
        known = sorted(file.name.removesuffix("_TRAIN.ts") for file in folder.glob("*/*_TRAIN.ts"))
        raise SylinitError(f"--data aeon:{name}: aeon contains no such series; it has {', '.join(known)}")
    (x, y), (test_x, test_y) = (_ts(file) for file in files)
    if x.shape[1:] != test_x.shape[1:]:
        raise SylinitError(f"--data aeon:{name}: training and test series differ in length; choose another")
    found_y = tables.targets(y, test_y, "auto", f"aeon:{name}")
    return Raw(x, found_y.train, test_x, found_y.test, found_y.outputs, found_y.names)


def _ts(path: Path) -> tuple[Tensor, np.ndarray]:
    """Series and targets of a ``.ts`` file: a line a sample, channels and then the target between colons."""
    lines = path.read_text(encoding="utf-8").splitlines()
    begin = next(place for place, line in enumerate(lines) if line.strip().lower() == "@data")
    rows = [line.strip().split(":") for line in lines[begin + 1 :] if line.strip()]
    try:
        x = torch.tensor([[[float(v) for v in channel.split(",")] for channel in row[:-1]] for row in rows])
    except ValueError as error:
        raise SylinitError(f"{path.name}: series of several lengths or with missing values; choose another") from error
    return x, np.array([row[-1] for row in rows])


def _npz(path: Path, task: str) -> Raw:
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error) if zipfile.is_zipfile(path) else "its contents are something else"
        raise SylinitError(
            f"--data {path}: not a .npz file of arrays ({reason}); write one with numpy.savez({path.name!r}, x=x, y=y)"
        ) from error
    if not {"x", "y"} <= set(arrays):
        raise SylinitError(f"--data {path}: expected arrays 'x' and 'y', found {', '.join(arrays) or 'none'}")
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise SylinitError(f"--data {path}: 'x_test' and 'y_test' go together, only one of them is there")
    x = _samples(arrays["x"], f"{path}: x")
    test_x = _samples(arrays["x_test"], f"{path}: x_test") if "x_test" in arrays else None
    if len(x) != len(arrays["y"]):
        raise SylinitError(f"--data {path}: {len(x)} samples and {len(arrays['y'])} targets; expected one for each")
    y = tables.targets(arrays["y"], arrays.get("y_test"), task, str(path))
    return Raw(x, y.train, test_x, y.test, y.outputs, y.names)


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
    return torch.from_numpy(np.ascontiguousarray(x if x.dtype == np.uint8 else x.astype(np.float32)))


def _csv(path: Path, label: str | None, task: str) -> Raw:
    import pandas as pd

    try:
        frame = pd.read_csv(path, sep="\t" if path.suffix.lower() == ".tsv" else ",")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError) as error:
        raise SylinitError(f"--data {path}: cannot be read as CSV with a header line ({error})") from error
    (header, *others) = map(str, frame.columns)
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if not others and mark in header:
            raise SylinitError(f"--data {path}: its columns are separated by {name}; write it with commas between them")
    return _frames(frame, None, label, task, str(path))


def _frames(train: Any, test: Any, label: str | None, task: str, where: str) -> Raw:
    column = tables.label_column([str(name) for name in train.columns], label, where)
    parts = [part for part in (train, test) if part is not None]
    if missing := sum(int(part[column].isna().sum()) for part in parts):
        raise SylinitError(f"--data {where}: column {column!r} has {missing} rows without a label; remove them")
    values = [_plain(part[column]) for part in parts]
    y = tables.targets(values[0], values[1] if test is not None else None, task, where)
    x = tables.features(train.drop(columns=column), test.drop(columns=column) if test is not None else None, where)
    return Raw(x.train, y.train, x.test, y.test, y.outputs, y.names, x.names, [f"target: column {column!r}", *x.notes])


def _plain(column: Any) -> np.ndarray:
    """A column as numbers or text of numpy's own."""
    import pandas as pd

    if pd.api.types.is_bool_dtype(column) or not pd.api.types.is_numeric_dtype(column):
        return column.astype(str).to_numpy().astype(np.str_)
    return column.to_numpy()


def _look_up(source: str) -> None:
    """Ask the hub once whether it has the data set; `datasets` would ask again and again, and wait in between."""
    from datasets import config
    from huggingface_hub import HfApi

    cached = Path(config.HF_DATASETS_CACHE) / source.replace("/", "___")
    if config.HF_HUB_OFFLINE or cached.exists():
        return
    try:
        HfApi().dataset_info(source, timeout=HUB_SECONDS)
    except Exception as error:  # the client raises its transport's types as well as its own
        reason = (str(error).splitlines() or ["no message"])[0]
        raise SylinitError(
            f"--data {source}: no such directory here, and not to be had from the Hugging Face hub "
            f"({type(error).__name__}: {reason}); check the name and the connection"
        ) from error


def _from_datasets(source: str, label: str | None, task: str) -> Raw:
    import datasets

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
            f"--data {source}: nothing that datasets.load_dataset can read ({type(error).__name__}: {reason}); "
            "expected Parquet or CSV files, or a folder of images for each class"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    train = parts["train"] if "train" in parts else parts[next(iter(parts))]
    test = next((parts[name] for name in ("test", "validation", "valid") if name in parts), None)
    test = None if test is train else test
    images = [name for name, kind in train.features.items() if isinstance(kind, datasets.Image)]
    if not images:
        frames = [None if part is None else _named(part) for part in (train, test)]
        return _frames(frames[0], frames[1], label or _class_column(train.features), task, source)
    if len(images) > 1:
        raise SylinitError(f"--data {source}: several image columns ({', '.join(images)}); keep one")
    column = label or _class_column(train.features) or tables.label_column(list(train.features), None, source)
    tables.label_column(list(train.features), column, source)
    return _pictures(train, test, images[0], column, task, source)


def _class_column(features: Any) -> str | None:
    """The column of named classes, of several the one with the best name."""
    from datasets import ClassLabel

    named = [name for name, kind in features.items() if isinstance(kind, ClassLabel)]
    return next((name for name in tables.LABEL_NAMES if name in named), named[0] if named else None)


def _named(part: Any) -> Any:
    """A part as a pandas table, its classes by name."""
    from datasets import ClassLabel

    frame = part.to_pandas()
    for name, kind in part.features.items():
        if isinstance(kind, ClassLabel) and len(frame):
            frame[name] = [kind.names[v] if v is not None and v >= 0 else None for v in frame[name].tolist()]
    return frame


def _pictures(train: Any, test: Any, image: str, label: str, task: str, source: str) -> Raw:
    """Images and their targets, decoded once and then read from the cache."""
    from datasets import ClassLabel

    parts = [part for part in (train, test) if part is not None]
    kind = train.features[label]
    values = [np.asarray(part.data[label].to_numpy()) for part in parts]
    if any((a.dtype.kind == "f" and np.isnan(a).any()) or (a.dtype.kind == "O" and None in a) for a in values):
        raise SylinitError(f"--data {source}: column {label!r} has rows without a label; remove them")
    if isinstance(kind, ClassLabel):  # a named class may be absent from the rows; its number stays
        y = [torch.tensor(a) for a in values]
        if any(len(part) and int(part.min()) < 0 for part in y):
            raise SylinitError(f"--data {source}: some rows have no label (-1); remove them or the part they are in")
        found = tables.Targets(y[0], y[1] if len(y) > 1 else None, kind.num_classes, tuple(kind.names))
        tables.require_classes(values[0], np.unique(values[0]), source)
    else:
        values = [a.astype(str) if a.dtype.kind == "O" else a for a in values]
        found = tables.targets(values[0], values[1] if test is not None else None, task, source)
    cache = _cache_file(train, test, image)
    if cache.exists():
        from safetensors.torch import load_file

        stored = load_file(cache)
    else:
        stored = {"x": _images(train, column=image, source=source)}
        if test is not None:
            stored["test_x"] = _images(test, column=image, source=source)
        _save(stored, cache)
    return Raw(stored["x"], found.train, stored.get("test_x"), found.test, found.outputs, found.names)


def _images(part: Any, *, column: str, source: str) -> Tensor:
    """All images of a part, uint8 ``[n, channels, height, width]``, decoded by all cores at once."""
    from datasets import Image as ImageFeature
    from PIL import Image

    part = part.select_columns([column]).cast_column(column, ImageFeature(decode=False))

    def raw() -> Iterator[Any]:
        for batch in part.iter(batch_size=1000):
            yield from batch[column]

    def read_one(item: Any) -> np.ndarray:
        # Pillow releases the interpreter lock while it decodes, so threads do run side by side.
        with Image.open(io.BytesIO(item["bytes"]) if item["bytes"] is not None else item["path"]) as picture:
            pixels = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(read_one, raw()))
    shapes = {picture.shape for picture in pictures}
    if len({shape[0] for shape in shapes}) > 1:
        gray = sum(picture.shape[0] == 1 for picture in pictures)
        raise SylinitError(
            f"--data {source}: {gray} gray images among {len(pictures) - gray} in color; convert them to one kind, "
            "such as image.convert('RGB') with Pillow"
        )
    if len(shapes) != 1:
        raise SylinitError(
            f"--data {source}: images of {len(shapes)} shapes, such as "
            f"{' and '.join(map(str, sorted(shapes)[:2]))}; resize them to one"
        )
    # as the cache gives it back: in another layout, sums would round otherwise
    return torch.from_numpy(np.ascontiguousarray(np.stack(pictures)))


def _cache_file(train: Any, test: Any, image: str) -> Path:
    # `datasets` derives a fingerprint from the files' identity and every step applied to them
    identity = f"2 {train._fingerprint} {train.num_rows} {test._fingerprint if test is not None else ''} {image}"
    return cache_directory() / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.safetensors"


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write at once or not at all: a half-written cache would be worse than none."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file({key: value.contiguous() for key, value in tensors.items()}, partial)
    partial.replace(path)

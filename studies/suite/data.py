"""Data sets with few examples: train subsets, validation subsets disjoint from them, and a test set read on demand.

Add a data set: a function that returns the ``"train"`` or the ``"test"`` part as ``(x, y)``, and the line
``@dataset("name", kind)`` above it.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from studies.suite.networks import TextEncoder, encoder_directory

Loader = Callable[[str, Path | None], tuple[Any, Any]]
"""``(part, directory) -> (x, y)``; ``part`` is "train" or "test", ``directory`` holds data that no package carries."""

TRAIN_POOL = 10_000
"""Training samples of a large data set, drawn once with a fixed seed; subsets are drawn from these."""

TEST_SIZE = 2_000
"""Test samples of a large data set, drawn once with a fixed seed."""

VALIDATION_SIZE = 500
"""Validation samples at most."""

TOKENS = 32
"""Tokens of a text at most."""

TEXT_TRAIN_POOL, TEXT_TEST_SIZE = 3_000, 1_000
"""The same for text, where an encoder has to read every sample."""


class MissingDataError(RuntimeError):
    """A data set's directory or package is not there; the message says what to do."""


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set before it is read.

    Attributes:
        name: as in a task's name.
        kind: "image" ``[n, channels, height, width]``, "series" ``[n, channels, length]``, "table" or "embedding"
            ``[n, features]``, or "text" ``[n, tokens]`` (token numbers, zero where there is none).
        load: reads a part.
        regression: whether values are predicted instead of classes.
    """

    name: str
    kind: str
    load: Loader
    regression: bool = False

    @property
    def validation_size(self) -> int:
        """Validation samples at most."""
        return 300 if self.kind == "text" else VALIDATION_SIZE


DATA_SETS: dict[str, DataSet] = {}
"""Every data set by name."""


@dataclass(frozen=True)
class Samples:
    """Inputs and targets.

    Attributes:
        x: ``[n, *shape]``, float32 and standardized; token numbers are int64.
        y: classes ``[n]``, int64; values ``[n, 1]``, float32 and standardized.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> Samples:
        return Samples(self.x[index], self.y[index])

    def to(self, device: torch.device) -> Samples:
        """The same on a device."""
        return Samples(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Parts:
    """What one seed sees of a data set; `test` is None unless it was asked for.

    Attributes:
        train: the train subset.
        validation: drawn from the rest of the training part.
        test: the same for all seeds.
        outputs: classes, or 1 where a value is predicted.
    """

    train: Samples
    validation: Samples
    test: Samples | None
    outputs: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return tuple(self.train.x.shape[1:])


def dataset(name: str, kind: str, *, regression: bool = False) -> Callable[[Loader], Loader]:
    """Put a loader into `DATA_SETS` under `name`."""

    def register(load: Loader) -> Loader:
        DATA_SETS[name] = DataSet(name, kind, load, regression)
        return load

    return register


def directory_of(given: str | Path | None) -> Path | None:
    """The directory of the data: as given, or as the environment variable SYLINIT_DATA names it."""
    chosen = given or os.environ.get("SYLINIT_DATA")
    return Path(chosen) if chosen else None


def parts(name: str, size: int, seed: int, directory: Path | None = None, *, test: bool) -> Parts:
    """Draw a train and a validation subset.

    Args:
        name: of the data set.
        size: training samples of each class, or in all where values are predicted. Of a class that has too few, half
            are taken.
        seed: decides which samples; every method sees the same.
        directory: of data that no package carries.
        test: whether to read the test part.
    """
    data = DATA_SETS[name]
    pool = samples(name, "train", directory)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(len(pool), dtype=torch.bool)
    groups = [order] if data.regression else [order[pool.y[order] == label] for label in pool.y.unique()]
    for members in groups:
        chosen[members[: min(size, len(members) // 2)]] = True
    train = order[chosen[order]]
    validation = order[~chosen[order]][: data.validation_size]
    return Parts(
        train=pool[train],
        validation=pool[validation],
        test=samples(name, "test", directory) if test else None,
        outputs=1 if data.regression else int(pool.y.max()) + 1,
    )


@lru_cache(maxsize=8)
def samples(name: str, part: str, directory: Path | None = None) -> Samples:
    """A part of a data set, standardized with the mean and deviation of its training part.

    Images and series are standardized by channel, tables and embeddings by column, target values as a whole; tokens
    are left as they are.
    """
    data = DATA_SETS[name]
    x, y = data.load(part, directory)
    if data.kind == "text":
        inputs = torch.as_tensor(x)
    else:
        mean, deviation = input_statistics(name, directory)
        inputs = ((torch.as_tensor(x, dtype=torch.float64) - mean) / deviation).float()
    if not data.regression:
        return Samples(inputs, torch.tensor(np.asarray(y), dtype=torch.int64))
    values = torch.as_tensor(np.asarray(y), dtype=torch.float64)
    reference = torch.as_tensor(np.asarray(data.load("train", directory)[1]), dtype=torch.float64)
    return Samples(inputs, ((values - reference.mean()) / reference.std()).float().unsqueeze(1))


@lru_cache(maxsize=32)
def input_statistics(name: str, directory: Path | None) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the training part; a deviation of zero counts as one."""
    x = torch.as_tensor(DATA_SETS[name].load("train", directory)[0], dtype=torch.float64)
    axes = [0, *range(2, x.ndim)]
    deviation, mean = torch.std_mean(x, dim=axes, keepdim=True, correction=0)
    return mean, torch.where(deviation > 0, deviation, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Images


def parquet(directory: Path | None, folder: str, part: str) -> Any:
    """Rows of ``DIRECTORY/folder/part-*.parquet`` as a data frame: a fixed random choice where there are many."""
    import pandas

    if directory is None:
        raise MissingDataError(f"{folder}: pass --data DIR, or set SYLINIT_DATA; DIR/{folder} holds Parquet files")
    files = sorted((directory / folder).glob(f"{part}-*.parquet"))
    if not files:
        raise MissingDataError(f"{folder}: no file {part}-*.parquet in {directory / folder}")
    frame = pandas.concat([pandas.read_parquet(file) for file in files])
    return frame.sample(min(len(frame), TRAIN_POOL if part == "train" else TEST_SIZE), random_state=0)


def decoded(column: Any) -> np.ndarray:
    """Images ``[n, channels, height, width]``, uint8, of a column of mappings with PNG ``bytes``."""
    from PIL import Image

    images = np.stack([np.asarray(Image.open(io.BytesIO(entry["bytes"]))) for entry in column])
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)


@dataset("cifar10", "image")
@lru_cache(maxsize=2)
def cifar10(part: str, directory: Path | None) -> tuple[Any, Any]:
    """CIFAR-10, 3x32x32 (Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009)."""
    frame = parquet(directory, "cifar10", part)
    return decoded(frame["img"]), frame["label"].to_numpy()


@dataset("fashion-mnist", "image")
@lru_cache(maxsize=2)
def fashion_mnist(part: str, directory: Path | None) -> tuple[Any, Any]:
    """Fashion-MNIST, 1x28x28 (Xiao, Rasul and Vollgraf, 2017)."""
    frame = parquet(directory, "fashion_mnist", part)
    return decoded(frame["image"]), frame["label"].to_numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Data in one piece, which a fixed seed cuts into a training part of 60 % and a test part


def cut(part: str, whole: Any, *, regression: bool = False) -> tuple[Any, Any]:
    """One of the two parts of ``(x, y)``, with equal shares of the classes."""
    from sklearn.model_selection import train_test_split

    x, y = whole
    index = np.arange(len(y))
    train, test = train_test_split(index, test_size=0.4, random_state=0, stratify=None if regression else y)
    chosen = train if part == "train" else test
    return x[chosen], y[chosen]


@dataset("digits", "image")
def digits(part: str, directory: Path | None) -> tuple[Any, Any]:
    """Handwritten digits, 1x8x8, of scikit-learn."""
    x, y = digits_table(part, directory)
    return x.reshape(-1, 1, 8, 8), y


@dataset("digits-table", "table")
def digits_table(part: str, directory: Path | None) -> tuple[Any, Any]:
    """The same digits as rows of 64 numbers."""
    from sklearn.datasets import load_digits

    return cut(part, load_digits(return_X_y=True))


@dataset("breast-cancer", "table")
def breast_cancer(part: str, directory: Path | None) -> tuple[Any, Any]:
    """Benign and malignant tumors, 30 measurements each, of scikit-learn."""
    from sklearn.datasets import load_breast_cancer

    return cut(part, load_breast_cancer(return_X_y=True))


@dataset("wine", "table")
def wine(part: str, directory: Path | None) -> tuple[Any, Any]:
    """Wines of three growers, 13 measurements each, of scikit-learn."""
    from sklearn.datasets import load_wine

    return cut(part, load_wine(return_X_y=True))


@dataset("diabetes", "table", regression=True)
def diabetes(part: str, directory: Path | None) -> tuple[Any, Any]:
    """Progression of diabetes after a year, from 10 measurements, of scikit-learn."""
    from sklearn.datasets import load_diabetes

    return cut(part, load_diabetes(return_X_y=True), regression=True)


@dataset("friedman1", "table", regression=True)
def friedman1(part: str, directory: Path | None) -> tuple[Any, Any]:
    """Friedman's first regression problem, 10 columns of which 5 matter, made by scikit-learn with a fixed seed."""
    from sklearn.datasets import make_friedman1

    return cut(part, make_friedman1(2000, noise=1.0, random_state=0), regression=True)


def series(name: str, part: str) -> tuple[Any, Any]:
    """A data set of time series that the package ``aeon`` carries, both of its parts together, cut anew.

    The archive's own training parts are too small to hold a validation subset. Series of unequal length are padded
    with zeros at their ends.
    """
    from aeon.datasets import load_classification

    x, y = load_classification(name)
    if isinstance(x, list):
        longest = max(one.shape[1] for one in x)
        x = np.stack([np.pad(one, ((0, 0), (0, longest - one.shape[1]))) for one in x])
    return cut(part, (x, np.unique(y, return_inverse=True)[1]))


@dataset("italy-power-demand", "series")
def italy_power_demand(part: str, directory: Path | None) -> tuple[Any, Any]:
    """Summer or winter by the hours of a day, 1x24."""
    return series("ItalyPowerDemand", part)


@dataset("gun-point", "series")
def gun_point(part: str, directory: Path | None) -> tuple[Any, Any]:
    """A hand that draws a gun or points, 1x150."""
    return series("GunPoint", part)


@dataset("arrow-head", "series")
def arrow_head(part: str, directory: Path | None) -> tuple[Any, Any]:
    """Outlines of three kinds of arrow heads, 1x251."""
    return series("ArrowHead", part)


@dataset("osu-leaf", "series")
def osu_leaf(part: str, directory: Path | None) -> tuple[Any, Any]:
    """Outlines of the leaves of six trees, 1x427."""
    return series("OSULeaf", part)


@dataset("acsf1", "series")
def acsf1(part: str, directory: Path | None) -> tuple[Any, Any]:
    """Power drawn by ten kinds of appliances, 1x1460, averaged over each four values to 1x365."""
    x, y = series("ACSF1", part)
    return x.reshape(*x.shape[:2], -1, 4).mean(3), y


@dataset("japanese-vowels", "series")
def japanese_vowels(part: str, directory: Path | None) -> tuple[Any, Any]:
    """Nine speakers by 12 coefficients of a vowel, 12x29."""
    return series("JapaneseVowels", part)


@dataset("basic-motions", "series")
def basic_motions(part: str, directory: Path | None) -> tuple[Any, Any]:
    """Four activities by accelerometer and gyroscope, 6x100."""
    return series("BasicMotions", part)


# ---------------------------------------------------------------------------------------------------------------------
# The second look: data on which nothing was chosen


@dataset("rotations", "image")
def rotations(part: str, directory: Path | None) -> tuple[Any, Any]:
    """By how many quarters a piece of 20x20 pixels of scikit-learn's two photographs is turned.

    Pieces to train on are of the left 60 % of a photograph, those to test on of the rest.
    """
    from sklearn.datasets import load_sample_images

    train = part == "train"
    draw = np.random.default_rng(0 if train else 1)
    pieces = []
    for photograph in load_sample_images().images:
        height, width, _ = photograph.shape
        border = int(0.6 * width)
        for _ in range(1000):
            top = draw.integers(0, height - 20)
            left = draw.integers(0, border - 20) if train else draw.integers(border, width - 20)
            pieces.append(photograph[top : top + 20, left : left + 20].transpose(2, 0, 1))
    turns = np.arange(len(pieces)) % 4
    turned = [np.rot90(piece, int(turn), (1, 2)) for piece, turn in zip(pieces, turns, strict=True)]
    return np.stack(turned), turns


@dataset("hastie", "table")
def hastie(part: str, directory: Path | None) -> tuple[Any, Any]:
    """Whether ten Gaussian numbers lie far from zero, made by scikit-learn with a fixed seed.

    Source: Hastie, Tibshirani and Friedman, *The Elements of Statistical Learning*, 2009, example 10.2.
    """
    from sklearn.datasets import make_hastie_10_2

    x, y = make_hastie_10_2(4000, random_state=0)
    return cut(part, (x, (y > 0).astype(np.int64)))


@dataset("covid-3-month", "series", regression=True)
def covid_3_month(part: str, directory: Path | None) -> tuple[Any, Any]:
    """Deaths over cases after three months of a country's daily cases, 1x84."""
    from aeon.datasets import load_regression

    x, y = load_regression("Covid3Month")
    return cut(part, (x, y.astype(np.float64)), regression=True)


# ---------------------------------------------------------------------------------------------------------------------
# Text


@dataset("banking77", "text")
@lru_cache(maxsize=2)
def banking77(part: str, directory: Path | None) -> tuple[Any, Any]:
    """Customers' questions with 77 intents (Casanueva et al., *Efficient Intent Detection*, 2020), as token numbers."""
    from sklearn.model_selection import train_test_split
    from tokenizers import Tokenizer

    if directory is None:
        raise MissingDataError("banking77: pass --data DIR, or set SYLINIT_DATA; DIR/banking77 holds two CSV files")
    with (directory / "banking77" / f"{part}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = np.unique([row["category"] for row in rows], return_inverse=True)[1]
    size = TEXT_TRAIN_POOL if part == "train" else TEXT_TEST_SIZE
    chosen, _ = train_test_split(np.arange(len(rows)), train_size=size, random_state=0, stratify=labels)
    tokenizer = Tokenizer.from_file(str(encoder_directory() / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    tokens = [encoding.ids for encoding in tokenizer.encode_batch([rows[i]["text"] for i in chosen])]
    return np.asarray(tokens, dtype=np.int64), labels[chosen]


@dataset("banking77-embeddings", "embedding")
@lru_cache(maxsize=2)
def banking77_embeddings(part: str, directory: Path | None) -> tuple[Any, Any]:
    """The same questions as the frozen encoder reads them: 384 numbers each."""
    tokens, labels = banking77(part, directory)
    return embeddings(torch.as_tensor(tokens)).numpy(), labels


@torch.no_grad()
def embeddings(tokens: Tensor) -> Tensor:
    """Features of the pretrained encoder, ``[n, 384]``; texts of similar length are read together."""
    encoder = TextEncoder().to(tokens.device).eval()
    order = (tokens != 0).sum(1).argsort()
    features = torch.cat([encoder(part) for part in tokens[order].split(64)])
    return features[order.argsort()]

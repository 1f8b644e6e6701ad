"""Tables as numbers: which column is the target, what each of the others becomes, and what is left out and why."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sylinit import SylinitError

LABEL_NAMES = ("label", "labels", "y", "target", "class", "fine_label")
"""Columns that are taken for the target by their name, the first that is there."""

MANY_CATEGORIES = 50
"""A column of text with more different values than this is left out."""

MANY_CLASSES = 1000
"""More different whole numbers than this are no classes."""


@dataclass(frozen=True)
class Targets:
    """What is to be predicted.

    Attributes:
        train: int64 ``[n]`` of classes, or float32 ``[n, 1]`` of numbers.
        test: the same of the test part, if there is one.
        outputs: number of classes, or 1.
        names: of the classes, in the order of their indices; empty for numbers.
    """

    train: Tensor
    test: Tensor | None
    outputs: int
    names: tuple[str, ...] = ()


@dataclass
class Features:
    """Columns as numbers.

    Attributes:
        train: float32 ``[n, features]``.
        test: the same of the test part, if there is one.
        names: of the features; ``color=red`` is 1 where the column says so and 0 elsewhere.
        notes: what was left out, and why.
    """

    train: Tensor
    test: Tensor | None
    names: tuple[str, ...]
    notes: list[str] = field(default_factory=list)


def label_column(columns: list[str], wanted: str | None, where: str) -> str:
    """The column that holds the target.

    Args:
        columns: names of all columns.
        wanted: the name that the user gave, if any.
        where: what messages call the data.

    Raises:
        SylinitError: there is none of that name, or none that is known for a target.
    """
    if wanted is not None:
        if wanted in columns:
            return wanted
        near = difflib.get_close_matches(wanted, columns, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SylinitError(f"--label {wanted}: {where} has no such column; it has {', '.join(columns)}{hint}")
    lowered = {name.strip().lower(): name for name in reversed(columns)}
    for name in LABEL_NAMES:
        if name in lowered:
            return lowered[name]
    raise SylinitError(
        f"--data {where}: no column is named {', '.join(LABEL_NAMES[:-1])}; say which one holds the target with "
        f"--label COLUMN; there are {', '.join(columns)}"
    )


def targets(train: np.ndarray, test: np.ndarray | None, task: str, where: str) -> Targets:
    """Targets of any type, as class indices ``0 .. classes - 1`` or as numbers.

    Args:
        train: of the training part, ``[n]``, or ``[n, values]`` for a regression on several.
        test: of the test part.
        task: "classification", "regression", or "auto": real numbers that are not whole are a regression.
        where: what messages call the data.

    Raises:
        SylinitError: missing or unusable values, a single class, or a class for almost every sample.
    """
    parts = [part for part in (train, test) if part is not None]
    if any(part.dtype.kind not in "biufUST" or part.ndim not in (1, 2) for part in parts):
        raise SylinitError(
            f"--data {where}: targets must be integers, names or real numbers, one for each sample, got "
            + " and ".join(f"{part.dtype} {list(part.shape)}" for part in parts)
        )
    for part in parts:
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            raise SylinitError(
                f"--data {where}: {int((~np.isfinite(part)).sum())} rows have no target (NaN or infinite); remove them"
            )
    real = any(part.dtype.kind == "f" and (part != np.round(part)).any() for part in parts)
    if task == "regression" or (task == "auto" and (real or parts[0].ndim == 2)):
        if any(part.dtype.kind in "UST" for part in parts):
            raise SylinitError(f"--data {where}: --task regression needs numbers as targets, got text")
        numbers = [torch.from_numpy(part.astype(np.float32)).reshape(len(part), -1) for part in parts]
        if bool((numbers[0] == numbers[0][:1]).all()):
            raise SylinitError(f"--data {where}: all targets are equal; there is nothing to learn")
        return Targets(numbers[0], numbers[1] if len(numbers) > 1 else None, numbers[0].shape[1])
    if parts[0].ndim == 2:
        raise SylinitError(f"--data {where}: classes must be one for each sample, got targets {list(parts[0].shape)}")
    if real:
        raise SylinitError(
            f"--data {where}: the targets are real numbers, no classes; leave --task out or say --task regression"
        )
    names = np.unique(np.concatenate(parts))
    require_classes(train, names, where)
    index = [torch.from_numpy(np.searchsorted(names, part)).long() for part in parts]
    shown = tuple(str(int(name)) if names.dtype.kind == "f" else str(name) for name in names)
    return Targets(index[0], index[1] if len(index) > 1 else None, len(names), shown)


def require_classes(train: np.ndarray, names: np.ndarray, where: str) -> None:
    """Refuse classes that nothing can be learned of: a single one, or a class for almost every sample.

    Args:
        train: targets of the training part.
        names: all classes.
        where: what messages call the data.
    """
    if not len(names):
        raise SylinitError(f"--data {where}: it has no rows")
    if len(names) < 2:
        raise SylinitError(f"--data {where}: there is only one class; classification needs at least two")
    single = int((np.unique(train, return_counts=True)[1] == 1).sum())
    if len(names) > MANY_CLASSES and names.dtype.kind in "iuf" and len(names) > len(train) / 10:
        raise SylinitError(
            f"--data {where}: {len(names):,} different whole numbers among {len(train):,} targets; "
            "if they are counts or measurements, say --task regression"
        )
    if single > len(names) / 2:
        raise SylinitError(
            f"--data {where}: {single} of {len(names)} classes have a single sample; expected at least 2 of each "
            "class. If the targets are counts or measurements, say --task regression; if they name the samples, choose "
            "another column with --label"
        )


def features(train: pd.DataFrame, test: pd.DataFrame | None, where: str) -> Features:
    """Columns as numbers: numbers as they are, bool as 0 and 1, text one column for each value.

    Columns that number or name the samples, dates, free text and empty columns are left out, with a note. The values
    that text may have are those of the training part.

    Args:
        train: the training part without its target.
        test: the test part; it must have the same columns.
        where: what messages call the data.

    Raises:
        SylinitError: missing values, columns that the parts do not share, or no usable column.
    """
    if test is not None and set(train.columns) - set(test.columns):
        lost = ", ".join(map(str, sorted(set(train.columns) - set(test.columns))))
        raise SylinitError(f"--data {where}: the test part lacks the columns {lost}")
    columns: list[list[np.ndarray]] = [[], []]
    names: list[str] = []
    notes: list[str] = []
    for name in train.columns:
        parts = [train[name]] if test is None else [train[name], test[name]]
        reason = _unusable(str(name), parts[0])
        if reason:
            notes.append(f"column {name!r} is left out: {reason}")
            continue
        if missing := sum(int(part.isna().sum()) for part in parts):
            raise SylinitError(
                f"--data {where}: column {name!r} has {missing} missing value{'s' * (missing > 1)}; fill "
                "them, or drop the rows or the column"
            )
        if pd.api.types.is_numeric_dtype(parts[0]):  # bool among them
            names.append(str(name))
            for place, part in enumerate(parts):
                columns[place].append(_numbers(part, str(name), where))
            continue
        values = sorted(parts[0].astype(str).unique())
        values = values[1:] if len(values) == 2 else values
        names += [f"{name}={value}" for value in values]
        for place, part in enumerate(parts):
            text = part.astype(str).to_numpy()
            columns[place] += [(text == value).astype(np.float32) for value in values]
    if not names:
        raise SylinitError(
            f"--data {where}: no usable column beside the target ({'; '.join(notes) or 'none is there'})"
        )
    stacked = [torch.from_numpy(np.stack(part, 1)) for part in columns if part]
    return Features(stacked[0], stacked[1] if test is not None else None, tuple(names), notes)


def _numbers(part: pd.Series, name: str, where: str) -> np.ndarray:
    try:
        return part.to_numpy().astype(np.float32)
    except (TypeError, ValueError) as error:
        raise SylinitError(
            f"--data {where}: column {name!r} holds numbers in one part and text in the other"
        ) from error


def _unusable(name: str, column: pd.Series) -> str:
    """Why a column tells nothing about new samples; empty if it may."""
    distinct = column.nunique()
    if column.isna().all():
        return "it is empty"
    if pd.api.types.is_bool_dtype(column):
        return ""
    if pd.api.types.is_numeric_dtype(column):
        whole = bool((column == column.round()).all()) if not pd.api.types.is_integer_dtype(column) else True
        called = name.lower() in ("id", "index", "key", "row") or name.lower().endswith(("_id", " id", "-id"))
        called = called or name.startswith("Unnamed:")
        counts_up = whole and distinct > 2 and bool((column.diff().dropna() == 1).all())
        if whole and distinct == len(column) > 2 and (called or counts_up):
            return "it numbers the samples"
        return ""
    if pd.api.types.is_datetime64_any_dtype(column):
        return "it holds dates; turn them into numbers that matter, such as the month"
    if isinstance(column.iloc[0], (list, tuple, dict, np.ndarray, bytes)):
        return f"it holds values of type {type(column.iloc[0]).__name__}"
    if distinct == len(column) and len(column) > 2:
        return "each of its values occurs once: a name, or free text"
    if distinct > MANY_CATEGORIES:
        return f"it is text of {distinct:,} different values; at most {MANY_CATEGORIES} are taken as categories"
    return ""

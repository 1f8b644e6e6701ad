"""Calibration batches from the data that a trainer is about to train on, without disturbing its own loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from sylinit.data.tasks import TASKS
from sylinit.errors import SylinitError
from sylinit.initialize import initialize_, initialize_head_
from sylinit.report import Report


def calibration_loader(
    dataset: Any,
    *,
    samples: int,
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    rank: int = 0,
    processes: int = 1,
) -> Iterable[Any]:
    """Batches of samples spread evenly over a data set, in its order, whatever the trainer's sampler does.

    Of a data set without a length the first samples are taken, in each process its own share.

    Args:
        dataset: what the trainer trains on.
        samples: at most so many in all processes.
        batch_size: of each batch.
        collate_fn: the trainer's own, which pads and stacks.
        rank: of this process.
        processes: how many there are.
    """
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        share = range(rank, samples, processes)
        chosen = [sample for number, sample in zip(range(samples), dataset, strict=False) if number in share]
        return DataLoader(chosen, batch_size, collate_fn=collate_fn)  # type: ignore[arg-type]
    count = min(samples, len(dataset))
    index = (torch.arange(count) * len(dataset)).div(count, rounding_mode="floor").tolist() if count else []
    return DataLoader(Subset(dataset, index[rank::processes]), batch_size, collate_fn=collate_fn)  # type: ignore[arg-type]


def run(model: nn.Module, batches: Iterable[Any], layers: Any, samples: int, options: dict[str, Any]) -> Report:
    """`initialize_head_` for ``layers="head"``, else `initialize_`.

    Args:
        model: the module itself, without wrappers.
        batches: calibration data.
        layers: which layers.
        samples: at most so many are read.
        options: further arguments of these functions.
    """
    if layers != "head":
        return initialize_(model, batches, layers=layers, samples=samples, **options)
    own = initialize_head_.__kwdefaults__ or {}
    return initialize_head_(model, batches, samples=samples, **{k: v for k, v in options.items() if k in own})


def check_options(options: dict[str, Any], where: str) -> None:
    """Refuse what would fail only when training begins.

    Raises:
        SylinitError: an argument that `initialize_` does not have.
    """
    known = initialize_.__kwdefaults__ or {}
    if unknown := sorted(options.keys() - known.keys()):
        names = ", ".join(map(repr, unknown))
        raise SylinitError(f"{where}: unexpected arguments {names}; known are {', '.join(known)}")
    if options.get("task", "auto") not in ("auto", *TASKS):
        raise SylinitError(f"{where}: task must be 'auto' or one of {', '.join(TASKS)}, got {options['task']!r}")

"""How long runs will take: counted from their sizes, corrected by the runs that have been made."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from sylinit.comparison.experiment import Experiment
from sylinit.comparison.store import Record

SIZES = {"cifar10": (50_000, 10_000, 1.0), "fashion-mnist": (60_000, 10_000, 0.77), "digits": (1_400, 360, 0.07)}
"""Training samples, test samples and pixels, as a share of 32x32."""

FORWARD = {"mlp": 2e-6, "cnn": 7e-4, "resnet20": 1.1e-3, "resnet56": 3e-3, "resnet110": 6e-3, "vit-tiny": 4e-3}
"""Seconds that the forward pass of one sample of 32x32 takes on one thread, to about a factor of two."""

OVERHEAD = 0.5
"""Seconds that a run takes beside training and measuring."""


def counted(experiment: Experiment) -> float:
    """Seconds by count: three forward passes a sample and epoch, and the evaluation data before and after."""
    if experiment.task == "time":
        return 10.0
    train, test, pixels = SIZES.get(Path(experiment.dataset).name, SIZES["cifar10"])
    samples = train if experiment.shots is None else 10 * experiment.shots
    measured = 2 * min(test, 2_000 if experiment.split == "validation" else test)
    return OVERHEAD + FORWARD.get(experiment.model, 1e-3) * pixels * (3 * samples * experiment.epochs + measured)


def forecast(missing: Iterable[Experiment], records: Iterable[Record]) -> float:
    """Seconds that `missing` will take one after the other.

    The count for each is multiplied by the median of what the recorded runs of its data set and network took, over
    what was counted for them; of all recorded runs if there is none of those.
    """
    ratios: dict[tuple[str, ...], list[float]] = {}
    for record in records:
        seconds = record.result.get("run_seconds") or record.result.get("total_seconds")
        if seconds:
            ratio = seconds / counted(record.experiment)
            for kind in (_kind(record.experiment), ()):
                ratios.setdefault(kind, []).append(ratio)
    factor = {kind: statistics.median(values) for kind, values in ratios.items()}
    otherwise = factor.get((), 1.0)
    return sum(factor.get(_kind(experiment), otherwise) * counted(experiment) for experiment in missing)


def _kind(experiment: Experiment) -> tuple[str, ...]:
    return experiment.task, Path(experiment.dataset).name, experiment.model

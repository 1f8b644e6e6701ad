"""What the experiments of the studies are run by."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from studies.finetune import prepare_finetune, run_finetune
from studies.precision import autocast, environment
from studies.timing import prepare_nothing, run_timing
from sylinit.comparison.experiment import Experiment
from sylinit.comparison.runner import Task, Tasks
from sylinit.comparison.runs import device, run_train
from sylinit.comparison.store import Store


def run_mixed(experiment: Experiment) -> dict[str, Any]:
    """Train and measure in the precision that the setting names, in float32 where it names none."""
    return run_train(experiment, partial(autocast, device(), experiment.get("precision") or "float32"))


TASKS: Tasks = {
    "train": Task(run_mixed),
    "finetune": Task(run_finetune, prepare_finetune),
    "time": Task(run_timing, prepare_nothing),
}
"""By the name that `Experiment.task` gives."""


def open_store(path: Path) -> Store:
    """The results of a study; new ones say how their processor computes in bfloat16."""
    return Store(path, environment)

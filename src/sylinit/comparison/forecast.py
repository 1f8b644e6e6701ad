"""How long a comparison will take: measured on a few steps before the first run, then on the runs that have ended."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from sylinit.comparison.data import Dataset
from sylinit.comparison.experiment import Experiment
from sylinit.comparison.plan import Plan, missing
from sylinit.comparison.runs import recipe, subset
from sylinit.comparison.store import Store
from sylinit.comparison.training import EVALUATE, correct, loss_of, prediction

STEPS = 3
"""Training steps that are timed, after one that is not."""

START_SECONDS = 5.0
"""Until the first run begins in a process of its own, most of it to import torch."""

OTHER_SECONDS = 0.5
"""Of a run, beside steps and measurements: drawing samples, building and initializing the network."""


@dataclass(frozen=True)
class Pace:
    """What a step and a measurement take.

    Attributes:
        step: seconds of a training step.
        sample: seconds of measuring one sample.
    """

    step: float
    sample: float

    def seconds(self, experiment: Experiment, data: Dataset) -> float:
        """What a run takes at this pace.

        Args:
            experiment: the run.
            data: what it draws its samples from.
        """
        part = subset(data, experiment)
        how = recipe(experiment, data.shape)
        steps = math.ceil(len(part.x) / how.size(len(part.x))) * how.epochs
        measured = 2 * len(part.test_x) + (how.points - 1) * min(1000, len(part.test_x))
        return OTHER_SECONDS + self.step * steps + self.sample * measured


def measure(experiment: Experiment, data: Dataset, make_model: Callable[[], nn.Module], threads: int) -> Pace:
    """Time a few steps of a run, and the measurement of a few samples, on a model of its own.

    Args:
        experiment: one of the runs.
        data: what it draws its samples from.
        make_model: makes the network.
        threads: that a run will have.
    """
    part, before = subset(data, experiment), torch.get_num_threads()
    how = recipe(experiment, data.shape)
    x, y = (each[: how.size(len(part.x))] for each in (part.x, part.y))
    with torch.random.fork_rng([part.x.device] if part.x.is_cuda else []):
        model = make_model().to(part.x.device)
        optimizer = how.make_optimizer([p for p in model.parameters() if p.requires_grad])

        def step() -> None:
            loss = loss_of(prediction(model(x)), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss.item()

        torch.set_num_threads(threads)
        try:
            model.train()
            step()
            per_step = _timed(step, STEPS)
            few = part.test_x[:EVALUATE], part.test_y[:EVALUATE]
            per_sample = _timed(lambda: correct(model, *few), 1) / len(few[0])
        finally:
            torch.set_num_threads(before)
    return Pace(per_step, per_sample)


def forecast(plan: Plan, store: Store, pace: Pace, data: Dataset, workers: int) -> float:
    """Seconds until a plan has been run.

    A run of a kind that has ended before takes the median of those; any other what `pace` says, times the median of
    what the ended ones took over what `pace` said of them.

    Args:
        plan: what is run.
        store: of the runs that have ended.
        pace: measured beforehand.
        data: of all runs.
        workers: runs at a time.
    """
    lacking = missing(plan, store)
    counted = {split: pace.seconds(_with(plan, split), data) for split in ("validation", plan.split)}
    known: dict[tuple[str, str], list[float]] = {}
    ratios: list[float] = []
    for record in store.records.values():
        e, seconds = record.experiment, record.result.get("run_seconds")
        if seconds and e.split in counted:
            known.setdefault((e.label, e.split), []).append(seconds)
            ratios.append(seconds / counted[e.split])
    factor = statistics.median(ratios) if ratios else 1.0
    each = [
        statistics.median(known[kind]) if (kind := (e.label, e.split)) in known else factor * counted[e.split]
        for e in lacking
    ]
    if not each:
        return 0.0
    start = START_SECONDS if workers > 1 and not ratios else 0.0
    return start + max(max(each), sum(each) / workers)


def _with(plan: Plan, split: str) -> Experiment:
    runs = plan.tuning() if split == "validation" and plan.grid else []
    return runs[0] if runs else plan.final({arm.method: arm.lr for arm in plan.arms})[0]


def _timed(work: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times

"""Run experiments: each by its task, several at once in processes, each result stored the moment it is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sylinit import SylinitError
from sylinit.comparison.experiment import Experiment
from sylinit.comparison.plan import Comparison, Plan, chosen_rates, missing, read
from sylinit.comparison.pool import Each, cores, one_by_one, pool
from sylinit.comparison.runs import data_of, run_train
from sylinit.comparison.store import Store

Progress = Callable[[int, int, str], None]
"""``(runs done, runs in all, what is going on)``."""

Report = Callable[[str], None]
"""Takes what is going on."""


def load_data(experiments: Sequence[Experiment], report: Report) -> None:
    """Read the data sets once, here: the workers would otherwise all decode them at the same moment."""
    for source, experiment in {e.dataset: e for e in experiments}.items():
        report(f"loading {source}")
        data_of(experiment)


@dataclass(frozen=True)
class Task:
    """How experiments of one kind are run.

    Attributes:
        run: runs one experiment and returns its result; a function of a module, so that other processes can import it.
        prepare: does once, in this process, what all of the experiments need.
    """

    run: Callable[[Experiment], dict[str, Any]]
    prepare: Callable[[Sequence[Experiment], Report], None] = load_data


Tasks = Mapping[str, Task]
"""Tasks by the name that `Experiment.task` gives."""

TASKS: Tasks = {"train": Task(run_train)}


def run(experiment: Experiment, tasks: Tasks = TASKS) -> dict[str, Any]:
    """Run one experiment in this process and return its result, with the seconds that all of it took."""
    began = time.perf_counter()
    result = tasks[experiment.task].run(experiment)
    return {**result, "run_seconds": time.perf_counter() - began}


def run_plan(
    plan: Plan,
    store: Store,
    progress: Progress | None = None,
    *,
    tasks: Tasks = TASKS,
    start_worker: Callable[[], None] | None = None,
) -> Comparison:
    """Tune each arm on held-back training data, then run it on every seed with the rate that was best.

    Runs that the store already holds are not run again. A run that fails does not stop the others.

    Args:
        plan: what to run.
        store: where results are, and go.
        progress: called with what is going on.
        tasks: what the experiments of the plan are run by.
        start_worker: called once in each worker process, before its first run.

    Raises:
        SylinitError: at the end, if runs failed.
    """

    def report(what: str) -> None:
        if progress:
            progress(len(plan) - len(missing(plan, store)), len(plan), what)

    with pool(plan.workers or cores(), start_worker) as each:
        failed = execute(plan.tuning(), store, tasks, each, report)
        failed |= execute(plan.final(chosen_rates(plan, store)), store, tasks, each, report)
    if failed:
        experiment, error = next(iter(failed.items()))
        raise SylinitError(
            f"{len(failed)} runs failed, the others are kept; the first was {experiment.label} ({experiment.model} on "
            f"{experiment.dataset}, learning rate {experiment.lr:g}, seed {experiment.seed}): "
            f"{type(error).__name__}: {error}"
        ) from error
    return read(plan, store)


def execute(
    experiments: Sequence[Experiment],
    store: Store,
    tasks: Tasks = TASKS,
    each: Each = one_by_one,
    report: Report = lambda what: None,
) -> dict[Experiment, Exception]:
    """Run what the store lacks and store each result the moment it is there.

    Args:
        experiments: what to run.
        store: where results go; Ctrl-C, crashes and kills lose the runs under way, not those that ended.
        tasks: what they are run by.
        each: runs them, from `pool`.
        report: called with what is going on, at the beginning and after each run.

    Returns:
        The runs that failed, and why.
    """
    lacking = [e for e in dict.fromkeys(experiments) if e not in store]
    failed: dict[Experiment, Exception] = {}
    if not lacking:
        return failed
    for name in dict.fromkeys(e.task for e in lacking):
        tasks[name].prepare([e for e in lacking if e.task == name], report)
    report("")
    for experiment, result in each(partial(run, tasks=tasks), lacking):
        if isinstance(result, Exception):
            failed[experiment] = result
        else:
            store.add(experiment, result)
        report(experiment.label)
    return failed

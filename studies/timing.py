"""What an initialization costs: seconds and memory against depth, width, samples and code."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from studies.allocator import return_freed_memory
from sylinit.comparison.experiment import Experiment
from sylinit.comparison.initializations import apply_initialization
from sylinit.comparison.models import mlp
from sylinit.comparison.runner import Report

REPEATS = 5


def run_timing(experiment: Experiment) -> dict[str, Any]:
    """Time an initialization, on one thread, on a fully connected network and random data.

    The setting names ``depth``, ``width`` and ``samples``. Seconds are those that the processor spent on it, which
    other programs on the machine do not lengthen; memory is measured apart, since watching it costs time.

    Returns:
        Median seconds of the initialization and of a plain forward pass, their ratio, and the extra memory of the
        initialization in bytes (None where the system does not tell).
    """
    depth, width, samples = (int(experiment.get(name)) for name in ("depth", "width", "samples"))
    generator = torch.Generator().manual_seed(experiment.seed)
    y = torch.arange(samples) % 10
    x = torch.randn(samples, width, generator=generator) + torch.randn(10, width, generator=generator)[y]
    model = mlp((width,), 10, [width] * (depth - 1))
    options = {**dict(experiment.options)}
    if experiment.initialization == "sylinit":
        options["samples"] = samples

    def forward() -> None:
        with torch.no_grad():
            for part in x.split(500):
                model(part)

    def initialize() -> None:
        apply_initialization(experiment.initialization, model, x, y, experiment.seed, options)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine blur a time tenfold
    try:
        extra = peak_memory(initialize)  # this first call also loads what is loaded once
        init = statistics.median(_seconds(initialize) for _ in range(REPEATS))
        plain = statistics.median(_seconds(forward) for _ in range(REPEATS))
    finally:
        torch.set_num_threads(threads)
    return {
        "init_seconds": init,
        "forward_seconds": plain,
        "forward_passes": init / plain,
        "extra_bytes": extra,
    }


def prepare_nothing(experiments: Sequence[Experiment], report: Report) -> None:
    """Each run makes its own data."""


def peak_memory(action: Callable[[], None]) -> int | None:
    """Run `action` and return by how many bytes the resident memory rose at its peak; None where it is not told."""
    return_freed_memory()
    start = _resident()
    peak, ended = start or 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, _resident() or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        action()
    finally:
        ended.set()
        watcher.join()
    return None if start is None else max(0, peak - start)


def _resident() -> int | None:
    """Resident bytes of this process, where ``/proc`` tells."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return None


def _seconds(action: Callable[[], Any]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began

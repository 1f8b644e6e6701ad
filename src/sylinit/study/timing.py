"""What a start costs: seconds and memory against depth, width, samples and code."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sylinit.study.experiment import Experiment
from sylinit.study.models import mlp
from sylinit.study.starts import apply_start

REPEATS = 3


def run_timing(experiment: Experiment) -> dict[str, Any]:
    """Time a start, on one thread, on a fully connected network and random data.

    The setting names ``depth``, ``width`` and ``samples``.

    Returns:
        Median seconds of the start and of a plain forward pass, their ratio, and the start's extra memory in bytes
        (None where the system does not tell).
    """
    depth, width, samples = (int(experiment.get(name)) for name in ("depth", "width", "samples"))
    generator = torch.Generator().manual_seed(experiment.seed)
    y = torch.arange(samples) % 10
    x = torch.randn(samples, width, generator=generator) + torch.randn(10, width, generator=generator)[y]
    model = mlp((width,), 10, [width] * (depth - 1))
    options = {**dict(experiment.options)}
    if experiment.start == "sylinit":
        options["samples"] = samples

    def forward() -> None:
        with torch.no_grad():
            for part in x.split(500):
                model(part)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine blur a time tenfold
    try:
        forward()
        init, extra = [], []
        for _ in range(REPEATS):
            seconds, peak = peak_memory(lambda: apply_start(experiment.start, model, x, y, experiment.seed, options))
            init.append(seconds)
            extra.append(peak)
        plain = [_seconds(forward) for _ in range(REPEATS)]
    finally:
        torch.set_num_threads(threads)
    known = [e for e in extra if e is not None]
    seconds = statistics.median(init)
    return {
        "init_seconds": seconds,
        "forward_seconds": statistics.median(plain),
        "forward_passes": seconds / statistics.median(plain),
        "extra_bytes": max(known) if known else None,
    }


def peak_memory(action: Callable[[], float]) -> tuple[float, int | None]:
    """Run `action` and return what it returned and by how many bytes the resident memory rose at its peak."""
    start = _resident()
    if start is None:
        return action(), None
    peak, ended = start, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, _resident() or 0)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        value = action()
    finally:
        ended.set()
        watcher.join()
    return value, peak - start


def _resident() -> int | None:
    """Resident bytes of this process, where ``/proc`` tells."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return None


def _seconds(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began

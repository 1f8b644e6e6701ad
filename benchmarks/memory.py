"""Peak extra memory of `initialize_` against the number of calibration images, with and without ``offload=``.

    python benchmarks/memory.py [--images 200 2000] [--repeats 5]

Each run is a process of its own, on ResNet-20 with batches of 100 images, joined to one or, with ``offload=``, apart.
Measured are the growth of the resident set at its peak (from the kernel), and the live activations: the most bytes that
the model's own operations held at once for all images. What remains is what the initialization itself needs. All runs
of one number of images must end with the same weights to rounding, offloaded or not. Linux only. A stopped run goes on
where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sylinit
from harness import Results, save_figure
from one_pass import images
from sylinit.comparison.models import build

BATCH = 100
MODEL = "resnet20"


class Live(TorchDispatchMode):
    """Counts the bytes that operations allocated and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        size = storage.nbytes()
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self._now -= size


def live_activations(count: int) -> int:
    """Bytes that one forward pass of all images holds at most: no layer is computed here."""
    model = build(MODEL, (3, 32, 32), 10).eval()
    x, _ = images(count, 32)
    with torch.no_grad(), Live() as live:
        model(x)
    return live.peak


def peak_growth(count: int, offload: bool | str) -> dict[str, Any]:
    """Growth of this process's resident set at its peak, in bytes, while `initialize_` runs."""
    torch.set_num_threads(1)
    x, y = images(count, 32)
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    torch.manual_seed(0)
    model = build(MODEL, (3, 32, 32), 10)
    with torch.no_grad():
        model.eval()(x[:BATCH])  # what is loaded and cached once
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _resident("VmRSS")
    report = sylinit.initialize_(model, batches, code="mixed", samples=count, offload=offload)
    grown = _resident("VmHWM") - before
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double()
    return {
        "grown": grown,
        "offloaded_peak": report.offloaded_peak,
        "offloaded_total": report.offloaded_total,
        "checksum": weights.abs().sum().item(),
    }


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def in_process(count: int, offload: bool | str) -> dict[str, Any]:
    """Run `peak_growth` in a fresh process whose allocator gives memory back at once."""
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--one", json.dumps([count, offload])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def draw(rows: dict[str, dict[str, Any]]) -> None:
    """Memory against images, live activations beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for offload, color, label in (
        (False, "#D55E00", "initialize_"),
        ("disk", "#0072B2", 'initialize_(offload="disk")'),
    ):
        found = sorted((row["images"], row["grown"]) for row in rows.values() if row["offload"] == offload)
        axes.plot([n for n, _ in found], [1e-6 * b for _, b in found], "-o", color=color, label=label)
    live = sorted({(row["images"], row["live"]) for row in rows.values()})
    axes.plot([n for n, _ in live], [1e-6 * b for _, b in live], "--", color="#555555", label="live activations alone")
    axes.set(
        xlabel=f"calibration images ({MODEL}, batches of {BATCH})", ylabel="peak extra memory (MB)", ylim=(0, None)
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, "memory")


def main() -> None:
    """Measure, print, write after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[200, 600, 2000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(peak_growth(*json.loads(given.one))))
        return
    results = Results("memory", model=MODEL, batch=BATCH)
    for count in given.images:
        live = live_activations(count)
        for offload in (False, "disk"):
            name = f"{count}-{'offload' if offload else 'plain'}"
            row = results.rows.get(name, {"images": count, "offload": offload, "live": live, "runs": []})
            while len(row["runs"]) < given.repeats:
                row["runs"].append(in_process(count, offload))
                row["grown"] = median(run["grown"] for run in row["runs"])
                row["beyond"] = row["grown"] - live
                results.save(name, row)
            said = f"{row['grown'] / 1e6:7.1f} MB, live activations {live / 1e6:7.1f} MB"
            print(f"{count:5} images {'offload' if offload else '':8} {said}", flush=True)
        plain, moved = (results.rows[f"{count}-{kind}"] for kind in ("plain", "offload"))
        sums = [run["checksum"] for row in (plain, moved) for run in row["runs"]]
        if max(sums) - min(sums) > 1e-5 * max(sums):
            raise SystemExit("offloading or a rerun changed the weights")
    few, many = (results.rows[f"{count}-plain"] for count in (given.images[0], given.images[-1]))
    more = many["beyond"] - few["beyond"]
    print(
        f"{given.images[-1] / given.images[0]:g} times the images: {more / 1e6:+.1f} MB beyond the live activations, "
        f"{100 * more / few['beyond']:+.0f} % of what the initialization itself needs (at most 10 %), "
        f"{100 * more / many['grown']:.1f} % of the peak"
    )
    draw(results.rows)


if __name__ == "__main__":
    main()

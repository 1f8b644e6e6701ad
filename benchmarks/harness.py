"""What the benchmarks share: timing, the machine's ceilings, and results that a rerun resumes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from sylinit.comparison.figures import save
from sylinit.comparison.statistics import paired
from sylinit.comparison.store import environment

RESULTS = Path(__file__).parent / "results"


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of one call, the device's work included."""
    _finish()
    started = time.perf_counter()
    action()
    _finish()
    return time.perf_counter() - started


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def before_and_after(results: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]] | None) -> str:
    """Cells of a table: accuracy (%) before and after training, each with how far `kept` is above it, draw by draw."""
    cells = ""
    for metric in ("before", "after"):
        these = [float(result[metric]) for result in results]
        gap = paired([float(result[metric]) for result in kept], these).percent(sign=True) if kept else ""
        cells += f"{100 * mean(these):8.1f}{gap:>14}"
    return cells


class Results:
    """A JSON file of rows by name, written after every measurement.

    Rows made with other code, another number of threads or on another device are dropped, since ratios hold within one
    setting only.

    Args:
        name: of the file in ``benchmarks/results``, without suffix.
        settings: what else the numbers depend on.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        self.path = RESULTS / f"{name}.json"
        made_with = environment()
        # The results are in the repository too: writing them must not count as another commit.
        made_with = {**made_with, "commit": (made_with["commit"] or "").removesuffix("-dirty")}
        self.setting = {"environment": made_with, "threads": torch.get_num_threads(), **settings}
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            before = json.loads(self.path.read_text(encoding="utf-8"))
            if {key: before.get(key) for key in self.setting} == self.setting:
                self.rows = before["rows"]

    def save(self, name: str, row: dict[str, Any]) -> None:
        """Keep one row."""
        self.rows[name] = row
        RESULTS.mkdir(exist_ok=True)
        body = {**self.setting, "rows": self.rows}
        whole = self.path.with_suffix(".part")
        whole.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        whole.replace(self.path)


def save_figure(figure: Any, name: str) -> None:
    """As PNG and SVG beside the numbers."""
    save(figure, RESULTS / name)


def ceilings(device: str, size: int = 2048) -> dict[str, float]:
    """What the machine can do at best: GFLOP/s of large matrix products, GB/s of copying."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        a = torch.randn(size, size, dtype=dtype, device=device)
        b = torch.empty_like(a)
        best = min(seconds(lambda a=a, b=b: torch.mm(a, a, out=b)) for _ in range(10))
        found[f"{dtype}_gflops".removeprefix("torch.")] = round(2e-9 * size**3 / best, 1)
    a = torch.zeros(1 << 25, device=device)
    b = torch.empty_like(a)
    found["copy_gbs"] = round(2e-9 * a.nbytes / median(seconds(lambda: b.copy_(a)) for _ in range(5)), 1)
    return found

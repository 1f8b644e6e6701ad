"""Where the time of one initialization goes, beside the fewest operations that each step needs.

    python benchmarks/where.py [--repeats 5] [--threads 2] [--case resnet18-224]

Steps are timed from the outside: by the functions that do them. Operations are counted from the shapes, one for a
multiplication and one for an addition; a floor is what they take at the machine's measured speed for large products.
Writes ``benchmarks/results/where.json``.
"""

from __future__ import annotations

import argparse
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

import sylinit
from harness import Results, ceilings, seconds
from one_pass import cases
from sylinit import initialize as engine
from sylinit.codes import CODES
from sylinit.config import Config
from sylinit.layers.convolution import ConvView
from sylinit.layers.registry import hypotheses
from sylinit.plan.sites import MatrixSite, NormalizationSite
from sylinit.solvers import exact, projected
from sylinit.solvers.projected import subspace_rank
from sylinit.statistics.patch_moments import share_for_all
from sylinit.statistics.rows import Rows

STEPS: dict[str, tuple[Any, str]] = {
    "trial run": (engine, "_trial"),
    "moments": (Rows, "covariance"),
    "subspace": (projected, "principal_subspace"),
    "equation": (projected, "solve_projected"),
    "exact solver": (exact, "fit_exact"),
    "writing": (MatrixSite, "_write"),
    "normalizations": (NormalizationSite, "sums"),
    "layers in all": (engine._Pass, "_compute"),
}


@contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Add up the wall time of each step inside."""
    saved = {step: getattr(owner, name) for step, (owner, name) in STEPS.items()}

    def wrapped(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            found: list[Any] = []
            spent[step] += seconds(lambda: found.append(function(*args, **kwargs)))
            return found[0]

        return run

    for step, (owner, name) in STEPS.items():
        setattr(owner, name, wrapped(step, saved[step]))
    try:
        yield
    finally:
        for step, (owner, name) in STEPS.items():
            setattr(owner, name, saved[step])


def operations(model: torch.nn.Module, report: sylinit.Report) -> dict[str, float]:
    """The fewest float32 operations of the projected layers, by step.

    Moments: half of ``2 n d^2`` for sampled rows; for all patches at stride 1, one product for each distinct offset.
    Subspace: two products with the covariance. Equation: a Cholesky factor, its two solves, and the residual.
    """
    count: dict[str, float] = defaultdict(float)
    config = Config()
    for record in report.initialized:
        if record.solver != "projected":
            continue
        groups, units, dim = record.shape
        (view,) = hypotheses(model.get_submodule(record.name), record.name)[0]
        sampled = record.rows == max(config.min_rows, config.rows_per_input * dim)
        share = 1.0
        if isinstance(view, ConvView) and set(view.module.stride) == {1} and not sampled:
            share = share_for_all(view)  # all patches are read, not a sample of them
        code = CODES[record.code].with_label_share(config, normalized=False)
        components = code.leading_components(units)
        assert components is not None
        rank = subspace_rank(components)
        count["moments"] += groups * record.rows * dim**2 * share
        count["subspace"] += groups * 2 * 2 * dim**2 * rank
        count["equation"] += groups * (dim**3 / 3 + 4 * dim**2 * components)
    return dict(count)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", default="resnet18-224", choices=cases())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.backends.mha.set_fastpath_enabled(False)
    results, before = Results("where"), ceilings("cpu")
    model, batches = cases()[given.case]()
    report = sylinit.initialize_(model, batches, code="mixed")
    needed = operations(model, report)

    @torch.no_grad()
    def forward() -> None:
        model.eval()
        for x, _ in batches:
            model(x)

    runs: dict[str, list[float]] = defaultdict(list)
    for _ in range(given.repeats):
        runs["forward"].append(seconds(forward))
        spent: dict[str, float] = defaultdict(float)
        with timed(spent):
            runs["initialise"].append(seconds(lambda: sylinit.initialize_(model, batches, code="mixed")))
        for step in STEPS:
            runs[step].append(spent[step])
    speed = {name: max(each, before[name]) for name, each in ceilings("cpu").items()}
    floors = {step: 1e-9 * count / speed["float32_gflops"] for step, count in needed.items()}
    row = {
        "seconds": {step: median(each) for step, each in runs.items()},
        "gflop": {step: 1e-9 * count for step, count in needed.items()},
        "floor_seconds": floors,
        "ratio": median(b / a for a, b in zip(runs["forward"], runs["initialise"], strict=True)),
        "ratio_floor": 1 + sum(floors.values()) / median(runs["forward"]),
        "ceilings": speed,
        "runs": dict(runs),
    }
    results.save(given.case, row)
    for step, taken in row["seconds"].items():
        floor = f"   floor {floors[step]:6.2f} s for {1e-9 * needed[step]:6.0f} GFLOP" if step in floors else ""
        print(f"{step:18} {taken:7.2f} s{floor}")
    print(f"{row['ratio']:.2f} forward passes; with all steps at their floors {row['ratio_floor']:.2f}")


if __name__ == "__main__":
    main()

"""The Sylvester solver: exact against SciPy, projected against exact, and what projecting costs in accuracy.

    python benchmarks/solver.py DIRECTORY [--repeats 5] [--scipy-repeats 5] [--seeds 3] [--fresh]

DIRECTORY holds CIFAR-10 as Parquet files (or is a hub id). Every answer is checked before it is timed; the two sides
alternate within one process; medians are reported. SciPy takes about 20 s for its larger case and is repeated less
often there. Writes ``benchmarks/results/solver.json`` after each case, and ``solver.png`` and ``.svg``; a rerun keeps
the cases that are there, unless ``--fresh``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import scipy
import scipy.linalg
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import sylinit
from sylinit.codes import mixed
from sylinit.comparison.data import few_shot, load
from sylinit.comparison.figures import OTHERS, OURS, save
from sylinit.comparison.store import environment
from sylinit.comparison.training import accuracy
from sylinit.config import Config
from sylinit.layers.registry import hypotheses
from sylinit.solvers.exact import fit_exact
from sylinit.solvers.fit import Fit
from sylinit.solvers.problem import Problem
from sylinit.solvers.projected import fit_projected
from sylinit.statistics.moments import Covariance, Moments

RESULTS = Path(__file__).parent / "results"
SHOTS = 50
TEST_IMAGES = 5000
SYSTEMS = {"scipy-256x1152": (256, 1152), "scipy-512x2304": (512, 2304)}
LAYERS = {"layer-512x2304": "deep.0", "layer-512x4608": "deep.3"}
TARGETS = {"scipy-256x1152": 7, "scipy-512x2304": 15, "layer-512x2304": 4, "layer-512x4608": 6}
"""How many times faster each case has to be."""


class WideCNN(nn.Module):
    """Four 3x3 convolutions with BatchNorm to 512 channels of 4x4; the last two have the shapes of ResNet-18's last."""

    def __init__(self) -> None:
        super().__init__()

        def stage(channels: int, width: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(width), nn.ReLU()]

        self.stem = nn.Sequential(*stage(3, 64, 1), nn.MaxPool2d(2), *stage(64, 256, 2))
        self.deep = nn.Sequential(*stage(256, 512, 2), *stage(512, 512, 1))
        self.head = nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images of 32x32 to logits."""
        return self.head(self.deep(self.stem(x)).mean((2, 3)))


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def compared(case: str, slow: list[float], fast: list[float], **more: Any) -> dict[str, Any]:
    """The row of a case: what takes long, what takes less, and how many times."""
    return {
        "case": case,
        "slow_seconds": median(slow),
        "fast_seconds": median(fast),
        "times_faster": median(slow) / median(fast),
        "target": TARGETS[case],
        "slow": slow,
        "fast": fast,
        **more,
    }


def against_scipy(case: str, repeats: int, scipy_repeats: int) -> dict[str, Any]:
    """`solve_sylvester` and SciPy's, on covariances whose variances fall like one over their rank."""
    units, dim = SYSTEMS[case]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def covariance(size: int) -> Tensor:
        axes = torch.linalg.qr(random(size, size))[0]
        return (axes / torch.arange(1, size + 1)) @ axes.T

    a, b, c = covariance(units), covariance(dim), random(units, dim)
    system = (a.numpy(), b.numpy(), c.numpy())

    def residual(w: Tensor) -> float:
        return float((a @ w + w @ b - c).norm() / c.norm())

    ours, theirs, fast, slow = 0.0, 0.0, [], []
    for repeat in range(repeats):
        if repeat < scipy_repeats:
            started = time.perf_counter()
            theirs_w = scipy.linalg.solve_sylvester(*system)
            slow.append(time.perf_counter() - started)
            theirs = residual(torch.from_numpy(theirs_w))
        solution = sylinit.solve_sylvester(a, b, c)
        ours = residual(solution.weight)
        if ours > max(theirs, 1e-12):
            raise SystemExit(f"{case}: residual {ours:.1e}, SciPy's {theirs:.1e}; not timed")
        fast.append(seconds(lambda: sylinit.solve_sylvester(a, b, c)))
    return compared(case, slow, fast, residual=ours, scipy_residual=theirs)


def calibration(data: Any, seed: int) -> tuple[Tensor, Tensor]:
    """The few labeled images of a seed."""
    chosen = few_shot(data.train_y, SHOTS, seed)
    return data.train_x[chosen], data.train_y[chosen]


def initialized(data: Any, seed: int, solver: str) -> tuple[WideCNN, sylinit.Report]:
    """A network from the few images of a seed."""
    torch.manual_seed(seed)
    model = WideCNN()
    generator = torch.Generator().manual_seed(seed)
    return model, sylinit.initialize_(
        model, [calibration(data, seed)], code="mixed", generator=generator, config=Config(solver=solver)
    )


@torch.no_grad()
def system_of(model: nn.Module, layer: str, x: Tensor, y: Tensor) -> Covariance:
    """The second moments of all rows of input of a layer, with the one-hot class of their image."""
    module, seen = model.get_submodule(layer), []
    hook = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.eval()(x)
    hook.remove()
    view = hypotheses(module, layer)[0][0]
    rows = view.rows(seen[0], None)
    targets = nn.functional.one_hot(y).double().repeat_interleave(rows.shape[1] // len(x), 0)
    return Moments.zeros(1, view.dim, targets.shape[1]).update(rows, targets).covariance()


def projected(case: str, data: Any, repeats: int) -> dict[str, Any]:
    """Both solvers from a real layer's moments to its weight: axes, code, equation, and the check of the answer."""
    model, _ = initialized(data, 0, "auto")
    x, y = calibration(data, 0)
    cov = system_of(model, LAYERS[case], x, y)
    units = model.get_submodule(LAYERS[case]).out_channels
    config = Config()
    problem = Problem(case, mixed(config.label_share), units, 1)
    single = replace(cov, xx=cov.xx.float())  # as each solver is given it
    approximate, solve_exactly = (
        partial(fit_projected, single, problem, config),
        partial(fit_exact, cov, problem, config),
    )
    found, exact = approximate(), solve_exactly()
    if not isinstance(found, Fit) or not isinstance(exact, Fit):
        raise SystemExit(f"{case}: declined; not timed")
    for error in ("encoding_error", "decoding_error"):
        if abs(float(getattr(found, error) - getattr(exact, error))) > 0.02:
            raise SystemExit(f"{case}: the {error} of the two answers differs; not timed")
    slow, fast = [], []
    for _ in range(repeats):
        fast.append(seconds(approximate))
        slow.append(seconds(solve_exactly))
    errors = {
        f"{solver}_{error}": float(getattr(answer, error))
        for solver, answer in (("projected", found), ("exact", exact))
        for error in ("residual", "encoding_error", "decoding_error")
    }
    return compared(case, slow, fast, **errors)


def accuracies(data: Any, seeds: int) -> dict[str, Any]:
    """Accuracy in percent before training, of the same network from the same images by either solver."""
    x, y = data.test_x[:TEST_IMAGES], data.test_y[:TEST_IMAGES]
    found: dict[str, list[float]] = {"auto": [], "exact": []}
    routes: dict[str, str] = {}
    for seed in range(seeds):
        for solver, values in found.items():
            model, report = initialized(data, seed, solver)
            values.append(100 * accuracy(model, x, y))
            if solver == "auto":
                routes = {layer.name: layer.solver for layer in report.initialized}
    difference = [a - b for a, b in zip(found["auto"], found["exact"], strict=True)]
    return {
        "case": "accuracy",
        "test_images": len(y),
        "routes": routes,
        **found,
        "difference": sum(difference) / seeds,
        "target": 0.5,
    }


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Seconds of both sides of each case, and accuracy by either solver."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    times, before = figure.subplots(1, 2, width_ratios=[2, 1])
    timed = [row for row in rows if row["case"] in TARGETS]
    names = []
    for place, row in enumerate(timed):
        kind, size = row["case"].split("-")
        names.append(f"{'exact, SciPy' if kind == 'scipy' else 'projected, exact'}\n{size.replace('x', ' x ')}")
        times.plot([row["fast_seconds"], row["slow_seconds"]], [place, place], color="#BBBBBB", zorder=1)
        times.plot(row["fast_seconds"], place, "o", color=OURS[0])
        times.plot(row["slow_seconds"], place, "s", color=OTHERS[0])
        middle = (row["fast_seconds"] * row["slow_seconds"]) ** 0.5
        times.annotate(
            f"{row['times_faster']:.1f} times", (middle, place), xytext=(0, 4), textcoords="offset points", ha="center"
        )
    times.set_yticks(range(len(timed)), names)
    times.set(xscale="log", xlabel="seconds (dot: first named, square: second)", ylim=(len(timed) - 0.4, -0.6))
    for row in rows:
        if row["case"] == "accuracy":
            for seed, pair in enumerate(zip(row["exact"], row["auto"], strict=True)):
                before.plot([0, 1], pair, "o-", color=OTHERS[seed % len(OTHERS)])
            before.set_xticks([0, 1], ["exact", "projected"])
            before.set(xlim=(-0.4, 1.4), ylim=(0, 1.1 * max(row["exact"] + row["auto"])))
            before.set_ylabel("accuracy before training (%)")
            before.set_title("one line a seed", fontsize=10)
    for axes in (times, before):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    return figure


def main() -> None:
    """Measure, print, write after every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scipy-repeats", type=int, default=5, help="of SciPy at 512 x 2304")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    given = parser.parse_args()
    data = load(given.data)
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "scipy-256x1152": lambda: against_scipy("scipy-256x1152", given.repeats, given.repeats),
        "scipy-512x2304": lambda: against_scipy("scipy-512x2304", given.repeats, given.scipy_repeats),
        **{case: partial(projected, case, data, given.repeats) for case in LAYERS},
        "accuracy": lambda: accuracies(data, given.seeds),
    }
    path = RESULTS / "solver.json"
    known = json.loads(path.read_text())["rows"] if path.is_file() and not given.fresh else []
    rows = {row["case"]: row for row in known}
    for case, measure in cases.items():
        if case not in rows:
            about = {**environment(), "scipy": scipy.__version__, "threads": torch.get_num_threads()}
            rows[case] = {**measure(), "environment": about}
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps({"rows": list(rows.values())}, indent=1) + "\n", encoding="utf-8")
        row = rows[case]
        if case == "accuracy":
            print(f"{case:16} projected minus exact: {row['difference']:+.2f} points (target: within {row['target']})")
        else:
            print(
                f"{case:16} {row['slow_seconds']:7.2f} s -> {row['fast_seconds']:6.2f} s: {row['times_faster']:5.1f} "
                f"times faster (target: {row['target']})",
                flush=True,
            )
    save(draw(list(rows.values())), RESULTS / "solver")


if __name__ == "__main__":
    main()

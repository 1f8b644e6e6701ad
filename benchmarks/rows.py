"""What reading some rows instead of all costs in accuracy: CIFAR-10, 50 images a class, no training step.

    python benchmarks/rows.py DIRECTORY [--seeds 5] [--rows 1024 4096 default all] [--test 10000]

DIRECTORY holds CIFAR-10 as Parquet files (or is a hub id). The arms of a seed share images, network and test set, so
their differences are paired. A stopped run goes on where it was. Writes ``benchmarks/results/rows.json`` and a figure.
"""

from __future__ import annotations

import argparse
import math
from statistics import mean
from typing import Any

import torch

import sylinit
from harness import Results, save_figure, seconds
from sylinit.comparison.data import few_shot, load
from sylinit.comparison.models import build
from sylinit.comparison.statistics import interval
from sylinit.comparison.training import accuracy

MODELS = ("cnn", "resnet20")
SHOTS = 50


def one(data: Any, model: str, rows: str, seed: int, test: int) -> dict[str, Any]:
    """Accuracy in percent of one network and what its initialization took; every solve is checked."""
    chosen = few_shot(data.train_y, SHOTS, seed)
    batch = (data.train_x[chosen], data.train_y[chosen])
    torch.manual_seed(seed)
    network = build(model, data.shape, data.classes)
    budget: Any = {"default": None, "all": "all"}.get(rows) if rows in ("default", "all") else int(rows)
    generator = torch.Generator().manual_seed(seed)
    found: list[sylinit.Report] = []
    config = sylinit.Config(rows=budget)
    taken = seconds(
        lambda: found.append(sylinit.initialize_(network, [batch], code="mixed", config=config, generator=generator))
    )
    worst = max(layer.residual or 0.0 for layer in found[0].initialized)
    if not worst <= 1e-3:
        raise SystemExit(f"{model}, rows={rows}: a residual of {worst:.1e}")
    return {
        "accuracy": 100 * accuracy(network, data.test_x[:test], data.test_y[:test]),
        "seconds": taken,
        "rows_read": sum(layer.rows for layer in found[0].initialized),
    }


def draw(rows: dict[str, dict[str, Any]], arms: list[str]) -> None:
    """Accuracy by budget, one line a network, bars for 95 % intervals of the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for model, color in zip(MODELS, ("#D55E00", "#0072B2"), strict=True):
        found = [interval([run["accuracy"] for run in rows[f"{model}-{arm}"]["runs"]]) for arm in arms]
        low, high = ([getattr(each, side) for each in found] for side in ("low", "high"))
        means = [each.mean for each in found]
        errors = [[m - e for m, e in zip(means, low, strict=True)], [e - m for m, e in zip(means, high, strict=True)]]
        axes.errorbar(range(len(arms)), means, errors, fmt="-o", color=color, capsize=3, label=model)
    axes.set(xlabel="rows read per layer", ylabel="accuracy before training (%)")
    axes.set_xticks(range(len(arms)), arms)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save_figure(figure, "rows")


def main() -> None:
    """Measure, print, write after every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", default=["1024", "default", "all"])
    parser.add_argument("--test", type=int, default=10_000)
    given = parser.parse_args()
    data = load(given.data)
    results = Results("rows", shots=SHOTS, test_images=given.test)
    for model in MODELS:
        for arm in given.rows:
            name = f"{model}-{arm}"
            row = results.rows.get(name, {"model": model, "rows": arm, "runs": []})
            while len(row["runs"]) < given.seeds:
                row["runs"].append(one(data, model, arm, len(row["runs"]), given.test))
                row["accuracy"] = mean(run["accuracy"] for run in row["runs"])
                results.save(name, row)
            print(f"{model:10} rows {arm:8} {row['accuracy']:6.2f} %", flush=True)
        if {"default", "all"} <= set(given.rows):
            some, every = (results.rows[f"{model}-{arm}"]["runs"] for arm in ("default", "all"))
            gaps = [a["accuracy"] - b["accuracy"] for a, b in zip(some, every, strict=True)]
            found = interval(gaps) if len(gaps) > 1 else None
            width = (found.high - found.low) / 2 if found else math.nan
            print(f"{model:10} default - all: {mean(gaps):+.2f} +- {width:.2f} points (within 0.5)", flush=True)
    draw(results.rows, given.rows)


if __name__ == "__main__":
    main()

"""Accuracy without a training step: sylinit and random starts on CIFAR-10, mean of several seeds on the full test set.

    python benchmarks/zero_steps.py DIRECTORY            # the table of the README
    python benchmarks/zero_steps.py DIRECTORY --tune     # on held-back training data, over encoding_weight and share

DIRECTORY holds CIFAR-10 as Parquet files (or is a hub id). Writes ``benchmarks/results/zero_steps[_tune].json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import sylinit
from sylinit.study.data import few_shot, held_back, load
from sylinit.study.models import build
from sylinit.study.starts import apply_start
from sylinit.study.statistics import interval
from sylinit.study.store import environment
from sylinit.study.train import accuracy

RESULTS = Path(__file__).parent / "results"
MODELS = ("cnn", "resnet20")


def one(data: Any, model: str, shots: int, seed: int, *, tune: bool, start: str = "", **options: Any) -> float:
    """Accuracy in percent of one network, on the test set or on 5,000 held-back training images."""
    chosen = few_shot(data.train_y, shots, seed + (1000 if tune else 0))
    x, y = data.train_x[chosen], data.train_y[chosen]
    torch.manual_seed(seed)
    network = build(model, data.shape, data.classes)
    if start:
        apply_start(start, network, x, y, seed)
    else:
        sylinit.initialize_(network, [(x, y)], generator=torch.Generator().manual_seed(seed), **options)
    if tune:
        other = held_back(data.train_y, chosen, 5000, seed)
        return 100 * accuracy(network, data.train_x[other], data.train_y[other])
    return 100 * accuracy(network, data.test_x, data.test_y)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", type=int, nargs="+", default=[50])
    given = parser.parse_args()
    data = load(given.data)
    arms: dict[str, dict[str, Any]] = {
        "sylinit": {},
        "he-normal": {"start": "he-normal"},
        "xavier-normal": {"start": "xavier-normal"},
    }
    if given.tune:
        arms = {f"encoding_weight {value:g}": {"encoding_weight": value} for value in (0.3, 1.0, 2.0, 4.0, 8.0, 16.0)}
        arms |= {f"label share {value:g}": {"code": sylinit.mixed(value)} for value in (0.0, 0.125, 0.5, 0.75, 1.0)}
    table = []
    for shots in given.shots:
        for name, options in arms.items():
            for model in MODELS:
                values = [one(data, model, shots, seed, tune=given.tune, **options) for seed in range(given.seeds)]
                found = interval(values)
                table.append({"arm": name, "model": model, "shots": shots, "accuracy": values, "mean": found.mean})
                print(
                    f"{name:24} {model:10} {shots:4} a class: {found.mean:5.2f} %  {[round(v, 1) for v in values]}",
                    flush=True,
                )
    body = {
        "environment": environment(),
        "seeds": given.seeds,
        "split": "held-back" if given.tune else "test",
        "rows": table,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"zero_steps{'_tune' if given.tune else ''}.json"
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    main()

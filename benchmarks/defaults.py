"""The library's defaults and their neighbors, judged before and after training on held-back images of CIFAR-10.

    python benchmarks/defaults.py DIRECTORY [--seeds 6] [--models cnn resnet20] [--shots 50] [--epochs E]

The scale of logits, weight and offset of normalization layers, length of the filters before them, lambda, the share of
label units and how many samples are few. DIRECTORY holds CIFAR-10 as Parquet files (or is a hub id). 50 images a class,
or on ResNet-20 100, 200 or 500; SGD in mixed precision, as many epochs as in the study; one run a setting and seed; no
run sees the test set. Appends to ``benchmarks/results/defaults.jsonl``, goes on from there when run again, and prints
the table.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import before_and_after
from studies.allocator import keep_freed_memory
from studies.precision import environment
from studies.presets import MIXED, epochs_for
from studies.tasks import TASKS
from sylinit import Config
from sylinit.comparison.experiment import Experiment
from sylinit.comparison.plan import TUNING_SEED
from sylinit.comparison.pool import cores, pool
from sylinit.comparison.runner import load_data
from sylinit.comparison.runner import run as run_experiment

RESULTS = Path(__file__).parent / "results" / "defaults.jsonl"

HELD = {"few_samples": 10**9}
"""Normalizations, and what feeds them, start as they do where samples are few, whatever their number."""

FREE = {"few_samples": 0}
"""They never do."""

SETTINGS: dict[tuple[str, int], list[dict[str, Any]]] = {
    ("resnet20", 50): [
        {},
        {"norm_offset": 0.0},
        {"norm_scale": 1.0},
        {"logit_deviation": 1.0},
        {"encoding_weight": 1.0},
        {"label_share": 0.0},
        {"label_share": 0.125},
        FREE,
        {**FREE, "label_share": 0.25},
    ],
    ("resnet20", 100): [{}, FREE, {**FREE, "label_share": 0.25}, {"start": "pca-whitening"}],
    ("resnet20", 200): [{}, FREE, {"start": "pca-whitening"}],
    ("resnet20", 500): [
        {},
        HELD,
        {"start": "pca-whitening"},
        {"label_share": 0.25},
        {"label_share": 0.0625},
        {**HELD, "norm_scale": 1.0, "filter_length": None},
        {**HELD, "norm_scale": 1.0, "norm_offset": 0.0, "filter_length": 0.7},
        {**HELD, "norm_offset": 0.0, "filter_length": None, "label_share": 0.125},
        {**HELD, "norm_scale": 1.0, "norm_offset": 0.0, "label_share": 0.125},
    ],
    ("cnn", 50): [
        {},
        {"label_share": 0.0},
        {"label_share": 0.0625},
        {"label_share": 0.25},
        {"logit_deviation": 0.2},
        {"logit_deviation": 1.0},
        {"encoding_weight": 1.0},
    ],
}
"""What differs from the defaults."""

RATES = {"resnet20": 0.1, "cnn": 0.01}


@dataclass(frozen=True)
class Run:
    """One training: what differs from the library's defaults, and the experiment."""

    values: tuple[tuple[str, Any], ...]
    experiment: Experiment

    @property
    def key(self) -> str:
        """Differs between runs that differ."""
        return json.dumps([self.values, self.experiment.to_dict()], sort_keys=True)


def settings(model: str, shots: int, epochs: int | None) -> list[dict[str, Any]]:
    """What to change: with a schedule that is not the study's, only whether the samples count as few."""
    if epochs is None:
        return SETTINGS.get((model, shots), [])
    return [{}, FREE if 10 * shots < Config().few_samples else HELD]


def make_run(data: str, model: str, shots: int, epochs: int, seed: int, values: dict[str, Any]) -> Run:
    """A change, trained on one draw."""
    share = values.get("label_share")
    experiment = Experiment(
        data, model, values.get("start", "sylinit"), shots, () if share is None else (("code", f"mixed:{share:g}"),),
        lr=RATES[model], epochs=epochs, seed=seed, split="validation", setting=MIXED,
    )  # fmt: skip
    return Run(tuple(values.items()), experiment)


def work(run: Run) -> dict[str, object]:
    """Train with the constants of the method set to those of the run."""
    experiment, values = run.experiment, dict(run.values)
    values.pop("label_share", None)  # is in the code's name, in every layer alike
    if values.pop("start", "sylinit") == "sylinit":
        code = () if any(name == "code" for name, _ in experiment.options) else (("code", "mixed"),)
        experiment = replace(experiment, options=(*experiment.options, *code, ("config", Config(**values))))
    return run_experiment(experiment, TASKS)


def main() -> None:
    """Run what is missing; print means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--models", nargs="*", default=[*RATES], choices=RATES)
    parser.add_argument("--shots", type=int, default=50)
    parser.add_argument(
        "--epochs", type=int, help="by default as many as in the study; with another number only few_samples changes"
    )
    given = parser.parse_args()
    done: dict[str, dict[str, object]] = {}
    if RESULTS.exists():
        done = {row["key"]: row["result"] for row in map(json.loads, RESULTS.read_text().splitlines())}
    runs = [
        make_run(given.data, model, given.shots, given.epochs or epochs_for(given.shots), TUNING_SEED + seed, values)
        for seed in range(given.seeds)
        for model in given.models
        for values in settings(model, given.shots, given.epochs)
    ]
    load_data([run.experiment for run in runs], lambda what: None)
    with pool(cores(), keep_freed_memory) as each, RESULTS.open("a") as file:
        for run, result in each(work, [run for run in runs if run.key not in done]):
            if isinstance(result, BaseException):
                raise result
            done[run.key] = result
            file.write(json.dumps({"key": run.key, "result": result, "environment": environment()}) + "\n")
            file.flush()
    table = defaultdict(list)
    for run in runs:
        table[run.experiment.model, run.experiment.lr, run.values].append(done[run.key])
    print("accuracy (%); gap: the defaults less each change, paired by draw, with 95 % intervals")
    print(f"{'network':10}{'rate':>6}  {'changed':64}{'before':>8}{'gap':>14}{'after':>8}{'gap':>14}")
    for (model, lr, values), results in table.items():
        changed = ", ".join(f"{name} {value}" for name, value in values) or "nothing"
        kept = table[model, lr, ()] if values else None
        print(f"{model:10}{lr:>6}  {changed:64}{before_and_after(results, kept)}")


if __name__ == "__main__":
    main()

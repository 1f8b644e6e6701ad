"""What ``code="auto"`` chooses on the suite, beside what the choice would best have been.

    python benchmarks/choosing.py measure --data DIR      # the held-out scores, task by task, without training
    python benchmarks/choosing.py report                  # beside validation values: results/suite_*.jsonl

`measure` initializes each network of the suite by ``code="auto"`` on the train subset of a seed, and stores the recipe
taken, the held-out scores and the seconds, beside those of one recipe. Nothing of the validation or test data is read.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sylinit
from studies.suite.data import directory_of, parts
from studies.suite.methods import is_trained
from studies.suite.networks import NETWORKS
from studies.suite.tasks import Task, matching

RESULTS = Path(__file__).parent / "results"

SCORE = re.compile(r"([a-z-]+) (-?[0-9.]+|-inf)(?: \(([+-][0-9.]+) ± ([0-9.]+)\))?(?:,|$)")
"""A recipe's name, its score, and the difference to the own body with its standard error, in a note."""


def chosen(task: Task, seed: int, code: str, directory: Path | None) -> dict[str, Any]:
    """Initialize a network, and read what was chosen off the report."""
    data = parts(task.data, task.size, seed, directory, test=False)
    torch.manual_seed(seed)
    model = NETWORKS[task.network](data.shape, data.outputs)
    layers = None if all(parameter.requires_grad for parameter in model.parameters()) else is_trained
    began = time.perf_counter()
    report = sylinit.initialize_(
        model, [(data.train.x, data.train.y)], code=code, layers=layers, generator=torch.Generator().manual_seed(seed)
    )
    record: dict[str, Any] = {"task": task.name, "seed": seed, "code": code, "seconds": time.perf_counter() - began}
    note = next((note for note in report.notes if note.startswith("code='auto' took")), "")
    if note:
        record["taken"] = note.split("'")[3]
        found = SCORE.findall(note.rpartition(": ")[2])
        record["scores"] = {name: float(score) for name, score, *_ in found}
        record["over_own"] = {name: [float(mean), float(error)] for name, _, mean, error in found if mean}
        record["samples"] = int(re.findall(r"of (\d+) held-out", note)[0])
    return record


def measure(args: argparse.Namespace) -> None:
    """Store what the file lacks."""
    torch.set_num_threads(1)
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = {(r["task"], r["seed"], r["code"]) for r in map(json.loads, lines)}
    for task in matching(args.tasks):
        for seed in args.seeds:
            for code in args.codes:
                if (task.name, seed, code) not in done:
                    record = chosen(task, seed, code, directory_of(args.data))
                    with args.out.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                    print(task.name, seed, code, record.get("taken", ""), f"{record['seconds']:.2f} s", flush=True)


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--tasks", nargs="*", default=["*"])
    measuring.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    measuring.add_argument("--codes", nargs="*", default=["auto", "mixed"])
    measuring.add_argument("--data", type=Path)
    measuring.add_argument("--out", type=Path, default=RESULTS / "choosing.jsonl")
    measuring.set_defaults(run=measure)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

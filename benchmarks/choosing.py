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
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sylinit
from studies.suite.data import directory_of, parts
from studies.suite.methods import RANDOM, is_trained
from studies.suite.networks import NETWORKS
from studies.suite.run import TUNING_SEED
from studies.suite.tasks import Task, matching
from sylinit.plan.recipes import RECIPES

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


# ---------------------------------------------------------------------------------------------------------------------
# Report


LAYER_NORM = ("vit", "mixer", "convnext", "residual-mlp")
"""The networks of the suite that normalize by LayerNorm."""

RULES: dict[str, Callable[[str], str]] = {
    "own": lambda task: "own",
    "mixed": lambda task: "mixed",
    "half": lambda task: "half",
    "first": lambda task: "first",
    "half; own with LayerNorm": lambda task: "own" if task.rpartition("/")[2] in LAYER_NORM else "half",
    "half; first with LayerNorm": lambda task: "first" if task.rpartition("/")[2] in LAYER_NORM else "half",
}
"""What would be taken without a choice, by task."""

Values = dict[tuple[str, int], dict[str, float]]
"""By task and seed, the value of each recipe."""


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def recipe_of(method: str, deviation: float | None) -> str | None:
    """The recipe that a method of the suite runs, with that deviation of the logits; None for others."""
    first, _, rest = method.removeprefix("code=").partition(";")
    same = rest == ("" if deviation is None else f"config.logit_deviation={deviation:g}")
    return first if method.startswith("code=") and same and first in RECIPES else None


def values_of(records: Iterable[dict[str, Any]], point: int, deviation: float | None) -> Values:
    """Validation values of every recipe, before (0) or after (-1) training; the same plan has the same value."""
    found: Values = defaultdict(dict)
    for record in records:
        recipe = recipe_of(record["method"], deviation)
        if recipe and record["seed"] < TUNING_SEED:
            found[record["task"], record["seed"]][recipe] = record["result"]["curve"][point][1]
    for values in found.values():
        if "mixed" in values:
            values.setdefault("half", values["mixed"])  # not run where they are the same
        if "half" in values:
            values.setdefault("own-attention", values["half"])
    return found


def random_starts(records: Iterable[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """By task, the best random start after training, by seed."""
    ends: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if record["method"] in RANDOM and record["seed"] < TUNING_SEED:
            ends[record["task"]][record["method"]][record["seed"]] = record["result"]["curve"][-1][1]
    return {task: max(methods.values(), key=lambda seeds: fmean(seeds.values())) for task, methods in ends.items()}


def taken(record: dict[str, Any], recipes: Sequence[str], errors: float) -> str:
    """What is chosen if the best of the others must exceed the own body by more than so many standard errors."""
    scores, over = dict(record["scores"]), dict(record["over_own"])
    for name, same in (("half", "mixed"), ("own-attention", "half")):  # not tried where they are the same
        if name not in scores and same in scores:
            scores[name], over[name] = scores[same], over[same]
    best = max((name for name in recipes if name in scores and name != "own"), key=lambda name: scores[name])
    return best if over[best][0] > errors * over[best][1] else "own"


SETS: dict[str, tuple[str, ...]] = {
    "all six": tuple(RECIPES),
    "own, half": ("own", "half"),
    "own, half, first": ("own", "half", "first"),
    "own, mixed, half": ("own", "mixed", "half"),
    "own, half, pca": ("own", "half", "pca"),
}
"""Recipes to choose among."""


def strategies(values: Values, choices: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """By strategy and by task and seed, the recipe's value."""
    found: dict[str, Any] = defaultdict(dict)
    for key, of in values.items():
        if key not in choices or not {"own", "mixed", "half", "first"} <= of.keys():
            continue
        for name, rule in RULES.items():
            if rule(key[0]) in of:
                found[name][key] = of[rule(key[0])]
        for title, recipes in SETS.items():
            for errors in (-1.0, 0.0, 1.0):
                if (recipe := taken(choices[key], recipes, errors)) in of:
                    found[f"auto of {title}; {errors:g} errors"][key] = of[recipe]
        found["best in hindsight"][key] = max(of.values())
    return found


def by_task(values: dict[tuple[str, int], float]) -> dict[str, float]:
    """The mean over seeds."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for (task, _), value in values.items():
        grouped[task].append(value)
    return {task: fmean(each) for task, each in grouped.items()}


def report(args: argparse.Namespace) -> None:
    """Print what each strategy gives, before and after training, against the own body and the best random start."""
    before, after = read(args.before), read(args.after)
    choices = {(r["task"], r["seed"]): r for r in read(args.out) if "scores" in r}
    random = {task: fmean(seeds.values()) for task, seeds in random_starts(after).items()}
    mixed_before = by_task({key: of["mixed"] for key, of in values_of(before, 0, None).items() if "mixed" in of})
    print(lines("before training, against mixed", strategies(values_of(before, 0, None), choices), mixed_before))
    for deviation in (None, 0.1):
        title = f"after training, logits of {deviation or 0.5:g}, against the best random start"
        print(lines(title, strategies(values_of(after, -1, deviation), choices), random))
    tenth, half = values_of(after, -1, 0.1), values_of(after, -1, None)
    print("logits of 0.1 over 0.5, by recipe: task: points")
    for recipe in RECIPES:
        keys = [key for key in tenth if recipe in tenth[key] and recipe in half.get(key, {})]
        gains = by_task({key: tenth[key][recipe] - half[key][recipe] for key in keys})
        if gains:
            print(
                f"  {recipe}: mean {100 * fmean(gains.values()):+.2f} of {len(gains)} tasks, "
                f"above in {sum(g > 0 for g in gains.values())}, below in {sum(g < 0 for g in gains.values())}: "
                + ", ".join(f"{task} {100 * gain:+.1f}" for task, gain in gains.items())
            )


def lines(title: str, found: dict[str, Any], reference: dict[str, float]) -> str:
    """A table in Markdown of strategies on the tasks that all of them and the reference have."""
    found = {name: by_task(values) for name, values in found.items() if values}
    tasks = [task for task in reference if all(task in values for values in found.values())]
    if not tasks:
        return f"{title}: no task"
    rows = []
    for name, values in found.items():
        gains = [values[task] - reference[task] for task in tasks]
        below = [task for task, gain in zip(tasks, gains, strict=True) if gain < -0.005]
        worst = min(zip(gains, tasks, strict=True))
        rows.append(
            f"| {name} | {100 * fmean(gains):+.2f} | {sum(g > 0.005 for g in gains)} | {len(below)} | "
            f"{100 * worst[0]:+.1f} ({worst[1]}) |"
        )
    heads = f"| {title} ({len(tasks)} tasks) | mean | above by half a point | below by half a point | worst |"
    return "\n".join((heads, "|---|---|---|---|---|", *rows, ""))


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
    reporting = commands.add_parser("report")
    reporting.add_argument("--out", type=Path, default=RESULTS / "choosing.jsonl", help="what measure has stored")
    reporting.add_argument("--before", type=Path, default=RESULTS / "suite_before.jsonl")
    reporting.add_argument("--after", type=Path, default=RESULTS / "suite_after.jsonl")
    reporting.set_defaults(run=report)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

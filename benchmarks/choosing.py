"""What ``code="auto"`` chooses on the suite, beside what the choice would best have been.

    python benchmarks/choosing.py measure --data DIR      # the held-out scores, task by task, without training
    python benchmarks/choosing.py large                   # seconds on 2,048 images
    python benchmarks/choosing.py report                  # beside validation values: results/suite_*.jsonl

`measure` initializes each network of the suite on the train subset of a seed, and stores the held-out scores of all
recipes, and the CPU seconds of ``code="auto"`` and of one recipe. Nothing of the validation or test data is read.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sylinit
from studies.suite.data import directory_of, parts
from studies.suite.methods import RANDOM, is_trained
from studies.suite.networks import NETWORKS
from studies.suite.run import TUNING_SEED
from studies.suite.tasks import Task, matching
from sylinit.plan import choice
from sylinit.plan.recipes import RECIPES

RESULTS = Path(__file__).parent / "results"


def chosen(task: Task, seed: int, what: str, directory: Path | None) -> dict[str, Any]:
    """Initialize a network, and note what was tried and how long it took.

    Args:
        task: of the suite.
        seed: of the train subset and of the random weights.
        what: "scores" tries all recipes; anything else is the ``code=`` that is timed.
        directory: of data that no package carries.
    """
    data = parts(task.data, task.size, seed, directory, test=False)
    torch.manual_seed(seed)
    model = NETWORKS[task.network](data.shape, data.outputs)
    layers = None if all(parameter.requires_grad for parameter in model.parameters()) else is_trained
    scores: dict[str, list[float]] = {}

    def best(values: Any, *others: Any) -> choice.Choice:
        scores.update(values)
        return usual[0](values, *others)

    usual = choice._best, choice.TRIED, choice._still_racing
    choice._best = best
    if what == "scores":  # all recipes, each to the end
        choice.TRIED, choice._still_racing = tuple(RECIPES.values()), list
    try:
        began = time.process_time()
        sylinit.initialize_(
            model,
            [(data.train.x, data.train.y)],
            code="auto" if what == "scores" else what,
            layers=layers,
            generator=torch.Generator().manual_seed(seed),
        )
        seconds = time.process_time() - began
    finally:
        choice._best, choice.TRIED, choice._still_racing = usual
    record: dict[str, Any] = {"task": task.name, "seed": seed, "what": what, "seconds": seconds}
    if what == "scores" and scores:
        over = {name: [a - b for a, b in zip(each, scores["own"], strict=True)] for name, each in scores.items()}
        del over["own"]
        record["scores"] = {name: fmean(each) for name, each in scores.items()}
        record["over_own"] = {name: [fmean(each), stdev(each) / len(each) ** 0.5] for name, each in over.items()}
        record["samples"] = len(scores["own"])
    return record


def measure(args: argparse.Namespace) -> None:
    """Store what the file lacks."""
    torch.set_num_threads(1)
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    done = {(r["task"], r["seed"], r["what"]) for r in map(json.loads, lines)}
    for task in matching(args.tasks):
        for seed in args.seeds:
            for what in args.what:
                if (task.name, seed, what) not in done:
                    record = chosen(task, seed, what, directory_of(args.data))
                    with args.out.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                    print(task.name, seed, what, f"{record['seconds']:.2f} s", flush=True)


LARGE = "images-2048/"
"""Before the name of a network in the records of `large`."""


def large(args: argparse.Namespace) -> None:
    """Time the choice and one recipe on 2,048 images of 32x32 with a smooth pattern for each of ten classes."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(2048) % 10
    patterns = torch.nn.functional.interpolate(torch.randn(10, 3, 4, 4, generator=generator), size=32, mode="bilinear")
    x = patterns[y] + torch.randn(2048, 3, 32, 32, generator=generator)
    for network in args.networks:
        for what in ("half", "auto"):
            torch.manual_seed(0)
            model = NETWORKS[network]((3, 32, 32), 10)
            began = time.process_time()
            sylinit.initialize_(model, [(x, y)], code=what)
            record = {"task": LARGE + network, "seed": 0, "what": what, "seconds": time.process_time() - began}
            with args.out.open("a") as file:
                file.write(json.dumps(record) + "\n")


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
    "own, mixed": ("own", "mixed"),
    "own, half, first": ("own", "half", "first"),
    "own, mixed, half": ("own", "mixed", "half"),
    "own, half, pca": ("own", "half", "pca"),
}
"""Recipes to choose among."""

PREFERENCES = {-1.0: "computed within a standard error", 0.0: "the best", 1.0: "own within a standard error"}
"""By how many standard errors the best computed recipe must exceed the own body, in words."""


def strategies(values: Values, choices: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """By strategy and by task and seed, the recipe's value."""
    found: dict[str, Any] = defaultdict(dict)
    for key, of in values.items():
        if key not in choices or not {"own", "mixed", "half"} <= of.keys():
            continue
        for name, rule in RULES.items():
            if rule(key[0]) in of:
                found[name][key] = of[rule(key[0])]
        for title, recipes in SETS.items():
            for errors, words in PREFERENCES.items():
                if (recipe := taken(choices[key], recipes, errors)) in of:
                    found[f"auto of {title}; {words}"][key] = of[recipe]
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
    before, after, measured = read(args.before), read(args.after), read(args.out)
    choices = {(r["task"], r["seed"]): r for r in measured if "scores" in r}
    untrained = strategies(values_of(before, 0, None), choices)
    print(lines("before training, against mixed", untrained, by_task(untrained["mixed"])))
    print(lines("before training, against the default", untrained, by_task(untrained[DEFAULT])))
    random = {task: fmean(seeds.values()) for task, seeds in random_starts(after).items()}
    for deviation in (None, 0.1):
        trained = strategies(values_of(after, -1, deviation), choices)
        title = f"after training, logits of {deviation or 0.5:g}"
        print(lines(f"{title}, against the best random start", trained, random))
        print(lines(f"{title}, against mixed", trained, by_task(trained["mixed"])))
        print(lines(f"{title}, against the default", trained, by_task(trained[DEFAULT])))
    print(logits(values_of(after, -1, 0.1), values_of(after, -1, None)))
    print(seconds(measured))


DEFAULT = "auto of own, mixed, half; the best"
"""What ``code="auto"`` does."""


def logits(tenth: Values, half: Values) -> str:
    """What each recipe gains after training by logits of 0.1 instead of 0.5, over tasks."""
    rows = []
    for recipe in RECIPES:
        keys = [key for key in tenth if recipe in tenth[key] and recipe in half.get(key, {})]
        gains = [100 * gain for gain in by_task({key: tenth[key][recipe] - half[key][recipe] for key in keys}).values()]
        if len(gains) > 1:
            error = stdev(gains) / len(gains) ** 0.5
            above, below = sum(gain > 0.5 for gain in gains), sum(gain < -0.5 for gain in gains)
            rows.append(f"| {recipe} | {len(gains)} | {fmean(gains):+.1f} ± {error:.1f} | {above} | {below} |")
    heads = "| logits of 0.1 over 0.5, after training | tasks | mean ± standard error | above | below |"
    return "\n".join((heads, "|---|---|---|---|---|", *rows, ""))


def lines(title: str, found: dict[str, Any], reference: dict[str, float]) -> str:
    """A table in Markdown of the strategies that have a value on every task.

    The mean over tasks comes with its standard error; differences of a task are those of its means over seeds.
    """
    means = {name: by_task(values) for name, values in found.items() if values}
    tasks = [task for task in reference if task in means.get("own", {})]
    means = {name: values for name, values in means.items() if set(tasks) <= values.keys()}
    if len(tasks) < 2:
        return f"{title}: too few tasks\n"
    rows = []
    for name, values in means.items():
        gains = [100 * (values[task] - reference[task]) for task in tasks]
        worst = min(zip(gains, tasks, strict=True))
        above, below = sum(gain > 0.5 for gain in gains), sum(gain < -0.5 for gain in gains)
        middle = f"{fmean(gains):+.1f} ± {stdev(gains) / len(gains) ** 0.5:.1f} | {median(gains):+.1f}"
        rows.append(f"| {name} | {middle} | {above} | {below} | {worst[0]:+.1f} ({worst[1]}) |")
    heads = f"| {title}, {len(tasks)} tasks | mean ± standard error | median | above | below | worst |"
    return "\n".join((heads, "|---|---|---|---|---|---|", *rows, ""))


def seconds(records: Iterable[dict[str, Any]]) -> str:
    """How many times as long as one recipe the choice takes: the median and the largest ratio."""
    taken: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for record in records:
        if "seconds" in record:
            taken[record["task"], record["seed"]][record["what"]] = record["seconds"]
    both = {task: each for (task, _), each in taken.items() if {"auto", "half"} <= each.keys()}
    ratios = sorted(each["auto"] / each["half"] for task, each in both.items() if not task.startswith(LARGE))
    found = [f"{task} {each['auto'] / each['half']:.1f}" for task, each in both.items() if task.startswith(LARGE)]
    if ratios:
        found.append(f"suite: median {median(ratios):.1f}, largest {ratios[-1]:.1f}, {len(ratios)} tasks")
    return f"CPU seconds of auto over those of one recipe: {', '.join(found)}"


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--tasks", nargs="*", default=["*"])
    measuring.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    measuring.add_argument("--what", nargs="*", default=["scores", "auto", "half"])
    measuring.add_argument("--data", type=Path)
    measuring.add_argument("--out", type=Path, default=RESULTS / "choosing.jsonl")
    measuring.set_defaults(run=measure)
    timing = commands.add_parser("large")
    timing.add_argument("--networks", nargs="*", default=["lenet5", "mlp", "resnet", "vit", "mixer"])
    timing.add_argument("--out", type=Path, default=RESULTS / "choosing.jsonl")
    timing.set_defaults(run=large)
    reporting = commands.add_parser("report")
    reporting.add_argument("--out", type=Path, default=RESULTS / "choosing.jsonl", help="what measure has stored")
    reporting.add_argument("--before", type=Path, default=RESULTS / "suite_before.jsonl")
    reporting.add_argument("--after", type=Path, default=RESULTS / "suite_after.jsonl")
    reporting.set_defaults(run=report)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

"""What the suite says: the tables, the figure and the numbers of "Is it ever worse?", from the stored runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from statistics import fmean, median, stdev
from typing import Any

from matplotlib.figure import Figure
from stored import NETWORKS, OURS, RESULTS, markdown, methods
from stored import lead as row_lead

from studies.suite.methods import RANDOM
from studies.suite.report import Comparison, Results, compare, differences, group_of, on_series, percent, points, read
from studies.suite.tasks import SECOND_LOOK
from sylinit.comparison.figures import style

FILES = ("suite_test.jsonl", "suite_second.jsonl")
"""Runs with the defaults of today, measured on test sets."""

WORDS = {
    "own": "as the network comes",
    "he": "He",
    "xavier": "Xavier",
    "orthogonal": "orthogonal",
    "lsuv": "LSUV",
    "pca-head": "PCA whitening, computed head",
    "own-head": "own body, computed head",
    "lp-ft": "linear probe, then all",
    "default": "sylinit",
}
"""Methods of the suite in a reader's words."""


@functools.cache
def results() -> Results:
    """All of them."""
    return Results(read([RESULTS / name for name in FILES]), test=True)


@functools.cache
def compared() -> list[Comparison]:
    """The default beside the baselines on every task, those of the second look last."""
    found = compare(results(), "default", "adamw")
    return sorted(found, key=lambda one: one.task in second_look())


def second_look() -> set[str]:
    """The tasks that no choice has seen."""
    return {f"{data}-{size}/{network}" for data, size, networks in SECOND_LOOK for network in networks.split()}


def by_task() -> str:
    """The default before and after training beside the best random start, task by task."""
    body = [
        [
            f"`{one.task}`",
            WORDS[one.best],
            percent(one.best_after),
            percent(one.before),
            percent(one.after),
            points(one.gain),
        ]
        for one in compared()
    ]
    heads = ["task", "best random start", "it ends at", "sylinit, no step", "sylinit, trained", "lead"]
    return markdown(heads, body, words=2)


def all_methods() -> str:
    """Every method before and after training, task by task."""
    body = []
    for one in compared():
        cells = []
        for method in WORDS:
            before, after = (results().values(one.task, method, "adamw", what) for what in ("before", "after"))
            cells.append(f"{percent(fmean(before))} → {percent(fmean(after))}" if after else "")
        body.append([f"`{one.task}`", *cells])
    return markdown(["task", *WORDS.values()], body)


INSTEAD = {
    "minirocket": "MiniRocket",
    "logistic": "logistic or ridge regression",
    "forest": "random forest",
    "ridge": "ridge on the embeddings",
}
"""References of the suite in a reader's words."""


def instead() -> str:
    """The default, and the best random start after training, beside what is no network, on the same data."""
    body = []
    for one in compared():
        values = [results().references.get((group_of(one.task), name)) for name in INSTEAD]
        if any(values):
            cells = [percent(fmean(each.values())) if each else "" for each in values]
            body.append([f"`{one.task}`", percent(one.before), percent(one.after), percent(one.best_after), *cells])
    return markdown(["task", "sylinit, no step", "trained", "best random start", *INSTEAD.values()], body)


def text() -> str:
    """All of a text encoder fine-tuned: accuracy on test questions after shares of the steps."""
    found: dict[str, list[list[float]]] = {}
    for record in read([RESULTS / "suite_finetune.jsonl"]):
        if record["test"]:
            marks = [point[2] for point in record["result"]["curve"] if point[2] is not None]
            found.setdefault(record["method"], []).append(marks)
    body = []
    for method, head in (("own", "random"), ("default", "computed")):
        means = [percent(fmean(values)) for values in zip(*found[method], strict=True)]
        body.append([head, *means, ", ".join(percent(curve[-1]) for curve in found[method])])
    return markdown(["head", "before", "10 %", "30 %", "100 % of the steps", "by seed"], body)


def against() -> str:
    """The default after training over each baseline: mean over tasks, its standard error, and how often."""
    body = []
    for method in [name for name in WORDS if name != "default"]:
        leads = [100 * lead(one, method) for one in compared() if results().has(one.task, method, "adamw")]
        if not leads:
            continue
        above, below = sum(each > 0.5 for each in leads), sum(each < -0.5 for each in leads)
        error = stdev(leads) / len(leads) ** 0.5
        body.append(
            [
                WORDS[method],
                f"{fmean(leads):+.1f} ± {error:.1f}",
                f"{median(leads):+.1f}",
                str(above),
                str(below),
                str(len(leads)),
            ]
        )
    return markdown(["sylinit's lead over", "mean", "median", "above", "below", "of tasks"], body)


def lead(one: Comparison, method: str) -> float:
    """What the default ends with over a method on one task."""
    return one.after - fmean(results().values(one.task, method, "adamw", "after"))


def numbers() -> dict[str, str]:
    """What the page says in words."""
    found = differences([one.gain for one in compared()])
    whitened = differences([one.over_pca for one in compared() if one.over_pca])
    own = [lead(one, "own") for one in compared()]
    typical = [one.after - fmean(ends_of_random(one)) for one in compared()]
    series: dict[str, Any] = on_series(results(), compared(), "adamw")
    named = {
        "tasks": str(found["tasks"]),
        "above": str(sum(one.gain.mean > 0.005 for one in compared())),
        "below": str(found["below by more than half a point"]),
        "mean": f"{100 * found['mean']:+.1f}",
        "worst": f"{100 * found['worst']:+.1f}",
        "certainly_above": str(found["interval above zero"]),
        "certainly_below": str(found["interval below zero"]),
        "over_own": f"{100 * fmean(own):+.1f}",
        "over_own_below": str(sum(each < -0.005 for each in own)),
        "over_typical": f"{100 * fmean(typical):+.1f}",
        "whitened_mean": f"{100 * whitened['mean']:+.1f}",
        "whitened_worst": f"{100 * whitened['worst']:+.1f}",
        "whitened_below": str(whitened["below by more than a point"]),
        "nine_tenths": str(sum(one.before >= 0.9 * one.best_after for one in compared())),
        "more": str(sum(one.before > one.best_after for one in compared())),
        "steps": f"{100 * median([min(one.steps, 1.0) for one in compared()]):.0f}",
        "never": str(sum(math.isinf(one.steps) for one in compared())),
        "fcn": f"{100 * series['at least the trained FCN']:.0f}" if series["tasks"] else "",
    }
    look = [one.gain for one in compared() if one.task in second_look()]
    named |= {"second": ", ".join(points(each) for each in look)}
    return {f"suite_{name}": value for name, value in named.items()}


def ends_of_random(one: Comparison) -> list[float]:
    """Where each random start of a task ends."""
    return [fmean(results().values(one.task, method, "adamw", "after")) for method in RANDOM]


def draw() -> Figure:
    """The lead over the best random start after training, task by task, with its interval."""
    found = sorted(compared(), key=lambda one: one.gain.mean)
    figure = Figure(figsize=(7, 0.26 * len(found) + 1), layout="constrained")
    axes = figure.subplots()
    places = list(range(len(found)))
    means, halves = [100 * one.gain.mean for one in found], [100 * one.gain.half for one in found]
    axes.errorbar(means, places, xerr=halves, fmt="none", ecolor="gray", capsize=2)
    axes.plot(means, places, linestyle="none", **style(["sylinit"])["sylinit"])
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_yticks(places, [one.task + (" *" if one.task in second_look() else "") for one in found])
    axes.set_xlabel("points over the best random start, after training")
    axes.set_xlim(min(-12, *means) - 1, max(12, *means) + 1)
    return figure


def headline() -> str:
    """The study's headline columns with the defaults of 0.1.0 and of today, and the difference, paired by seed."""
    body = []
    for model, name in NETWORKS.items():
        for shots in (10, 50):
            former, now = (methods("fewshot", "cifar10", model, shots, file)[OURS] for file in ("", "fewshot-chosen"))
            cells = [percent(row.interval(metric).mean) for row in (former, now) for metric in ("before", "after")]
            body.append([f"{name}, {shots} of each class", *cells, row_lead(now, former)])
    heads = ["CIFAR-10", "0.1.0, no step", "trained", "today, no step", "trained", "today over 0.1.0"]
    return markdown(heads, body)


TABLES: dict[str, Callable[[], str]] = {
    "suite-tasks": by_task,
    "suite-methods": all_methods,
    "suite-against": against,
    "fine-tuning-text": text,
    "suite-instead": instead,
    "headline": headline,
}
FIGURES: dict[str, Callable[[], Figure]] = {"suite": draw}

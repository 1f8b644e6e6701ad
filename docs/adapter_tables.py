"""What the runs of `benchmarks/adapters.py` say: tables and numbers of "Is it better for LoRA?"."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from stored import RESULTS, markdown


@functools.cache
def adapter_lines() -> dict[str, Any]:
    """Every stored result of the adapters' benchmark, by its key."""
    lines = (RESULTS / "adapters.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["key"]: row["result"] for row in map(json.loads, lines)}


def adapter_curves(kind: str) -> dict[tuple[str, ...], list[list[float]]]:
    """What was measured on test data after each share of the steps, by setting and arm: one list a seed.

    Only of seeds that all arms of a setting have.

    Args:
        kind: "banking77", whose keys are (labels of each class, adapters, head), or "causal", whose are (adapters).
    """
    runs: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for key, result in adapter_lines().items():
        parts = key.split()
        if parts[0] == kind and parts[-1] == "test":
            arm = (parts[3], parts[1], parts[2]) if kind == "banking77" else (parts[1],)
            runs.setdefault(arm, {})[parts[len(arm) + 1]] = next(iter(result.values()))
    complete = {
        setting: set.intersection(*(set(found) for arm, found in runs.items() if arm[:-2] == setting))
        for setting in {arm[:-2] for arm in runs}
    }
    return {arm: [found[seed] for seed in sorted(complete[arm[:-2]])] for arm, found in runs.items()}


def means(curves: Sequence[Sequence[float]]) -> list[float]:
    """The mean curve over the seeds."""
    return [sum(values) / len(values) for values in zip(*curves, strict=True)]


ADAPTERS = {
    "default": "PEFT's default",
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "eva": "EVA",
    "pca": 'sylinit, `code="pca"`',
    "mixed": 'sylinit, `code="mixed"`',
    "label": 'sylinit, `code="label"`',
}
"""How pages call the initializations of adapters."""

HEADS = {"random": "random", "computed": "computed", "large": "computed, logits of 1"}
"""How pages call the heads."""

TUNING = 1000
"""Seeds from this one on are tuned with."""

MARKS = ["before", "10 %", "30 %", "100 % of the steps"]


def adapters() -> str:
    """Accuracy on Banking77, one row for each initialization of adapters and head; the best of each column is bold."""
    found = {arm: means(curves) for arm, curves in adapter_curves("banking77").items() if curves}
    body = []
    for arm in sorted(found, key=lambda arm: (int(arm[0]), list(HEADS).index(arm[2]), list(ADAPTERS).index(arm[1]))):
        beside = [curve for other, curve in found.items() if other[0] == arm[0]]
        cells = [
            f"**{100 * value:.1f}**" if value == max(values) else f"{100 * value:.1f}"
            for value, *values in zip(found[arm], *beside, strict=True)
        ]
        body.append([arm[0], ADAPTERS[arm[1]], HEADS[arm[2]], *cells])
    return markdown(["labels of each class", "adapters", "head", *MARKS], body, 3)


def digit_curves() -> dict[tuple[str, str, str], list[float]]:
    """Mean accuracy after each share of the steps, by first digit, head and adapters, at the rate that was tuned.

    That is the rate with runs of seeds below those that tune.
    """
    runs: dict[tuple[str, str, str], list[list[float]]] = {}
    for key, result in adapter_lines().items():
        kind, *parts = key.split()
        if kind == "digits" and int(parts[3]) < TUNING:
            runs.setdefault((parts[2], parts[1], parts[0]), []).append(result["accuracy"])
    return {arm: means(curves) for arm, curves in runs.items()}


def adapters_digits() -> str:
    """Accuracy on other digits than those that a small network was trained on."""
    found = digit_curves()
    body = [
        [{"5": "5 to 9", "8": "8, 9"}[first], ADAPTERS[name], head, *(f"{100 * value:.1f}" for value in curve)]
        for first in ("5", "8")
        for head in ("random", "computed")
        for name in ADAPTERS
        for curve in [found.get((first, head, name), [])]
        if curve
    ]
    return markdown(["digits", "adapters", "head", *MARKS], body, 3)


def adapters_causal() -> str:
    """Loss of a causal language model on held-out text."""
    found = {arm[0]: means(curves) for arm, curves in adapter_curves("causal").items() if curves}
    if not found:
        return "Not measured yet: `python benchmarks/adapters.py causal` writes the rows.\n"
    body = [[name, *(f"{value:.3f}" for value in found[arm])] for arm, name in ADAPTERS.items() if arm in found]
    return markdown(["adapters", *MARKS], body)


def adapter_costs() -> dict[str, dict[str, float]]:
    """Medians of what an initialization takes."""
    runs: dict[str, list[dict[str, float]]] = {}
    for key, result in adapter_lines().items():
        if key.startswith("cost "):
            runs.setdefault(key.removeprefix("cost ").rsplit(" ", 2)[0], []).append(result)
    return {arm: {key: median(row[key] for row in found) for key in ("processor", "MB")} for arm, found in runs.items()}


def adapters_cost() -> str:
    """Processor seconds and memory of the initializations."""
    names = {"forward pass": "one forward pass over the batches", **ADAPTERS, "computed head": "the computed head"}
    found = adapter_costs()
    body = [
        [name, f"{found[arm]['processor']:.1f}", f"{found[arm]['MB']:.0f}"]
        for arm, name in names.items()
        if arm in found
    ]
    return markdown(["", "processor seconds", "MB more at the peak"], body)


def numbers() -> dict[str, str]:
    """What the page says in words."""
    found = {}
    curves = {arm: means(each) for arm, each in adapter_curves("banking77").items() if each}
    for (shots, name, head), curve in curves.items():
        for mark, accuracy in zip((0, 10, 30, 100), curve, strict=True):
            found[f"adapters_{shots}_{name}_{head}_{mark}"] = f"{100 * accuracy:.1f}"
    for head in ("random", "computed"):
        for place, mark in enumerate((0, 10, 30, 100)):
            best = max(curve[place] for arm, curve in curves.items() if arm[::2] == ("5", head))
            found[f"adapters_5_best_{head}_{mark}"] = f"{100 * best:.1f}"
        for other in ("default", "eva"):
            pairs = zip(curves["5", "label", head], curves["5", other, head], (0, 10, 30, 100), strict=True)
            found |= {f"adapters_label_over_{other}_{head}_{mark}": f"{100 * (a - b):.1f}" for a, b, mark in pairs}
        by_shots = {shots: max(c[3] for arm, c in curves.items() if arm[::2] == (shots, head)) for shots in ("5", "10")}
        found |= {f"adapters_{shots}_best_{head}_end": f"{100 * best:.1f}" for shots, best in by_shots.items()}
    digits = digit_curves()
    for first in ("5", "8"):
        for name in ("default", "pca", "mixed", "label"):
            found[f"adapters_digits_{first}_{name}"] = f"{100 * digits[first, 'computed', name][3]:.1f}"
    losses = {arm[0]: means(each) for arm, each in adapter_curves("causal").items() if each}
    found |= {f"adapters_causal_{name}": f"{curve[3]:.3f}" for name, curve in losses.items()}
    found["adapters_seeds"] = str(len(adapter_curves("banking77")["5", "default", "random"]))
    spent = adapter_costs()
    found |= {f"adapters_seconds_{name.replace(' ', '_')}": f"{each['processor']:.1f}" for name, each in spent.items()}
    found |= {f"adapters_megabytes_{name.replace(' ', '_')}": f"{each['MB']:.0f}" for name, each in spent.items()}
    return found


TABLES: dict[str, Callable[[], str]] = {
    "adapters": adapters,
    "adapters-causal": adapters_causal,
    "adapters-cost": adapters_cost,
    "adapters-digits": adapters_digits,
}

"""What the stored runs say, and how pages print it: read by every module that makes a table or a figure."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from studies.presets import PRESETS
from studies.resume import as_run
from sylinit.comparison.plan import Comparison, read
from sylinit.comparison.statistics import Interval
from sylinit.comparison.store import Store
from sylinit.comparison.summary import Row, gap, ranked, rows

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

SHOTS = (5, 10, 20, 50, 100, 500)
"""Labeled images of each class in the study of few labels."""

TUNED = (10, 20, 50)
"""The same in the study of fine-tuning."""

WHITENING = ("pca-whitening", "pca-whitening-rescaled")
OURS = "sylinit"

NETWORKS = {"cnn": "CNN", "resnet20": "ResNet-20"}
DATA = {"cifar10": "CIFAR-10", "fashion-mnist": "Fashion-MNIST"}


def markdown(header: Sequence[str], body: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table of so many columns of words, and of numbers after them."""
    lines = [header, ["---"] * words + ["---:"] * (len(header) - words), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


@functools.cache
def comparison(preset: str, file: str = "") -> Comparison:
    """What a study has come to; of another file than its own, as far as that goes."""
    store = Store(RESULTS / "study" / f"{file or preset}.jsonl")
    return read(as_run(PRESETS[preset].plan(False), store), store)


def methods(preset: str, data: str, model: str, shots: int | None, file: str = "") -> dict[str, Row]:
    """The rows of one comparison, by initialization."""
    return {
        row.label: row
        for row in rows(comparison(preset, file))
        if (Path(row.method.dataset).name, row.method.model, row.method.shots) == (data, model, shots)
    }


def best_random(found: Mapping[str, Row]) -> Row:
    """The random initialization, or LSUV, that ends highest."""
    return ranked(row for name, row in found.items() if name != OURS and name not in WHITENING)[0]


def value(row: Row, metric: str, *, bold: bool = False) -> str:
    """A cell: mean and interval in percent; a star where the learning rate was at the edge of its grid."""
    shown = row.interval(metric).percent() + ("*" if row.at_edge and metric == "after" else "")
    return f"**{shown}**" if bold else shown


def lead(mine: Row, other: Row, metric: str = "after") -> str:
    """A cell: how far one is above the other, paired by seed."""
    found = gap(mine, other, metric)
    return "" if found is None else found.percent(sign=True)


@functools.cache
def stored(name: str) -> dict[str, Any]:
    """A JSON file of results."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def counted(leads: Iterable[Interval]) -> str:
    """A verdict in words: how many leads are above zero, level and below it, beyond their 95 % interval.

    A lead without an interval counts as level.
    """
    found = list(leads)
    above = sum(each.low > 0 for each in found)
    below = sum(each.high < 0 for each in found)
    level = len(found) - above - below
    if len(found) == 1:
        return "above" if above else "below" if below else "level"
    parts = [(above, "above"), (level, "level"), (below, "below")]
    return ", ".join(f"{word} in {number}" for number, word in parts if number) + f" of {len(found)}"

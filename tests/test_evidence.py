"""Every figure with an interval in README and docs follows from committed results."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from sylinit.study.experiment import Experiment
from sylinit.study.presets import PRESETS
from sylinit.study.runner import as_run, read
from sylinit.study.starts import STARTS
from sylinit.study.statistics import interval, paired
from sylinit.study.store import Store
from sylinit.study.summary import rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = re.compile(r"(?<![\d.])[+-]?\d+\.\d ± \d+\.\d(?!\d)")
METRICS = ("before", "after", "area")

Measured = tuple[tuple[Any, ...], str, int, Mapping[str, Any]]
"""What is compared with what, the name of one of them, the draw, and the results."""


def place(name: str, e: Experiment) -> tuple[Any, ...]:
    """What is compared within a study."""
    return name, Path(e.dataset).name, e.model, e.shots, e.epochs, e.optimiser


def measured() -> Iterator[Measured]:
    """Every run that a table may show: the final ones of the studies, and all of the benchmarks on held-back images."""
    for name, preset in PRESETS.items():
        store = Store(RESULTS / "study" / f"{name}.jsonl")
        study = read(as_run(preset.plan(False), store), store)
        for row in rows(study):
            for record in row.records:
                where = place(name, record.experiment)
                rate = () if study.plan.grid else (row.lr,)
                yield (*where, *rate), row.label, record.experiment.seed, record.result
    for record in Store(RESULTS / "study" / "former-default.jsonl").records.values():
        if record.experiment.split == "test":
            name = "fewshot" if record.experiment.shots else "scratch"
            yield place(name, record.experiment), "the former default", record.experiment.seed, record.result
    for record in Store(RESULTS / "ideas.jsonl").records.values():
        yield place("ideas", record.experiment), record.experiment.start, record.experiment.seed, record.result
    for line in (RESULTS / "defaults.jsonl").read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        values, experiment = json.loads(found["key"])
        where = tuple(experiment[key] for key in ("dataset", "model", "shots", "epochs"))
        yield ("defaults", *where), f"{values} {experiment['start']}", experiment["seed"], found["result"]
    for arm in json.loads((RESULTS / "rows.json").read_text(encoding="utf-8"))["rows"].values():
        for seed, run in enumerate(arm["runs"]):
            yield ("rows", arm["model"]), arm["rows"], seed, {"before": run["accuracy"] / 100}


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Figures as they are printed: the means of each start, and under "" everything, gaps too."""
    groups: dict[tuple[Any, ...], dict[str, dict[int, Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for where, label, seed, result in measured():
        groups[where][label][seed] = result
    found: dict[str, set[str]] = defaultdict(set)
    for group in groups.values():
        for metric in METRICS:
            series = {
                label: {seed: result[metric] for seed, result in runs.items() if result.get(metric) is not None}
                for label, runs in group.items()
            }
            for label, values in series.items():
                if values:
                    found[label].add(interval([*values.values()]).percent())
            for mine, other in permutations(series.values(), 2):
                both = sorted(mine.keys() & other.keys())
                if both:
                    gap = paired([mine[seed] for seed in both], [other[seed] for seed in both])
                    found[""] |= {gap.percent(), gap.percent(sign=True)}
    found[""].update(*found.values())
    return found


def start_of(line: str) -> str:
    """The start that a row of a table is about, if it is."""
    label = re.match(r"\| `([\w-]+)`", line)
    return label[1] if label and label[1] in STARTS else ""


@pytest.mark.parametrize("page", ["README.md", "docs/method.md", "docs/studies.md"])
def test_every_interval_follows_from_the_results(page: str, known: dict[str, set[str]]) -> None:
    wrong = [
        f"{page}:{number}: {figure} {start}".rstrip()
        for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1)
        for start in [start_of(line)]
        for figure in FIGURE.findall(line)
        if figure not in known["" if figure[0] in "+-" else start]
    ]
    assert not wrong, "not in the results:\n" + "\n".join(wrong)


def test_there_are_figures_to_check() -> None:
    found = [f for page in ("README.md", "docs/studies.md") for f in FIGURE.findall((ROOT / page).read_text("utf-8"))]
    assert len(found) > 500

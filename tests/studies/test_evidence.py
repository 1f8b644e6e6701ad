"""Every typed number with an interval in README and docs follows from committed results."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from studies.precision import PRECISIONS
from studies.presets import PRESETS
from studies.resume import as_run, in_precision
from sylinit.comparison.experiment import Experiment
from sylinit.comparison.initializations import INITIALIZATIONS
from sylinit.comparison.plan import read
from sylinit.comparison.store import Record, Store
from sylinit.comparison.summary import Row, gap

pytestmark = pytest.mark.studies

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = re.compile(r"(?<![\d.])[+-]?\d+\.\d ± \d+\.\d(?!\d)")
METRICS = ("before", "after", "area")
PAGES = ("README.md", "docs/design.md", "docs/method.md", "docs/studies.md")
"""Pages with typed intervals; those of the results pages are made when the site is built."""


def place(name: str, e: Experiment) -> tuple[Any, ...]:
    """What is compared within a study."""
    return name, Path(e.dataset).name, e.model, e.shots, e.epochs, e.optimizer


def measured() -> Iterator[tuple[tuple[Any, ...], str, Record]]:
    """What is compared with what, the name of one of them, and a run of it.

    The final runs of the studies, and all of the benchmarks on held-back images.
    """
    for name, preset in PRESETS.items():
        store = Store(RESULTS / "study" / f"{name}.jsonl")
        plan = as_run(preset.plan(False), store)
        runs = {r.experiment: r.experiment.method.label for r in read(plan, store).records}
        for precision in PRECISIONS:  # a part that was repeated in the other one
            for record in read(in_precision(plan, precision), store).records:
                runs.setdefault(record.experiment, f"{record.experiment.method.label}, {precision}")
        for e, label in runs.items():
            yield (*place(name, e), None if plan.grid else e.lr), label, store[e]
    for record in Store(RESULTS / "study" / "former-default.jsonl").records.values():
        e = record.experiment
        if e.split == "test":
            yield (*place("fewshot" if e.shots else "scratch", e), None), "the former default", record
    for record in Store(RESULTS / "ideas.jsonl").records.values():
        yield place("ideas", record.experiment), record.experiment.initialization, record
    for line in (RESULTS / "defaults.jsonl").read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        values, fields = json.loads(found["key"])
        e = Experiment.from_dict(fields)
        yield place("defaults", e), f"{values} {e.initialization}", Record(e, found["result"], {})
    for arm in json.loads((RESULTS / "rows.json").read_text(encoding="utf-8"))["rows"].values():
        for seed, run in enumerate(arm["runs"]):
            e = Experiment("cifar10", arm["model"], "sylinit", 50, seed=seed)
            yield place("rows", e), arm["rows"], Record(e, {"before": run["accuracy"] / 100}, {})


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Figures as they are printed: means of each initialization, its gaps to others, and under "" everything."""
    groups: dict[tuple[Any, ...], dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for where, label, record in measured():
        groups[where][label].append(record)
    found: dict[str, set[str]] = defaultdict(set)
    for group in groups.values():
        series = {label: Row(records[0].experiment.method, 0.0, tuple(records)) for label, records in group.items()}
        for metric in METRICS:
            for label, row in series.items():
                if row.values(metric):
                    found[label].add(row.interval(metric).percent())
            for (mine, one), (other, two) in permutations(series.items(), 2):
                difference = gap(one, two, metric)
                if difference is not None:
                    printed = {difference.percent(), difference.percent(sign=True)}
                    found["gap " + mine] |= printed
                    found["gap " + other] |= printed
    found[""].update(*found.values())
    return found


def initialization_of(line: str) -> str:
    """The initialization that a row of a table is about, if it is."""
    label = re.match(r"\| (?:gap to )?`([\w-]+)`", line.replace("PCA whitening", "`pca-whitening`"))
    return label[1] if label and label[1] in INITIALIZATIONS else ""


@pytest.mark.parametrize("page", PAGES)
def test_every_interval_follows_from_the_results(page: str, known: dict[str, set[str]]) -> None:
    wrong = [
        f"{page}:{number}: {figure} {name}".rstrip()
        for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1)
        for name in [initialization_of(line)]
        for figure in FIGURE.findall(line)
        if figure not in known[("gap " if name and figure[0] in "+-" else "") + name]
    ]
    assert not wrong, "not in the results:\n" + "\n".join(wrong)


def test_there_are_figures_to_check() -> None:
    found = [figure for page in PAGES for figure in FIGURE.findall((ROOT / page).read_text("utf-8"))]
    assert len(found) >= 10

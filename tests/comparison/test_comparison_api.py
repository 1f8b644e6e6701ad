"""`sylinit.compare`, forecasts, and the demo's findings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sylinit
from comparing import TINY, record, tasks_of
from conftest import vectors
from sylinit import SylinitError
from sylinit.comparison.api import ComparisonResult
from sylinit.comparison.data import load
from sylinit.comparison.demo import draw, find, plan_of, stories
from sylinit.comparison.forecast import Pace, forecast, measure
from sylinit.comparison.models import build
from sylinit.comparison.plan import Plan
from sylinit.comparison.runner import execute
from sylinit.comparison.store import Store
from sylinit.comparison.summary import Row

FEW: dict[str, Any] = {"initializations": ("he-normal", "sylinit"), "grid": (0.01, 0.03), "seeds": 2, "epochs": 3}


class Wrapped(nn.Module):
    """With its logits in a mapping."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(shape[0], 16), nn.ReLU(), nn.Linear(16, classes))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.body(x)}


def test_compare_from_python_gives_table_verdict_figure_and_every_run(tmp_path: Path) -> None:
    x, y = vectors(count=150)
    calls: list[int] = []
    result = sylinit.compare(Wrapped, (x, y), **FEW, out=tmp_path, progress=lambda done, *_: calls.append(done))
    assert isinstance(result, ComparisonResult)
    assert result.best == result.table[0]["initialization"]
    assert {row["initialization"] for row in result.table} == {"he-normal", "sylinit"}
    assert result.verdict.startswith(f"Best after training: {result.best}")
    assert "test accuracy (%), 2 seeds" in str(result)
    assert result.verdict in str(result)
    assert len(repr(result).splitlines()) == 1
    assert "<pre>" in result._repr_html_()
    kept = json.loads(json.dumps(result.to_dict()))
    assert len(kept["runs"]) == 4
    assert kept["table"] == result.table
    result.plot(tmp_path / "figure.png")
    result.plot(tmp_path / "curves.svg", curves=True)
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert calls[-1] == 8
    calls.clear()
    again = sylinit.compare(Wrapped, (x, y), **FEW, out=tmp_path, progress=lambda done, *_: calls.append(done))
    assert json.dumps(again.to_dict()) == json.dumps(result.to_dict())
    assert set(calls) <= {8}


def test_compare_takes_values_for_a_regression() -> None:
    x, _ = vectors(count=200)
    y = 1000 + 300 * x[:, 0] * x[:, 1].sign()
    result = sylinit.compare(
        lambda: nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 1)), (x[:150], y[:150], x[150:], y[150:]),
        **FEW,
    )  # fmt: skip
    assert result.metric == "explained variance"
    assert "test explained variance (%)" in str(result)
    assert all(-0.5 < row["after"] <= 1 for row in result.table)


def test_compare_takes_the_name_of_data_and_few_samples() -> None:
    result = sylinit.compare(lambda shape, classes: build("mlp", shape, classes), "digits", shots=3, **FEW)
    assert result.title.endswith("3 examples a class")
    assert result.to_dict()["runs"][0]["samples"] == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initializations": ("he",)}, "expected one of"),
        ({"initializations": ()}, "at least one"),
        ({"optimizer": "lion"}, "expected one of sgd, adamw"),
        ({"data": torch.zeros(4, 4)}, r"expected \(x, y\)"),
        ({"data": (1, 2, 3)}, "tuple of 3"),
        ({"data": (torch.zeros(4, 12), torch.arange(4))}, "single sample"),
        ({"model": lambda: 3}, "returns a torch.nn.Module"),
        ({"model": lambda: nn.Linear(5, 3)}, "its forward fails on samples of shape"),
        ({"model": lambda: nn.Linear(12, 5)}, "expected an output of shape"),
        ({"shots": 500}, "ask for fewer"),
    ],
)
def test_compare_says_at_once_what_is_wrong(change: dict[str, Any], message: str) -> None:
    x, y = vectors(count=60)
    given = {"model": lambda: nn.Linear(12, 3), "data": (x, y), **FEW, **change}
    with pytest.raises(SylinitError, match=message):
        sylinit.compare(given.pop("model"), given.pop("data"), **given, progress=lambda *_: pytest.fail("it runs"))


PLAN = Plan((TINY, replace(TINY, initialization="sylinit")), grid=(0.1, 0.2), seeds=(0, 1, 2), workers=1)
PACE = Pace(step=0.5, sample=0.001)


def test_forecasts_follow_the_runs_that_have_ended_and_shrink(tmp_path: Path) -> None:
    data = load("digits")
    store = Store(tmp_path / "r.jsonl")
    first = forecast(PLAN, store, PACE, data, 1)
    counted = {split: PACE.seconds(replace(TINY, split=split), data) for split in ("validation", "test")}
    assert first == pytest.approx(4 * counted["validation"] + 6 * counted["test"])
    tasks = tasks_of(lambda e: {"after": 0.5})
    seen = [first]
    for experiment in [*PLAN.tuning(), *PLAN.final({arm.method: 0.1 for arm in PLAN.arms})]:
        store.add(experiment, {"after": 0.5, "run_seconds": 3 * counted[experiment.split]})
        seen.append(forecast(PLAN, store, PACE, data, 1))
    assert seen[1] == pytest.approx(3 * (first - counted["validation"]))  # three times as slow as measured
    assert seen[1:] == sorted(seen[1:], reverse=True)
    assert seen[-1] == 0
    assert forecast(PLAN, Store(store.path), PACE, data, 1) == 0
    assert not execute(PLAN.tuning(), store, tasks)


def test_several_workers_share_the_time(tmp_path: Path) -> None:
    data, store = load("digits"), Store(tmp_path / "r.jsonl")
    store.add(PLAN.tuning()[0], {"after": 0.5, "run_seconds": 2.0})
    one, two, many = (forecast(PLAN, store, PACE, data, workers) for workers in (1, 2, 99))
    assert two == pytest.approx(one / 2)
    assert many > one / 99  # no less than the longest run


def test_a_pace_is_measured_on_the_network_itself() -> None:
    data, threads = load("digits"), torch.get_num_threads()
    state = torch.get_rng_state()
    pace = measure(TINY, data, lambda: build("mlp", data.shape, data.classes), 1)
    assert 0 < pace.step < 10
    assert 0 < pace.sample < 1
    assert torch.get_num_threads() == threads
    assert torch.equal(state, torch.get_rng_state())


def _finding(computed: float, curve: list[float]) -> Any:
    story = stories(20)[0]
    rows = []
    for arm in plan_of([story], 3, 1).arms:
        ours = arm.initialization == "sylinit"
        records = []
        for seed in range(3):
            made = record(replace(arm, seed=seed), 0.97 if ours else curve[-1])
            heights = [computed, 0.97] if ours else curve
            made.result.update(
                before=computed if ours else 0.1, seconds=8.0, samples=200, evaluated=359,
                curve=[[20.0 * place / (len(heights) - 1), height] for place, height in enumerate(heights)],
            )  # fmt: skip
            records.append(made)
        rows.append(Row(arm.method, 0.1, tuple(records)))
    return find(story, rows)


def test_the_demo_marks_the_crossing_where_it_is() -> None:
    finding = _finding(0.9, [0.1, 0.5, 0.9, 0.92, 0.95])
    assert (finding.steps, finding.crossing) == (200, 100)
    assert finding.crossing_seconds == pytest.approx(1.0 + 4.0)  # initialization, and half of training
    assert "takes 100 steps to get there, and ends at 95.0%" in finding.sentence
    assert "caught up" in finding.details
    texts = [text.get_text() for text in draw([finding]).axes[0].texts]
    assert any("catches up after 100 steps" in text for text in texts)


def test_the_demo_says_so_if_there_is_no_crossing_and_if_the_computed_network_is_behind() -> None:
    finding = _finding(0.96, [0.1, 0.5, 0.9, 0.92, 0.95])
    assert finding.crossing is None
    assert "trained for 200 steps from random weights" in finding.sentence
    assert finding.sentence.endswith("the same network ends at 95.0%.")
    texts = [text.get_text() for text in draw([finding]).axes[0].texts]
    assert "not reached in 200 steps" in texts
    behind = _finding(0.3, [0.1, 0.5, 0.9, 0.92, 0.95])
    assert behind.crossing == 50
    assert "takes 50 steps to get there" in behind.sentence

"""Experiments, the store, tuning, resuming, processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from comparing import TINY, record, tasks_of
from sylinit import SylinitError
from sylinit.comparison.data import load
from sylinit.comparison.experiment import Experiment
from sylinit.comparison.plan import TUNING_SEED, Comparison, Plan, choose
from sylinit.comparison.pool import pool
from sylinit.comparison.runner import execute, run, run_plan
from sylinit.comparison.runs import subset
from sylinit.comparison.store import Store
from sylinit.comparison.summary import Row, gap, ours, rows, verdict


def test_experiments_survive_json() -> None:
    experiment = replace(TINY, options=(("code", "pca"),), shots=None)
    back = Experiment.from_dict(json.loads(json.dumps(experiment.to_dict())))
    assert back == experiment
    assert back.key == experiment.key


def test_every_field_counts_in_the_key() -> None:
    changed: dict[str, Any] = {
        "dataset": "d", "model": "m", "initialization": "s", "shots": 3, "options": (("a", 1),), "optimizer": "adamw",
        "lr": 0.5, "epochs": 3, "seed": 4, "split": "validation", "task": "time", "setting": (("b", 2),),
    }  # fmt: skip
    keys = {replace(TINY, **{name: value}).key for name, value in changed.items()}
    assert set(changed) == set(TINY.__dataclass_fields__)
    assert len(keys | {TINY.key}) == len(changed) + 1


def test_equal_experiments_give_equal_results() -> None:
    first, second = run(TINY), run(TINY)
    for name in ("before", "after", "curve", "area"):
        assert first[name] == second[name]
    assert first["evaluated"] == len(load("digits").test_y)


@pytest.mark.parametrize("shots", [3, None])
def test_tuning_never_reads_the_test_set(shots: int | None) -> None:
    data = load("digits")
    part = subset(data, replace(TINY, shots=shots, split="validation"))
    known = {tuple(row.tolist()) for row in data.train_x.flatten(1)}
    trained = {tuple(row.tolist()) for row in part.x.flatten(1)}
    held = {tuple(row.tolist()) for row in part.test_x.flatten(1)}
    assert held <= known
    assert not held & trained


def test_initializations_share_their_subset_and_seeds_do_not() -> None:
    data = load("digits")
    assert subset(data, TINY).x.equal(subset(data, replace(TINY, initialization="sylinit", lr=1.0)).x)
    assert not subset(data, TINY).x.equal(subset(data, replace(TINY, seed=1)).x)


def test_the_best_rate_is_chosen_and_the_lower_of_equals() -> None:
    plan = Plan((TINY,), grid=(0.1, 0.2, 0.3), tuning_seeds=2)
    accuracies = {0.1: (0.2, 0.4), 0.2: (0.5, 0.6), 0.3: (0.9, 0.2)}
    records = [record(e, accuracies[e.lr][e.seed - TUNING_SEED]) for e in plan.tuning()]
    assert choose(plan, records) == {TINY.method: 0.2}
    assert choose(plan, records[:-2]) == {}  # tuning has not ended
    assert all(e.split == "validation" and e.seed not in plan.seeds for e in plan.tuning())


def test_a_plan_is_tuned_then_tested_and_a_rerun_runs_nothing(tmp_path: Path) -> None:
    ran: list[Experiment] = []

    def fake(experiment: Experiment) -> dict[str, Any]:
        ran.append(experiment)
        return {"after": experiment.lr + 0.01 * experiment.seed, "before": 0.1, "area": 0.3, "diverged": False}

    plan = Plan((TINY, replace(TINY, initialization="sylinit")), grid=(0.1, 0.2), seeds=(0, 1, 2), workers=1)
    calls: list[tuple[int, int, str]] = []
    comparison = run_plan(plan, Store(tmp_path / "r.jsonl"), lambda *call: calls.append(call), tasks=tasks_of(fake))
    assert [e.split for e in ran] == ["validation"] * 4 + ["test"] * 6
    assert {e.lr for e in ran[4:]} == {0.2}
    assert calls[-1][:2] == (10, 10)
    assert [done for done, *_ in calls] == sorted(done for done, *_ in calls)
    assert comparison.at_edge == (TINY.method, plan.arms[1].method)
    assert [row.interval("after").mean for row in rows(comparison)] == [pytest.approx(0.21)] * 2
    again = run_plan(plan, Store(tmp_path / "r.jsonl"), tasks=tasks_of(fake))
    assert len(ran) == 10
    assert again.records == comparison.records


def test_a_torn_last_line_costs_one_run(tmp_path: Path) -> None:
    tasks = tasks_of(lambda e: {"after": 0.5})
    path = tmp_path / "r.jsonl"
    experiments = [replace(TINY, seed=seed) for seed in range(4)]
    execute(experiments, Store(path), tasks)
    path.write_bytes(path.read_bytes()[:-25])
    store = Store(path)
    assert [e in store for e in experiments] == [True, True, True, False]
    execute(experiments, store, tasks)
    assert all(e in Store(path) for e in experiments)
    assert len(path.read_text().splitlines()) == 4


def test_a_killed_comparison_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    program = (
        "import time; from dataclasses import replace; from sylinit.comparison.runner import execute\n"
        "from comparing import TINY, tasks_of; from sylinit.comparison.store import Store\n"
        "def slow(e):\n    time.sleep(0.05)\n    return {'after': 0.5}\n"
        f"execute([replace(TINY, seed=s) for s in range(1000)], Store({str(path)!r}), tasks_of(slow))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[1])
    limit = time.monotonic() + 120
    while time.monotonic() < limit and (not path.exists() or path.read_bytes().count(b"\n") < 3):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    whole = path.read_bytes().count(b"\n")
    store = Store(path)
    assert 3 <= len(store.records) == whole < 1000
    assert all(replace(TINY, seed=seed) in store for seed in range(whole))


def test_a_run_that_fails_stops_no_other_and_is_named(tmp_path: Path) -> None:
    def fake(experiment: Experiment) -> dict[str, Any]:
        if experiment.initialization == "lsuv" and experiment.lr == 0.2:
            raise RuntimeError("no")
        return {"after": 0.5}

    plan = Plan(tuple(replace(TINY, initialization=s) for s in ("lsuv", "sylinit")), grid=(0.1, 0.2), workers=1)
    store = Store(tmp_path / "r.jsonl")
    with pytest.raises(SylinitError, match=r"1 runs failed.*lsuv.*0\.2.*RuntimeError: no"):
        run_plan(plan, store, tasks=tasks_of(fake))
    done = [record.experiment.initialization for record in store.records.values()]
    assert (done.count("lsuv"), done.count("sylinit")) == (1, 2 + 3)  # untuned, lsuv has no final runs


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "slow_for_test.py").write_text(
        "import os, pathlib, time\n"
        "def work(name):\n"
        "    pathlib.Path(name + '.part').write_text(str(os.getpid())); os.rename(name + '.part', name)\n"
        "    while True: time.sleep(0.05)\n"
    )
    program = (
        "from slow_for_test import work\nfrom sylinit.comparison.pool import pool\n"
        "with pool(2) as each: list(each(work, ['1', '2', '3', '4']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True
    )
    first = [tmp_path / "1", tmp_path / "2"]
    _until(lambda: all(path.exists() for path in first))
    pids = [int(path.read_text()) for path in first]
    os.kill(process.pid, how)
    process.wait(timeout=100)  # nor does Ctrl-C wait for the runs under way
    _until(lambda: not any(_alive(pid) for pid in pids))
    assert not (tmp_path / "3").exists()


def _until(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")  # ended, not yet reaped


def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    experiments = [replace(TINY, seed=seed) for seed in range(2)]
    store = Store(tmp_path / "r.jsonl")
    with pool(2) as each:
        execute(experiments, store, each=each)
    for experiment in experiments:
        assert store[experiment].result["after"] == pytest.approx(run(experiment)["after"], abs=0.02)


def test_the_verdict_says_how_sure_it_is() -> None:
    def verdict_of(scores: dict[str, list[float]]) -> str:
        plan = Plan(tuple(replace(TINY, initialization=name) for name in scores), grid=(0.1,))
        records = [
            record(replace(TINY, initialization=name, seed=seed, lr=0.1), value)
            for name, values in scores.items()
            for seed, value in enumerate(values)
        ]
        return verdict(rows(Comparison(plan, tuple(records), {})))

    clear = verdict_of({"sylinit": [0.5, 0.51, 0.52], "lsuv": [0.4, 0.41, 0.42], "he-normal": [0.1, 0.1, 0.1]})
    assert "Best after training: sylinit, 51.0" in clear
    assert "10.0 ± 0.0 points above the next, lsuv" in clear
    assert "a clear winner" in clear
    close = verdict_of({"sylinit": [0.3, 0.2, 0.3], "lsuv": [0.5, 0.4, 0.6], "he-normal": [0.4, 0.5, 0.5]})
    assert "not a clear winner" in close
    assert "sylinit is 23.3" in close
    assert "fewer than 3 seeds" in verdict_of({"sylinit": [0.5], "lsuv": [0.4]})


def test_gaps_are_paired_over_the_seeds_that_both_have() -> None:
    def row(name: str, scores: dict[int, float]) -> Row:
        method = replace(TINY, initialization=name)
        return Row(method, 0.1, tuple(record(replace(method, seed=seed), score) for seed, score in scores.items()))

    ours = row("sylinit", {0: 0.5, 1: 0.7, 2: 0.9})
    found = gap(ours, row("lsuv", {1: 0.6, 2: 0.7, 3: 0.1}))
    assert found is not None
    assert (round(found.mean, 9), found.n) == (0.15, 2)
    assert gap(ours, row("lsuv", {7: 0.1})) is None
    assert "other seeds" in verdict([ours, row("lsuv", {7: 0.1})])


def test_others_are_compared_with_plain_sylinit_or_its_first_variant() -> None:
    def rows_of(*names: str) -> list[Row]:
        return [Row(replace(TINY, initialization=name), 0.1, ()) for name in names]

    for names, expected in (
        (("lsuv", "sylinit head", "sylinit"), "sylinit"),
        (("LP-FT", "sylinit head", "sylinit all"), "sylinit head"),
        (("sylinit head", "sylinit all"), None),
        (("lsuv",), None),
    ):
        found = ours(rows_of(*names))
        assert (found and found.label) == expected

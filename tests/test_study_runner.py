"""Experiments, the store, tuning, resuming, presets, the page."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sylinit.errors import SylinitError
from sylinit.study import runner
from sylinit.study.data import load
from sylinit.study.experiment import Experiment
from sylinit.study.forecast import counted, forecast
from sylinit.study.page import recorded, write_page
from sylinit.study.panels import panels
from sylinit.study.pool import pool
from sylinit.study.presets import PRESETS, part
from sylinit.study.runner import (
    Plan,
    Study,
    as_begun,
    as_run,
    choose,
    execute,
    in_precision,
    read,
    run,
    run_study,
    subset,
)
from sylinit.study.store import Record, Store
from sylinit.study.summary import Row, epochs_to, gap, ours, rows, verdict
from sylinit.study.timing import _resident

TINY = Experiment("digits", "mlp", "he-normal", shots=2, epochs=2, setting=(("points", 2),))


def record(experiment: Experiment, after: float) -> Record:
    result = {
        "after": after, "before": 0.1, "area": 0.2, "diverged": False, "curve": [[0.0, 0.1], [10.0, after]],
        "init_seconds": 1.0, "total_seconds": 9.0,
    }  # fmt: skip
    return Record(experiment, result, {})


def test_experiments_survive_json() -> None:
    experiment = replace(TINY, options=(("code", "pca"),), shots=None)
    from dataclasses import asdict

    back = Experiment.from_dict(json.loads(json.dumps(asdict(experiment))))
    assert back == experiment
    assert back.key == experiment.key


def test_every_field_counts_in_the_key() -> None:
    changed: dict[str, Any] = {
        "dataset": "d", "model": "m", "start": "s", "shots": 3, "options": (("a", 1),), "optimiser": "adamw",
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


def test_starts_share_their_subset_and_seeds_do_not() -> None:
    data = load("digits")
    assert subset(data, TINY).x.equal(subset(data, replace(TINY, start="sylinit", lr=1.0)).x)
    assert not subset(data, TINY).x.equal(subset(data, replace(TINY, seed=1)).x)


def test_the_best_rate_is_chosen_and_the_lower_of_equals() -> None:
    plan = Plan((TINY,), grid=(0.1, 0.2, 0.3), tuning_seeds=2)
    accuracies = {0.1: (0.2, 0.4), 0.2: (0.5, 0.6), 0.3: (0.9, 0.2)}
    records = [record(e, accuracies[e.lr][e.seed - runner.TUNING_SEED]) for e in plan.tuning()]
    assert choose(plan, records) == {TINY.method: 0.2}
    assert choose(plan, records[:-2]) == {}  # tuning has not ended
    assert all(e.split == "validation" and e.seed not in plan.seeds for e in plan.tuning())


def test_a_study_tunes_then_tests_and_a_rerun_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Experiment] = []

    def fake(experiment: Experiment) -> dict[str, Any]:
        ran.append(experiment)
        return {"after": experiment.lr + 0.01 * experiment.seed, "before": 0.1, "area": 0.3, "diverged": False}

    monkeypatch.setitem(runner.TASKS, "train", fake)
    plan = Plan((TINY, replace(TINY, start="sylinit")), grid=(0.1, 0.2), seeds=(0, 1, 2), workers=1)
    calls: list[tuple[int, int, str, float]] = []
    study = run_study(plan, Store(tmp_path / "r.jsonl"), lambda *call: calls.append(call))
    assert [e.split for e in ran] == ["validation"] * 4 + ["test"] * 6
    assert {e.lr for e in ran[4:]} == {0.2}
    assert calls[-1][:2] == (10, 10)
    assert [done for done, *_ in calls] == sorted(done for done, *_ in calls)
    assert all((left == 0) == (done == 10) for done, _, _, left in calls)
    assert study.at_edge == (TINY.method, plan.arms[1].method)
    assert [row.interval("after").mean for row in rows(study)] == [pytest.approx(0.21)] * 2
    again = run_study(plan, Store(tmp_path / "r.jsonl"))
    assert len(ran) == 10
    assert again.records == study.records


def test_a_torn_last_line_costs_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runner.TASKS, "train", lambda e: {"after": 0.5})
    path = tmp_path / "r.jsonl"
    experiments = [replace(TINY, seed=seed) for seed in range(4)]
    execute(experiments, Store(path))
    path.write_bytes(path.read_bytes()[:-25])
    store = Store(path)
    assert [e in store for e in experiments] == [True, True, True, False]
    execute(experiments, store)
    assert all(e in Store(path) for e in experiments)
    assert len(path.read_text().splitlines()) == 4


def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    program = (
        "import time; from dataclasses import replace; from sylinit.study import runner\n"
        "from test_study_runner import TINY; from sylinit.study.store import Store\n"
        "def slow(e):\n    time.sleep(0.05)\n    return {'after': 0.5}\n"
        "runner.TASKS['train'] = slow\n"
        f"runner.execute([replace(TINY, seed=s) for s in range(1000)], Store({str(path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parent)
    limit = time.monotonic() + 120
    while time.monotonic() < limit and (not path.exists() or path.read_bytes().count(b"\n") < 3):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    whole = path.read_bytes().count(b"\n")
    store = Store(path)
    assert 3 <= len(store.records) == whole < 1000
    assert all(replace(TINY, seed=seed) in store for seed in range(whole))


def test_a_run_that_fails_stops_no_other_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(experiment: Experiment) -> dict[str, Any]:
        if experiment.start == "lsuv" and experiment.lr == 0.2:
            raise RuntimeError("no")
        return {"after": 0.5}

    monkeypatch.setitem(runner.TASKS, "train", fake)
    plan = Plan(tuple(replace(TINY, start=s) for s in ("lsuv", "sylinit")), grid=(0.1, 0.2), workers=1)
    store = Store(tmp_path / "r.jsonl")
    with pytest.raises(SylinitError, match=r"1 runs failed.*lsuv.*0\.2.*RuntimeError: no"):
        run_study(plan, store)
    done = [record.experiment.start for record in store.records.values()]
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
        "from slow_for_test import work\nfrom sylinit.study.pool import pool\n"
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


def test_a_part_of_a_study_is_completed_by_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runner.TASKS, "train", lambda e: {"after": e.lr, "run_seconds": 1})
    monkeypatch.setattr(runner, "prepare", lambda experiments, report: None)
    whole = replace(PRESETS["fewshot"].plan(False), workers=1)
    wanted = {"--only": ("label", ["sylinit", "lsuv"]), "--shots": ("shots", ["10"]), "--models": ("model", ["cnn"])}
    few = replace(part(whole, wanted), seeds=whole.seeds[:2])
    assert len(few) == 2 * 2 * (5 + 2)
    store = Store(tmp_path / "r.jsonl")
    assert len(run_study(few, store).records) == 8
    assert runner.remaining(whole, store)[0] == len(whole) - len(few)
    assert len(read(whole, store).records) == 8
    with pytest.raises(SylinitError, match="--shots 11: this study has 5, 10, 20"):
        part(whole, {"--shots": ("shots", ["11"])})


def test_a_task_goes_on_in_the_precision_it_was_begun_in() -> None:
    whole = replace(PRESETS["fewshot"].plan(False), seeds=(0, 1, 2))
    wanted = {"--models": ("model", ["cnn"]), "--shots": ("shots", ["10", "20"]), "--data": ("dataset", ["cifar10"])}
    plan = part(whole, wanted)
    assert {arm.get("precision") for arm in plan.arms} == {"bfloat16"}
    single = in_precision(plan, "float32")
    assert {arm.get("precision") for arm in single.arms} == {"float32"}
    assert in_precision(single, "bfloat16") == plan
    store = Store("nowhere")
    assert as_begun(single, store) == single
    for e in single.final({arm.method: 0.1 for arm in single.arms}):
        if e.start == "sylinit" and e.shots == 10:  # three runs of one start, and one in the other precision
            store.records[e.key] = record(e, 0.3)
    other = next(arm for arm in plan.arms if arm.start == "lsuv" and arm.shots == 10)
    store.records[other.key] = record(other, 0.3)
    for begun in (as_begun(plan, store), as_run(plan, store)):
        assert {arm.get("precision") for arm in begun.arms if arm.shots == 10} == {"float32"}  # of every start
        assert {arm.get("precision") for arm in begun.arms if arm.shots == 20} == {"bfloat16"}
        assert len(begun.arms) == len(plan.arms)
    timed = PRESETS["time"].plan(False)
    assert in_precision(timed, "float32") == as_begun(timed, store) == timed  # it trains nothing


def test_starts_that_are_compared_have_one_schedule() -> None:
    plan = part(PRESETS["scratch"].plan(False), {"--only": ("label", ["sylinit", "lsuv", "he-normal"])})
    assert {arm.epochs for arm in plan.arms} == {60}
    store = Store("nowhere")

    def add(epochs: int, *starts: str) -> None:
        for arm in plan.arms:
            if arm.start in starts:
                made = replace(arm, epochs=epochs, lr=0.1)
                store.records[made.key] = record(made, 0.5)

    add(4, "sylinit", "lsuv", "he-normal")
    add(60, "sylinit")
    assert {arm.epochs for arm in as_run(plan, store).arms} == {4}  # of all starts, though one has the plan's
    add(60, "lsuv", "he-normal")
    add(90, "sylinit", "lsuv", "he-normal")
    assert as_run(plan, store) == plan
    assert {arm.epochs for arm in as_run(PRESETS["fewshot"].plan(False), store).arms} > {40}  # others stay


def test_results_of_compare_over_other_grids_are_other_panels(tmp_path: Path) -> None:
    store = Store(tmp_path / "results.jsonl")
    result = {"before": 0.1, "after": 0.5, "area": 0.3, "diverged": False, "curve": [[0, 0.1], [10, 0.5]],
              "init_seconds": 1.0, "total_seconds": 2.0}  # fmt: skip
    for starts, grid in ((("sylinit", "lsuv"), (0.1, 0.3)), (("he-normal",), (0.1,))):
        plan = Plan(tuple(replace(TINY, start=start) for start in starts), grid=grid, seeds=(0, 1))
        for e in [*plan.tuning(), *plan.final({arm.method: 0.1 for arm in plan.arms})]:
            store.add(e, result)
    found = [read(plan, store) for plan in recorded(store)]
    assert sorted((len(study.records), study.plan.grid) for study in found) == [(2, (0.1,)), (4, (0.1, 0.3))]
    assert "6 runs" not in write_page(tmp_path).read_text()
    assert "4 of 4 runs" in write_page(tmp_path).read_text()  # beside the page, where compare puts them by default


def test_a_panel_says_where_precision_differs() -> None:
    records = tuple(
        record(replace(TINY, start="sylinit", shots=shots, seed=seed, lr=0.1, setting=(("precision", precision),)), 0.3)
        for shots, precision in ((5, "bfloat16"), (20, "bfloat16"), (50, "float32"))
        for seed in (0, 1)
    )
    plan = Plan(tuple({record.experiment.method for record in records}), grid=(0.1,))
    (panel,) = panels(PRESETS["fewshot"], Study(plan, records, {}))
    assert panel.remarks == ("Trained in bfloat16 (5, 20) and float32 (50) (labelled examples a class).",)
    (panel,) = panels(PRESETS["fewshot"], Study(plan, records[:4], {}))
    assert panel.remarks == ()


def test_forecasts_follow_the_runs_that_were_made() -> None:
    cnn, resnet = replace(TINY, model="cnn", shots=50), replace(TINY, model="resnet20", shots=50)
    slow = [Record(cnn, {"run_seconds": 3 * counted(cnn)}, {})]
    longer = replace(cnn, epochs=200)
    assert forecast([longer], []) == counted(longer)
    assert forecast([longer, resnet], slow) == pytest.approx(3 * (counted(longer) + counted(resnet)))
    both = [*slow, Record(resnet, {"run_seconds": counted(resnet)}, {})]
    assert forecast([longer, resnet], both) == pytest.approx(3 * counted(longer) + counted(resnet))


def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    experiments = [replace(TINY, seed=seed) for seed in range(2)]
    store = Store(tmp_path / "r.jsonl")
    with pool(2) as each:
        execute(experiments, store, each)
    for experiment in experiments:
        assert store[experiment].result["after"] == pytest.approx(run(experiment)["after"], abs=0.02)


def kept_bytes(megabytes: int) -> int:
    """By how much the resident memory of a process has risen when a block is freed again."""
    before = _resident()
    block = torch.ones(megabytes, 2**18)
    del block
    after = _resident()
    assert before is not None
    assert after is not None
    return after - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has another allocator")
def test_workers_keep_freed_memory() -> None:
    with pool(2) as each:
        ((_, kept),) = each(kept_bytes, [256])
    assert kept > 250 * 2**20


def test_the_verdict_says_how_sure_it_is() -> None:
    def study_of(scores: dict[str, list[float]]) -> str:
        plan = Plan(tuple(replace(TINY, start=name) for name in scores), grid=(0.1,))
        records = [
            record(replace(TINY, start=name, seed=seed, lr=0.1), value)
            for name, values in scores.items()
            for seed, value in enumerate(values)
        ]
        return verdict(rows(runner.Study(plan, tuple(records), {})))

    clear = study_of({"sylinit": [0.5, 0.51, 0.52], "lsuv": [0.4, 0.41, 0.42], "he-normal": [0.1, 0.1, 0.1]})
    assert "Best after training: sylinit, 51.0" in clear
    assert "10.0 ± 0.0 points above the next, lsuv" in clear
    assert "a clear winner" in clear
    close = study_of({"sylinit": [0.3, 0.2, 0.3], "lsuv": [0.5, 0.4, 0.6], "he-normal": [0.4, 0.5, 0.5]})
    assert "not a clear winner" in close
    assert "sylinit is 23.3" in close
    assert "One seed" in study_of({"sylinit": [0.5], "lsuv": [0.4]})


def test_gaps_are_paired_over_the_seeds_that_both_have() -> None:
    def row(start: str, scores: dict[int, float]) -> Row:
        method = replace(TINY, start=start)
        return Row(method, 0.1, tuple(record(replace(method, seed=seed), score) for seed, score in scores.items()))

    ours = row("sylinit", {0: 0.5, 1: 0.7, 2: 0.9})
    found = gap(ours, row("lsuv", {1: 0.6, 2: 0.7, 3: 0.1}))
    assert found is not None
    assert (round(found.mean, 9), found.n) == (0.15, 2)
    assert gap(ours, row("lsuv", {7: 0.1})) is None
    assert "other seeds" in verdict([ours, row("lsuv", {7: 0.1})])


def race_of_three(shots: int) -> list[Record]:
    """Runs of three starts over four epochs: sylinit passes the end of LSUV, the better of the others, on the way."""

    def arm(start: str, *curves: list[float], init: float = 1.0) -> list[Record]:
        return [
            Record(
                replace(TINY, start=start, seed=seed, lr=0.1, epochs=4, shots=shots),
                {
                    "before": curve[0], "after": curve[-1], "area": 0.0, "diverged": False, "init_seconds": init,
                    "total_seconds": init + 8.0, "curve": [[2.0 * i, value] for i, value in enumerate(curve)],
                },
                {},
            )
            for seed, curve in enumerate(curves)
        ]  # fmt: skip

    return [
        *arm("sylinit", [0.2, 0.4, 0.8], [0.4, 0.6, 0.8], init=2.0),
        *arm("lsuv", [0.1, 0.3, 0.6], [0.1, 0.3, 0.6]),
        *arm("he-normal", [0.1, 0.2, 0.3], [0.1, 0.2, 0.5]),
    ]


def test_how_soon_a_start_reaches_where_the_best_other_ends() -> None:
    records = race_of_three(10)
    scratch = PRESETS["scratch"]
    plan = Plan(tuple(dict.fromkeys(each.experiment.method for each in records)), grid=(0.1,))
    (panel,) = panels(scratch, runner.Study(plan, tuple(records), {}))
    (speed,) = [grid for grid in panel.tables if grid.caption.startswith("epochs")]
    assert "60.0 %, where lsuv ends" in speed.caption
    # sylinit's mean curve is 0.3, 0.5, 0.8: it crosses 0.6 a third of the way from epoch 2 to 4
    assert speed.cells[0] == ("sylinit", "2.7", "7.3", "2.00", "10.0")
    assert speed.cells[1][:3] == ("lsuv", "4.0", "9.0")
    assert speed.cells[2][:3] == ("he-normal", "never", "")
    mine = rows(runner.Study(plan, tuple(records), {}))[0]
    assert epochs_to(mine, 0.25) == 0.0
    alone = runner.Study(plan, tuple(records[:2]), {})
    assert not [grid for panel in panels(scratch, alone) for grid in panel.tables if grid.caption.startswith("epochs")]


def test_a_sweep_says_how_soon_each_start_is_there_and_what_part_of_the_time_it_takes() -> None:
    records = [*race_of_three(5), *race_of_three(20)[:4]]  # no he-normal with 20
    plan = Plan(tuple(dict.fromkeys(each.experiment.method for each in records)), grid=(0.1,))
    (panel,) = panels(PRESETS["fewshot"], runner.Study(plan, tuple(records), {}))
    epochs, seconds = panel.tables[-2:]
    assert epochs.caption.startswith("epochs until")
    assert epochs.cells == (
        ("best other", "lsuv", "lsuv"),
        ("its end (%)", "60.0", "60.0"),
        ("sylinit", "2.7", "2.7"),
        ("lsuv", "4.0", "4.0"),
        ("he-normal", "never", ""),
    )
    assert seconds.caption.startswith("seconds of the start")
    assert seconds.cells == (
        ("sylinit", "2 of 10", "2 of 10"),
        ("lsuv", "1 of 9", "1 of 9"),
        ("he-normal", "1 of 9", ""),
    )


def test_a_sweep_of_sylinit_alone_says_how_far_each_place_is_below_the_best() -> None:
    ends = {0.1: (0.2, 0.4), 1.0: (0.5, 0.5), 10.0: (0.4, 0.4)}
    records = [
        record(replace(TINY, start="sylinit", options=(("encoding_weight", place),), lr=0.1, seed=seed), value)
        for place, values in ends.items()
        for seed, value in enumerate(values)
    ]
    plan = Plan(tuple({each.experiment.method for each in records}), grid=(0.1,))
    (panel,) = panels(PRESETS["lambda"], runner.Study(plan, tuple(records), {}))
    (fall,) = [grid for grid in panel.tables if "less each other" in grid.caption and "after" in grid.caption]
    assert fall.caption.startswith("encoding_weight 1 less each other")
    assert fall.cells == (("sylinit", "+20.0 ± 127.1", "", "+10.0 ± 0.0"),)
    shots = tuple(record(replace(TINY, start="sylinit", shots=n, lr=0.1), 0.01 * n) for n in (5, 20))
    (panel,) = panels(PRESETS["fewshot"], runner.Study(plan, shots, {}))
    assert not [grid for grid in panel.tables if "less each other" in grid.caption]  # these are tasks, not choices


def test_others_are_compared_with_plain_sylinit_or_its_first_variant() -> None:
    def rows_of(*starts: str) -> list[Row]:
        return [Row(replace(TINY, start=start), 0.1, ()) for start in starts]

    for starts, expected in (
        (("lsuv", "sylinit head", "sylinit"), "sylinit"),
        (("LP-FT", "sylinit head", "sylinit all"), "sylinit head"),
        (("sylinit head", "sylinit all"), None),
        (("lsuv",), None),
    ):
        found = ours(rows_of(*starts))
        assert (found and found.label) == expected


def test_a_sweep_says_how_far_sylinit_is_above_each_other_start() -> None:
    records = [
        record(replace(TINY, start=start, seed=seed, shots=shots, lr=0.1), base + 0.1 * seed + shots / 1000)
        for start, base in (("sylinit", 0.3), ("lsuv", 0.2), ("he-normal", 0.25))
        for seed in (0, 1, 2)
        for shots in (5, 20)
        if (start, shots) != ("he-normal", 20)
    ]
    plan = Plan(tuple({record.experiment.method for record in records}), grid=(0.1,))
    (panel,) = panels(PRESETS["fewshot"], runner.Study(plan, tuple(records), {}))
    (grid,) = [table for table in panel.tables if "less each other" in table.caption and "after" in table.caption]
    assert grid.cells == (("lsuv", "+10.0 ± 0.0", "+10.0 ± 0.0"), ("he-normal", "+5.0 ± 0.0", ""))


def test_panels_name_starts_at_an_edge_of_the_grid_and_lost_runs() -> None:
    def lost(start: str, shots: int, seed: int) -> Record:
        made = record(replace(TINY, start=start, shots=shots, seed=seed, lr=0.1), 0.3)
        diverged = (start, shots, seed) == ("lsuv", 20, 1)
        return replace(made, result={**made.result, "diverged": diverged})

    records = tuple(lost(start, shots, seed) for start in ("sylinit", "lsuv") for shots in (5, 20) for seed in (0, 1))
    plan = Plan(tuple({record.experiment.method for record in records}), grid=(0.1, 0.3))
    edges = tuple(r.experiment.method for r in records if r.experiment.start == "sylinit" or r.experiment.shots == 5)
    (panel,) = panels(PRESETS["fewshot"], runner.Study(plan, records, {}, edges))
    assert panel.remarks == (
        "Best at the first or last learning rate of the grid (labelled examples a class): sylinit (5, 20); lsuv (5).",
        "Runs that diverged and count as chance (labelled examples a class): lsuv (1 at 20).",
    )
    others = tuple(r for r in records if (r.experiment.start, r.experiment.shots) == ("lsuv", 20))
    (panel,) = panels(PRESETS["scratch"], runner.Study(plan, others, {}))
    assert panel.remarks[1:] == ("Runs that diverged and count as chance: lsuv (1).",)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("quick", [True, False])
def test_presets_are_well_formed(name: str, quick: bool) -> None:
    plan = PRESETS[name].plan(quick)
    finals = replace(plan, grid=()).final({})
    assert len({e.key for e in finals}) == len(finals)
    assert len({e.key for e in plan.tuning()}) == len(plan.arms) * len(plan.grid) * plan.tuning_seeds
    if name in ("codes", "lambda", "samples"):
        assert {e.split for e in finals} == {"validation"}  # these choose defaults
    if not quick:
        assert len(plan.seeds) >= (5 if name in ("fewshot", "finetune") else 3)


def test_panels_and_page_of_every_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(experiment: Experiment) -> dict[str, Any]:
        size = float(experiment.get(str(experiment.get("sweep"))) or 1)
        return {
            "before": 0.1, "after": 0.5 + 0.01 * experiment.seed, "area": 0.4, "diverged": False,
            "curve": [[0, 0.1], [2, 0.5]], "init_seconds": size**2, "total_seconds": 9.0,
            "forward_passes": size, "extra_bytes": 10**6 * size,
        }  # fmt: skip

    for task in list(runner.TASKS):
        monkeypatch.setitem(runner.TASKS, task, fake)
    monkeypatch.setattr(runner, "prepare", lambda experiments, report: None)
    for preset in PRESETS.values():
        plan = replace(preset.plan(True), workers=1)
        store = Store(tmp_path / f"{preset.name}-quick.jsonl")
        study = run_study(plan, store)
        found = panels(preset, study)  # every table; the page below draws the figures into files
        assert found
        tables = [table for panel in found for table in panel.tables]
        assert all(panel.figures and panel.tables for panel in found)
        assert len({panel.name for panel in found}) == len(found)
        assert all(len(cells) == len(table.header) for table in tables for cells in table.cells)
        assert read(plan, store).records == study.records
        if preset.name == "time":
            powers = {table.caption: table.cells[0] for table in tables if table.header[0] == "power"}
            assert powers["seconds grow as a power of depth"] == ("sylinit", "2.00", "2.00", "1")
            assert powers["memory grows as a power of depth"] == ("sylinit", "1.00", "1.00", "0 to 1")
    text = write_page(tmp_path).read_text()
    assert text.count("<h2") == len(PRESETS)
    assert "data:image/svg+xml;base64," in text
    assert 'src="http' not in text
    assert "quick scale" in text


def test_figures_of_a_part_have_the_names_they_have_in_the_whole() -> None:
    preset = PRESETS["fewshot"]
    names = []
    for chosen in ({}, {"--models": ("model", ["cnn"])}):
        plan = part(preset.plan(False), chosen)
        records = tuple(record(replace(arm, seed=seed), 0.5) for arm in plan.arms for seed in plan.seeds)
        names.append([panel.name for panel in panels(preset, Study(plan, records, {}))])
    whole, cnn = names
    assert cnn == [name for name in whole if "cnn" in name]
    assert len(whole) > len(cnn) > 0


def test_a_page_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(SylinitError, match="no results"):
        write_page(tmp_path)

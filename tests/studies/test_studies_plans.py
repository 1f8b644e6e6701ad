"""Presets, parts of plans, forecasts, panels, the page."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from comparing import TINY, record, tasks_of
from studies.allocator import keep_freed_memory
from studies.forecast import counted, forecast
from studies.page import recorded, write_page
from studies.panels import panels
from studies.presets import PRESETS
from studies.race import epochs_to
from studies.resume import as_begun, as_run, in_precision, part
from studies.timing import _resident
from sylinit import SylinitError
from sylinit.comparison.experiment import Experiment
from sylinit.comparison.plan import Comparison, Plan, missing, read
from sylinit.comparison.pool import pool
from sylinit.comparison.runner import run_plan
from sylinit.comparison.store import Record, Store
from sylinit.comparison.summary import rows

pytestmark = pytest.mark.studies


def test_a_part_of_a_study_is_completed_by_the_whole(tmp_path: Path) -> None:
    tasks = tasks_of(lambda e: {"after": e.lr, "run_seconds": 1})
    whole = replace(PRESETS["fewshot"].plan(False), workers=1)
    wanted = {"--only": ("label", ["sylinit", "lsuv"]), "--shots": ("shots", ["10"]), "--models": ("model", ["cnn"])}
    few = replace(part(whole, wanted), seeds=whole.seeds[:2])
    assert len(few) == 2 * 2 * (5 + 2)
    store = Store(tmp_path / "r.jsonl")
    assert len(run_plan(few, store, tasks=tasks).records) == 8
    assert len(missing(whole, store)) == len(whole) - len(few)
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
        if (
            e.initialization == "sylinit" and e.shots == 10
        ):  # three runs of one initialization, and one in the other precision
            store.records[e.key] = record(e, 0.3)
    other = next(arm for arm in plan.arms if arm.initialization == "lsuv" and arm.shots == 10)
    store.records[other.key] = record(other, 0.3)
    for begun in (as_begun(plan, store), as_run(plan, store)):
        assert {arm.get("precision") for arm in begun.arms if arm.shots == 10} == {"float32"}  # of every initialization
        assert {arm.get("precision") for arm in begun.arms if arm.shots == 20} == {"bfloat16"}
        assert len(begun.arms) == len(plan.arms)
    timed = PRESETS["time"].plan(False)
    assert in_precision(timed, "float32") == as_begun(timed, store) == timed  # it trains nothing


def test_initializations_that_are_compared_have_one_schedule() -> None:
    plan = part(PRESETS["scratch"].plan(False), {"--only": ("label", ["sylinit", "lsuv", "he-normal"])})
    assert {arm.epochs for arm in plan.arms} == {60}
    store = Store("nowhere")

    def add(epochs: int, *names: str) -> None:
        for arm in plan.arms:
            if arm.initialization in names:
                made = replace(arm, epochs=epochs, lr=0.1)
                store.records[made.key] = record(made, 0.5)

    add(4, "sylinit", "lsuv", "he-normal")
    add(60, "sylinit")
    assert {arm.epochs for arm in as_run(plan, store).arms} == {4}  # of all initializations, though one has the plan's
    add(60, "lsuv", "he-normal")
    add(90, "sylinit", "lsuv", "he-normal")
    assert as_run(plan, store) == plan
    assert {arm.epochs for arm in as_run(PRESETS["fewshot"].plan(False), store).arms} > {40}  # others stay


def test_results_of_compare_over_other_grids_are_other_panels(tmp_path: Path) -> None:
    store = Store(tmp_path / "results.jsonl")
    result = {"before": 0.1, "after": 0.5, "area": 0.3, "diverged": False, "curve": [[0, 0.1], [10, 0.5]],
              "init_seconds": 1.0, "total_seconds": 2.0}  # fmt: skip
    for names, grid in ((("sylinit", "lsuv"), (0.1, 0.3)), (("he-normal",), (0.1,))):
        plan = Plan(tuple(replace(TINY, initialization=name) for name in names), grid=grid, seeds=(0, 1))
        for e in [*plan.tuning(), *plan.final({arm.method: 0.1 for arm in plan.arms})]:
            store.add(e, result)
    found = [read(plan, store) for plan in recorded(store)]
    assert sorted((len(each.records), each.plan.grid) for each in found) == [(2, (0.1,)), (4, (0.1, 0.3))]
    assert "6 runs" not in write_page(tmp_path).read_text()
    assert "4 of 4 runs" in write_page(tmp_path).read_text()  # beside the page, where compare puts them by default


def test_a_panel_says_where_precision_differs() -> None:
    records = tuple(
        record(
            replace(
                TINY, initialization="sylinit", shots=shots, seed=seed, lr=0.1, setting=(("precision", precision),)
            ),
            0.3,
        )
        for shots, precision in ((5, "bfloat16"), (20, "bfloat16"), (50, "float32"))
        for seed in (0, 1)
    )
    plan = Plan(tuple({record.experiment.method for record in records}), grid=(0.1,))
    (panel,) = panels(PRESETS["fewshot"], Comparison(plan, records, {}))
    assert panel.remarks == ("Trained in bfloat16 (5, 20) and float32 (50) (labeled examples a class).",)
    (panel,) = panels(PRESETS["fewshot"], Comparison(plan, records[:4], {}))
    assert panel.remarks == ()


def test_forecasts_follow_the_runs_that_were_made() -> None:
    cnn, resnet = replace(TINY, model="cnn", shots=50), replace(TINY, model="resnet20", shots=50)
    slow = [Record(cnn, {"run_seconds": 3 * counted(cnn)}, {})]
    longer = replace(cnn, epochs=200)
    assert forecast([longer], []) == counted(longer)
    assert forecast([longer, resnet], slow) == pytest.approx(3 * (counted(longer) + counted(resnet)))
    both = [*slow, Record(resnet, {"run_seconds": counted(resnet)}, {})]
    assert forecast([longer, resnet], both) == pytest.approx(3 * counted(longer) + counted(resnet))


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
    with pool(2, keep_freed_memory) as each:
        ((_, kept),) = each(kept_bytes, [256])
    assert kept > 250 * 2**20


def race_of_three(shots: int) -> list[Record]:
    """Runs over four epochs: on the way, sylinit passes the end of LSUV, the better of the two others."""

    def arm(start: str, *curves: list[float], init: float = 1.0) -> list[Record]:
        return [
            Record(
                replace(TINY, initialization=start, seed=seed, lr=0.1, epochs=4, shots=shots),
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


def test_how_soon_an_initialization_reaches_where_the_best_other_ends() -> None:
    records = race_of_three(10)
    scratch = PRESETS["scratch"]
    plan = Plan(tuple(dict.fromkeys(each.experiment.method for each in records)), grid=(0.1,))
    (panel,) = panels(scratch, Comparison(plan, tuple(records), {}))
    (speed,) = [grid for grid in panel.tables if grid.caption.startswith("epochs")]
    assert "60.0 %, where lsuv ends" in speed.caption
    # sylinit's mean curve is 0.3, 0.5, 0.8: it crosses 0.6 a third of the way from epoch 2 to 4
    assert speed.cells[0] == ("sylinit", "2.7", "7.3", "2.00", "10.0")
    assert speed.cells[1][:3] == ("lsuv", "4.0", "9.0")
    assert speed.cells[2][:3] == ("he-normal", "never", "")
    mine = rows(Comparison(plan, tuple(records), {}))[0]
    assert epochs_to(mine, 0.25) == 0.0
    alone = Comparison(plan, tuple(records[:2]), {})
    assert not [grid for panel in panels(scratch, alone) for grid in panel.tables if grid.caption.startswith("epochs")]


def test_a_sweep_says_how_soon_each_initialization_is_there_and_what_part_of_the_time_it_takes() -> None:
    records = [*race_of_three(5), *race_of_three(20)[:4]]  # no he-normal with 20
    plan = Plan(tuple(dict.fromkeys(each.experiment.method for each in records)), grid=(0.1,))
    (panel,) = panels(PRESETS["fewshot"], Comparison(plan, tuple(records), {}))
    epochs, seconds = panel.tables[-2:]
    assert epochs.caption.startswith("epochs until")
    assert epochs.cells == (
        ("best other", "lsuv", "lsuv"),
        ("its end (%)", "60.0", "60.0"),
        ("sylinit", "2.7", "2.7"),
        ("lsuv", "4.0", "4.0"),
        ("he-normal", "never", ""),
    )
    assert seconds.caption.startswith("seconds of the initialization")
    assert seconds.cells == (
        ("sylinit", "2 of 10", "2 of 10"),
        ("lsuv", "1 of 9", "1 of 9"),
        ("he-normal", "1 of 9", ""),
    )


def test_a_sweep_of_sylinit_alone_says_how_far_each_place_is_below_the_best() -> None:
    ends = {0.1: (0.2, 0.4), 1.0: (0.5, 0.5), 10.0: (0.4, 0.4)}
    records = [
        record(replace(TINY, initialization="sylinit", options=(("encoding_weight", place),), lr=0.1, seed=seed), value)
        for place, values in ends.items()
        for seed, value in enumerate(values)
    ]
    plan = Plan(tuple({each.experiment.method for each in records}), grid=(0.1,))
    (panel,) = panels(PRESETS["lambda"], Comparison(plan, tuple(records), {}))
    (fall,) = [grid for grid in panel.tables if "less each other" in grid.caption and "after" in grid.caption]
    assert fall.caption.startswith("weight of encoding, λ 1 less each other")
    assert fall.cells == (("sylinit", "+20.0", "", "+10.0"),)
    shots = tuple(record(replace(TINY, initialization="sylinit", shots=n, lr=0.1), 0.01 * n) for n in (5, 20))
    (panel,) = panels(PRESETS["fewshot"], Comparison(plan, shots, {}))
    assert not [grid for grid in panel.tables if "less each other" in grid.caption]  # these are tasks, not choices


def test_a_sweep_says_how_far_sylinit_is_above_each_other_initialization() -> None:
    records = [
        record(replace(TINY, initialization=start, seed=seed, shots=shots, lr=0.1), base + 0.1 * seed + shots / 1000)
        for start, base in (("sylinit", 0.3), ("lsuv", 0.2), ("he-normal", 0.25))
        for seed in (0, 1, 2)
        for shots in (5, 20)
        if (start, shots) != ("he-normal", 20)
    ]
    plan = Plan(tuple({record.experiment.method for record in records}), grid=(0.1,))
    (panel,) = panels(PRESETS["fewshot"], Comparison(plan, tuple(records), {}))
    (grid,) = [table for table in panel.tables if "less each other" in table.caption and "after" in table.caption]
    assert grid.cells == (("lsuv", "+10.0 ± 0.0", "+10.0 ± 0.0"), ("he-normal", "+5.0 ± 0.0", ""))


def test_panels_name_initializations_at_an_edge_of_the_grid_and_lost_runs() -> None:
    def lost(start: str, shots: int, seed: int) -> Record:
        made = record(replace(TINY, initialization=start, shots=shots, seed=seed, lr=0.1), 0.3)
        diverged = (start, shots, seed) == ("lsuv", 20, 1)
        return replace(made, result={**made.result, "diverged": diverged})

    records = tuple(lost(start, shots, seed) for start in ("sylinit", "lsuv") for shots in (5, 20) for seed in (0, 1))
    plan = Plan(tuple({record.experiment.method for record in records}), grid=(0.1, 0.3))
    edges = tuple(
        r.experiment.method for r in records if r.experiment.initialization == "sylinit" or r.experiment.shots == 5
    )
    (panel,) = panels(PRESETS["fewshot"], Comparison(plan, records, {}, edges))
    assert panel.remarks == (
        "Best at the first or last learning rate of the grid (labeled examples a class): sylinit (5, 20); lsuv (5).",
        "Runs that diverged and count as chance (labeled examples a class): lsuv (1 at 20).",
    )
    others = tuple(r for r in records if (r.experiment.initialization, r.experiment.shots) == ("lsuv", 20))
    (panel,) = panels(PRESETS["scratch"], Comparison(plan, others, {}))
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


def test_panels_and_page_of_every_preset(tmp_path: Path) -> None:
    def fake(experiment: Experiment) -> dict[str, Any]:
        size = float(experiment.get(str(experiment.get("sweep"))) or 1)
        return {
            "before": 0.1, "after": 0.5 + 0.01 * experiment.seed, "area": 0.4, "diverged": False,
            "curve": [[0, 0.1], [2, 0.5]], "init_seconds": size**2, "total_seconds": 9.0,
            "forward_passes": size, "extra_bytes": 10**6 * size,
        }  # fmt: skip

    for preset in PRESETS.values():
        plan = replace(preset.plan(True), workers=1)
        store = Store(tmp_path / f"{preset.name}-quick.jsonl")
        comparison = run_plan(plan, store, tasks=tasks_of(fake))
        found = panels(preset, comparison)  # every table; the page below draws the figures into files
        assert found
        tables = [table for panel in found for table in panel.tables]
        assert all(panel.figures and panel.tables for panel in found)
        assert len({panel.name for panel in found}) == len(found)
        assert all(len(cells) == len(table.header) for table in tables for cells in table.cells)
        assert read(plan, store).records == comparison.records
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
        names.append([panel.name for panel in panels(preset, Comparison(plan, records, {}))])
    whole, cnn = names
    assert cnn == [name for name in whole if "cnn" in name]
    assert len(whole) > len(cnn) > 0


def test_a_page_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(SylinitError, match="no results"):
        write_page(tmp_path)

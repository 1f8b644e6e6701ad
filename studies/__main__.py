"""The command ``python -m studies``: run the experiments of one question, or write the page of all answers."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from studies.allocator import keep_freed_memory
from studies.forecast import forecast
from studies.page import results_file, write_page
from studies.panels import Panel, panels
from studies.precision import PRECISIONS, fast_precision
from studies.presets import PRESETS
from studies.resume import as_begun, as_run, in_precision, part
from studies.tasks import TASKS, open_store
from sylinit import SylinitError
from sylinit.comparison.figures import save
from sylinit.comparison.plan import Comparison, Plan, missing, read
from sylinit.comparison.pool import cores
from sylinit.comparison.runner import run_plan
from sylinit.comparison.runs import device
from sylinit.comparison.store import Store
from sylinit.comparison.terminal import console, duration, progress_bar, run_app, waiting, words

app = typer.Typer(
    name="studies",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.command(
    epilog="Examples: [bold]python -m studies fewshot --quick[/bold], then [bold]python -m studies report[/bold]"
)
def study(
    preset: Annotated[
        str,
        typer.Argument(
            metavar="PRESET",
            help="fewshot, scratch, finetune, codes, lambda, samples, time, learning-rate; "
            "or report, which collects all results into one page.",
        ),
    ],
    quick: Annotated[bool, typer.Option("--quick", help="A small version, to try it.")] = False,
    out: Annotated[Path, typer.Option(help="Directory of the results; a rerun resumes.")] = Path("runs/study"),
    only: Annotated[str, typer.Option(help="A part: comma-separated initializations, such as 'he-normal,sylinit'.")] = (
        ""
    ),
    models: Annotated[str, typer.Option(help="A part: comma-separated networks.")] = "",
    data: Annotated[str, typer.Option(help="A part: comma-separated data sets.")] = "",
    shots: Annotated[str, typer.Option(help="A part: comma-separated numbers of examples a class.")] = "",
    seeds: Annotated[int | None, typer.Option(min=1, help="Repetitions; by default as many as the preset has.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="A shorter or longer schedule than the preset's.")] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="float32, or bfloat16 for mixed precision; by default what a part was begun in, else bfloat16 unless "
            "the GPU lacks it."
        ),
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what there is to run and stop.")] = False,
    cifar10: Annotated[str, typer.Option(help="Local copy of CIFAR-10; by default from the hub.")] = "",
    fashion_mnist: Annotated[str, typer.Option(help="Local copy of Fashion-MNIST; by default from the hub.")] = "",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")] = None,
) -> None:
    """Answer one question about initializations computed from data, or write the page of all answers.

    Results of a part go into the file of the whole, so that a later run without the options for parts completes it.
    """
    if preset == "report":
        with waiting("drawing"):
            page = write_page(out)
        console.print(f"page: {page}", highlight=False, soft_wrap=True)
        return
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, [*PRESETS, "report"], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SylinitError(f"study {preset!r}: expected {', '.join(PRESETS)} or report{hint}")
    for name, copy in (("CIFAR10", cifar10), ("FASHION_MNIST", fashion_mnist)):
        if copy:  # worker processes inherit it
            os.environ[f"SYLINIT_{name}"] = str(Path(copy).resolve()) if Path(copy).exists() else copy
    chosen = PRESETS[preset]
    wanted = {"--only": ("label", only), "--models": ("model", models), "--data": ("dataset", data)}
    wanted["--shots"] = ("shots", shots)
    plan = part(chosen.plan(quick), {option: (name, words(text)) for option, (name, text) in wanted.items() if text})
    plan = replace(
        plan,
        arms=tuple(replace(arm, epochs=epochs) for arm in plan.arms) if epochs else plan.arms,
        seeds=tuple(range(seeds)) if seeds else plan.seeds,
        workers=workers or plan.workers,
    )
    path = results_file(out, chosen, quick)
    if epochs and all(arm.task == "time" for arm in plan.arms):
        raise SylinitError(f"--epochs {epochs}: {preset} trains nothing; leave it out")
    if precision and precision not in PRECISIONS:
        raise SylinitError(f"--precision {precision}: expected {' or '.join(PRECISIONS)}")
    if precision and not any(arm.get("precision") for arm in plan.arms):
        raise SylinitError(f"--precision: {preset}{' --quick' if quick else ''} has none to choose; leave it out")
    fast = fast_precision(device())
    plan = in_precision(plan, precision or fast)
    store = open_store(path)
    plan = plan if precision else as_begun(plan, store)
    console.print(chosen.question)
    used = sorted({arm.get("precision") for arm in plan.arms} - {None})
    if used:
        slow = "bfloat16" in used and fast != "bfloat16"
        console.print(
            f"Trained in {' and '.join(used)}.{' This GPU must emulate bfloat16, which is slow.' if slow else ''}"
        )
    _announce(plan, store)
    if dry_run:
        return
    found = panels(chosen, _run(plan, store))
    # a part's figures show what there is of the whole: the same file name, the same figure
    drawn = {panel.name: panel for panel in panels(chosen, read(as_run(chosen.plan(quick), store), store))}
    for panel in found:
        _print_panel(panel)
        for name, figure in drawn.get(panel.name, panel).figures:
            save(figure, out / "figures" / f"{path.stem}-{panel.name}-{name}")
    console.print(
        f"figures: {out / 'figures'}; page of all results: python -m studies report --out {out}", soft_wrap=True
    )


def _run(plan: Plan, store: Store) -> Comparison:
    with progress_bar("runs") as progress:
        return run_plan(plan, store, _with_forecast(progress, plan, store), tasks=TASKS, start_worker=keep_freed_memory)


def _with_forecast(
    progress: Callable[[int, int, str, float], None], plan: Plan, store: Store
) -> Callable[[int, int, str], None]:
    """Progress that also says how many seconds are left."""

    def report(done: int, total: int, what: str) -> None:
        progress(done, total, what, _seconds_left(plan, store))

    return report


def _seconds_left(plan: Plan, store: Store) -> float:
    return forecast(missing(plan, store), store.records.values()) / (plan.workers or cores())


def _announce(plan: Plan, store: Store) -> None:
    """Say how many runs there are and how long they will take."""
    lacking, tuning = len(missing(plan, store)), len(plan.tuning())
    console.print(f"{tuning} runs to tune, {len(plan) - tuning} to report; {len(plan) - lacking} are done.", end=" ")
    if lacking:
        workers = plan.workers or cores()
        console.print(
            f"About {duration(_seconds_left(plan, store))} on {workers} {'process' if workers == 1 else 'processes'}, "
            "by a rough count. Stop it at any time: the same command goes on from there.",
            highlight=False,
        )
    else:
        console.print("")


def _print_panel(panel: Panel) -> None:
    for grid in panel.tables:
        # not as the table's title, which would be folded to the width of a narrow table
        console.print(f"{panel.title}: {grid.caption}", style="italic", highlight=False, markup=False)
        table = Table()
        for place, name in enumerate(grid.header):
            table.add_column(name, justify="right" if place else "left", no_wrap=not place)
        for cells in grid.cells:
            table.add_row(*cells, style="bold" if cells[0] == "sylinit" else None)
        console.print(table)
    for remark in panel.remarks:
        console.print(remark, highlight=False, markup=False)


if __name__ == "__main__":
    run_app(app)

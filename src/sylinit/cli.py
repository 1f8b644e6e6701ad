"""The commands: `sylinit demo`, `init`, `compare` and `study`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sylinit import __version__
from sylinit.errors import SylinitError

try:
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.table import Table
    from rich.text import Text
except ImportError as missing:  # pragma: no cover
    raise SystemExit(f"the sylinit command needs more packages: pip install 'sylinit[study]' ({missing})") from missing

if TYPE_CHECKING:
    from sylinit.study.runner import Study
    from sylinit.study.store import Store
    from sylinit.study.summary import Row

app = typer.Typer(
    name="sylinit",
    help="Start neural networks from data instead of from noise.",
    epilog="Try [bold]sylinit demo[/bold] first: it takes less than a minute.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

PATIENCE = 2.0
"""Seconds after which a progress bar appears."""

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="mlp, cnn, resnet20, resnet56, resnet110, resnet18, vit-tiny, or module:factory, "
        "where factory(shape, classes) or factory() returns the model.",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        metavar="DATA",
        help="digits, a directory of Parquet files or image folders, a hub id, or a .npz file with x and y.",
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"sylinit {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Start neural networks from data instead of from noise."""


@app.command(epilog="Example: [bold]sylinit demo --shots 10 --seeds 5[/bold]")
def demo(
    shots: Annotated[int, typer.Option(min=1, help="Labelled examples of each digit.")] = 10,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, each with other examples.")] = 5,
    out: Annotated[Path, typer.Option(help="Directory of the figure and the results.")] = Path("sylinit-demo"),
    workers: Workers = None,
) -> None:
    """Learn handwritten digits from a few examples, from six starting points. Under a minute."""
    from sylinit.study.experiment import Experiment
    from sylinit.study.runner import Plan
    from sylinit.study.store import Store

    names = ("he-uniform", "he-normal", "xavier-uniform", "xavier-normal", "orthogonal", "sylinit")
    arms = tuple(Experiment("digits", "mlp", name, shots, epochs=20, setting=(("points", 20),)) for name in names)
    plan = Plan(arms, grid=(0.003, 0.01, 0.03, 0.1), seeds=tuple(range(seeds)), workers=workers)
    console.print(f"Handwritten digits, {shots} examples of each, {seeds} seeds; a perceptron of three layers.")
    study = _run(plan, Store(out / "results.jsonl"))
    _show(study, out / "demo", f"Digits from {shots} examples each")


@app.command(epilog="Example: [bold]sylinit init resnet20 --data digits --out weights.safetensors[/bold]")
def init(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="Where the weights go, as safetensors.")] = Path("weights.safetensors"),
    report: Annotated[Path | None, typer.Option(help="Where the report goes, as JSON.")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Training samples to compute the weights from.")] = 2000,
    train_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Samples that the model will be trained on. By default all of DATA.", show_default=False
        ),
    ] = None,
    code: Annotated[str, typer.Option(help="The latent code; see sylinit.CODES.")] = "mixed",
    encoding_weight: Annotated[
        float | None,
        typer.Option(
            help="Lambda: encoding against decoding. By default 4; the head finds its own.", show_default=False
        ),
    ] = None,
    solver: Annotated[
        str, typer.Option(help="auto, or exact: never approximate the equation of a wide layer.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the samples and of everything random.")] = 0,
) -> None:
    """Compute the weights of MODEL from DATA and write them to a file."""
    import torch
    from safetensors.torch import save_model

    import sylinit
    from sylinit.study.data import load
    from sylinit.study.models import build

    for path in filter(None, (out, report)):
        if not path.parent.is_dir():
            raise SylinitError(f"{path}: the directory {path.parent} does not exist; create it first")
    with _waiting("loading data"):
        dataset = load(data)
    torch.manual_seed(seed)
    network = build(model, dataset.shape, dataset.classes)
    index = torch.randperm(len(dataset.train_y), generator=torch.Generator().manual_seed(seed))[:samples]
    batches = [(dataset.train_x[part], dataset.train_y[part]) for part in index.split(500)]
    with _bar("layers") as progress:
        result = sylinit.initialize_(
            network,
            batches,
            code=code,
            encoding_weight=encoding_weight,
            train_size=train_size or len(dataset.train_y),
            solver=solver,
            generator=torch.Generator().manual_seed(seed),
            progress=progress,
        )
    save_model(network, str(out))
    console.print(str(result), highlight=False, markup=False, soft_wrap=True)
    console.print(f"weights: {out}", highlight=False)
    if report is not None:
        result.to_json(report)
        console.print(f"report:  {report}", highlight=False)


@app.command(epilog="Example: [bold]sylinit compare cnn --data digits --shots 20 --seeds 3[/bold]")
def compare(
    model: Model,
    data: Data,
    shots: Annotated[int, typer.Option(min=1, help="Labelled examples a class.")] = 50,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, each with other examples.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the examples, the same for every start.")] = 20,
    starts: Annotated[str, typer.Option(help="Comma-separated starts, or 'all'.")] = (
        "pytorch,he-normal,xavier-normal,orthogonal,lsuv,pca-whitening,sylinit"
    ),
    grid: Annotated[str, typer.Option(help="Comma-separated learning rates to tune each start over.")] = "",
    optimiser: Annotated[str, typer.Option(help="sgd or adamw.")] = "sgd",
    out: Annotated[Path, typer.Option(help="Directory of the results; a rerun resumes.")] = Path("sylinit-compare"),
    workers: Workers = None,
) -> None:
    """Train MODEL on DATA from each starting point and say which is best.

    The learning rate of each start is tuned over one shared grid on training data that is held back; then every start
    is trained on the same examples, seed by seed, and measured on the test set, which nothing before has read.
    """
    from sylinit.study.data import few_shot, held_back, load
    from sylinit.study.experiment import Experiment
    from sylinit.study.models import build, fingerprint
    from sylinit.study.runner import GRIDS, Plan
    from sylinit.study.starts import STARTS, check_start
    from sylinit.study.store import Store

    names = list(STARTS) if starts == "all" else list(dict.fromkeys(_words(starts)))
    for name in names:
        check_start(name)
    if optimiser not in GRIDS:
        raise SylinitError(f"--optimiser {optimiser}: expected one of {', '.join(GRIDS)}")
    rates = _numbers(grid, "--grid") if grid else GRIDS[optimiser]
    with _waiting("loading data"):
        dataset = load(data)
    # what cannot work should say so now, not in the middle of a run
    build(model, dataset.shape, dataset.classes)
    held_back(dataset.train_y, few_shot(dataset.train_y, shots, 0), 1, 0)
    source = str(Path(data).resolve()) if Path(data).exists() else data
    # results of other data or another model of the same name are not those of these
    setting = tuple(
        (key, value) for key, value in (("data", dataset.fingerprint), ("source", fingerprint(model))) if value
    )
    arms = tuple(
        Experiment(source, model, name, shots, optimiser=optimiser, epochs=epochs, setting=setting) for name in names
    )
    plan = Plan(arms, grid=rates, seeds=tuple(range(seeds)), workers=workers)
    size = len(dataset.test_y)
    console.print(
        f"{model} on {data}: {shots} examples of each of {dataset.classes} classes, {epochs} epochs, {seeds} seeds; "
        f"measured on {size:,} test samples ({dataset.note}).",
        highlight=False,
    )
    study = _run(plan, Store(out / "results.jsonl"))
    _show(study, out / f"{model.replace(':', '-')}-{shots}", f"{model}, {shots} examples a class")


@app.command(epilog="Examples: [bold]sylinit study fewshot --quick[/bold], then [bold]sylinit study report[/bold]")
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
    out: Annotated[Path, typer.Option(help="Directory of the results; a rerun resumes.")] = Path("sylinit-study"),
    only: Annotated[str, typer.Option(help="A part: comma-separated starts, such as 'he-normal,sylinit'.")] = "",
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
    workers: Workers = None,
) -> None:
    """Answer one question about starts from data, or write the page of all answers.

    Results of a part go into the file of the whole, so that a later run without the options for parts completes it.
    """
    import difflib
    from dataclasses import replace

    from sylinit.study.figures import save
    from sylinit.study.page import results_file, write_page
    from sylinit.study.panels import panels
    from sylinit.study.precision import PRECISIONS, fast_precision
    from sylinit.study.presets import PRESETS, part
    from sylinit.study.runner import as_begun, as_run, device, in_precision, read
    from sylinit.study.store import Store

    if preset == "report":
        with _waiting("drawing"):
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
    plan = part(chosen.plan(quick), {option: (name, _words(text)) for option, (name, text) in wanted.items() if text})
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
    store = Store(path)
    plan = plan if precision else as_begun(plan, store)
    console.print(chosen.question)
    used = sorted({arm.get("precision") for arm in plan.arms} - {None})
    if used:
        slow = "bfloat16" in used and fast != "bfloat16"
        console.print(
            f"Trained in {' and '.join(used)}.{' This GPU must emulate bfloat16, which is slow.' if slow else ''}"
        )
    if dry_run:
        _announce(plan, store)
        return
    found = panels(chosen, _run(plan, store))
    # a part's figures show what there is of the whole: the same file name, the same figure
    drawn = {panel.name: panel for panel in panels(chosen, read(as_run(chosen.plan(quick), store), store))}
    for panel in found:
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
        for name, figure in drawn.get(panel.name, panel).figures:
            save(figure, out / "figures" / f"{path.stem}-{panel.name}-{name}")
    console.print(f"figures: {out / 'figures'}; page of all results: sylinit study report --out {out}", soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors that a user can mend are one message and exit code 1, without a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends as Ctrl-C does
    try:
        app(given)
    except SylinitError as error:
        if debug:
            raise
        errors.print(f"[bold red]error:[/bold red] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        errors.print("stopped; results of runs that ended are kept, the same command goes on from there")
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        errors.print(
            f"[bold red]error:[/bold red] {_escaped(f'{type(error).__name__}: {error}')} "
            "(run again with --debug for the traceback)",
            highlight=False,
            soft_wrap=True,
        )
        raise SystemExit(1) from None


def _run(plan: Any, store: Store) -> Study:
    from sylinit.study.runner import run_study

    _announce(plan, store)
    with _bar("runs") as progress:
        return run_study(plan, store, progress)


def _announce(plan: Any, store: Store) -> None:
    """Say how many runs there are and how long they will take."""
    from sylinit.study.pool import cores
    from sylinit.study.runner import remaining

    missing, seconds = remaining(plan, store)
    workers = plan.workers or cores()
    tuning = len(plan.tuning())
    console.print(f"{tuning} runs to tune, {len(plan) - tuning} to report; {len(plan) - missing} are done.", end=" ")
    if missing:
        console.print(
            f"About {_duration(seconds / workers)} on {workers} {'process' if workers == 1 else 'processes'}, by a "
            "rough count. Stop it at any time: the same command goes on from there.",
            highlight=False,
        )
    else:
        console.print("")


def _show(study: Study, figure: Path, title: str) -> None:
    """Table, verdict and figures of a study that compares starts on one task."""
    from sylinit.study.figures import before_and_after, learning_curves, save
    from sylinit.study.summary import rows, verdict

    found = rows(study)
    console.print(_table(found, title))
    console.print(verdict(found), highlight=False, markup=False)
    files = save(before_and_after(found, title), figure)
    files += save(learning_curves(found, title), figure.with_name(figure.name + "-curves"))
    console.print("figures: " + ", ".join(str(file) for file in files if file.suffix == ".png"), soft_wrap=True)


def _table(rows: Sequence[Row], title: str) -> Table:
    from sylinit.study.summary import ranked

    table = Table(title=f"{title}: test accuracy (%) ± 95 % interval over seeds", title_justify="left", pad_edge=False)
    table.add_column("start", no_wrap=True)
    for column in ("before", "after", "mean", "lr", "init s", "all s"):
        table.add_column(column, justify="right", no_wrap=True)
    for place, row in enumerate(ranked(rows)):
        after = row.interval("after").percent() + (f" ({row.diverged} diverged)" if row.diverged else "")
        table.add_row(
            row.label,
            row.interval("before").percent(),
            after,
            row.interval("area").percent(),
            f"{row.lr:g}" + (" *" if row.at_edge else ""),
            f"{row.interval('init_seconds').mean:.2f}",
            f"{row.interval('total_seconds').mean:.1f}",
            style="bold" if not place else None,
        )
    table.caption = "before, after and mean over training; lr chosen on held-back data (* the grid's first or last)"
    table.caption_justify = "left"
    return table


class _Left(ProgressColumn):
    """Time left, as the work at hand says, or else as the pace so far says."""

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        left = task.time_remaining if ends is None else max(0.0, ends - time.monotonic())
        return Text("" if left is None else f"{_duration(left)} left")


@contextmanager
def _bar(unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar that shows itself only once the work has taken `PATIENCE` seconds."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        _Left(),
        console=errors,
        transient=True,
    )
    task = bar.add_task("", total=None, ends=None)
    # by a clock, not by an update: the first run of a study may take minutes
    timer = threading.Timer(PATIENCE, bar.start)
    timer.daemon = True
    timer.start()

    def update(done: int, total: int, name: str, left: float | None = None) -> None:
        ends = None if left is None else time.monotonic() + left
        bar.update(task, completed=done, total=total, description=_escaped(name), ends=ends)

    try:
        yield update
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def _duration(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``3 h 20 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    with errors.status(what):
        yield


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        values = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise SylinitError(f"{option} {text}: expected numbers with commas between them, such as 0.03,0.1") from None
    if not all(value > 0 for value in values):
        raise SylinitError(f"{option} {text}: learning rates must be positive")
    return values


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()

"""The commands: `sylinit demo`, `init`, `info` and `compare`."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import sylinit
from sylinit import SylinitError

try:
    import typer

    from sylinit.comparison.terminal import console, duration, progress_bar, quiet, run_app, stoppable, waiting, words
except ImportError as missing:  # pragma: no cover
    raise SystemExit(f"the sylinit command needs more packages: pip install 'sylinit[cli]' ({missing})") from missing

if TYPE_CHECKING:
    from sylinit.comparison.api import ComparisonResult

app = typer.Typer(
    name="sylinit",
    help="Start neural networks from data instead of from noise.",
    epilog="Try [bold]sylinit demo[/bold] first: it takes less than a minute.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="mlp, cnn, fcn, resnet20, resnet56, resnet110, resnet18, vit-tiny, or module:factory, "
        "where factory(shape, classes) or factory() returns the model.",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        metavar="DATA",
        help="digits, a .csv file with a header, a .npz file with x and y, a directory of Parquet files or of a folder "
        "of images for each class, a hub id (owner/name), or aeon:NAME for a time series that aeon contains.",
    ),
]
Label = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN", help="Column with the target. By default label, y, target or class.", show_default=False
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; by default one a core.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(f"sylinit {sylinit.__version__}", highlight=False)
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
    shots: Annotated[int, typer.Option(min=1, help="Labeled examples of each digit.")] = 20,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, each with other examples.")] = 3,
    out: Annotated[Path, typer.Option(help="Directory of the figure; it is replaced.")] = Path("sylinit-demo"),
    workers: Workers = None,
) -> None:
    """A network computed from data beside the same network trained from random weights. Under a minute."""
    from sylinit.comparison.demo import draw, find, plan_of, stories
    from sylinit.comparison.figures import save
    from sylinit.comparison.runner import run_plan
    from sylinit.comparison.store import Store
    from sylinit.comparison.summary import rows

    say = partial(console.print, highlight=False, soft_wrap=True)
    told = stories(shots)
    for story in told:
        say(story.title)
    say(f"Trained from every initialization, learning rates tuned on held-back data, {seeds} seeds: under a minute.\n")
    with stoppable(lambda: "no figure was drawn; the demo measures everything anew"):
        with progress_bar("runs") as progress, tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder) / "results.jsonl")
            found = rows(run_plan(plan_of(told, seeds, workers), store, progress, start_worker=quiet))
        findings = [find(story, found) for story in told]
        files = save(draw(findings), out / "demo")
    for finding in findings:
        say(f"{finding.story.name}: {finding.details}\n")
    if len(told) == 1:
        say("A time series joins the demo where aeon is installed: pip install aeon")
    say(f"figure: {files[0]}\n")
    say(f"[bold]{findings[0].sentence}[/bold]")


@app.command(epilog="Example: [bold]sylinit init resnet20 --data digits --out weights.safetensors[/bold]")
def init(
    model: Model,
    data: Data,
    label: Label = None,
    task: Annotated[
        str, typer.Option(help="multiclass, binary, regression or none; auto reads it off the targets.")
    ] = "auto",
    normalize: Annotated[
        str,
        typer.Option(
            help="standard: each channel or column to mean 0 and variance 1; scale: bytes to 0..1; none. "
            "The file and the report say what was done."
        ),
    ] = "standard",
    weights: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights to start from. Only the head is computed then, unless --layers names more.",
            show_default=False,
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER", help="Layer whose outputs are the predictions. By default it is found.", show_default=False
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERNS",
            help="Comma-separated patterns of layer names, such as 'blocks.3*,head'; the others keep their weights.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the weights go, as safetensors.")] = Path("weights.safetensors"),
    report: Annotated[Path | None, typer.Option(help="Where the report goes, as JSON.", show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    samples: Annotated[int, typer.Option(min=2, help="Training samples to compute the weights from.")] = 2000,
    train_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Samples that the model will be trained on. By default all of DATA.", show_default=False
        ),
    ] = None,
    code: Annotated[
        str | None,
        typer.Option(
            help="A recipe (auto, mixed, half, own) or a latent code (see sylinit.CODES). By default auto: recipes are "
            "tried on samples that are held out, and the best is taken.",
            show_default=False,
        ),
    ] = None,
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
    from sylinit.comparison.making import TASKS, compute, prepare
    from sylinit.comparison.weights import save_weights

    if task not in TASKS:
        raise SylinitError(f"--task {task}: expected one of {', '.join(TASKS)}")
    for path in filter(None, (out, report)):
        _require_writable(path, force)
    if encoding_weight is None:
        config = sylinit.Config(solver=solver)  # type: ignore[arg-type]
    else:
        config = sylinit.Config(
            solver=solver,  # type: ignore[arg-type]
            encoding_weight=encoding_weight,
            head_encoding_weight=encoding_weight,
        )
    options: dict[str, Any] = {"config": config} | ({} if code is None else {"code": code})
    with stoppable(lambda: "nothing was written; the same command starts again"):
        made = prepare(model, data, label, task, normalize, weights, samples, seed)
        result = compute(
            made,
            task=task,
            head_only=weights is not None and layers is None,
            head=head,
            layers=None if layers is None else words(layers),
            train_size=train_size,
            options=options,
        )
        description = made.description(sylinit.__version__, result.headline())
        save_weights(made.network, out, description)
        if report is not None:
            text = json.dumps({**result.to_dict(), "description": description}, indent=2)
            report.write_text(text + "\n", encoding="utf-8")
    headline, _, rest = str(result).partition("\n")
    console.print(headline, highlight=False, markup=False, soft_wrap=True, style="bold")
    console.print(f"normalization: {made.dataset.normalization}", highlight=False, markup=False, soft_wrap=True)
    apart = f"{len(made.dataset.test_y):,} test samples, which were not read ({made.dataset.note})"
    console.print(f"held back: {apart}", highlight=False, markup=False, soft_wrap=True)
    if made.dataset.features:
        console.print(f"columns: {', '.join(made.dataset.features)}", highlight=False, markup=False, soft_wrap=True)
    for note in made.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    console.print(rest, highlight=False, markup=False, soft_wrap=True)
    console.print(f"weights: {out} (how to load them: sylinit info {out})", highlight=False, soft_wrap=True)
    if report is not None:
        console.print(f"report:  {report}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: [bold]sylinit info weights.safetensors[/bold]")
def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `sylinit init` wrote.")],
) -> None:
    """Say what a weights file was made from, and how to load it."""
    from sylinit.comparison.making import loading_snippet
    from sylinit.comparison.weights import read_description

    description, shapes = read_description(file)
    total = sum(math.prod(shape) for shape in shapes.values())
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(f"{file}: {len(shapes)} tensors, {total:,} numbers")
    if not description:
        say("It does not say how it was made; `sylinit init` writes files that do.")
        return
    say(
        f"{description['model']} on {description['data']}, {description['samples']} samples, seed {description['seed']}"
    )
    say(description["before"])
    say(f"samples: shape {description['shape']}")
    if description["features"]:
        say(f"columns: {', '.join(description['features'])}")
    if description["classes"]:
        say(f"classes: {', '.join(description['classes'])}")
    say(f"normalization: {description['normalization']['text']}")
    say(f"made with sylinit {description['sylinit']}\n")
    say(loading_snippet(file, description))


@app.command(epilog="Example: [bold]sylinit compare cnn --data digits --shots 20 --seeds 3[/bold]")
def compare(
    model: Model,
    data: Data,
    label: Label = None,
    task: Annotated[str, typer.Option(help="classification or regression; auto reads it off the targets.")] = "auto",
    shots: Annotated[int, typer.Option(min=1, help="Labeled examples of each class; in a regression, in all.")] = 50,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions, each with other examples.")] = 3,
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the examples, the same for every initialization.")
    ] = 20,
    initializations: Annotated[str, typer.Option(help="Comma-separated initializations, or 'all'.")] = (
        "pytorch,he-normal,xavier-normal,orthogonal,lsuv,pca-whitening,sylinit"
    ),
    grid: Annotated[str, typer.Option(help="Comma-separated learning rates to tune each initialization over.")] = "",
    optimizer: Annotated[str, typer.Option(help="sgd or adamw.")] = "sgd",
    out: Annotated[Path, typer.Option(help="Directory of the results; a rerun resumes.")] = Path("sylinit-compare"),
    workers: Workers = None,
) -> None:
    """Train MODEL on DATA from each initialization and say which is best.

    The learning rate of each is tuned over one shared grid on training data that is held back; then each is trained on
    the same examples, seed by seed, and measured on the test set, which nothing before has read.
    """
    import torch

    from sylinit.comparison.api import METRICS, ComparisonResult
    from sylinit.comparison.data import few_shot, held_back, load
    from sylinit.comparison.experiment import Experiment
    from sylinit.comparison.figures import plain
    from sylinit.comparison.forecast import forecast, measure
    from sylinit.comparison.initializations import INITIALIZATIONS, check_initialization
    from sylinit.comparison.models import build, check_model, fingerprint
    from sylinit.comparison.plan import GRIDS, Plan, missing
    from sylinit.comparison.pool import cores
    from sylinit.comparison.runner import run_plan
    from sylinit.comparison.store import Store
    from sylinit.comparison.summary import rows

    names = list(INITIALIZATIONS) if initializations == "all" else list(dict.fromkeys(words(initializations)))
    for name in names:
        check_initialization(name)
    if optimizer not in GRIDS:
        raise SylinitError(f"--optimizer {optimizer}: expected one of {', '.join(GRIDS)}")
    rates = _numbers(grid, "--grid") if grid else GRIDS[optimizer]
    with waiting("loading data"):
        dataset = load(data, label, task)
    # what cannot work should say so now, not in the middle of a run
    check_model(build(model, dataset.shape, dataset.classes), dataset, model)
    held_back(dataset.train_y, few_shot(dataset.train_y, shots, 0), 1, 0)
    source = str(Path(data).resolve()) if Path(data).exists() else data
    # results of other data or another model of the same name are not those of these
    given = (("data", dataset.fingerprint), ("source", fingerprint(model)), ("column", label))
    setting = tuple((key, value) for key, value in (*given, ("targets", task if task != "auto" else None)) if value)
    arms = tuple(
        Experiment(source, model, name, shots, optimizer=optimizer, epochs=epochs, setting=setting) for name in names
    )
    processes = workers or cores()
    plan = Plan(arms, grid=rates, seeds=tuple(range(seeds)), workers=processes)
    store = Store(out / "results.jsonl")
    few = f"{shots} examples" + ("" if dataset.task == "regression" else " a class")
    console.print(
        f"{model} on {data}: {few} ({dataset.classes} outputs), {epochs} epochs, "
        f"{seeds} seed{'s' * (seeds > 1)}; "
        f"measured on {len(dataset.test_y):,} test samples ({dataset.note}).",
        highlight=False,
        soft_wrap=True,
    )
    tuning, lacking = len(plan.tuning()), len(missing(plan, store))

    def kept() -> str:
        stored = Store(store.path)  # Ctrl-C may come between the disk and `store`
        done = len(plan) - len(missing(plan, stored))
        return f"{done} of {len(plan)} runs are kept in {store.path}; the same command goes on from there"

    with stoppable(kept):
        said = f"{tuning} runs to tune, {len(plan) - tuning} to report; {len(plan) - lacking} are done."
        if lacking:
            threads = 1 if processes > 1 else torch.get_num_threads()
            pace = measure(plan.tuning()[0], dataset, lambda: build(model, dataset.shape, dataset.classes), threads)
            left = partial(forecast, plan, store, pace, dataset, processes)
            said += f" About {duration(left())} left. Stop it at any time: the same command goes on from there."
        console.print(said, highlight=False, soft_wrap=True)
        with progress_bar("runs") as bar:

            def progress(done: int, total: int, what: str) -> None:
                bar(done, total, what, left() if lacking else None)

            comparison = run_plan(plan, store, progress, start_worker=quiet)
    title = ", ".join([plain(Path(data).name if Path(data).exists() else data), plain(model), few])
    result = ComparisonResult(tuple(rows(comparison)), title, METRICS[dataset.task])
    console.print(str(result), highlight=False, markup=False, soft_wrap=True)
    _save_figures(result, out / f"{model.replace(':', '-')}-{shots}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: errors that a user can fix are one message and exit code 1, without a traceback."""
    run_app(app, arguments)


def _require_writable(path: Path, force: bool) -> None:
    if not path.parent.is_dir():
        raise SylinitError(f"{path}: the directory {path.parent} does not exist; create it first")
    if path.is_dir():
        raise SylinitError(f"{path}: is a directory; name a file in it")
    if path.exists() and not force:
        raise SylinitError(f"{path}: is there already; choose another name, or replace it with --force")


def _save_figures(result: ComparisonResult, path: Path) -> None:
    from sylinit.comparison.figures import save

    files = save(result.plot(), path) + save(result.plot(curves=True), path.with_name(path.name + "-curves"))
    shown = ", ".join(str(file) for file in files if file.suffix == ".png")
    console.print(f"figures: {shown}", highlight=False, soft_wrap=True)


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        values = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        raise SylinitError(f"{option} {text}: expected numbers with commas between them, such as 0.03,0.1") from None
    if not all(value > 0 for value in values):
        raise SylinitError(f"{option} {text}: learning rates must be positive")
    return values


if __name__ == "__main__":
    main()

"""`sylinit.compare`: initializations of one network on one data set, and what came out."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sylinit import SylinitError
from sylinit.comparison import tables
from sylinit.comparison.data import Dataset, few_shot, held_back, load, make_dataset
from sylinit.comparison.experiment import Experiment
from sylinit.comparison.initializations import INITIALIZATIONS, check_initialization
from sylinit.comparison.models import check_model, takes_two
from sylinit.comparison.plan import GRIDS, Plan
from sylinit.comparison.runner import Progress, Task, run_plan
from sylinit.comparison.runs import run_on
from sylinit.comparison.sources import Raw
from sylinit.comparison.store import Store
from sylinit.comparison.summary import Row, ranked, rows, text_table, verdict

DEFAULT = ("pytorch", "he-normal", "xavier-normal", "orthogonal", "lsuv", "pca-whitening", "sylinit")
"""What is compared if nobody says."""

METRICS = {"classification": "accuracy", "regression": "explained variance"}
"""What is measured on the test part, by task: the share of right classes, or R²."""


@dataclass(frozen=True, repr=False)
class ComparisonResult:
    """What a comparison gave; it prints as a table with a verdict, in notebooks too.

    Attributes:
        rows: one for each initialization, in the order they were asked for.
        title: what was compared.
        metric: a value of `METRICS`.
    """

    rows: tuple[Row, ...]
    title: str
    metric: str = "accuracy"

    @property
    def best(self) -> str:
        """The initialization with the highest mean after training."""
        return ranked(self.rows)[0].label

    @property
    def verdict(self) -> str:
        """Which is best, by how much, and how sure that is."""
        return verdict(self.rows)

    @property
    def table(self) -> list[dict[str, Any]]:
        """One dictionary for each initialization, best first: ``pandas.DataFrame(result.table)`` is a table.

        ``before``, ``after`` and ``mean`` (over training) are means over the seeds, as shares; ``after_half`` is half
        the 95 % interval, None for fewer than three seeds; seconds are means, too.
        """
        return [
            {
                "initialization": row.label,
                "before": row.interval("before").mean,
                "after": row.interval("after").mean,
                "after_half": None if np.isnan(half := row.interval("after").half) else half,
                "mean": row.interval("area").mean,
                "lr": row.lr,
                "lr_at_edge": row.at_edge,
                "diverged": row.diverged,
                "init_seconds": row.interval("init_seconds").mean,
                "total_seconds": row.interval("total_seconds").mean,
            }
            for row in ranked(self.rows)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dictionaries: the table, and every run by seed."""
        runs = [
            {"initialization": row.label, "lr": row.lr, "seed": record.experiment.seed, **record.result}
            for row in self.rows
            for record in row.records
        ]
        return {
            "title": self.title,
            "metric": self.metric,
            "best": self.best,
            "verdict": self.verdict,
            "table": self.table,
            "runs": runs,
        }

    def plot(self, path: str | Path | None = None, *, curves: bool = False) -> Any:
        """Draw before and after training, or the learning curves.

        Args:
            path: where to save the picture; its suffix gives the format.
            curves: draw learning curves.

        Returns:
            The matplotlib figure.
        """
        from sylinit.comparison.figures import before_and_after, learning_curves

        figure = (learning_curves if curves else before_and_after)(self.rows, self.title, self.metric)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def __str__(self) -> str:
        """The table, and the verdict below it."""
        return f"{text_table(self.rows, self.title, self.metric)}\n\n{self.verdict}"

    def __repr__(self) -> str:
        """One line."""
        return f"<ComparisonResult: {self.verdict.splitlines()[0]}>"

    def _repr_html_(self) -> str:
        """For notebooks: table, verdict and figure."""
        picture = io.BytesIO()
        self.plot().savefig(picture, format="png", dpi=100)
        encoded = base64.b64encode(picture.getvalue()).decode()
        return f'<pre>{html.escape(str(self))}</pre><img alt="before and after" src="data:image/png;base64,{encoded}">'


def compare(
    model: Callable[..., nn.Module],
    data: Any,
    *,
    initializations: Sequence[str] = DEFAULT,
    shots: int | None = None,
    seeds: int = 3,
    epochs: int = 20,
    grid: Sequence[float] | None = None,
    optimizer: str = "sgd",
    task: str = "auto",
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> ComparisonResult:
    """Train one network from several initializations and say which is best.

    The learning rate of each is tuned over one shared grid, on training data that is held back; then each is trained on
    the same samples, seed by seed, and measured on the test part, which nothing before has read. All runs take place in
    this process, one after the other; ``sylinit compare`` runs several at once.

    Args:
        model: returns a new network; a function of ``(shape of a sample, number of classes)``, or of nothing. Its
            output is ``[n, classes]``, or a tuple, a mapping or an object that has such a tensor.
        data: ``(x, y)``, of which a fifth becomes the test part, or ``(x, y, x_test, y_test)``: tensors or arrays,
            taken as they are; or what ``--data`` may be, which is normalized. ``y`` holds classes ``[n]`` or real
            values.
        initializations: names in `sylinit.comparison.initializations.INITIALIZATIONS`.
        shots: training samples of each class, in a regression in all; None is all there are.
        seeds: repetitions, each with another order, other draws, and with `shots` other samples.
        epochs: passes over the training samples, the same for every initialization.
        grid: learning rates; by default five, from `sylinit.comparison.plan.GRIDS`.
        optimizer: "sgd" or "adamw".
        task: "classification" or "regression"; "auto" takes real numbers that are not whole for values.
        out: a directory where every run is kept; a later call with it goes on from there.
        progress: called with (runs done, runs in all, what is going on).

    Returns:
        Table, verdict, figures, and every run.

    Raises:
        SylinitError: for bad input, naming what was expected; also if the network fails on two samples.
    """
    for name in initializations:
        check_initialization(name)
    if not initializations:
        raise SylinitError(f"initializations: expected at least one of {', '.join(INITIALIZATIONS)}")
    if optimizer not in GRIDS:
        raise SylinitError(f"optimizer: expected one of {', '.join(GRIDS)}, got {optimizer!r}")
    dataset = _dataset(data, task)
    name = getattr(model, "__name__", type(model).__name__)

    def make_model() -> nn.Module:
        return model(dataset.shape, dataset.classes) if takes_two(model) else model()

    network = make_model()
    if not isinstance(network, nn.Module):
        raise SylinitError(f"model: expected a function that returns a torch.nn.Module, got {type(network).__name__}")
    check_model(network, dataset, name)
    if shots is not None:
        held_back(dataset.train_y, few_shot(dataset.train_y, shots, 0), 1, 0)
    made_of = hashlib.sha256(repr(network).encode()).hexdigest()[:16]
    setting = (("data", dataset.fingerprint), ("source", made_of))
    arms = tuple(
        Experiment(dataset.name, name, each, shots, optimizer=optimizer, epochs=epochs, setting=setting)
        for each in dict.fromkeys(initializations)
    )
    rates = tuple(sorted(grid)) if grid is not None else GRIDS[optimizer]
    plan = Plan(arms, grid=rates, seeds=tuple(range(seeds)), workers=1)
    tasks = {"train": Task(lambda e: run_on(dataset, make_model, e), lambda experiments, report: None)}
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder if out is None else out) / "results.jsonl")
        comparison = run_plan(plan, store, progress, tasks=tasks)
    shown = "all samples" if shots is None else f"{shots} examples" + (" a class" if dataset.class_names else "")
    return ComparisonResult(tuple(rows(comparison)), f"{name}, {shown}", METRICS[dataset.task])


def _dataset(data: Any, task: str) -> Dataset:
    if isinstance(data, Dataset):
        return data
    if isinstance(data, (str, Path)):
        return load(str(data), None, task)
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 4):
        raise SylinitError(
            f"data: expected (x, y), (x, y, x_test, y_test) or the name of a data set, got {type(data).__name__}"
            + (f" of {len(data)}" if isinstance(data, (tuple, list)) else "")
        )
    arrays = [value.detach().cpu() if isinstance(value, torch.Tensor) else np.asarray(value) for value in data]
    x, test_x = (None if value is None else torch.as_tensor(value).float() for value in (*arrays[::2], None)[:2])
    y = tables.targets(np.asarray(arrays[1]), np.asarray(arrays[3]) if len(arrays) > 3 else None, task, "data")
    assert x is not None
    return make_dataset("data", Raw(x, y.train, test_x, y.test, y.outputs, y.names), "none")

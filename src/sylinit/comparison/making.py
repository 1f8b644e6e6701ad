"""`sylinit init` step by step: data, model and starting weights; the computation; what the file says of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sylinit import Report, SylinitError, initialize_, initialize_head_
from sylinit.comparison.data import Dataset, load
from sylinit.comparison.models import build, check_model, construction
from sylinit.comparison.terminal import progress_bar, waiting
from sylinit.comparison.weights import KEY, load_weights

TASKS = {
    "auto": "auto",
    "multiclass": "classification",
    "binary": "classification",
    "regression": "regression",
    "none": "auto",
}
"""What ``--task`` may be, and what it asks of the targets of the data."""

FEW_NUMBERS = 4
"""Up to so many channels a loading snippet shows the normalization as numbers."""


@dataclass(frozen=True)
class Made:
    """A model and the data that its weights are computed from.

    Attributes:
        spec: the model's name.
        dataset: all of the data.
        network: the model, in its starting weights.
        index: the samples to compute from.
        seed: that they were drawn with.
        notes: what a user should know.
    """

    spec: str
    dataset: Dataset
    network: nn.Module
    index: torch.Tensor
    seed: int
    notes: tuple[str, ...]

    def description(self, version: str, headline: str) -> dict[str, Any]:
        """All that a user of the weights must know, for the file's metadata.

        Args:
            version: of sylinit.
            headline: of the report.
        """
        data = self.dataset
        return {
            "sylinit": version,
            "model": self.spec,
            "construction": construction(self.spec, data.shape, data.classes),
            "data": data.name,
            "fingerprint": data.fingerprint,
            "samples": len(self.index),
            "seed": self.seed,
            "shape": list(data.shape),
            "outputs": data.classes,
            "task": data.task,
            "classes": list(data.class_names),
            "features": list(data.features),
            "normalization": {**asdict(data.normalization), "text": str(data.normalization)},
            "before": headline,
        }


def prepare(
    spec: str,
    source: str,
    label: str | None,
    task: str,
    normalize: str,
    weights: Path | None,
    samples: int,
    seed: int,
) -> Made:
    """Load the data, build the model and check that they fit.

    Args:
        spec: of the model, for `models.build`.
        source: of the data, for `data.load`.
        label: the column with the target, if the user named one.
        task: a key of `TASKS`.
        normalize: as `data.load` takes it.
        weights: to start from.
        samples: at most so many training samples are used.
        seed: of the samples and of the starting weights.
    """
    with waiting("loading data"):
        dataset = load(source, label, TASKS[task], normalize)
    torch.manual_seed(seed)
    network = build(spec, dataset.shape, dataset.classes)
    notes = list(dataset.notes)
    if weights is not None:
        lacking = load_weights(network, weights)
        notes.append(f"starting weights: {weights}" + (f"; not in it: {_some(lacking)}" if lacking else ""))
    check_model(network, dataset, spec)
    index = torch.randperm(len(dataset.train_y), generator=torch.Generator().manual_seed(seed))[:samples]
    return Made(spec, dataset, network, index, seed, tuple(notes))


def compute(
    made: Made,
    *,
    task: str,
    head_only: bool,
    head: str | None,
    layers: list[str] | None,
    train_size: int | None,
    options: dict[str, Any],
) -> Report:
    """Compute the weights of the model in place.

    Args:
        made: model and data.
        task: for `sylinit.initialize_`.
        head_only: leave the body as it is.
        head: the name of the head, if the user gave one.
        layers: patterns of the layers to compute.
        train_size: samples that the model will be trained on; None for all of the data.
        options: further arguments of `sylinit.initialize_`.

    Raises:
        SylinitError: also if nothing was initialized.
    """
    data, index = made.dataset, made.index
    shared: dict[str, Any] = {
        "task": task,
        "samples": max(2, len(index)),
        "head": head or "auto",
        "generator": torch.Generator().manual_seed(made.seed),
    }
    batches = [(data.train_x[index], data.train_y[index])]
    with progress_bar("layers") as progress:
        if head_only:
            result = initialize_head_(made.network, batches, progress=progress, config=options["config"], **shared)
        else:
            size = train_size or len(data.train_y)
            more: dict[str, Any] = {} if layers is None else {"layers": layers, "overwrite": True}
            result = initialize_(made.network, batches, progress=progress, train_size=size, **shared, **more, **options)
    if not result.initialized:
        reasons = sorted({layer.reason for layer in result.left_alone if layer.reason})
        raise SylinitError(
            f"no layer of {made.spec} was initialized, so nothing is written ({'; '.join(reasons) or 'it has none'}); "
            "check the data, and --layers and --head if they are given"
        )
    return result


def loading_snippet(file: Path, description: dict[str, Any]) -> str:
    """The Python that loads a weights file and normalizes samples as the model expects them."""
    made = description["normalization"]
    lines = ["import torch", "from safetensors.torch import load_model", description["construction"]]
    lines += [f"load_model(model, {str(file)!r})", "model.eval()"]
    scaled = f"x / {made['divisor']:g}" if made["divisor"] != 1 else "x"
    if not made["mean"]:
        return "\n".join([*lines, *([f"x = {scaled}"] if scaled != "x" else [])])
    dims = ", 1" * (len(description["shape"]) - 1)
    if len(made["mean"]) <= FEW_NUMBERS:
        given = [f"mean, std = torch.tensor({made['mean']}), torch.tensor({made['std']})"]
    else:
        lines[:2] = ["import json", "", "import torch", "from safetensors import safe_open", lines[1]]
        given = [
            f"with safe_open({str(file)!r}, 'pt') as opened:",
            f"    made = json.loads(opened.metadata()[{KEY!r}])['normalization']",
            "mean, std = torch.tensor(made['mean']), torch.tensor(made['std'])",
        ]
    shaped = f".view(-1{dims})" if dims else ""
    return "\n".join([*lines, *given, f"x = ({scaled} - mean{shaped}) / std{shaped}"])


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")

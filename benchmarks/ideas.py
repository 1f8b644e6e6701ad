"""Ideas for the method that are no part of the library, judged as its defaults are: on held-back images of CIFAR-10.

    python benchmarks/ideas.py DIRECTORY [--seeds 3] [--models cnn resnet20]

DIRECTORY holds CIFAR-10 as Parquet files (or is a hub id). 50 images a class, 20 epochs of SGD in mixed precision, one
learning rate a network; no run sees the test set. Appends to ``benchmarks/results/ideas.jsonl``, goes on from there
when run again, and prints the table.

subclasses        label units are aimed at two clusters of each class instead of the class
shared-labels     both convolutions of a residual block aim their label units at the same directions
shared-code       the same, and the second one's other units at the code of the first: each at its own channel
chosen-share      one share of label units for all layers, of least leave-one-out error of a ridge readout
chosen-shares     one for each layer, in forward order (the CNN only: it takes some 20 trial initializations)
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from torch import Tensor, nn

from harness import before_and_after
from studies.allocator import keep_freed_memory
from studies.finetune import features, layer_names
from studies.presets import MIXED
from studies.tasks import TASKS, open_store
from sylinit import initialize_
from sylinit.codes import Code, LinearCode, mixed
from sylinit.codes.linear import linear_code
from sylinit.comparison.experiment import Experiment
from sylinit.comparison.initializations import INITIALIZATIONS, pytorch
from sylinit.comparison.plan import TUNING_SEED
from sylinit.comparison.pool import cores, pool
from sylinit.comparison.runner import execute
from sylinit.config import Config
from sylinit.statistics.axes import Axes

RESULTS = Path(__file__).parent / "results" / "ideas.jsonl"

RATES = {"cnn": 0.01, "resnet20": 0.1}

SHARES = (0.0, 0.125, 0.25, 0.5)


def subclasses(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> None:
    """All layers but the head see each class as two clusters of its images, shrunk to 8x8."""
    pytorch(model, x, y, seed)
    *inner, head = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    small = F.adaptive_avg_pool2d(x, 8).flatten(1).numpy()
    finer = torch.zeros_like(y)
    for label in y.unique().tolist():
        member = y == label
        components = PCA(10, random_state=seed).fit_transform(small[member.numpy()])
        cluster = KMeans(2, n_init=5, random_state=seed).fit_predict(components)
        finer[member] = 2 * label + torch.as_tensor(cluster).long()
    initialize_(
        model, [(x, finer)], code="mixed", layers=inner, head=None, generator=torch.Generator().manual_seed(seed)
    )
    initialize_(model, [(x, y)], layers=head)


def shared(model: nn.Module, x: Tensor, y: Tensor, seed: int, *, units: bool) -> None:
    """Layers of one residual block take the same directions of the labels, and with `units` the same code."""
    pytorch(model, x, y, seed)
    base = mixed(Config().normalized_label_share)

    def within(layer: str) -> Code:
        draw = zlib.crc32(layer.rpartition(".")[0].encode()) + seed
        follows = units and layer.endswith("conv2")

        def function(axes: Axes, units: int) -> LinearCode:
            code = linear_code(base, layer, axes, units, torch.Generator().manual_seed(draw), Config())
            return center_taps(axes, code) if follows else code

        return replace(base, function=function, leading=None if follows else base.leading)

    codes = {layer: within(layer) for layer in layer_names(model)[:-1]}
    initialize_(model, [(x, y)], code=codes, generator=torch.Generator().manual_seed(seed))


def center_taps(axes: Axes, code: LinearCode) -> LinearCode:
    """The code with its components replaced: unit u tells what channel u holds in the middle of the 3x3 patch."""
    taps = axes.basis[:, 4::9]
    deviation = (taps.square() * axes.variances.unsqueeze(1)).sum(2, keepdim=True).sqrt()
    is_label = code.on_t.abs().sum(2, keepdim=True) > 0
    return LinearCode((taps / deviation.clamp(min=1e-9)).masked_fill(is_label, 0), code.on_t)


def chosen(model: nn.Module, x: Tensor, y: Tensor, seed: int, *, each: bool) -> None:
    """The share of label units of least leave-one-out error, one for the network or one for each layer."""
    pytorch(model, x, y, seed)
    inner = layer_names(model)[:-1]
    one_hot = F.one_hot(y).double().numpy()

    def write(shares: dict[str, float]) -> None:
        codes = {layer: mixed(share) for layer, share in shares.items()}
        initialize_(model, [(x, y)], code=codes, generator=torch.Generator().manual_seed(seed))

    def error(shares: dict[str, float]) -> float:
        write(shares)
        rows = features(model, x).double().numpy()
        penalties = np.logspace(-6, 2, 33) * float(np.linalg.norm(rows - rows.mean(0), 2) ** 2)
        return -float(RidgeCV(penalties).fit(rows, one_hot).best_score_)

    if each:
        shares = dict.fromkeys(inner, Config().label_share)
        for layer in inner:
            shares[layer] = min(SHARES, key=lambda share: error({**shares, layer: share}))
    else:
        shares = min((dict.fromkeys(inner, share) for share in SHARES), key=error)
    write(shares)


IDEAS: dict[str, Callable[..., None]] = {
    "subclasses": subclasses,
    "shared-labels": lambda *given: shared(*given, units=False),
    "shared-code": lambda *given: shared(*given, units=True),
    "chosen-share": lambda *given: chosen(*given, each=False),
    "chosen-shares": lambda *given: chosen(*given, each=True),
}

OF = {
    "cnn": ("sylinit", "subclasses", "chosen-share", "chosen-shares"),
    "resnet20": ("sylinit", "subclasses", "shared-labels", "shared-code", "chosen-share"),
}

INITIALIZATIONS.update(IDEAS)  # worker processes import this module, too


def main() -> None:
    """Run what is missing; print means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=[*OF], choices=OF)
    given = parser.parse_args()
    rows = {
        (model, idea): [
            Experiment(
                given.data, model, idea, 50, lr=RATES[model], seed=TUNING_SEED + seed, split="validation",
                setting=MIXED,
            )
            for seed in range(given.seeds)
        ]
        for model in given.models
        for idea in OF[model]
    }  # fmt: skip
    store = open_store(RESULTS)
    with pool(cores(), keep_freed_memory) as each:
        failed = execute([e for row in rows.values() for e in row], store, TASKS, each)
    if failed:
        raise next(iter(failed.values()))
    print("accuracy (%); gap: the library's default less each idea, paired by draw, with 95 % intervals")
    print(f"{'network':10}{'idea':16}{'before':>8}{'gap':>14}{'after':>8}{'gap':>14}")
    for (model, idea), row in rows.items():
        results, kept = ([store[e].result for e in r] for r in (row, rows[model, "sylinit"]))
        print(f"{model:10}{idea:16}{before_and_after(results, None if idea == 'sylinit' else kept)}")


if __name__ == "__main__":
    main()

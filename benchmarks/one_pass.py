"""What `initialize_` costs beside one plain forward pass of the same data, and beside the `lsuv` package.

    python benchmarks/one_pass.py [--repeats 5] [--only resnet20 ...]

Runs alternate within one process, so that a noisy machine disturbs both sides alike; medians and ratios are reported.
Before timing, every layer's residual is checked. Writes ``benchmarks/results/one_pass.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import sylinit
from sylinit.projected import TOLERANCE
from sylinit.study.models import build
from sylinit.study.store import environment

RESULTS = Path(__file__).parent / "results"


def images(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Smooth random images: neighbouring pixels agree, as in photographs."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, size // 4, size // 4, generator=generator)
    fine = torch.randn(count, 3, size, size, generator=generator)
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") + 0.3 * fine, torch.arange(count) % 10


class Encoder(nn.Module):
    """A transformer encoder of six layers, width 384, over sequences of 128 tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(384, 6, 1536, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(384, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits from the mean over tokens."""
        return self.head(self.encoder(x).mean(1))


def cases() -> dict[str, Callable[[], tuple[nn.Module, list[tuple[Tensor, Tensor]]]]]:
    """Model and calibration batches by name."""

    def cifar(name: str, count: int = 1000) -> Callable[[], tuple[nn.Module, list[tuple[Tensor, Tensor]]]]:
        return lambda: (build(name, (3, 32, 32), 10), _batches(*images(count, 32), 500))

    def tokens() -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(384, 384, generator=generator) / 20
        return torch.randn(256, 128, 384, generator=generator) @ mix, torch.arange(256) % 10

    return {
        "resnet20": cifar("resnet20"),
        "resnet56": cifar("resnet56"),
        "resnet110": cifar("resnet110"),
        "resnet18-224": lambda: (build("resnet18", (3, 224, 224), 10), _batches(*images(128, 224), 64)),
        "encoder": lambda: (Encoder(), _batches(*tokens(), 128)),
    }


def _batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def seconds(action: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Alternate forward passes and initialisations of one model."""
    model, batches = cases()[name]()

    @torch.no_grad()
    def forward() -> None:
        model.eval()
        for x, _ in batches:
            model(x)

    torch.backends.mha.set_fastpath_enabled(False)  # both sides by the same kernels
    report = sylinit.initialize_(model, batches)
    worst = max(layer.residual or 0.0 for layer in report.initialised)
    if worst > TOLERANCE:
        raise SystemExit(f"{name}: a residual of {worst:.1e} is too large; not timed")
    forward()
    plain, ours = [], []
    for _ in range(repeats):
        plain.append(seconds(forward))
        ours.append(seconds(lambda: sylinit.initialize_(model, batches)))
    ratios = [b / a for a, b in zip(plain, ours, strict=True)]
    return {
        "case": name,
        "layers": len(report.initialised),
        "forward_seconds": median(plain),
        "initialise_seconds": median(ours),
        "ratio": median(ratios),
        "ratios": ratios,
        "worst_residual": worst,
    }


def against_lsuv(name: str, repeats: int) -> dict[str, Any]:
    """Alternate `lsuv` and sylinit on the same model and 500 images."""
    from lsuv import lsuv_with_singlebatch

    x, y = images(500, 32)
    theirs, ours = [], []
    for _ in range(repeats):
        model = build(name, (3, 32, 32), 10)
        theirs.append(seconds(lambda model=model: lsuv_with_singlebatch(model, x, verbose=False)))
        model = build(name, (3, 32, 32), 10)
        ours.append(seconds(lambda model=model: sylinit.initialize_(model, [(x, y)])))
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {
        "case": f"lsuv-{name}",
        "lsuv_seconds": median(theirs),
        "initialise_seconds": median(ours),
        "times_faster": median(ratios),
        "ratios": ratios,
    }


def main() -> None:
    """Measure, print, write after every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[*cases(), "lsuv-resnet20", "lsuv-resnet56"])
    given = parser.parse_args()
    path = RESULTS / "one_pass.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    for name in given.only:
        lsuv = name.startswith("lsuv-")
        row = against_lsuv(name[5:], given.repeats) if lsuv else measure(name, given.repeats)
        rows = [other for other in rows if other["case"] != name] + [row]
        shown = f"{row['times_faster']:.1f} times faster than lsuv" if lsuv else f"{row['ratio']:.2f} forward passes"
        print(f"{name:14} {row['initialise_seconds']:7.2f} s   {shown}", flush=True)
        RESULTS.mkdir(exist_ok=True)
        body = {
            "environment": environment(),
            "threads": torch.get_num_threads(),
            "repeats": given.repeats,
            "rows": rows,
        }
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

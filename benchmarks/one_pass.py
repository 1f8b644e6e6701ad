"""What `initialize_` costs beside one plain forward pass of the same data, and beside the `lsuv` package.

    python benchmarks/one_pass.py [--repeats 5] [--threads 2] [--device cpu] [--only resnet20 lsuv-resnet20 ...]

Both sides alternate within one process, so that a noisy machine disturbs them alike; the ratio is the median of the
ratios of neighbors. Before timing, every layer's residual is checked. A run that was stopped goes on where it was.
Writes ``benchmarks/results/one_pass.json`` and a figure of the cost against depth, width and samples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import sylinit
from harness import Results, ceilings, save_figure, seconds
from sylinit.comparison.models import build, mlp

Batches = list[tuple[Tensor, Tensor]]
Case = Callable[[], tuple[nn.Module, Batches]]

TARGETS = {"resnet20": 2.0, "resnet56": 2.0, "resnet18-224": 3.0, "encoder": 3.0}
"""Forward passes that a case may cost; ResNet-110 may cost a fifth more than ResNet-20."""

LSUV_TARGETS = {"lsuv-resnet20": 15, "lsuv-resnet56": 40}
"""How many times faster than `lsuv` each is to be."""

RESIDUALS = {"exact": 1e-6, "row-space": 1e-6, "projected": 1e-3}
"""The largest residual of a right answer, by solver."""

DEPTHS = {"resnet20": 20, "resnet56": 56, "resnet110": 110}
WIDTHS = (128, 256, 512, 1024)
SAMPLES = (250, 500, 1000, 2000)


def images(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Smooth random images: neighboring pixels agree, as in photographs."""
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


def cases() -> dict[str, Case]:
    """Model and calibration batches by name."""

    def cifar(name: str, count: int = 1000) -> Case:
        return lambda: (build(name, (3, 32, 32), 10), _batches(*images(count, 32), 500))

    def tokens() -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(384, 384, generator=generator) / 20
        return torch.randn(256, 128, 384, generator=generator) @ mix, torch.arange(256) % 10

    def vectors(width: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(16384) % 10
        means = torch.randn(10, width, generator=generator)
        return torch.randn(len(y), width, generator=generator) + means[y], y

    return {
        "resnet20": cifar("resnet20"),
        "resnet56": cifar("resnet56"),
        "resnet110": cifar("resnet110"),
        "resnet18-224": lambda: (build("resnet18", (3, 224, 224), 10), _batches(*images(128, 224), 64)),
        "encoder": lambda: (Encoder(), _batches(*tokens(), 128)),
        **{
            f"mlp-width-{width}": lambda width=width: (mlp((width,), 10, [width] * 4), _batches(*vectors(width), 4096))
            for width in WIDTHS
        },
        **{f"resnet20-samples-{count}": cifar("resnet20", count) for count in SAMPLES if count != 1000},
    }


def _batches(x: Tensor, y: Tensor, size: int) -> Batches:
    return list(zip(x.split(size), y.split(size), strict=True))


def measure(case: Case, repeats: int, device: str, row: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    """Alternate forward passes and initializations of one model, on all of the samples."""
    model, batches = case()
    model, batches = model.to(device), [(x.to(device), y.to(device)) for x, y in batches]

    @torch.no_grad()
    def forward() -> None:
        model.eval()
        for x, _ in batches:
            model(x)

    samples = sum(len(x) for x, _ in batches)
    report = sylinit.initialize_(model, batches, code="mixed", samples=samples)
    for layer in report.initialized:
        if not (layer.residual or 0.0) <= RESIDUALS[layer.solver]:
            raise SystemExit(f"{layer.name} ({layer.solver}): a residual of {layer.residual:.1e}; not timed")
    forward()
    row.setdefault("forward", [])
    row.setdefault("initialise", [])
    row.setdefault("on_layers", [])
    while len(row["initialise"]) < repeats:
        plain = seconds(forward)
        found: list[sylinit.Report] = []
        ours = seconds(
            lambda found=found: found.append(sylinit.initialize_(model, batches, code="mixed", samples=samples))
        )
        row["forward"].append(plain)
        row["initialise"].append(ours)
        row["on_layers"].append(found[0].solve_seconds)
        ratios = [b / a for a, b in zip(row["forward"], row["initialise"], strict=True)]
        row |= {
            "layers": len(report.initialized),
            "samples": report.samples,
            "worst_residual": max(layer.residual or 0.0 for layer in report.initialized),
            "solvers": sorted({layer.solver for layer in report.initialized}),
            "ratio": median(ratios),
        }
        save(row)


def against_lsuv(name: str, repeats: int, row: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    """Alternate `lsuv` and sylinit on the same model and 500 images; both must leave finite logits."""
    from lsuv import lsuv_with_singlebatch

    x, y = images(500, 32)
    row.setdefault("lsuv", [])
    row.setdefault("initialise", [])
    while len(row["initialise"]) < repeats:
        for side, start in (
            ("lsuv", lambda model: lsuv_with_singlebatch(model, x, verbose=False)),
            ("initialise", lambda model: sylinit.initialize_(model, [(x, y)], code="mixed")),
        ):
            model = build(name, (3, 32, 32), 10)
            taken = seconds(lambda start=start, model=model: start(model))
            with torch.no_grad():
                if not bool(model.eval()(x[:10]).isfinite().all()):
                    raise SystemExit(f"{name}: {side} left logits that are not finite")
            row[side].append(taken)
        row["times_faster"] = median(a / b for a, b in zip(row["lsuv"], row["initialise"], strict=True))
        save(row)


def draw(rows: dict[str, dict[str, Any]]) -> None:
    """Cost in forward passes against depth, width and samples."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    panels = (
        ("depth (ResNet, 1,000 images)", {DEPTHS[name]: name for name in DEPTHS}),
        ("width (5-layer MLP, 16,384 rows)", {width: f"mlp-width-{width}" for width in WIDTHS}),
        ("images (ResNet-20)", {n: "resnet20" if n == 1000 else f"resnet20-samples-{n}" for n in SAMPLES}),
    )
    for place, (title, names) in zip(axes, panels, strict=True):
        points = {value: name for value, name in names.items() if name in rows}
        for index, (value, name) in enumerate(points.items()):
            row = rows[name]
            each = [b / a for a, b in zip(row["forward"], row["initialise"], strict=True)]
            place.plot(
                [value] * len(each), each, "o", color="#0072B2", alpha=0.3, ms=4, label="runs" if not index else ""
            )
        place.plot(list(points), [rows[n]["ratio"] for n in points.values()], "-o", color="#D55E00", label="median")
        place.axhline(1, color="#555555", lw=1, ls="--")
        place.set(xlabel=title, xscale="log")
        place.set_xticks(list(names), [f"{value:,}" for value in names])
        place.minorticks_off()
        place.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)  # shared, and only now that all is drawn
    axes[0].set_ylabel("cost in forward passes")
    axes[0].annotate("one forward pass", (0.03, 1), xycoords=("axes fraction", "data"), va="top", fontsize=8)
    axes[-1].legend(frameon=False)
    save_figure(figure, "one_pass")


def main() -> None:
    """Measure, print, write after every repeat."""
    everything = cases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", default=[*everything, *LSUV_TARGETS])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.backends.mha.set_fastpath_enabled(False)  # both sides by the same kernels
    results = Results("one_pass" if given.device == "cpu" else f"one_pass_{given.device}", device=given.device)
    limits = ceilings(given.device)
    print(", ".join(f"{name} {value}" for name, value in limits.items()), flush=True)
    for name in given.only:
        row = results.rows.get(name, {"ceilings": limits})

        def save(row: dict[str, Any], name: str = name) -> None:
            results.save(name, row)

        if name in LSUV_TARGETS:
            against_lsuv(name.removeprefix("lsuv-"), given.repeats, row, save)
            said = f"{row['times_faster']:.1f} times faster than lsuv (at least {LSUV_TARGETS[name]})"
        else:
            measure(everything[name], given.repeats, given.device, row, save)
            bound = TARGETS.get(name)
            if name == "resnet110" and "resnet20" in results.rows:
                bound = 1.2 * results.rows["resnet20"]["ratio"]
            said = f"{row['ratio']:.2f} forward passes" + (f" (at most {bound:.2f})" if bound else "")
        print(f"{name:22} {median(row['initialise']):8.2f} s   {said}", flush=True)
    if given.device == "cpu":
        draw(results.rows)


if __name__ == "__main__":
    main()

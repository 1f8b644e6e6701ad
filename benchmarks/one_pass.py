"""What `initialize_` costs beside one plain forward pass of the same data, and beside the `lsuv` package.

    python benchmarks/one_pass.py [--repeats 5] [--threads 2] [--device cpu] [--only resnet20 lsuv-resnet20 ...]
    python benchmarks/one_pass.py --device cuda     # larger networks too, with profiles and the memory on the device
    python benchmarks/one_pass.py --quick           # the larger networks made small: a trial, nothing is stored

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

import networks
import sylinit
from harness import RESULTS, Results, ceilings, save_figure, seconds
from sylinit.comparison.models import build, mlp

Batches = list[tuple[Tensor, Tensor]]
Case = Callable[[], tuple[nn.Module, Batches]]

TARGETS = {
    "cpu": {"resnet20": 2.0, "resnet56": 2.0, "resnet18-224": 3.0, "encoder": 3.0, "mlp-8x256": 8.0, "depthwise": 2.0},
    "cuda": {"resnet20": 20.0, "resnet50": 10.0, "vit-b16": 6.0, "convnext-t": 12.0},
}
"""Forward passes that a case may cost, by device; ResNet-110 may cost a fifth more than ResNet-20."""

LARGE = ("resnet50", "vit-b16", "convnext-t", "mobilenet-v2", "decoder")
"""Networks for a GPU."""

LSUV_TARGETS = {"lsuv-resnet20": 15, "lsuv-resnet56": 40, "lsuv-mlp-8x256": 1}
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


def cases(*, small: bool = False) -> dict[str, Case]:
    """Model and calibration batches by name; ``small``: the networks for a GPU as small as they can be."""

    def cifar(name: str, count: int = 1000) -> Case:
        return lambda: (build(name, (3, 32, 32), 10), _batches(*images(count, 32), 500))

    def tokens() -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(384, 384, generator=generator) / 20
        return torch.randn(256, 128, 384, generator=generator) @ mix, torch.arange(256) % 10

    def vectors(width: int, count: int = 16384) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(count) % 10
        means = torch.randn(10, width, generator=generator)
        return torch.randn(len(y), width, generator=generator) + means[y], y

    def photographs(make: Callable[[], nn.Module]) -> Case:
        count, size = (20, 32) if small else (256, 224)
        return lambda: (make(), _batches(*images(count, size), count))

    def sequences() -> tuple[Tensor, Tensor]:
        count, length, width = (20, 8, 32) if small else (64, 512, 2048)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, length, width, generator=generator), torch.arange(count) % 10

    def vit() -> nn.Module:
        return networks.VisionTransformer(64, 2, 32) if small else networks.VisionTransformer()

    def decoder() -> nn.Module:
        return networks.Encoder(32, 1, 2, causal=True) if small else networks.Encoder(2048, 4, 16, causal=True)

    return {
        "resnet50": photographs(lambda: networks.resnet50(8, (1, 1, 1, 1)) if small else networks.resnet50()),
        "vit-b16": photographs(vit),
        "convnext-t": photographs(lambda: networks.convnext_tiny(16, (1, 1, 1)) if small else networks.convnext_tiny()),
        "mobilenet-v2": photographs(lambda: networks.mobilenet_v2(8) if small else networks.mobilenet_v2()),
        "decoder": lambda: (decoder(), _batches(*sequences(), 64)),
        "depthwise": lambda: (networks.depthwise(), _batches(*images(1000, 32), 500)),
        "mlp-8x256": lambda: (mlp((256,), 10, [256] * 8), _batches(*vectors(256, 2000), 500)),
        "resnet20": cifar("resnet20"),
        "resnet56": cifar("resnet56"),
        "resnet110": cifar("resnet110"),
        "resnet18-224": lambda: (build("resnet18", (3, 224, 224), 10), _batches(*images(128, 224), 64)),
        "encoder": lambda: (networks.Encoder(384, 6, 6), _batches(*tokens(), 128)),
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


def profile(case: Case, name: str, device: str, row: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> None:
    """The operations of one initialization, as a table beside the results, and the memory it takes."""
    model, batches = case()
    model, batches = model.to(device), [(x.to(device), y.to(device)) for x, y in batches]
    on_cuda = device.startswith("cuda")
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if on_cuda else 0
    with torch.profiler.profile() as seen:
        sylinit.initialize_(model, batches, code="mixed", samples=sum(len(x) for x, _ in batches))
    averages = seen.key_averages()
    row["operations"] = sum(average.count for average in averages if average.key.startswith("aten::"))
    row["launches"] = sum(average.count for average in averages if "LaunchKernel" in average.key)
    if on_cuda:
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    save(row)
    by = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    place = RESULTS / f"one_pass_{device}_{name}.txt"
    place.write_text(averages.table(sort_by=by, row_limit=40) + "\n", encoding="utf-8")


def against_lsuv(
    case: Case, name: str, repeats: int, row: dict[str, Any], save: Callable[[dict[str, Any]], None]
) -> None:
    """Alternate `lsuv` and sylinit on the same model and samples; both must leave finite logits."""
    from lsuv import lsuv_with_singlebatch

    x, y = (torch.cat(part) for part in zip(*case()[1], strict=True))
    x, y = (x[:500], y[:500]) if x.ndim == 4 else (x, y)
    row.setdefault("lsuv", [])
    row.setdefault("initialise", [])
    while len(row["initialise"]) < repeats:
        for side, start in (
            ("lsuv", lambda model: lsuv_with_singlebatch(model, x, verbose=False)),
            ("initialise", lambda model: sylinit.initialize_(model, [(x, y)], code="mixed")),
        ):
            model = case()[0]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    everything = cases(small=given.quick)
    if given.quick:
        given.only, given.repeats = given.only or list(LARGE), 1
    elif given.only is None:
        left_out = LARGE if given.device == "cpu" else ()
        given.only = [name for name in (*everything, *LSUV_TARGETS) if name not in left_out]
    torch.set_num_threads(given.threads)
    torch.backends.mha.set_fastpath_enabled(False)  # both sides by the same kernels
    results = Results("one_pass" if given.device == "cpu" else f"one_pass_{given.device}", device=given.device)
    limits = ceilings(given.device)
    print(", ".join(f"{name} {value}" for name, value in limits.items()), flush=True)
    for name in given.only:
        row = {} if given.quick else results.rows.get(name, {"ceilings": limits})

        def save(row: dict[str, Any], name: str = name) -> None:
            if not given.quick:
                results.save(name, row)

        if name in LSUV_TARGETS:
            case = name.removeprefix("lsuv-")
            against_lsuv(everything[case], case, given.repeats, row, save)
            said = f"{row['times_faster']:.1f} times faster than lsuv (at least {LSUV_TARGETS[name]})"
        else:
            measure(everything[name], given.repeats, given.device, row, save)
            if given.device != "cpu":
                profile(everything[name], name, given.device, row, save)
            bound = TARGETS.get(given.device, {}).get(name)
            if name == "resnet110" and "resnet20" in results.rows:
                bound = 1.2 * results.rows["resnet20"]["ratio"]
            said = f"{row['ratio']:.2f} forward passes" + (f" (at most {bound:.2f})" if bound else "")
        print(f"{name:22} {median(row['initialise']):8.2f} s   {said}", flush=True)
    if given.device == "cpu" and not given.quick:
        draw(results.rows)


if __name__ == "__main__":
    main()

"""Figures that a person can read: labels at the lines, colors for color-blind eyes, bands for uncertainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from sklearn.isotonic import isotonic_regression

from sylinit.comparison.statistics import Interval
from sylinit.comparison.summary import Row, mean_curve, ranked

OURS = ("#D55E00", "#E69F00", "#8C2D04", "#F28E72", "#C2185B", "#6B4A00")
OTHERS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#555555", "#7F3C8D", "#6B8E23", "#000000", "#9C9EDE")
MARKERS = "osD^vP*Xh"
LOOKS = {
    "sylinit": 0,
    "pytorch": 0,
    "he-normal": 1,
    "xavier-normal": 2,
    "orthogonal": 3,
    "lsuv": 4,
    "pca-whitening": 5,
    "he-uniform": 6,
    "xavier-uniform": 7,
    "pca-whitening-rescaled": 8,
}
"""Place of each initialization among the colors and markers of its family."""

PLAIN = {
    "digits": "handwritten digits",
    "cifar10": "CIFAR-10",
    "fashion-mnist": "Fashion-MNIST",
    "synthetic": "random data",
    "mlp": "MLP",
    "cnn": "CNN",
    "fcn": "FCN",
    "resnet18": "ResNet-18",
    "resnet20": "ResNet-20",
    "resnet56": "ResNet-56",
    "resnet110": "ResNet-110",
    "vit-tiny": "ViT-Tiny",
    "sgd": "SGD",
    "adamw": "AdamW",
}
"""Names of data, networks and optimizers on the command line, as people write them."""


def plain(name: str) -> str:
    """A name of the command line as titles show it; one that is not known, such as a path, stays as it is."""
    return PLAIN.get(name, name)


def style(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Color and marker of each label, the same in every figure: sylinit warm and thick, the others cold.

    Labels that are no known initialization get what their name gives, or, where that is taken, the next that is free.
    """
    found: dict[str, dict[str, Any]] = {}
    for label in sorted(labels, key=lambda each: each not in LOOKS):  # the known ones have theirs for certain
        warm = label.startswith("sylinit")
        family = OURS if warm else OTHERS
        first = LOOKS[label] if label in LOOKS else crc32(label.encode())
        marks = MARKERS[not warm :]
        looks = [(family[(first + step) % len(family)], marks[(first + step) % len(marks)]) for step in range(99)]
        taken = [look["color"] for look in found.values()]
        color, marker = next((look for look in looks if look[0] not in taken), looks[0])
        found[label] = {"color": color, "marker": marker}
        if warm:
            found[label] |= {"linewidth": 2.5, "zorder": 3}
    return found


def before_and_after(rows: Sequence[Row], title: str, name: str = "accuracy") -> Figure:
    """One line a method: `name` before (hollow) and after training (full), with 95 % intervals of three seeds on."""
    ordered = ranked(rows)[::-1]
    figure = Figure(figsize=(7.5, 1.6 + 0.38 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    looks = style([row.label for row in rows])
    for place, row in enumerate(ordered):
        color = looks[row.label]["color"]
        before, after = row.interval("before"), row.interval("after")
        axes.plot([100 * before.mean, 100 * after.mean], [place, place], color=color, alpha=0.3, linewidth=2)
        for value, face in ((before, "white"), (after, color)):
            mean = min(100.0, max(0.0, 100 * value.mean))
            half = _half(value, 100)
            bars = None if half is None else [[min(half, mean)], [min(half, 100 - mean)]]  # what can be
            axes.errorbar(
                mean, place, xerr=bars, fmt="o", color=color, markerfacecolor=face, capsize=3, clip_on=False, zorder=3
            )
        axes.annotate(
            f"{100 * after.mean:.1f}", (1, place), xytext=(8, -3), xycoords=("axes fraction", "data"),
            textcoords="offset points", color=color, fontsize=9, annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(ordered)), [row.label for row in ordered])
    axes.set(title=title, ylim=(-0.7, len(ordered) - 0.3), xlim=(0, 100))
    bars_there = any(_half(row.interval("after"), 1) is not None for row in rows)
    explained = "\nbars are 95 % intervals over seeds" if bars_there else ""
    axes.set_xlabel(f"{name} (%): hollow before any training, full after (the value at the right){explained}")
    _plain(axes, "x")
    return figure


def learning_curves(rows: Sequence[Row], title: str, name: str = "accuracy") -> Figure:
    """Accuracy, or what `name` says, over epochs, the mean of the seeds with a 95 % band from three seeds on."""
    series = {row.label: mean_curve(row) for row in rows}
    return lines(series, title, "epoch", f"{name} (%)")


def lines(
    series: Mapping[str, Sequence[tuple[float, Interval]]],
    title: str,
    xlabel: str,
    ylabel: str,
    *,
    scale: float = 100.0,
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """A line a label, named at its right end, with a 95 % band (of two values it would hide all else).

    Args:
        series: pairs of a place on the horizontal axis and a value there, by label.
        title: of the figure.
        xlabel: of the horizontal axis.
        ylabel: of the vertical axis.
        scale: what values are multiplied by; 100 shows shares, which lie in [0, 1], as percentages.
        log_x: whether the horizontal axis is logarithmic, with a tick at each place.
        log_y: whether the vertical axis is logarithmic.
    """
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    looks = style(list(series))
    ends = []
    for label, points in series.items():
        x = [p for p, _ in points]
        y = [scale * value.mean for _, value in points]
        axes.plot(x, y, markersize=4, **looks[label])
        halves = [_half(value, scale) or 0.0 for _, value in points]
        low, high = ([v + sign * h for v, h in zip(y, halves, strict=True)] for sign in (-1, 1))
        if scale == 100.0:  # an interval may reach beyond what an accuracy can be
            low, high = [max(0.0, v) for v in low], [min(100.0, v) for v in high]
        if min(value.n for _, value in points) > 2:
            alpha = 0.12 if len(series) < 6 or "linewidth" in looks[label] else 0.05  # many bands would make mud
            axes.fill_between(x, low, high, color=looks[label]["color"], alpha=alpha, linewidth=0)
        ends.append((y[-1], x[-1], label))
    if log_x:
        axes.set_xscale("log")
        ticks = sorted({x for points in series.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
        axes.minorticks_off()
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # all nine of a decade would overlap
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    if scale == 100.0 and not log_y:
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(0.0, bottom), min(100.0, top))
    _plain(axes, "both")
    _name_ends(axes, ends, looks)
    return figure


def _name_ends(axes: Axes, ends: list[tuple[float, float, str]], looks: Mapping[str, dict[str, Any]]) -> None:
    """Write each label right of the axes at the height of its line's end, apart where lines end close together."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # the layout must be known
    point = axes.figure.dpi / 72
    wanted = [(axes.transData.transform((x, y))[1] / point, y, label) for y, x, label in sorted(ends)]
    # least squares over all heights at least 11 points apart: isotonic regression of what is left of the gaps
    gaps = 11.0 * np.arange(len(wanted))
    placed = isotonic_regression(np.array([height for height, *_ in wanted]) - gaps) + gaps
    lowest = axes.bbox.y0 / point + 6  # above the horizontal axis
    for p, (height, y, label) in zip(np.maximum(placed, lowest + gaps), wanted, strict=True):
        axes.annotate(
            label,
            (1, y),
            xytext=(4, p - height - 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=looks[label]["color"],
            fontsize=9,
            annotation_clip=False,
        )


def save(figure: Figure, path: Path) -> list[Path]:
    """Write ``path.png`` and ``path.svg`` and return both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (path.with_name(path.name + suffix) for suffix in (".png", ".svg"))
    figure.savefig(png, dpi=150)
    save_svg(figure, svg)
    return [png, svg]


def save_svg(figure: Figure, target: Path | BinaryIO) -> None:
    """Write an SVG file that is the same byte for byte when the figure is."""
    with rc_context({"svg.hashsalt": "sylinit"}):
        figure.savefig(target, format="svg", metadata={"Date": None})


def _half(value: Interval, scale: float) -> float | None:
    return None if value.half != value.half else scale * value.half


def _plain(axes: Axes, axis: Any) -> None:
    axes.grid(alpha=0.3, axis=axis)
    axes.spines[["top", "right"]].set_visible(False)

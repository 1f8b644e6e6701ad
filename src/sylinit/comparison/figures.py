"""Figures that a person can read: labels at the lines, colors for color-blind eyes, bands for uncertainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from sklearn.isotonic import isotonic_regression

from sylinit.comparison.statistics import Interval
from sylinit.comparison.summary import Row, mean_curve, ranked

OURS = ("#D55E00", "#E69F00", "#8C2D04", "#B8860B")
OTHERS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#555555", "#7F3C8D", "#6B8E23", "#000000", "#9C9EDE")
MARKERS = "osD^vP*Xh<>"


def style(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Color and marker of each label: sylinit warm and thick, unless there is nothing else to tell it from."""
    ours = [label for label in labels if label.startswith("sylinit")]
    warm = ours if len(ours) < len(labels) else ours[:1]
    cold = [label for label in labels if label not in warm]
    found: dict[str, dict[str, Any]] = {}
    for index, label in enumerate(labels):
        family, place = (OURS, warm.index(label)) if label in warm else (OTHERS, cold.index(label))
        found[label] = {"color": family[place % len(family)], "marker": MARKERS[index % len(MARKERS)]}
        if label in warm:
            found[label] |= {"linewidth": 2.5, "zorder": 3}
    return found


def before_and_after(rows: Sequence[Row], title: str) -> Figure:
    """One line a method: accuracy before (hollow) and after training (full), with 95 % intervals."""
    ordered = ranked(rows)[::-1]
    figure = Figure(figsize=(7.5, 1.6 + 0.38 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    looks = style([row.label for row in rows])
    for place, row in enumerate(ordered):
        color = looks[row.label]["color"]
        before, after = row.interval("before"), row.interval("after")
        axes.plot([100 * before.mean, 100 * after.mean], [place, place], color=color, alpha=0.3, linewidth=2)
        for value, face in ((before, "white"), (after, color)):
            axes.errorbar(
                100 * value.mean, place, xerr=_half(value, 100), fmt="o", color=color, markerfacecolor=face, capsize=3
            )
        axes.annotate(
            f"{100 * after.mean:.1f}", (100 * (after.mean + (_half(after, 1) or 0)), place), xytext=(6, -3),
            textcoords="offset points", color=color, fontsize=9,
        )  # fmt: skip
    axes.set_yticks(range(len(ordered)), [row.label for row in ordered])
    axes.set(title=title, ylim=(-0.7, len(ordered) - 0.3), xlim=(0, None))
    axes.set_xlabel("accuracy (%): hollow before any training, full after\nbars are 95 % intervals over seeds")
    axes.margins(x=0.12)
    _plain(axes, "x")
    return figure


def learning_curves(rows: Sequence[Row], title: str) -> Figure:
    """Accuracy over epochs, the mean of the seeds with a 95 % band."""
    series = {row.label: mean_curve(row) for row in rows}
    return lines(series, title, "epoch", "accuracy (%)")


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
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # all nine of a decade would overlap
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    _plain(axes, "both")
    _name_ends(axes, ends, looks)
    return figure


def _name_ends(axes: Axes, ends: list[tuple[float, float, str]], looks: Mapping[str, dict[str, Any]]) -> None:
    """Write each label beside the right end of its line, pushed apart where lines end close together."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]  # the layout must be known
    point = axes.figure.dpi / 72
    wanted = [(axes.transData.transform((x, y))[1] / point, x, y, label) for y, x, label in sorted(ends)]
    # least squares over all heights at least 11 points apart: isotonic regression of what is left of the gaps
    gaps = 11.0 * np.arange(len(wanted))
    placed = isotonic_regression(np.array([height for height, *_ in wanted]) - gaps) + gaps
    for p, (height, x, y, label) in zip(placed, wanted, strict=True):
        axes.annotate(
            label,
            (x, y),
            xytext=(8, p - height - 3),
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

"""One preset's results as panels: figures, tables and remarks for each data set and network."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from studies.exponents import exponent
from studies.presets import Preset
from studies.race import Pace, race
from sylinit.comparison.figures import before_and_after, learning_curves, lines, plain
from sylinit.comparison.plan import Comparison
from sylinit.comparison.statistics import Interval
from sylinit.comparison.summary import Row, gap, ours, ranked, rows, verdict

TITLES = {
    "before": "accuracy before training (%)",
    "after": "accuracy after training (%)",
    "area": "mean accuracy over training (%)",
    "init_seconds": "seconds of one core to initialize",
    "forward_passes": "cost in forward passes",
    "extra_bytes": "extra memory (MB)",
}
"""What a metric is, with the unit it is shown in."""

SCALES = {"before": 100.0, "after": 100.0, "area": 100.0, "extra_bytes": 1e-6}
"""What a metric is multiplied by to be shown; others are shown as they are."""

DERIVED = {
    "init_seconds": {
        ("sylinit", "depth"): "1",  # one pass, every layer costs alike
        ("sylinit", "width"): "2 to 3",  # passes and moments n d^2, solves d^3
        ("sylinit", "samples"): "0 to 1",  # passes and moments grow with n, solves do not
        ("lsuv", "depth"): "2",  # passes over the whole network for each layer
        ("lsuv", "width"): "2 to 3",  # passes n d^2, orthogonal matrices d^3
        ("lsuv", "samples"): "0 from 500",  # one batch of at most 500
    },
    "extra_bytes": {
        ("sylinit", "depth"): "0 to 1",  # one layer's matrices, and the former weights of all
        ("sylinit", "width"): "1 to 2",  # activations n d, matrices d^2
        ("sylinit", "samples"): "0 to 1",  # activations of one layer grow with n, matrices do not
        ("lsuv", "depth"): "0",  # one layer's matrix and activations
        ("lsuv", "width"): "1 to 2",  # the same
        ("lsuv", "samples"): "0 from 500",
    },
}
"""Exponents that counting operations and bytes gives, by what is measured, initialization and size."""

AXES = {
    "shots": "labeled examples a class",
    "lr": "peak learning rate",
    "encoding_weight": "weight of encoding, λ",
    "samples": "samples that are read",
    "rows": "rows that are read of each layer",
    "depth": "layers",
    "width": "units of each layer",
}
"""What an axis says of the field or option that it shows."""

LOST = "Runs that diverged and count as chance"


@dataclass(frozen=True)
class Grid:
    """A table: what its numbers are, its columns and its rows, the name of the row first."""

    caption: str
    header: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Panel:
    """One data set and network of a preset: figures, tables and remarks.

    `name` is for files: another part of the preset's study has other names.
    """

    title: str
    name: str
    figures: tuple[tuple[str, Figure], ...]
    tables: tuple[Grid, ...]
    remarks: tuple[str, ...] = ()


def panels(preset: Preset, comparison: Comparison) -> list[Panel]:
    """The panels of a comparison as far as it has been run."""
    several = len({row.method.optimizer for row in rows(comparison)}) > 1
    measured = "" if comparison.plan.split == "test" else " (held-back training data)"
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows(comparison):
        method = row.method
        axis = preset.axis(method)[0] if preset.axis else ""
        fixed = axis != "shots" and method.task != "time"  # the number of examples
        size = "all training data" if method.shots is None else f"{method.shots} examples a class"
        optimizer = method.optimizer if several else ""
        named = [plain(name) for name in (Path(method.dataset).name, method.model)]
        title = _joined(", ", *named, size if fixed else "", plain(optimizer)) + measured
        short = _joined("-", method.dataset, method.model, str(method.shots or "all") if fixed else "", optimizer, axis)
        groups.setdefault((title, re.sub("[^a-z0-9]+", "-", short.lower()), axis), []).append(row)
    return [_panel(preset, group, *key) for key, group in groups.items()]


def _joined(between: str, *words: str) -> str:
    return between.join(filter(None, words))


def _panel(preset: Preset, group: list[Row], title: str, name: str, axis: str) -> Panel:
    return _swept(preset, group, title, name, axis) if preset.axis else _flat(preset, group, title, name)


def _flat(preset: Preset, group: list[Row], title: str, name: str) -> Panel:
    shown = [metric for metric in ("before", "after", "area") if group[0].values(metric)]
    own = ours(group) or ranked(group)[0]

    cells = [
        (
            row.label,
            f"{row.lr:g}",
            str(len(row.records)),
            *(row.interval(metric).percent() for metric in shown),
            "" if row is own else _signed(gap(own, row)),
        )
        for row in ranked(group)
    ]
    names = {"before": "before training", "after": "after training", "area": "mean over training"}
    header = ("initialization", "learning rate", "seeds", *(names[m] for m in shown), "gap")
    caption = f"accuracy (%); gap: {own.label} after training less each other, paired by seed"
    table = Grid(caption, header, tuple(cells))
    figures = (("accuracy", before_and_after(group, title)), ("curves", learning_curves(group, title)))
    lost = ", ".join(f"{row.label} ({row.diverged})" for row in group if row.diverged)
    remarks = (verdict(group), *([f"{LOST}: {lost}."] if lost else ()))
    return Panel(title, name, figures, (table, *_speed(group)), remarks)


def _speed(group: Sequence[Row]) -> tuple[Grid, ...]:
    """How soon each initialization reaches where the best of the others ends; nothing without sylinit and others."""
    raced = race(group)
    if raced is None:
        return ()
    cells = [
        (
            label,
            _epochs(each),
            "" if each.seconds is None else f"{each.seconds:.1f}",
            f"{each.init_seconds:.2f}",
            f"{each.total_seconds:.1f}",
        )
        for label, each in raced.paces.items()
    ]
    best, level = raced.best, f"{100 * raced.level:.1f} %"
    caption = f"epochs of {best.method.epochs} until the mean curve reaches {level}, where {best.label} ends"
    header = (
        "initialization",
        "epochs",
        "seconds, initialization included",
        "seconds of the initialization",
        "seconds in all",
    )
    return (Grid(caption, header, tuple(cells)),)


def _speeds(series: Mapping[str, Mapping[float, Row]], xlabel: str, places: Sequence[float]) -> tuple[Grid, ...]:
    """The same along an axis, and the part of the time that the initialization takes."""
    races = {place: race([points[place] for points in series.values() if place in points]) for place in places}
    if not any(races.values()):
        return ()
    header = (xlabel, *(f"{place:g}" for place in places))

    def cells(shown: Callable[[Pace], str]) -> list[tuple[str, ...]]:
        return [
            (label, *(shown(r.paces[label]) if (r := races[p]) and label in r.paces else "" for p in places))
            for label in series
        ]

    best = ("best other", *(r.best.label if (r := races[p]) else "" for p in places))
    level = ("its end (%)", *(f"{100 * r.level:.1f}" if (r := races[p]) else "" for p in places))
    spent = cells(_share_of_time)
    caption = "epochs until the mean curve reaches where the best other initialization ends"
    seconds = "seconds of the initialization, of those in all, on the machines that the runs were made on"
    return (
        Grid(caption, header, (best, level, *cells(_epochs))),
        Grid(seconds, header, tuple(spent)),
    )


def _share_of_time(pace: Pace) -> str:
    init = f"{pace.init_seconds:.2g}" if pace.init_seconds >= 0.01 else "0"
    return f"{init} of {pace.total_seconds:.3g}"


def _epochs(pace: Pace) -> str:
    return "never" if pace.epochs is None else f"{pace.epochs:.1f}"


def _swept(preset: Preset, group: list[Row], title: str, name: str, axis: str) -> Panel:
    assert preset.axis is not None
    series: dict[str, dict[float, Row]] = {}
    for row in group:
        # fixed learning rates live in the row, not in its method
        value = row.lr if axis == "lr" else preset.axis(row.method)[1]
        options = tuple(pair for pair in row.method.options if pair[0] != axis)
        series.setdefault(replace(row.method, options=options).label, {})[value] = row
    places = sorted({value for points in series.values() for value in points})
    xlabel = AXES.get(axis, axis)
    if len(places) == 1 and group[0].values("after"):
        return _flat(preset, group, f"{title}, {xlabel}: {places[0]:g}", f"{name}-{places[0]:g}")
    figures, tables, own = [], [], ours(group)
    for metric in preset.metrics:
        scale = SCALES.get(metric, 1.0)
        drawn: dict[str, list[tuple[float, Interval]]] = {
            label: [(value, points[value].interval(metric)) for value in sorted(points) if points[value].values(metric)]
            for label, points in series.items()
        }
        drawn = {label: points for label, points in drawn.items() if points}
        if not drawn:
            continue
        figures.append((metric, lines(drawn, title, xlabel, TITLES[metric], scale=scale, log_x=True, log_y=scale == 1)))
        cells = [
            (label, *(_number(dict(points).get(place), metric) for place in places)) for label, points in drawn.items()
        ]
        tables.append(Grid(TITLES[metric], (xlabel, *(f"{place:g}" for place in places)), tuple(cells)))
        if metric in DERIVED:
            tables.append(_exponents(drawn, metric, axis))
        if scale == 100.0:
            if len(series) > 1 and own is not None:
                tables.append(_gaps(own.label, series, metric, xlabel, places))
            elif len(series) == 1 and axis != "shots":  # other numbers of examples are other tasks
                tables.append(_falls(*next(iter(series.items())), metric, xlabel))
    tables += _speeds(series, xlabel, places)
    return Panel(title, name, tuple(figures), tuple(tables), _warnings(series, xlabel))


def _warnings(series: Mapping[str, Mapping[float, Row]], xlabel: str) -> tuple[str, ...]:
    """Where a mean may say less of an initialization than it seems to: tuning ended at an edge, or runs were lost."""
    edges, lost = [], []
    precisions: dict[str, set[float]] = {}
    for points in series.values():
        for value, row in points.items():
            precisions.setdefault(row.method.get("precision"), set()).add(value)
    said = [f"{p} ({', '.join(f'{v:g}' for v in sorted(values))})" for p, values in precisions.items()]
    for label, points in series.items():
        at_edge = [f"{value:g}" for value, row in sorted(points.items()) if row.at_edge]
        edges += [f"{label} ({', '.join(at_edge)})"] if at_edge else []
        diverged = [f"{row.diverged} at {value:g}" for value, row in sorted(points.items()) if row.diverged]
        lost += [f"{label} ({', '.join(diverged)})"] if diverged else []
    return (
        *([f"Trained in {' and '.join(said)} ({xlabel})."] if len(said) > 1 else ()),
        *([f"Best at the first or last learning rate of the grid ({xlabel}): {'; '.join(edges)}."] if edges else ()),
        *([f"{LOST} ({xlabel}): {'; '.join(lost)}."] if lost else ()),
    )


def _exponents(series: Mapping[str, Sequence[tuple[float, Interval]]], metric: str, axis: str) -> Grid:
    """The power with which a cost grows: over all sizes, over the larger, where constants count less, and by count."""
    cells = []
    for label, points in series.items():
        fits = []
        for part in (points, points[-3:]):
            known = [(x, value.mean) for x, value in part if value.mean > 0]  # memory may be too little to see
            fit = exponent(*zip(*known, strict=True)) if len(known) > 1 else None
            fits.append(
                "" if fit is None else f"{fit.power:.2f}" + ("" if math.isnan(fit.half) else f" ± {fit.half:.2f}")
            )
        cells.append((label, *fits, DERIVED[metric].get((label.split()[0], axis), "")))
    what = "seconds grow" if metric == "init_seconds" else "memory grows"
    return Grid(f"{what} as a power of {axis}", ("power", "all sizes", "largest three", "by count"), tuple(cells))


def _falls(label: str, points: Mapping[float, Row], metric: str, xlabel: str) -> Grid:
    """How far one initialization is, at each place of an axis, below the place where its mean is highest."""
    known = {place: points[place] for place in sorted(points) if points[place].values(metric)}
    top, best = max(known.items(), key=lambda item: item[1].interval(metric).mean)
    cells = (label, *("" if row is best else _signed(gap(best, row, metric)) for row in known.values()))
    return Grid(_less_each_other(f"{xlabel} {top:g}", metric), (xlabel, *(f"{place:g}" for place in known)), (cells,))


def _gaps(
    own: str, series: Mapping[str, Mapping[float, Row]], metric: str, xlabel: str, places: Sequence[float]
) -> Grid:
    """How far one initialization is above every other."""
    mine, cells = series[own], []
    for label, points in series.items():
        if label != own:
            found = [gap(mine[p], points[p], metric) if p in mine and p in points else None for p in places]
            cells.append((label, *map(_signed, found)))
    return Grid(_less_each_other(own, metric), (xlabel, *(f"{place:g}" for place in places)), tuple(cells))


def _less_each_other(own: str, metric: str) -> str:
    return f"{own} less each other: points of {TITLES[metric].removesuffix(' (%)')}, paired by seed"


def _signed(value: Interval | None) -> str:
    return "" if value is None else value.percent(sign=True)


def _number(value: Interval | None, metric: str) -> str:
    if value is None:
        return ""
    if SCALES.get(metric) == 100.0:
        return value.percent()
    scale = SCALES.get(metric, 1.0)
    return f"{scale * value.mean:.3g}" + ("" if math.isnan(value.half) else f" ± {scale * value.half:.2g}")

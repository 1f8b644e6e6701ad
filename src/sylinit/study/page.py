"""All results as one self-contained HTML page, and one preset's results as panels: a table and figures each."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from sylinit.errors import SylinitError
from sylinit.study.experiment import Experiment
from sylinit.study.figures import SCALES, TITLES, before_and_after, learning_curves, lines, save_svg
from sylinit.study.presets import PRESETS, Preset
from sylinit.study.runner import TUNING_SEED, VALIDATION, Plan, Study, as_run, read
from sylinit.study.statistics import Interval, exponent
from sylinit.study.store import Store
from sylinit.study.summary import Row, epochs_to, gap, mean_curve, ours, ranked, rows, verdict

DERIVED = {
    ("sylinit", "depth"): "1",  # one pass, every layer costs alike
    ("sylinit", "width"): "2 to 3",  # passes and moments n d^2, solves d^3
    ("sylinit", "samples"): "0 to 1",  # passes and moments grow with n, solves do not
    ("lsuv", "depth"): "2",  # passes over the whole network for each layer
    ("lsuv", "width"): "2 to 3",  # passes n d^2, orthogonal matrices d^3
    ("lsuv", "samples"): "0 from 500",  # one batch of at most 500
}
"""Exponents of the cost that the operation counts give, by start and size."""

LOST = "Runs that diverged and count as chance"

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: 0.9rem }
th, td { padding: 0.2rem 0.8rem; text-align: right; border-bottom: 1px solid #ddd }
caption { text-align: left; font-weight: 600; white-space: nowrap; padding: 0.3rem 0 }
th:first-child, td:first-child { text-align: left; white-space: nowrap }
tr.ours { font-weight: 600 } img { max-width: 100%; height: auto } .wide { overflow-x: auto }
h2 { margin-top: 3rem; border-top: 2px solid #222; padding-top: 1rem } .small { color: #666; font-size: 0.85rem }
"""


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


def panels(preset: Preset, study: Study) -> list[Panel]:
    """The panels of a study as far as it has been run."""
    several = len({row.method.optimiser for row in rows(study)}) > 1
    measured = "" if study.plan.split == "test" else " (held-back training data)"
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows(study):
        method = row.method
        axis = preset.axis(method)[0] if preset.axis else ""
        fixed = axis != "shots" and method.task != "time"  # the number of examples
        size = "all training data" if method.shots is None else f"{method.shots} examples a class"
        optimiser = method.optimiser if several else ""
        title = _joined(", ", method.dataset, method.model, size if fixed else "", optimiser) + measured
        short = _joined("-", method.dataset, method.model, str(method.shots or "all") if fixed else "", optimiser, axis)
        groups.setdefault((title, re.sub("[^a-z0-9]+", "-", short.lower()), axis), []).append(row)
    return [_panel(preset, group, *key) for key, group in groups.items()]


def _joined(between: str, *words: str) -> str:
    return between.join(filter(None, words))


def _panel(preset: Preset, group: list[Row], title: str, name: str, axis: str) -> Panel:
    return _swept(preset, group, title, name, axis) if preset.axis else _flat(preset, group, title, name)


def _flat(preset: Preset, group: list[Row], title: str, name: str) -> Panel:
    shown = [metric for metric in ("before", "after", "area") if group[0].values(metric)]
    own = ours(group) or ranked(group)[0]

    def above(row: Row) -> str:
        found = gap(own, row) if row is not own else None
        return "" if found is None else found.percent(sign=True)

    cells = [
        (
            row.label,
            f"{row.lr:g}",
            str(len(row.records)),
            *(row.interval(metric).percent() for metric in shown),
            above(row),
        )
        for row in ranked(group)
    ]
    names = {"before": "before training", "after": "after training", "area": "mean over training"}
    header = ("start", "learning rate", "seeds", *(names[m] for m in shown), "gap")
    caption = f"accuracy (%); gap: {own.label} after training less each other, paired by seed"
    table = Grid(caption, header, tuple(cells))
    figures = (("accuracy", before_and_after(group, title)), ("curves", learning_curves(group, title)))
    lost = ", ".join(f"{row.label} ({row.diverged})" for row in group if row.diverged)
    remarks = (verdict(group), *([f"{LOST}: {lost}."] if lost else ()))
    return Panel(title, name, figures, (table, *_speed(group)), remarks)


def _speed(group: Sequence[Row]) -> tuple[Grid, ...]:
    """How soon each start reaches what the best of the others ends with; nothing without sylinit and others."""
    others = [row for row in group if not row.label.startswith("sylinit")]
    if not others or ours(group) is None:
        return ()
    best = ranked(others)[0]
    level = mean_curve(best)[-1][1].mean
    cells = []
    for row in ranked(group):
        epochs, needed = row.method.epochs, epochs_to(row, level)
        start, whole = row.interval("init_seconds").mean, row.interval("total_seconds").mean
        spent = None if needed is None else start + (whole - start) * needed / epochs
        cells.append(
            (
                row.label,
                "never" if needed is None else f"{needed:.1f}",
                "" if spent is None else f"{spent:.1f}",
                f"{start:.2f}",
                f"{whole:.1f}",
            )
        )
    caption = (
        f"epochs of {best.method.epochs} until the mean curve reaches {100 * level:.1f} %, where {best.label} ends"
    )
    header = ("start", "epochs", "seconds, start included", "seconds of the start", "seconds in all")
    return (Grid(caption, header, tuple(cells)),)


def _swept(preset: Preset, group: list[Row], title: str, name: str, axis: str) -> Panel:
    assert preset.axis is not None
    series: dict[str, dict[float, Row]] = {}
    for row in group:
        # fixed learning rates live in the row, not in its method
        value = row.lr if axis == "lr" else preset.axis(row.method)[1]
        options = tuple(pair for pair in row.method.options if pair[0] != axis)
        series.setdefault(replace(row.method, options=options).label, {})[value] = row
    places = sorted({value for points in series.values() for value in points})
    xlabel = {"shots": "labelled examples a class", "lr": "peak learning rate"}.get(axis, axis)
    if len(places) == 1 and group[0].values("after"):
        return _flat(preset, group, f"{title}, {xlabel}: {places[0]:g}", f"{name}-{places[0]:g}")
    figures, tables = [], []
    for metric in preset.metrics:
        drawn: dict[str, list[tuple[float, Interval]]] = {
            label: [(value, points[value].interval(metric)) for value in sorted(points) if points[value].values(metric)]
            for label, points in series.items()
        }
        drawn = {label: points for label, points in drawn.items() if points}
        if not drawn:
            continue
        figures.append((metric, lines(drawn, title, xlabel, metric, log=True)))
        cells = [
            (label, *(_number(dict(points).get(place), metric) for place in places)) for label, points in drawn.items()
        ]
        tables.append(Grid(TITLES[metric], (xlabel, *(f"{place:g}" for place in places)), tuple(cells)))
        if metric == "init_seconds":
            tables.append(_exponents(drawn, axis))
        own = ours(group)
        if own is not None and SCALES.get(metric) == 100.0 and len(drawn) > 1:
            tables.append(_gaps(own.label, series, metric, xlabel, places))
    return Panel(title, name, tuple(figures), tuple(tables), _warnings(series, xlabel))


def _warnings(series: Mapping[str, Mapping[float, Row]], xlabel: str) -> tuple[str, ...]:
    """Where a mean may say less of a start than it seems to: tuning ended at an edge, or runs were lost."""
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


def _exponents(series: Mapping[str, Sequence[tuple[float, Interval]]], axis: str) -> Grid:
    """The power with which time grows: over all sizes, over the larger, where overheads count less, and by count."""
    cells = []
    for label, points in series.items():
        fits = []
        for part in (points, points[-3:]):
            fit = exponent([x for x, _ in part], [value.mean for _, value in part]) if len(part) > 1 else None
            fits.append(
                "" if fit is None else f"{fit.power:.2f}" + ("" if math.isnan(fit.half) else f" ± {fit.half:.2f}")
            )
        cells.append((label, *fits, DERIVED.get((label.split()[0], axis), "")))
    return Grid(f"seconds grow as a power of {axis}", ("power", "all sizes", "largest three", "by count"), tuple(cells))


def _gaps(
    own: str, series: Mapping[str, Mapping[float, Row]], metric: str, xlabel: str, places: Sequence[float]
) -> Grid:
    """How far one start is above every other."""
    mine, cells = series[own], []
    for label, points in series.items():
        if label != own:
            found = [gap(mine[p], points[p], metric) if p in mine and p in points else None for p in places]
            cells.append((label, *("" if each is None else each.percent(sign=True) for each in found)))
    caption = f"{own} less each other: points of {TITLES[metric].removesuffix(' (%)')}, paired by seed"
    return Grid(caption, (xlabel, *(f"{place:g}" for place in places)), tuple(cells))


def _number(value: Interval | None, metric: str) -> str:
    if value is None:
        return ""
    if SCALES.get(metric) == 100.0:
        return value.percent()
    return f"{SCALES.get(metric, 1.0) * value.mean:.3g}"


COMPARE = Preset("compare", "Which start is best for one network and few examples?", lambda quick: Plan(()))
"""Results of `sylinit compare`, as a preset: its plan is what its records say."""


def write_page(directory: Path) -> Path:
    """Collect the results of every preset, and of `sylinit compare` (there or in ``compare/``), in one page.

    Returns:
        The path of ``index.html``, which needs no other file.

    Raises:
        SylinitError: if there are no results.
    """
    sections = [(COMPARE, False, place / "results.jsonl") for place in (directory, directory / "compare")]
    sections += [
        (preset, quick, results_file(directory, preset, quick))
        for preset in PRESETS.values()
        for quick in (False, True)
    ]
    parts, contents = [], []
    for preset, quick, path in sections:
        store = Store(path)
        if not store.records:
            continue
        plans = recorded(store) if preset is COMPARE else [as_run(preset.plan(quick), store)]
        studies = [read(plan, store) for plan in plans]
        anchor = f"{preset.name}{'-quick' if quick else ''}"
        scale = " (quick scale: a try-out, no evidence)" if quick else ""
        contents.append(f'<li><a href="#{anchor}">{html.escape(preset.question)}</a>{scale}</li>')
        parts.append(f'<h2 id="{anchor}">{html.escape(preset.question)}</h2>')
        for study in studies:
            parts += [_panel_html(panel) for panel in panels(preset, study)]
            parts.append(f"<p class=small>{html.escape(_provenance(preset, quick, study))}</p>")
    if not parts:
        raise SylinitError(f"{directory}: no results of any study here; run 'sylinit study PRESET --out {directory}'")
    target = directory / "index.html"
    target.write_text(
        "<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>sylinit: the evidence</title><style>{CSS}</style>\n<h1>sylinit: the evidence</h1>\n"
        "<p>Starts compared on equal terms: the same examples for every start, each with its learning rate chosen on "
        "held-back training data from one shared grid, means over seeds with 95 % intervals.</p>\n"
        f"<ul>{''.join(contents)}</ul>\n" + "\n".join(parts) + "\n</html>\n",
        encoding="utf-8",
    )
    return target


def recorded(store: Store) -> list[Plan]:
    """The plans that the records of a store come from: one for each task and each grid that starts were tuned over."""
    methods: dict[Experiment, list[Experiment]] = {}
    for record in store.records.values():
        methods.setdefault(record.experiment.method, []).append(record.experiment)
    tasks: dict[tuple[Experiment, tuple[float, ...], int], list[Experiment]] = {}
    for method, made in methods.items():
        tuned = [e for e in made if e.seed >= TUNING_SEED]
        grid, draws = tuple(sorted({e.lr for e in tuned})), len({e.seed for e in tuned})
        tasks.setdefault((replace(method, start="", options=()), grid, draws), []).extend(made)
    return [
        Plan(
            tuple(dict.fromkeys(e.method for e in made)),
            grid=grid,
            seeds=tuple(sorted({e.seed for e in made if e.seed < TUNING_SEED})),
            tuning_seeds=draws,
        )
        for (_, grid, draws), made in tasks.items()
    ]


def results_file(directory: Path, preset: Preset, quick: bool) -> Path:
    """Where the records of a preset are kept."""
    return directory / f"{preset.name}{'-quick' if quick else ''}.jsonl"


def _panel_html(panel: Panel) -> str:
    out = [f"<h3>{html.escape(panel.title)}</h3>"]
    out += [f"<p>{html.escape(remark)}</p>" for text in panel.remarks for remark in text.splitlines()]
    for name, figure in panel.figures:
        buffer = io.BytesIO()
        save_svg(figure, buffer)
        code = base64.b64encode(buffer.getvalue()).decode()
        out.append(f'<img alt="{html.escape(panel.title)}: {name}" src="data:image/svg+xml;base64,{code}">')
    for table in panel.tables:
        out.append(
            f"<div class=wide><table><caption>{html.escape(table.caption)}</caption>" + _row_html(table.header, "th")
        )
        out += [_row_html(cells, "td", ours=cells[0] == "sylinit") for cells in table.cells]
        out.append("</table></div>")
    return "\n".join(out)


def _row_html(cells: Iterable[str], tag: str, *, ours: bool = False) -> str:
    return f"<tr{' class=ours' if ours else ''}>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"


def _provenance(preset: Preset, quick: bool, study: Study) -> str:
    """With what, how often and how the results were made."""
    plan, records = study.plan, study.records
    final = len(plan) - len(plan.tuning())
    epochs = sorted({record.experiment.epochs for record in records if record.experiment.epochs})
    seeds = sorted({record.experiment.seed for record in records})
    command = f"sylinit {'' if preset is COMPARE else 'study '}{preset.name}{' --quick' if quick else ''}"
    text = [f"{command}: {len(records)} of {final} runs, seeds {_listed(seeds)}"]
    if epochs:
        text.append(f"{_listed(epochs)} epochs, one cycle")
    precisions = {record.experiment.get("precision") or "float32" for record in records if record.experiment.epochs}
    if precisions:
        text.append(" and ".join(sorted(precisions)))
    if plan.grid:
        held = "10 % of the training data" if plan.arms[0].shots is None else f"{VALIDATION:,} held-back samples"
        text.append(f"learning rates {_listed(plan.grid)} tried on {held}, seeds from {TUNING_SEED}")
    made = {
        f"sylinit {e.get('sylinit')} ({e.get('commit')}), torch {e.get('torch')}, Python {e.get('python')}, "
        f"{e.get('device')}, {e.get('cores')} cores"
        for e in (record.environment for record in records)
    }
    return "; ".join(text) + ". Made with " + "; ".join(sorted(made)) + "."


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)

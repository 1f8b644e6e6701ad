"""All results as one self-contained HTML page, and one preset's results as panels: a table and figures each."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sylinit.errors import SylinitError
from sylinit.study.experiment import Experiment
from sylinit.study.figures import SCALES, TITLES, bars, before_and_after, learning_curves, lines
from sylinit.study.presets import PRESETS, Preset
from sylinit.study.runner import TUNING_SEED, VALIDATION, Plan, Study, as_run, read
from sylinit.study.statistics import Interval, exponent
from sylinit.study.store import Store
from sylinit.study.summary import Row, rows, verdict

DERIVED = {
    "depth": "1: every layer costs alike",
    "width": "2 to 3: moments and passes n d^2, solves d^3",
    "samples": "0 to 1: passes and moments grow with n, solves do not",
}
"""Exponents of the cost that the method's operation counts give."""

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: 0.9rem }
th, td { padding: 0.2rem 0.8rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left; white-space: nowrap }
tr.ours { font-weight: 600 } img { max-width: 100%; height: auto } .wide { overflow-x: auto }
h2 { margin-top: 3rem; border-top: 2px solid #222; padding-top: 1rem } .small { color: #666; font-size: 0.85rem }
"""


@dataclass(frozen=True)
class Panel:
    """One data set and network of a preset: a table, figures and remarks."""

    title: str
    header: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    figures: tuple[tuple[str, Figure], ...]
    remarks: tuple[str, ...] = ()


def panels(preset: Preset, study: Study) -> list[Panel]:
    """The panels of a study as far as it has been run."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    several = len({row.method.optimiser for row in rows(study)}) > 1
    for row in rows(study):
        method = row.method
        name = preset.axis(method)[0] if preset.axis else ""
        data = "all training data" if method.shots is None else f"{method.shots} examples a class"
        size = "" if name == "shots" or method.task == "time" else data
        groups.setdefault((method.dataset, method.model, size, method.optimiser if several else "", name), []).append(
            row
        )
    measured = "" if study.plan.split == "test" else " (held-back training data)"
    return [
        _panel(preset, group, ", ".join(filter(None, key[:-1])) + measured, key[-1]) for key, group in groups.items()
    ]


def _panel(preset: Preset, group: list[Row], title: str, axis: str) -> Panel:
    drawn = _swept(preset, group, title, axis) if preset.axis else _flat(preset, group, title)
    edges = sorted({row.label for row in group if row.at_edge})
    remark = f"Learning rate at an edge of the grid: {', '.join(edges)}." if edges and preset.axis else ""
    return replace(drawn, remarks=(*drawn.remarks, *filter(None, [remark])))


def _flat(preset: Preset, group: list[Row], title: str) -> Panel:
    shown = [metric for metric in ("before", "after", "area") if group[0].values(metric)]
    cells = [
        (row.label, f"{row.lr:g}", str(len(row.records)), *(row.interval(metric).percent() for metric in shown))
        for row in sorted(group, key=lambda row: -row.interval("after").mean)
    ]
    figures = [("accuracy", before_and_after(group, title)), ("curves", learning_curves(group, title))]
    figures += [(metric, bars(group, metric, title)) for metric in preset.metrics if metric not in shown]
    header = ("start", "learning rate", "seeds", *(TITLES[metric] for metric in shown))
    return Panel(title, header, tuple(cells), tuple(figures), (verdict(group),))


def _swept(preset: Preset, group: list[Row], title: str, axis: str) -> Panel:
    assert preset.axis is not None
    series: dict[str, dict[Any, Row]] = {}
    for row in group:
        # fixed learning rates live in the row, not in its method
        value = row.lr if axis == "lr" else preset.axis(row.method)[1]
        options = tuple(pair for pair in row.method.options if pair[0] != axis)
        series.setdefault(replace(row.method, options=options).label, {})[value] = row
    places = sorted({value for points in series.values() for value in points})
    figures, cells, remarks = [], [], []
    for metric in preset.metrics:
        drawn: dict[str, list[tuple[float, Interval]]] = {
            label: [(value, points[value].interval(metric)) for value in sorted(points) if points[value].values(metric)]
            for label, points in series.items()
        }
        drawn = {label: points for label, points in drawn.items() if points}
        if drawn:
            xlabel = {"shots": "labelled examples a class", "lr": "peak learning rate"}.get(axis, axis)
            figures.append((metric, lines(drawn, title, xlabel, metric, log=True)))
        for label, points in drawn.items():
            at = dict(points)
            cells.append((f"{label}: {TITLES[metric]}", *(_number(at.get(place), metric) for place in places)))
            if axis in DERIVED and metric == "init_seconds" and len(points) > 1:
                fit = exponent([x for x, _ in points], [value.mean for _, value in points])
                remarks.append(
                    f"{label}: time grows as {axis}^{fit.power:.2f} (± {fit.half:.2f}); by count, {DERIVED[axis]}."
                )
    header = (axis, *(f"{place:g}" for place in places))
    return Panel(title, header, tuple(cells), tuple(figures), tuple(remarks))


def _number(value: Interval | None, metric: str) -> str:
    if value is None:
        return ""
    if SCALES.get(metric) == 100.0:
        return value.percent()
    return f"{SCALES.get(metric, 1.0) * value.mean:.3g}"


COMPARE = Preset("compare", "Which start is best for one network and few examples?", lambda quick: Plan(()))
"""Results of `sylinit compare`, as a preset: its plan is what its records say."""


def write_page(directory: Path) -> Path:
    """Collect every preset's results in `directory`, and those of `sylinit compare` in ``compare/``, in one page.

    Returns:
        The path of ``index.html``, which needs no other file.

    Raises:
        SylinitError: if there are no results.
    """
    sections = [(COMPARE, False, directory / "compare" / "results.jsonl")]
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
    """The plans that the records of a store come from, one for each task."""
    tasks: dict[Experiment, list[Experiment]] = {}
    for record in store.records.values():
        task = replace(record.experiment.method, start="", options=())
        tasks.setdefault(task, []).append(record.experiment)
    return [
        Plan(
            tuple(dict.fromkeys(e.method for e in made)),
            grid=tuple(sorted({e.lr for e in made if e.seed >= TUNING_SEED})),
            seeds=tuple(sorted({e.seed for e in made if e.seed < TUNING_SEED})),
            tuning_seeds=len({e.seed for e in made if e.seed >= TUNING_SEED}),
        )
        for made in tasks.values()
    ]


def results_file(directory: Path, preset: Preset, quick: bool) -> Path:
    """Where the records of a preset are kept."""
    return directory / f"{preset.name}{'-quick' if quick else ''}.jsonl"


def _panel_html(panel: Panel) -> str:
    out = [f"<h3>{html.escape(panel.title)}</h3>"]
    out += [f"<p>{html.escape(remark)}</p>" for text in panel.remarks for remark in text.splitlines()]
    for name, figure in panel.figures:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        code = base64.b64encode(buffer.getvalue()).decode()
        out.append(f'<img alt="{html.escape(panel.title)}: {name}" src="data:image/svg+xml;base64,{code}">')
    out.append("<div class=wide><table>" + _row_html(panel.header, "th"))
    out += [_row_html(cells, "td", ours=cells[0].startswith("sylinit")) for cells in panel.cells]
    return "\n".join(out) + "</table></div>"


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

"""All results as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from studies.panels import Panel, panels
from studies.presets import PRESETS, Preset
from studies.resume import as_run
from sylinit import SylinitError
from sylinit.comparison.experiment import Experiment
from sylinit.comparison.figures import save_svg
from sylinit.comparison.plan import TUNING_SEED, Comparison, Plan, read
from sylinit.comparison.runs import VALIDATION
from sylinit.comparison.store import Store

CSS = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: 0.9rem }
th, td { padding: 0.2rem 0.8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd }
caption { text-align: left; font-weight: 600; white-space: nowrap; padding: 0.3rem 0 }
th:first-child, td:first-child { text-align: left }
tr.ours { font-weight: 600 } img { max-width: 100%; height: auto } .wide { overflow-x: auto }
h2 { margin-top: 3rem; border-top: 2px solid #222; padding-top: 1rem } .small { color: #666; font-size: 0.85rem }
"""


COMPARE = Preset("compare", "Which initialization is best for one network and few examples?", lambda quick: Plan(()))
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
        comparisons = [read(plan, store) for plan in plans]
        anchor = f"{preset.name}{'-quick' if quick else ''}"
        scale = " (quick scale: a try-out, no evidence)" if quick else ""
        contents.append(f'<li><a href="#{anchor}">{html.escape(preset.question)}</a>{scale}</li>')
        parts.append(f'<h2 id="{anchor}">{html.escape(preset.question)}</h2>')
        for comparison in comparisons:
            parts += [_panel_html(panel) for panel in panels(preset, comparison)]
            parts.append(f"<p class=small>{html.escape(_provenance(preset, quick, comparison))}</p>")
    if not parts:
        raise SylinitError(
            f"{directory}: no results of any study here; run 'python -m studies PRESET --out {directory}'"
        )
    target = directory / "index.html"
    target.write_text(
        "<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>sylinit: the evidence</title><style>{CSS}</style>\n<h1>sylinit: the evidence</h1>\n"
        "<p>Initializations compared on equal terms: the same examples for all, each with its learning rate chosen on "
        "held-back training data from one shared grid, means over seeds with 95 % intervals.</p>\n"
        f"<ul>{''.join(contents)}</ul>\n" + "\n".join(parts) + "\n</html>\n",
        encoding="utf-8",
    )
    return target


def recorded(store: Store) -> list[Plan]:
    """The plans that the records of a store come from: one for each task and each grid that was tuned over."""
    methods: dict[Experiment, list[Experiment]] = {}
    for record in store.records.values():
        methods.setdefault(record.experiment.method, []).append(record.experiment)
    tasks: dict[tuple[Experiment, tuple[float, ...], int], list[Experiment]] = {}
    for method, made in methods.items():
        tuned = [e for e in made if e.seed >= TUNING_SEED]
        grid, draws = tuple(sorted({e.lr for e in tuned})), len({e.seed for e in tuned})
        tasks.setdefault((replace(method, initialization="", options=()), grid, draws), []).extend(made)
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


def _provenance(preset: Preset, quick: bool, comparison: Comparison) -> str:
    """With what, how often and how the results were made."""
    plan, records = comparison.plan, comparison.records
    final = len(plan) - len(plan.tuning())
    epochs = sorted({record.experiment.epochs for record in records if record.experiment.epochs})
    seeds = sorted({record.experiment.seed for record in records})
    command = f"{'sylinit' if preset is COMPARE else 'python -m studies'} {preset.name}{' --quick' if quick else ''}"
    text = [f"{command}: {len(records)} of {final} runs, seeds {_listed(seeds)}"]
    if epochs:
        text.append(f"{_listed(epochs)} epochs, one cycle")
    precisions = {record.experiment.get("precision") or "float32" for record in records if record.experiment.epochs}
    if precisions:
        rounded = sum(record.environment.get("bfloat16") == "rounded" for record in records)
        text.append(" and ".join(sorted(precisions)) + (f" ({rounded} runs rounded in float32)" if rounded else ""))
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

"""Tables, figures and numbers of the results pages, made from `benchmarks/results` whenever the site is built.

`python docs/tables.py` draws the one figure that is stored, that of the README.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import adapter_tables
import command_line
import study_tables
import suite_tables
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stored import (
    DATA,
    NETWORKS,
    OURS,
    RESULTS,
    SHOTS,
    TUNED,
    best_random,
    comparison,
    counted,
    lead,
    markdown,
    methods,
    stored,
    value,
)

from sylinit.comparison.figures import style
from sylinit.comparison.statistics import Interval, paired
from sylinit.comparison.summary import Row, gap, ranked, rows


def few_labels(data: str, model: str) -> str:
    """Accuracy after training, one row for each initialization, one column for each number of labels."""
    columns = [methods("fewshot", data, model, shots) for shots in SHOTS]
    body = []
    for name in columns[0]:
        cells = [value(c[name], "after", bold=c[name] is ranked(c.values())[0]) if name in c else "" for c in columns]
        body.append([f"`{name}`", *cells])
    body.append(["lead over the best random one", *(lead(c[OURS], best_random(c)) for c in columns)])
    body.append(["lead over PCA whitening", *(lead(c[OURS], c["pca-whitening"]) for c in columns)])
    return markdown(["labels of each class", *map(str, SHOTS)], body)


def before_training(data: str, model: str) -> str:
    """The computed network without a step beside where the others end after all of their training."""
    columns = [methods("fewshot", data, model, shots) for shots in SHOTS]
    randoms = [best_random(c) for c in columns]
    body = [
        ["`sylinit`, no training step", *(value(c[OURS], "before", bold=True) for c in columns)],
        ["best random one, no training step", *(value(row, "before") for row in randoms)],
        ["best random one, trained", *(value(row, "after") for row in randoms)],
        ["PCA whitening, trained", *(value(c["pca-whitening"], "after") for c in columns)],
        [
            "untrained less trained",
            *(head_start(c[OURS], row).percent(sign=True) for c, row in zip(columns, randoms, strict=True)),
        ],
    ]
    return markdown(["labels of each class", *map(str, SHOTS)], body)


def head_start(mine: Row, other: Row) -> Interval:
    """One before any training less the other after all of it, paired by seed."""
    ends = {record.experiment.seed: record.result["after"] for record in other.records}
    pairs = [(r.result["before"], ends[r.experiment.seed]) for r in mine.records if r.experiment.seed in ends]
    return paired([a for a, _ in pairs], [b for _, b in pairs])


def fine_tuning(data: str) -> str:
    """Each way to begin a fine-tuning, before and after."""
    columns = [methods("finetune", data, "cnn", shots) for shots in TUNED]
    header = ["start", *(f"{n}, {when}" for n in TUNED for when in ("before", "after"))]
    body = []
    for name in columns[0]:
        cells = [
            value(c[name], metric, bold=metric == "after" and c[name] is ranked(c.values())[0])
            for c in columns
            for metric in ("before", "after")
        ]
        body.append([name, *cells])
    return markdown(header, body)


def codes(model: str) -> str:
    """Every code, before and after training."""
    found = [row for row in rows(comparison("codes")) if row.method.model == model]
    default = next(row for row in found if row.label == "sylinit code=mixed")
    body = []
    for row in ranked(found):
        name = row.label.removeprefix("sylinit code=")
        cells = [value(row, "before"), value(row, "after")]
        body.append([f"`{name}`", f"{row.lr:g}", *cells, "" if row is default else lead(default, row)])
    return markdown(["code", "rate", "before", "after", "lead of `mixed`"], body)


PASSES = {
    "resnet20-samples-250": "ResNet-20, 250 images of 32x32",
    "resnet20-samples-500": "ResNet-20, 500 images",
    "resnet20": "ResNet-20, 1,000 images",
    "resnet20-samples-2000": "ResNet-20, 2,000 images",
    "resnet56": "ResNet-56, 1,000 images",
    "resnet110": "ResNet-110, 1,000 images",
    "encoder": "transformer encoder, 256 sequences of 128 tokens",
    "resnet18-224": "ResNet-18, 128 images of 224x224",
    "depthwise": "depthwise separable convolutions, 1,000 images",
    "mlp-8x256": "eight linear layers of 256 units, 2,000 rows",
    "mlp-width-128": "linear layers of 128 units, 16,384 rows",
    "mlp-width-1024": "linear layers of 1,024 units, 16,384 rows",
}
CONVOLUTIONAL = [name for name in PASSES if name.startswith("resnet")]
LINEAR = [name for name in PASSES if name.startswith("mlp")]


def cost() -> str:
    """Seconds of the initialization and of a forward pass over the same data."""
    measured = stored("one_pass.json")["rows"]
    body = [
        [
            shown,
            f"{median(measured[name]['forward']):.2f}",
            f"{median(measured[name]['initialise']):.2f}",
            f"{measured[name]['ratio']:.1f}",
        ]
        for name, shown in PASSES.items()
    ]
    return markdown(["network and data", "forward (s)", "initialize (s)", "passes"], body)


def memory() -> str:
    """Peak memory with and without offloading."""
    found = stored("memory.json")["rows"]

    def peak(count: int, how: str) -> str:
        return f"{median(run['grown'] for run in found[f'{count}-{how}']['runs']) / 1e6:.0f}"

    body = [
        [f"{n:,}", f"{found[f'{n}-plain']['live'] / 1e6:.0f}", peak(n, "plain"), peak(n, "offload")]
        for n in (200, 600, 2000)
    ]
    return markdown(["images", "live activations (MB)", "peak (MB)", 'peak, `offload="disk"` (MB)'], body)


def task_rows() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The measured forms of batch, by task and target."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in stored("tasks.json")["table"]:
        found.setdefault((entry["task"], entry["target"]), []).append(entry)
    return found


def shortfall(entries: Iterable[Mapping[str, Any]]) -> float:
    """Of the worst form of batch, to the ridge regression."""
    return max(entry["ridge"] - entry["head"] for entry in entries)


def tasks() -> str:
    """The head that was computed beside regressions on the same features."""
    body = []
    for (task, target), entries in task_rows().items():
        first = entries[0]
        logistic = first.get("logistic")
        shown = "" if logistic is None else f"{logistic:.3f}"
        body.append(
            [task, target, f"{first['head']:.3f}", f"{first['ridge']:.3f}", shown, f"{shortfall(entries):+.3f}"]
        )
    return markdown(["task", "target", "head", "ridge", "logistic", "shortfall"], body, 2)


def estimator_rows() -> dict[str, dict[str, dict[str, float]]]:
    """Mean accuracy and seconds over the seeds, by data set and classifier."""
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    for line in (RESULTS / "heads.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        data, classifier, _ = row["key"].rsplit(" ", 2)
        runs.setdefault(data, {}).setdefault(classifier, []).append(row["result"])
    return {
        data: {
            name: {key: sum(run[key] for run in found) / len(found) for key in ("accuracy", "seconds")}
            for name, found in by_name.items()
        }
        for data, by_name in runs.items()
    }


ESTIMATORS = ("sylinit", "MiniRocket", "ridge", "forest")


def estimators() -> str:
    """Accuracy in percent of classifiers as they come, and their processor seconds."""
    body = []
    for data, found in estimator_rows().items():
        best = max(each["accuracy"] for each in found.values())
        cells = []
        for name in ESTIMATORS:
            shown = ""
            if name in found:
                shown = f"{100 * found[name]['accuracy']:.1f}"
                shown = f"**{shown}**" if found[name]["accuracy"] == best else shown
                shown += f" ({found[name]['seconds']:.2g} s)"
            cells.append(shown)
        body.append([data, *cells])
    return markdown(["data", *ESTIMATORS], body)


TABLES: dict[str, Callable[[], str]] = {
    **{
        f"{kind}-{data}-{model}": functools.partial(make, data, model)
        for kind, make in (("after", few_labels), ("before", before_training))
        for data in DATA
        for model in NETWORKS
    },
    "fine-tuning-near": functools.partial(fine_tuning, "cifar10"),
    "fine-tuning-far": functools.partial(fine_tuning, "digits"),
    "codes-cnn": functools.partial(codes, "cnn"),
    "codes-resnet20": functools.partial(codes, "resnet20"),
    "cost": cost,
    "memory": memory,
    "tasks": tasks,
    "estimators": estimators,
    **adapter_tables.TABLES,
    **study_tables.TABLES,
    **suite_tables.TABLES,
}
"""Each table, by the name of the file that pages include."""


def numbers() -> dict[str, str]:
    """What pages say in words, as ``{{ name }}``."""
    found = adapter_tables.numbers() | study_tables.numbers() | suite_tables.numbers()
    for data in DATA:
        for model in NETWORKS:
            for shots in SHOTS:
                cell = methods("fewshot", data, model, shots)
                mine, other, whitened = cell[OURS], best_random(cell), cell["pca-whitening"]
                key = f"{data.replace('-', '_')}_{model}_{shots}"
                found |= {
                    f"{key}_before": mine.interval("before").percent(),
                    f"{key}_after": mine.interval("after").percent(),
                    f"{key}_random": other.interval("after").percent(),
                    f"{key}_lead": lead(mine, other).removeprefix("+"),
                    f"{key}_whitened": whitened.interval("after").percent(),
                    f"{key}_lead_whitened": lead(mine, whitened).removeprefix("+"),
                }
            columns = [methods("fewshot", data, model, shots) for shots in SHOTS]
            starts = [head_start(column[OURS], best_random(column)) for column in columns]
            found[f"{data.replace('-', '_')}_{model}_untrained"] = counted(starts)
    for data, name in (("cifar10", "near"), ("digits", "far")):
        for shots in TUNED:
            cell = methods("finetune", data, "cnn", shots)
            for start, row in cell.items():
                key = f"{name}_{shots}_{start.replace('-', '_').replace(' ', '_')}"
                found[f"{key}_before"] = row.interval("before").percent()
                found[f"{key}_after"] = row.interval("after").percent()
    whole = methods("scratch", "cifar10", "resnet20", None)
    found["full_lead_whitened"] = lead(whole[OURS], whole["pca-whitening"])
    found["full_lead_random"] = lead(whole[OURS], best_random(whole))
    passes = stored("one_pass.json")["rows"]
    found |= {f"passes_{name.replace('-', '_')}": f"{passes[name]['ratio']:.1f}" for name in PASSES}
    for kind, names in (("convolutional", CONVOLUTIONAL), ("linear", LINEAR)):
        ratios = [passes[name]["ratio"] for name in names]
        found |= {f"passes_{kind}_least": f"{min(ratios):.1f}", f"passes_{kind}_most": f"{max(ratios):.1f}"}
    found |= {f"lsuv_{n}": f"{passes[f'lsuv-{n}']['times_faster']:.0f}" for n in ("resnet20", "resnet56")}
    found["worst_shortfall"] = f"{100 * max(map(shortfall, task_rows().values())):.1f}"
    firsts = [entries[0] for entries in task_rows().values() if entries[0].get("logistic") is not None]
    ahead = sum(first["logistic"] > max(first["head"], first["ridge"]) for first in firsts)
    found["logistic_ahead"] = f"{ahead} of {len(firsts)}"
    found |= estimator_numbers() | fine_tuning_numbers()
    for model in NETWORKS:
        for row in rows(comparison("codes")):
            if row.method.model == model:
                code = row.label.removeprefix("sylinit code=").replace(":", "_").replace(".", "_")
                found[f"code_{model}_{code}"] = row.interval("after").percent()
        by_code = {row.label: row for row in rows(comparison("codes")) if row.method.model == model}
        noise, labels = (by_code[f"sylinit code={code}"] for code in ("random", "label"))
        found[f"code_{model}_noise_over_labels"] = lead(noise, labels).removeprefix("+")
    return found


def estimator_numbers() -> dict[str, str]:
    """How the computed classifier stands to others: on time series, and on tables, where MiniRocket has no row."""
    series = [row for row in estimator_rows().values() if "MiniRocket" in row]
    plain = [row for row in estimator_rows().values() if "MiniRocket" not in row]
    found = {}
    for group, name in ((series, "series"), (plain, "plain")):
        for other in group[0].keys() - {"sylinit"}:
            leads = [row["sylinit"]["accuracy"] - row[other]["accuracy"] for row in group]
            key = f"{name}_{other.lower()}"
            found[f"{key}_above"] = f"{sum(lead > 0 for lead in leads)} of {len(leads)}"
            found[f"{key}_mean"] = f"{100 * sum(leads) / len(leads):+.1f}"
            found[f"{key}_worst"] = f"{100 * min(leads):+.1f}"
    slower = [row["sylinit"]["seconds"] / row["forest"]["seconds"] for row in (*series, *plain)]
    return found | {"slower_than_forest": f"{median(slower):.0f}"}


def fine_tuning_numbers() -> dict[str, str]:
    """How often what is computed ends above LP-FT, near and far."""
    found = {}
    for data, name in (("cifar10", "near"), ("digits", "far")):
        cells = [methods("finetune", data, "cnn", shots) for shots in TUNED]
        for start in ("sylinit head", "sylinit last two", "sylinit all"):
            leads = [each for cell in cells if (each := gap(cell[start], cell["LP-FT"])) is not None]
            found[f"{name}_{start.split(' ', 1)[1].replace(' ', '_')}_counted"] = counted(leads)
    return found


def draw_tasks() -> Figure:
    """Scores of the head and of the two regressions, one line for each form of target."""
    entries = [(f"{task}: {target}", found[0]) for (task, target), found in task_rows().items()]
    figure = Figure(figsize=(7.5, 1.2 + 0.27 * len(entries)), layout="constrained")
    axes = figure.subplots()
    for label, key, color, marker in (
        ("logistic regression", "logistic", "#999999", "s"),
        ("ridge regression", "ridge", "#0072B2", "D"),
        ("computed head", "head", "#D55E00", "o"),
    ):
        points = [(entry[key], place) for place, (_, entry) in enumerate(entries) if entry.get(key) is not None]
        axes.plot(*zip(*points, strict=True), marker, color=color, label=label, markersize=6)
    axes.set_yticks(range(len(entries)), [name for name, _ in entries])
    axes.set(xlabel="accuracy, or R² of values", xlim=(0.7, 1.0), ylim=(len(entries) - 0.4, -0.6))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    return figure


SHOWN = {
    "sylinit": "sylinit",
    "pca-whitening": "PCA whitening",
    "he-normal": "He",
    "lsuv": "LSUV",
    "orthogonal": "orthogonal",
    "pytorch": "PyTorch's default",
}
"""The initializations that figures show, by the names that they have there."""


def over_labels(axes: Axes, title: str, counts: Sequence[int] = SHOTS) -> None:
    """Axes of accuracy over the number of labels, in letters that a phone can show."""
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(shots) for shots in counts], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("labeled images of each class", fontsize=11)
    axes.set_ylabel("test accuracy (%)", fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def curve(axes: Axes, found: Sequence[Row], metric: str, label: str, **look: Any) -> None:
    """One initialization over the numbers of labels, with its 95 % intervals."""
    values = [row.interval(metric) for row in found]
    mean, half = ([100 * getattr(each, name) for each in values] for name in ("mean", "half"))
    counts = [row.method.shots or 0 for row in found]
    axes.errorbar(counts, mean, half, label=label, capsize=3, elinewidth=0.9, **look)


def show_after(axes: Axes, data: str, model: str) -> None:
    """Accuracy after training."""
    over_labels(axes, f"After training: {DATA[data]}, {NETWORKS[model]}")
    columns = [methods("fewshot", data, model, shots) for shots in SHOTS]
    looks = style(list(SHOWN))
    for name, label in SHOWN.items():
        curve(axes, [column[name] for column in columns], "after", label, **looks[name])
    axes.legend(frameon=False, fontsize=11)


def show_before(axes: Axes, data: str, model: str) -> None:
    """The computed network without training beside the best random one after it."""
    over_labels(axes, f"Before training: {DATA[data]}, {NETWORKS[model]}")
    columns = [methods("fewshot", data, model, shots) for shots in SHOTS]
    best = [best_random(column) for column in columns]
    ours, other = style([OURS, "he-normal"]).values()
    curve(axes, [column[OURS] for column in columns], "before", "sylinit, no training step", **ours)
    curve(axes, best, "before", "best random one, no training step", **other, linestyle=":", alpha=0.7)
    curve(axes, best, "after", "best random one, trained", **other)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=11)


def show_fine_tuning(axes: Axes) -> None:
    """Accuracy after fine-tuning, of the ways to begin it that differ."""
    over_labels(axes, "After fine-tuning: CIFAR-10, classes 0-4 to 5-9, CNN", TUNED)
    columns = [methods("finetune", "cifar10", "cnn", shots) for shots in TUNED]
    looks = style(["sylinit head", "sylinit all", "LP-FT", "random head"])
    for name, look in looks.items():
        curve(axes, [column[name] for column in columns], "after", name, **look)
    axes.legend(frameon=False, fontsize=11, loc="lower right")


def drawn(*panels: Callable[[Axes], None]) -> Figure:
    """A figure with these panels side by side."""
    figure = Figure(figsize=(0.4 + 6.6 * len(panels), 4.6), layout="constrained")
    for place, panel in enumerate(panels, 1):
        panel(figure.add_subplot(1, len(panels), place))
    return figure


def draw_overview() -> Figure:
    """Before and after training with few labels: the figure of the README and of the first page."""
    panels = [functools.partial(show, data="cifar10", model="cnn") for show in (show_before, show_after)]
    figure = drawn(*panels)
    for axes in figure.axes:
        axes.set_ylim(0, 70)
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "before": lambda: drawn(functools.partial(show_before, data="cifar10", model="cnn")),
    "after": lambda: drawn(functools.partial(show_after, data="cifar10", model="cnn")),
    "fine-tuning": lambda: drawn(show_fine_tuning),
    "tasks": draw_tasks,
    **study_tables.FIGURES,
    **suite_tables.FIGURES,
}
"""Each figure, by the name of its file."""


def write(folder: Path) -> dict[str, str]:
    """Write every table to a file of its own, and every figure, and return the numbers.

    Args:
        folder: where the files go.
    """
    folder.mkdir(exist_ok=True)
    for name, make in TABLES.items():
        (folder / f"{name}.md").write_text(make(), encoding="utf-8")
    for name, page in command_line.reference().items():
        (folder / f"{name}.md").write_text(page, encoding="utf-8")
    for name, draw in FIGURES.items():
        draw().savefig(folder / f"{name}.png", dpi=150)
    return {name: found.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}") for name, found in numbers().items()}


if __name__ == "__main__":
    draw_overview().savefig(Path(__file__).parent / "static" / "few-labels.png", dpi=110)

"""Tables, figures and numbers of the studies of one thing each: learning rates, codes, λ, samples, defaults, time."""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

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
    value,
)

from studies.exponents import exponent
from studies.panels import panels
from studies.precision import PRECISIONS
from studies.presets import PRESETS
from studies.race import race
from studies.resume import as_run, in_precision
from sylinit.comparison.experiment import Experiment
from sylinit.comparison.figures import before_and_after
from sylinit.comparison.plan import GRIDS, read
from sylinit.comparison.statistics import Interval
from sylinit.comparison.store import Record, Store
from sylinit.comparison.summary import Row, gap, ranked, rows

OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW"}
WHEN = {"before": "before training", "after": "after training"}


def paired_leads(preset: str, data: str, model: str, other: Callable[[dict[str, Row]], Row]) -> list[Interval]:
    """How far sylinit ends above another initialization, at each number of labels."""
    cells = [methods(preset, data, model, shots) for shots in SHOTS]
    return [found for cell in cells if (found := gap(cell[OURS], other(cell))) is not None]


def whitened(found: Mapping[str, Row]) -> Row:
    """Plain PCA whitening."""
    return found["pca-whitening"]


def means_over_training(data: str, model: str) -> str:
    """Accuracy averaged over training, and when sylinit is where the best other one ends."""
    columns = [methods("fewshot", data, model, shots) for shots in SHOTS]
    names = ("he-normal", "orthogonal", "lsuv", "pca-whitening", OURS)
    body = [[f"`{name}`", *(value(column[name], "area") for column in columns)] for name in names]
    raced = [race(list(column.values())) for column in columns]
    body.append(["best other at the end", *(f"`{each.best.label}`" if each else "" for each in raced)])
    cells = []
    for each in raced:
        epochs = each.paces[OURS].epochs if each else None
        cells.append("never" if each is None or epochs is None else f"{epochs:.1f} of {each.best.method.epochs}")
    body.append(["epochs of `sylinit` to there", *cells])
    return markdown(["labels of each class", *map(str, SHOTS)], body)


@functools.cache
def repeated() -> dict[tuple[str, int], Row]:
    """The rows of sylinit that were made again in float32, by network and labels of each class."""
    store = Store(RESULTS / "study" / "fewshot.jsonl")
    plan = as_run(PRESETS["fewshot"].plan(False), store)
    first = {record.experiment for record in comparison("fewshot").records}
    found = {}
    for precision in PRECISIONS:
        for row in rows(read(in_precision(plan, precision), store)):
            e = row.method
            if row.label == OURS and e.dataset == "cifar10" and row.records[0].experiment not in first:
                found[e.model, e.shots or 0] = row
    return found


def repeat() -> str:
    """What a second run of the same cells in float32 came to."""
    body = []
    for (model, shots), row in sorted(repeated().items()):
        cell = methods("fewshot", "cifar10", model, shots)
        leads = [lead(row, other) for other in (cell[OURS], best_random(cell), whitened(cell))]
        body.append([f"{NETWORKS[model]}, {shots} a class", value(row, "before"), value(row, "after"), *leads])
    header = ["network and labels", "before", "after", "less the first run", "lead over random", "over PCA whitening"]
    return markdown(header, body)


def learning_rates(model: str) -> dict[str, dict[float, dict[str, Row]]]:
    """Every initialization at every rate, by optimizer and rate."""
    found: dict[str, dict[float, dict[str, Row]]] = {name: defaultdict(dict) for name in OPTIMIZERS}
    for row in rows(comparison("learning-rate")):
        if row.method.model == model:
            found[row.method.optimizer][row.lr][row.label] = row
    return found


def best_other(found: Mapping[str, Row]) -> Row:
    """Of all but sylinit, the one that ends highest."""
    return ranked(row for name, row in found.items() if name != OURS)[0]


def rates(model: str, optimizer: str) -> str:
    """Accuracy after training, one row for each initialization, one column for each rate."""
    by_rate = learning_rates(model)[optimizer]
    columns = [by_rate[rate] for rate in GRIDS[optimizer]]
    tops = [ranked(column.values())[0] for column in columns]
    body = [
        [f"`{name}`", *(value(c[name], "after", bold=c[name] is top) for c, top in zip(columns, tops, strict=True))]
        for name in columns[0]
    ]
    for words, other in (("the best random one", best_random), ("PCA whitening", whitened)):
        body.append([f"lead over {words}", *(lead(c[OURS], other(c)) for c in columns)])
    return markdown([f"peak rate of {OPTIMIZERS[optimizer]}", *(f"{rate:g}" for rate in GRIDS[optimizer])], body)


def full_set() -> str:
    """All of CIFAR-10."""
    found = methods("scratch", "cifar10", "resnet20", None)
    body = []
    for row in ranked(found.values()):
        cells = [value(row, metric) for metric in ("before", "after", "area")]
        body.append([f"`{row.label}`", *cells, "" if row.label == OURS else lead(found[OURS], row)])
    return markdown(["initialization", "before", "after", "mean over training", "lead of `sylinit`"], body)


def swept(preset: str, option: str, model: str) -> dict[float, Row]:
    """The rows of a study of one option, by its value."""
    found = {}
    for row in rows(comparison(preset)):
        if row.method.model == model and option in dict(row.method.options):
            found[dict(row.method.options)[option]] = row
    return found


def sweep(preset: str, option: str, header: str) -> str:
    """Accuracy before and after training against one option, for both networks; the best of each row is bold."""
    body = []
    for model, name in NETWORKS.items():
        found = swept(preset, option, model)
        for metric, when in WHEN.items():
            best = ranked(found.values(), metric)[0]
            body.append([f"{name}, {when}", *(value(row, metric, bold=row is best) for row in found.values())])
    return markdown([header, *(f"{each:,g}" for each in swept(preset, option, "cnn"))], body)


def clearly_below(preset: str, option: str, model: str, metric: str) -> str:
    """In words: the values of an option that lie below the best beyond the interval, paired by draw."""
    found = swept(preset, option, model)
    best = ranked(found.values(), metric)[0]
    worse = []
    for each, row in found.items():
        behind = None if row is best else gap(best, row, metric)
        if behind is not None and behind.low > 0:
            worse.append(f"{each:,g}")
    return ", ".join(worse) if worse else "none"


VARIANTS = ("sylinit", "sylinit code=pca", "sylinit code=label", "sylinit code=kmeans", "sylinit solver=exact", "lsuv")
COSTS = {"init_seconds": 1.0, "extra_bytes": 1e-6}


def timed(axis: str) -> dict[str, dict[int, Row]]:
    """The rows of the study of time along one size, by method and size."""
    found: dict[str, dict[int, Row]] = {name: {} for name in VARIANTS}
    for row in rows(comparison("time")):
        if row.method.get("sweep") == axis:
            found[row.label][row.method.get(axis)] = row
    return found


def power(points: Mapping[int, Row], metric: str) -> str:
    """The power with which a cost grows, with its 95 % interval."""
    fit = exponent(list(points), [row.interval(metric).mean for row in points.values()])
    return f"{fit.power:.2f} ± {fit.half:.2f}"


def growth(axis: str, metric: str) -> str:
    """A cost against one size, and the power with which it grows: over all sizes, and over the three largest."""
    found = timed(axis)
    body = []
    for name, points in found.items():
        cells = [f"{COSTS[metric] * row.interval(metric).mean:.3g}" for row in points.values()]
        largest = dict(list(points.items())[-3:])
        body.append([f"`{name}`", *cells, power(points, metric), power(largest, metric).split(" ± ")[0]])
    return markdown([axis, *(f"{size:,}" for size in found[OURS]), "power", "largest three"], body)


Change = tuple[str, int, int, str]
"""Network, images of each class, epochs, and what differs from the defaults as JSON."""


@functools.cache
def changes() -> dict[Change, Row]:
    """Runs of the defaults and of one change of them."""
    found: dict[Change, list[Record]] = defaultdict(list)
    for line in (RESULTS / "defaults.jsonl").read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        values, fields = json.loads(run["key"])
        e = Experiment.from_dict(fields)
        found[e.model, e.shots or 0, e.epochs, json.dumps(dict(values))].append(Record(e, run["result"], {}))
    return {key: Row(records[0].experiment.method, 0.0, tuple(records)) for key, records in found.items()}


def change(model: str, shots: int, epochs: int, **values: Any) -> Row | None:
    """The row of one change, if it was run."""
    return changes().get((model, shots, epochs, json.dumps(values)))


def changed_cells(default: Row | None, row: Row | None) -> list[str]:
    """Cells: before, the default's lead, after, the default's lead."""
    if row is None or default is None:
        return [""] * 4
    cells = []
    for metric in WHEN:
        cells += [f"{100 * row.interval(metric).mean:.1f}", "" if row is default else lead(default, row, metric)]
    return cells


CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "no label units": {"label_share": 0.0},
    "a sixteenth of label units": {"label_share": 0.0625},
    "an eighth": {"label_share": 0.125},
    "a quarter": {"label_share": 0.25},
    "λ of 1 instead of 4": {"encoding_weight": 1.0},
    "logits of 0.2 instead of 0.5": {"logit_deviation": 0.2},
    "logits of 1": {"logit_deviation": 1.0},
    "normalizations without offset": {"norm_offset": 0.0},
    "normalizations at full scale": {"norm_scale": 1.0},
}
HELD, FREE = {"few_samples": 10**9}, {"few_samples": 0}


def neighbors() -> str:
    """The defaults with one thing changed at a time, on both networks."""
    body = []
    for name, values in CHANGES.items():
        cells = []
        for model in NETWORKS:
            cells += changed_cells(change(model, 50, 20), change(model, 50, 20, **values))
        body.append([name, *cells])
    header = ["changed"]
    for name in NETWORKS.values():
        header += [f"{name}, before", "lead of the defaults", "after", "lead of the defaults"]
    return markdown(header, body)


def clear_changes(model: str) -> str:
    """In words: what costs accuracy after training beyond the interval."""
    default = change(model, 50, 20)
    worse = []
    for name, values in CHANGES.items():
        row = change(model, 50, 20, **values)
        behind = gap(default, row) if default and row and row is not default else None
        if behind is not None and behind.low > 0:
            worse.append(name)
    return ", ".join(worse) if worse else "none"


BY_LABELS = ((50, 20), (50, 60), (100, 20), (200, 15), (500, 15), (500, 5))


def held_and_free() -> str:
    """ResNet-20 held near its initialization and free to move, by number of labels."""
    body = []
    for shots, epochs in BY_LABELS:
        few = shots < 300  # the default holds below 3,000 samples of ten classes
        held = change("resnet20", shots, epochs, **({} if few else HELD))
        free = change("resnet20", shots, epochs, **(FREE if few else {}))
        assert held is not None
        assert free is not None
        other = change("resnet20", shots, epochs, start="pca-whitening")
        means = [f"{100 * row.interval(m).mean:.1f}" for m in WHEN for row in (held, free)]
        ends = "" if other is None else f"{100 * other.interval('after').mean:.1f}"
        body.append([f"{shots}, {epochs} epochs", *means, lead(held, free), ends])
    header = ["labels of each class", "held, before", "free, before", "held, after", "free, after", "lead of held"]
    return markdown([*header, "PCA whitening, after"], body)


STEPS_BACK: dict[str, dict[str, Any]] = {
    "nothing (free)": {},
    "a quarter of label units": {"label_share": 0.25},
    "a sixteenth of label units": {"label_share": 0.0625},
    "normalizations at half scale": {**HELD, "norm_offset": 0.0, "filter_length": None, "label_share": 0.125},
    "filters of length √2": {**HELD, "norm_scale": 1.0, "norm_offset": 0.0, "label_share": 0.125},
    "filters of length 0.7, a quarter": {**HELD, "norm_scale": 1.0, "norm_offset": 0.0, "filter_length": 0.7},
    "an offset, a quarter": {**HELD, "norm_scale": 1.0, "filter_length": None},
    "held": HELD,
}


def steps_back() -> str:
    """What each part of holding a network costs where labels are many."""
    free = change("resnet20", 500, 15)
    body = [[name, *changed_cells(free, change("resnet20", 500, 15, **v))] for name, v in STEPS_BACK.items()]
    return markdown(["changed", "before", "lead of free", "after", "lead of free"], body)


IDEAS = {
    "sylinit": "none",
    "subclasses": "label units aimed at two clusters of each class",
    "shared-labels": "both convolutions of a residual block aim at the same directions of the labels",
    "shared-code": "the second of them also repeats the code of the first, channel by channel",
    "chosen-share": "the share of label units of least leave-one-out error, one for all layers",
    "chosen-shares": "the same, one for each layer",
}


def ideas() -> str:
    """What was tried beside the defaults, on both networks."""
    found: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in Store(RESULTS / "ideas.jsonl").records.values():
        found[record.experiment.model, record.experiment.initialization].append(record)
    made = {key: Row(records[0].experiment.method, 0.0, tuple(records)) for key, records in found.items()}
    body = []
    for idea, words in IDEAS.items():
        cells = []
        for model in NETWORKS:
            cells += changed_cells(made[model, OURS], made.get((model, idea)))
        body.append([words, *cells])
    header = ["idea"]
    for name in NETWORKS.values():
        header += [f"{name}, before", "lead of the defaults", "after", "lead of the defaults"]
    return markdown(header, body)


def aim(lead: Interval | None, wanted: float) -> str:
    """A cell: whether a mean reaches what was aimed at."""
    return "" if lead is None else "yes" if lead.mean >= wanted else "no"


AIMS = {10: {"cnn": 0.09, "resnet20": 0.05}, 50: {"cnn": 0.07, "resnet20": 0.05}, 500: {"cnn": 0.04}}
"""Of leads after training on CIFAR-10, by labels of each class and network, set before anything was run."""


def aims() -> str:
    """What the studies aimed at, and what was measured."""
    body = []
    for shots, wanted in AIMS.items():
        for model, least in wanted.items():
            cell = methods("fewshot", "cifar10", model, shots)
            again = repeated().get((model, shots))
            for words, other in (("the best random one", best_random(cell)), ("PCA whitening", whitened(cell))):
                found = gap(cell[OURS], other)
                second = gap(again, other) if again else None
                shown = "" if found is None else found.percent(sign=True)
                shown += "" if second is None else f"; repeated {second.percent(sign=True)}"
                reached = " / ".join(filter(None, (aim(found, least), aim(second, least))))
                name = f"{NETWORKS[model]}, {shots} labels of each class, after training, over {words}"
                body.append([name, f"{100 * least:+.0f}", shown, reached])
    for shots in (10, 50):
        cell = methods("finetune", "cifar10", "cnn", shots)
        found = gap(cell["sylinit head"], ranked([cell["random head"], cell["LP-FT"]])[0])
        shown = "" if found is None else found.percent(sign=True)
        name = f"fine-tuning, near, {shots} labels, over the better of a random head and LP-FT"
        body.append([name, "+3", shown, aim(found, 0.03)])
    return markdown(["lead", "aim", "measured", "reached"], body, 1)


def verdicts() -> str:
    """One line for each question: how often sylinit is clearly above, level and below."""
    body = []
    for data, name in DATA.items():
        for model, network in NETWORKS.items():
            for words, other in (("best random one", best_random), ("PCA whitening", whitened)):
                found = counted(paired_leads("fewshot", data, model, other))
                body.append([f"[few labels](few-labels.md), {name}, {network}", words, found])
    for model, network in NETWORKS.items():
        by_rate = [column for columns in learning_rates(model).values() for column in columns.values()]
        for words, other in (("best random one", best_random), ("PCA whitening", whitened)):
            leads = [found for column in by_rate if (found := gap(column[OURS], other(column))) is not None]
            body.append([f"[each learning rate](learning-rates.md), {network}", words, counted(leads)])
    for data, far in (("cifar10", "near"), ("digits", "far")):
        cells = [methods("finetune", data, "cnn", shots) for shots in TUNED]
        for start in ("random head", "LP-FT"):
            leads = [found for cell in cells if (found := gap(cell["sylinit head"], cell[start])) is not None]
            body.append([f"[fine-tuning](fine-tuning.md), {far}, the head computed", start, counted(leads)])
    whole = methods("scratch", "cifar10", "resnet20", None)
    for words, other in (("best random one", best_random(whole)), ("PCA whitening", whitened(whole))):
        found = gap(whole[OURS], other)
        body.append(["[the full set](full-set.md), CIFAR-10, ResNet-20", words, counted([found] if found else [])])
    return markdown(["after training", "against", "`sylinit` ends"], body, 3)


def draw(preset: str, name: str, metric: str) -> Figure:
    """A figure of a study, as `python -m studies` draws it."""
    panel = next(panel for panel in panels(PRESETS[preset], comparison(preset)) if panel.name == name)
    return dict(panel.figures)[metric]


def draw_neighbors() -> Figure:
    """The CNN with the defaults and with one of them changed, before and after training."""
    shown = []
    for name, values in CHANGES.items():
        row = change("cnn", 50, 20, **values)
        if row is not None:
            label = name if values else OURS
            shown.append(replace(row, method=replace(row.method, initialization=label, options=())))
    return before_and_after(shown, "CIFAR-10, CNN, 50 examples a class (held-back training data)")


TABLES: dict[str, Callable[[], str]] = {
    **{
        f"mean-{data}-{model}": functools.partial(means_over_training, data, model)
        for data in DATA
        for model in NETWORKS
    },
    **{f"rates-{model}-{name}": functools.partial(rates, model, name) for model in NETWORKS for name in OPTIMIZERS},
    **{
        f"{short}-{axis}": functools.partial(growth, axis, metric)
        for short, metric in (("seconds", "init_seconds"), ("megabytes", "extra_bytes"))
        for axis in ("depth", "width", "samples")
    },
    "repeat": repeat,
    "full-set": full_set,
    "encoding-weight": functools.partial(sweep, "lambda", "encoding_weight", "λ"),
    "samples": functools.partial(sweep, "samples", "samples", "samples"),
    "rows": functools.partial(sweep, "samples", "rows", "rows"),
    "neighbors": neighbors,
    "held-and-free": held_and_free,
    "steps-back": steps_back,
    "ideas": ideas,
    "aims": aims,
    "verdicts": verdicts,
}
"""Each table, by the name of the file that pages include."""

FIGURES: dict[str, Callable[[], Figure]] = {
    "full-set": functools.partial(draw, "scratch", "cifar10-resnet20-all", "curves"),
    "codes": functools.partial(draw, "codes", "cifar10-cnn-50", "accuracy"),
    "neighbors": draw_neighbors,
    "encoding-weight": functools.partial(draw, "lambda", "cifar10-cnn-50-encoding-weight", "before"),
    "samples": functools.partial(draw, "samples", "cifar10-cnn-50-samples", "before"),
    "rates-cnn": functools.partial(draw, "learning-rate", "cifar10-cnn-50-sgd-lr", "after"),
    "rates-resnet20": functools.partial(draw, "learning-rate", "cifar10-resnet20-50-sgd-lr", "after"),
    "growth": functools.partial(draw, "time", "synthetic-mlp-depth", "init_seconds"),
}
"""Each figure, by the name of its file."""


def numbers() -> dict[str, str]:
    """What pages say in words."""
    found: dict[str, str] = {}
    for data in DATA:
        for model in NETWORKS:
            key = f"{data.replace('-', '_')}_{model}"
            found[f"{key}_counted"] = counted(paired_leads("fewshot", data, model, best_random))
            found[f"{key}_counted_whitened"] = counted(paired_leads("fewshot", data, model, whitened))
        both = [each for model in NETWORKS for each in paired_leads("fewshot", data, model, best_random)]
        found[f"{data.replace('-', '_')}_counted"] = counted(both)
    both = [each for model in NETWORKS for each in paired_leads("fewshot", "cifar10", model, whitened)]
    found["cifar10_counted_whitened"] = counted(both)
    for model in NETWORKS:
        for optimizer, columns in learning_rates(model).items():
            key = f"rates_{model}_{optimizer}"
            for words, other in (("random", best_random), ("whitened", whitened)):
                leads = [each for column in columns.values() if (each := gap(column[OURS], other(column)))]
                found[f"{key}_{words}"] = counted(leads)
                for rate, column in columns.items():
                    spelled = f"{rate:g}".replace(".", "_")
                    found[f"{key}_{words}_{spelled}"] = lead(column[OURS], other(column))
    for metric in WHEN:
        for model in NETWORKS:
            found[f"lambda_{model}_{metric}_below"] = clearly_below("lambda", "encoding_weight", model, metric)
            for option in ("samples", "rows"):
                found[f"{option}_{model}_{metric}_below"] = clearly_below("samples", option, model, metric)
    for model in NETWORKS:
        found[f"changes_{model}_worse"] = clear_changes(model)
        every = swept("samples", "samples", model)
        found[f"samples_{model}_before_lost"] = lead(every[500], every[200], "before").removeprefix("+")
    for axis in ("depth", "width", "samples"):
        by_method = timed(axis)
        for name in (OURS, "lsuv"):
            found[f"power_{axis}_{name}"] = power(by_method[name], "init_seconds")
            found[f"memory_{axis}_{name}"] = power(by_method[name], "extra_bytes")
        ratios = [
            by_method[OURS][size].interval("init_seconds").mean / by_method["lsuv"][size].interval("init_seconds").mean
            for size in by_method[OURS]
        ]
        found |= {f"lsuv_faster_{axis}_least": f"{min(ratios):.1f}", f"lsuv_faster_{axis}_most": f"{max(ratios):.1f}"}
        if axis == "depth":
            sizes = list(by_method[OURS])
            found["lsuv_until"] = f"{max(n for n, ratio in zip(sizes, ratios, strict=True) if ratio > 1)}"
            found["lsuv_from"] = f"{min(n for n, ratio in zip(sizes, ratios, strict=True) if ratio < 1)}"
    for key, shots, epochs, values in (("few", 50, 20, FREE), ("many", 500, 15, HELD)):
        chosen, other = change("resnet20", shots, epochs), change("resnet20", shots, epochs, **values)
        assert chosen is not None
        assert other is not None
        found[f"held_{key}"] = lead(chosen, other).removeprefix("+")
    return found

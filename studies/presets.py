"""The questions that the studies answer, each as data: which experiments, and what its figure shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from studies.finetune import HEADS
from sylinit.comparison.experiment import Experiment
from sylinit.comparison.initializations import INITIALIZATIONS
from sylinit.comparison.plan import GRIDS, Plan

Pairs = tuple[tuple[str, Any], ...]


def field(name: str) -> Callable[[Experiment], tuple[str, Any]]:
    """The axis of one field or option."""
    return lambda experiment: (name, experiment.get(name))


def swept(experiment: Experiment) -> tuple[str, Any]:
    """The axis of a study that varies one thing at a time: the setting's, or whichever option there is."""
    name = experiment.get("sweep") or experiment.options[0][0]
    return name, experiment.get(name)


@dataclass(frozen=True)
class Preset:
    """A question, the plan that answers it and how the answer is drawn.

    Attributes:
        name: on the command line.
        question: for people.
        plan: of the full study (``False``) or of one small enough to try (``True``).
        axis: name and value of an experiment on the horizontal axis; None draws one row a method.
        metrics: of the result, each a figure.
    """

    name: str
    question: str
    plan: Callable[[bool], Plan]
    axis: Callable[[Experiment], tuple[str, Any]] | None = None
    metrics: tuple[str, ...] = ("before", "after")


MIXED: Pairs = (("precision", "bfloat16"),)
"""Setting of the full studies: training in mixed precision, if no other is asked for (`in_precision`)."""

FEW = ("he-normal", "xavier-normal", "lsuv", "sylinit")
GRID, QUICK_GRID = GRIDS["sgd"], (0.01, 0.03)


def fewshot(quick: bool) -> Plan:
    """Every initialization at every number of shots."""
    cells = (
        [("digits", "mlp")]
        if quick
        else [(data, model) for data in ("cifar10", "fashion-mnist") for model in ("resnet20", "cnn")]
    )
    arms = [
        Experiment(data, model, name, shots, epochs=10 if quick else epochs_for(shots))
        for data, model in cells
        for shots in ((5, 20) if quick else (5, 10, 20, 50, 100, 500))
        for name in (FEW if quick else initializations_for(model))
    ]
    return _plan(arms, quick, seeds=5)


def initializations_for(model: str) -> list[str]:
    """Every initialization that differs from the others: under normalization PCA whitening is not rescaled."""
    return [name for name in INITIALIZATIONS if not (model == "resnet20" and name == "pca-whitening-rescaled")]


def epochs_for(shots: int) -> int:
    """More passes where there is less data: at least some 200 steps, at least 15 epochs."""
    return 40 if shots <= 10 else 30 if shots <= 20 else 20 if shots <= 100 else 15


def scratch(quick: bool) -> Plan:
    """The full training set, ResNet-20, images mirrored and shifted."""
    setting = (("crop", 4), ("points", 30), ("batch_size", 128))
    base = Experiment("digits", "mlp", "", epochs=6) if quick else Experiment("cifar10", "resnet20", "", epochs=60)
    arms = [
        replace(base, initialization=name, setting=() if quick else setting)
        for name in (FEW if quick else initializations_for(base.model))
    ]
    return replace(_plan(arms, quick, seeds=3), grid=QUICK_GRID if quick else (0.1, 0.3, 1.0))


def finetune(quick: bool) -> Plan:
    """From classes 0-4 to 5-9 of CIFAR-10, and from Fashion-MNIST to digits."""
    near = (("source", "cifar10"), ("pretrain_classes", "0-4"), ("classes", "5-9"), ("pretrain_epochs", 10))
    far = (("source", "fashion-mnist"), ("pretrain_epochs", 3))
    small = (("source", "digits"), ("pretrain_classes", "0-4"), ("classes", "5-9"), ("pretrain_epochs", 20))
    cells = [("digits", small)] if quick else [("cifar10", near), ("digits", far)]
    arms = [
        Experiment(
            data, "cnn", head, shots, epochs=10 if quick else epochs_for(shots), task="finetune", setting=setting
        )
        for data, setting in cells
        for shots in ((10,) if quick else (10, 20, 50))
        for head in HEADS
    ]
    grid = (0.001, 0.003) if quick else (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03)
    return replace(_plan(arms, quick, seeds=5), grid=grid)


def codes(quick: bool) -> Plan:
    """Every registered code that needs no argument, and the share of label units in `mixed`."""
    from sylinit import CODES

    shares = ("mixed:0.25",) if quick else tuple(f"mixed:{share:g}" for share in (0, 0.125, 0.25, 0.5, 0.75, 1))
    default_first = sorted(CODES, key=lambda code: code != "mixed")  # figures draw it bold
    names = ("pca", "label") if quick else default_first
    return _sweep(quick, [(("code", code),) for code in (*names, *shares)])


def encoding_weight(quick: bool) -> Plan:
    """Lambda, from almost pure decoding to almost pure encoding."""
    values = (0.1, 10.0) if quick else (1e-3, 1e-2, 1e-1, 1.0, 10.0, 1e2, 1e3)
    return _sweep(quick, [(("encoding_weight", value),) for value in values])


def samples(quick: bool) -> Plan:
    """Calibration samples with the default rows of a layer, then rows of a layer with all samples."""
    counts = (50, 100) if quick else (25, 50, 100, 200, 500)
    rows = (200,) if quick else (100, 300, 1000, 3000, 10000, 30000)
    return _sweep(quick, [*[(("samples", n),) for n in counts], *[(("rows", n),) for n in rows]])


def timing(quick: bool) -> Plan:
    """One size at a time from a common middle, for sylinit's main codes, its exact solver and LSUV."""
    middle = {"depth": 8, "width": 256, "samples": 1000}
    sweeps: dict[str, tuple[int, ...]] = {
        "depth": (2, 4) if quick else (2, 4, 8, 16, 32),
        "width": (64, 128) if quick else (64, 128, 256, 512, 1024),
        "samples": (250, 500) if quick else (250, 500, 1000, 2000, 4000, 8000),
    }
    methods: list[tuple[str, Pairs]] = [("sylinit", ()), ("lsuv", ())]
    if not quick:
        variants: list[Pairs] = [(("code", code),) for code in ("pca", "label", "kmeans")]
        methods[1:1] = [("sylinit", options) for options in (*variants, (("solver", "exact"),))]
    arms = [
        Experiment(
            "synthetic",
            "mlp",
            name,
            options=options,
            lr=0.0,
            epochs=0,
            task="time",
            setting=(("sweep", sweep), *({**middle, sweep: value}).items()),
        )
        for sweep, values in sweeps.items()
        for value in values
        for name, options in methods
    ]
    return Plan(tuple(arms), grid=(), seeds=(0,) if quick else (0, 1, 2), workers=1)


def learning_rate(quick: bool) -> Plan:
    """Every initialization at every learning rate of both optimizers; nothing is tuned."""
    cells = [("digits", "mlp", 10)] if quick else [("cifar10", "cnn", 50), ("cifar10", "resnet20", 50)]
    arms = [
        Experiment(data, model, name, shots, optimizer=optimizer, lr=lr, epochs=10 if quick else epochs_for(shots))
        for data, model, shots in cells
        for optimizer in ("sgd", "adamw")
        for lr in (GRIDS[optimizer][1:3] if quick else GRIDS[optimizer])
        for name in (FEW if quick else initializations_for(model))
    ]
    return replace(_plan(arms, quick, seeds=3), grid=())


def _sweep(quick: bool, options: list[Pairs]) -> Plan:
    """Settings of sylinit on both networks. They choose the library's defaults, so they never see the test set."""
    cells = [("digits", "mlp", 10)] if quick else [("cifar10", "cnn", 50), ("cifar10", "resnet20", 50)]
    arms = [
        Experiment(data, model, "sylinit", shots, options=chosen, epochs=10 if quick else epochs_for(shots))
        for data, model, shots in cells
        for chosen in options
    ]
    return replace(_plan(arms, quick, seeds=3), split="validation")


def _plan(arms: list[Experiment], quick: bool, *, seeds: int) -> Plan:
    if not quick:
        arms = [replace(arm, setting=(*MIXED, *arm.setting)) for arm in arms]
    return Plan(tuple(arms), grid=QUICK_GRID if quick else GRID, seeds=tuple(range(2 if quick else seeds)))


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "fewshot",
            "What is an initialization from data worth when labels are few?",
            fewshot,
            field("shots"),
            ("before", "after", "area"),
        ),
        Preset("scratch", "Does it help on the full training set?", scratch, metrics=("after", "area")),
        Preset("finetune", "Does it help a pretrained network to learn new classes?", finetune, field("shots")),
        Preset("codes", "Which latent code is best?", codes),
        Preset("lambda", "How much should encoding weigh against decoding?", encoding_weight, field("encoding_weight")),
        Preset("samples", "How many samples and rows does it need?", samples, swept),
        Preset("time", "What does it cost?", timing, swept, ("init_seconds", "forward_passes", "extra_bytes")),
        Preset("learning-rate", "Is it good at any learning rate?", learning_rate, field("lr"), ("after",)),
    )
}
"""Every preset by name."""

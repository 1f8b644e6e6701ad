"""`sylinit demo`: a network computed from data beside the same network trained from random weights."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sylinit.comparison.experiment import Experiment
from sylinit.comparison.figures import LOOKS, OURS, style
from sylinit.comparison.plan import Plan
from sylinit.comparison.statistics import interval
from sylinit.comparison.summary import Row, mean_curve, ranked

GRID = (0.003, 0.01, 0.03, 0.1)
"""Learning rates that every initialization is tuned over."""

NAMES = {"pytorch": "PyTorch's default", "he-normal": "He", "orthogonal": "orthogonal", "xavier-normal": "Xavier"}
"""What the random initializations are called in figures and sentences."""


@dataclass(frozen=True)
class Story:
    """One task of the demo.

    Attributes:
        name: in messages.
        title: of its figure.
        what: what the network does, for the sentence at the end.
        dataset: for `data.load`.
        model: for `models.build`.
        shots: training samples of each class.
        epochs: passes over them.
        initializations: the random ones; the computed one is added.
    """

    name: str
    title: str
    what: str
    dataset: str
    model: str
    shots: int
    epochs: int
    initializations: tuple[str, ...]

    @property
    def arms(self) -> tuple[Experiment, ...]:
        """One experiment for each initialization."""
        setting = (("points", 20),)
        return tuple(
            Experiment(self.dataset, self.model, name, self.shots, epochs=self.epochs, setting=setting)
            for name in (*self.initializations, "sylinit")
        )


def plan_of(stories: Sequence[Story], seeds: int, workers: int | None) -> Plan:
    """All runs: rates tuned on training data that is held back, then every seed, measured on the test part.

    Args:
        stories: what is told.
        seeds: repetitions.
        workers: processes; None is one a core.
    """
    arms = tuple(arm for story in stories for arm in story.arms)
    return Plan(arms, grid=GRID, seeds=tuple(range(seeds)), workers=workers)


def stories(shots: int) -> list[Story]:
    """The tasks of the demo: digits always, a time series where the aeon package is installed.

    Args:
        shots: labeled examples of each digit.
    """
    found = [
        Story(
            "digits",
            f"Handwritten digits, {shots} labeled examples of each (a CNN of 6 layers)",
            "reads {score} of handwritten digits",
            "digits",
            "cnn",
            shots,
            20,
            ("pytorch", "he-normal"),
        )
    ]
    if importlib.util.find_spec("aeon") is not None:
        found.append(
            Story(
                "time series",
                "Motion of a hand (GunPoint), 15 labeled series of each class (an FCN)",
                "tells {score} of the motions apart",
                "aeon:GunPoint",
                "fcn-small",
                15,
                80,
                ("pytorch", "he-normal"),
            )
        )
    return found


@dataclass(frozen=True)
class Finding:
    """What a story came to. Accuracies are means over the seeds, as shares.

    Attributes:
        story: what was run.
        rows: one for each initialization.
        computed: accuracy of the computed network, before any training.
        seconds: that computing it took.
        best: the random initialization that ends highest.
        steps: of training in all.
        crossing: the first measured step at which the mean curve of `best` is at `computed`; None if it never is.
        crossing_seconds: that training to there took, its initialization included; to the end if it never is.
    """

    story: Story
    rows: tuple[Row, ...]
    computed: float
    seconds: float
    best: Row
    steps: int
    crossing: int | None
    crossing_seconds: float

    @property
    def sentence(self) -> str:
        """What a person repeats."""
        score = f"{self.computed:.1%}"
        after = self.best.interval("after").mean
        name = NAMES[self.best.label]
        first = f"Computed in {self.seconds:.1f} s without a training step, the network {self.story.what}".format(
            score=score
        )
        trained = f"from random weights ({name}), the same network"
        if self.crossing is None:
            return f"{first}; trained for {self.steps} steps {trained} ends at {after:.1%}."
        return f"{first}; trained {trained} takes {self.crossing} steps to get there, and ends at {after:.1%}."

    @property
    def details(self) -> str:
        """The numbers behind the sentence, the ones that speak against it among them."""
        computed = next(row for row in self.rows if row.label == "sylinit")
        others = ", ".join(
            f"{NAMES[row.label]} {row.interval('after').percent()}" for row in ranked(self.rows) if row is not computed
        )
        reached = "caught up in" if self.crossing is not None else "did not catch up in"
        return (
            f"accuracy (%) on {computed.records[0].result['evaluated']} test samples, {len(computed.records)} seeds: "
            f"computed {computed.interval('before').percent()}, and trained from there "
            f"{computed.interval('after').percent()}; random weights, trained: {others}. "
            f"The best of these, {NAMES[self.best.label]}, {reached} {self.crossing_seconds:.1f} s of training."
        )


def find(story: Story, rows: Sequence[Row]) -> Finding:
    """What a story came to.

    Args:
        story: what was run.
        rows: of this and of other stories.
    """
    rows = [row for row in rows if row.method in {arm.method for arm in story.arms}]
    computed = next(row for row in rows if row.label == "sylinit")
    best = next(row for row in ranked(rows) if row is not computed)
    level = computed.interval("before").mean
    samples = best.records[0].result["samples"]
    size = min(128, max(16, samples // 10))
    per_epoch = math.ceil(samples / min(size, samples))
    steps = per_epoch * story.epochs
    crossed = [epoch for epoch, value in mean_curve(best) if value.mean >= level]
    share = crossed[0] / story.epochs if crossed else 1.0
    training = interval([record.result["seconds"] for record in best.records]).mean
    return Finding(
        story,
        tuple(rows),
        level,
        computed.interval("init_seconds").mean,
        best,
        steps,
        round(crossed[0] * per_epoch) if crossed else None,
        best.interval("init_seconds").mean + share * training,
    )


def draw(findings: Sequence[Finding]) -> Figure:
    """One panel for each finding: accuracy over training steps, the computed network's as a line, the crossing marked.

    Args:
        findings: one or more.
    """
    figure = Figure(figsize=(1.5 + 6.2 * len(findings), 5.0), layout="constrained")
    few = "A computed network" if len(findings) == 1 else "Two computed networks"
    figure.suptitle(f"{few} against training from random weights", fontsize=15, fontweight="bold", x=0.01, ha="left")
    for axes, finding in zip(np.atleast_1d(figure.subplots(1, len(findings))), findings, strict=True):
        _panel(axes, finding)
    return figure


def _panel(axes: Axes, finding: Finding) -> None:
    level, steps = 100 * finding.computed, finding.steps
    looks = style(list(LOOKS))
    names: list[tuple[float, str, str]] = []
    for row in finding.rows:
        color = looks[row.label]["color"]
        points = mean_curve(row)
        x = [epoch / finding.story.epochs * steps for epoch, _ in points]
        y = np.array([100 * value.mean for _, value in points])
        ours = row.label == "sylinit"
        axes.plot(x, y, color=color, linewidth=1.8 if ours else 2.4, linestyle=":" if ours else "-", zorder=3)
        for record in row.records:
            single = [100 * accuracy for _, accuracy in record.result["curve"]]
            axes.plot(x, single, color=color, linewidth=0.8, alpha=0.3, linestyle=":" if ours else "-", zorder=2)
        names.append((y[-1], "computed, then trained" if ours else f"random weights ({NAMES[row.label]})", color))
    axes.axhline(level, color=OURS[0], linewidth=2.8, zorder=4)
    axes.plot(0, level, "o", color=OURS[0], markersize=11, clip_on=False, zorder=5)
    axes.annotate(
        f"computed: {level:.1f} % in {finding.seconds:.1f} s, 0 steps", (0, level), xytext=(10, 9),
        textcoords="offset points", color=OURS[0], fontsize=12, fontweight="bold",
    )  # fmt: skip
    if finding.crossing is not None:
        color = looks[finding.best.label]["color"]
        axes.plot(finding.crossing, level, "o", color="white", markeredgecolor=color, markersize=10, mew=2.5, zorder=6)
        axes.annotate(
            f"{NAMES[finding.best.label]} catches up after {finding.crossing} steps", (finding.crossing, level),
            xytext=(0, -42), ha="center", textcoords="offset points", fontsize=10, color=color,
            arrowprops={"arrowstyle": "-", "color": color},
        )  # fmt: skip
    else:
        axes.annotate(
            f"not reached in {steps} steps", (1, level), xycoords=("axes fraction", "data"), xytext=(-4, 7), ha="right",
            textcoords="offset points", color=OURS[0], fontsize=10,
        )  # fmt: skip
    seeds = len(finding.best.records)
    axes.set(
        xlabel=f"training steps (bold: mean of {seeds} seeds, thin: each)",
        ylabel="test accuracy (%)",
        xlim=(0, steps),
        ylim=(0, 100),
    )
    axes.set_yticks(range(0, 101, 20))
    axes.set_title(finding.story.title, fontsize=11, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(axes, names)


def _legend(axes: Axes, names: Sequence[tuple[float, str, str]]) -> None:
    """Names in the free corner at the lower right, highest end first, each in the color of its line."""
    for place, (end, name, color) in enumerate(sorted(names)):
        axes.annotate(
            f"{name}: {end:.1f} %", (0.985, 0.05 + 0.065 * place), xycoords="axes fraction", ha="right",
            color=color, fontsize=10,
        )  # fmt: skip

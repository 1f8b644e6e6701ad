"""What was done to each layer, as frozen records that print, save and plot themselves."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sylinit.config import Config
from sylinit.data.score import Before, Score

Action = Literal["initialized", "recalibrated", "left alone"]


@dataclass(frozen=True)
class LayerReport:
    """One layer, or one matrix of a layer that holds several.

    Attributes:
        name: dotted name in the model.
        kind: type of the module.
        action: what was done.
        reason: why it was left alone, or what else there is to say.
        shape: ``(groups, units, dim)`` of its weight as matrices.
        code: name of the latent code; "head" for the last layer of a classifier or regressor.
        rows: number of rows of input that were read.
        solver: "exact", "row-space" or "projected".
        rank: numerical rank of the weight, summed over groups.
        encoding_weight: lambda, as given or as chosen.
        residual: ``||A W + W B - C|| / ||C||`` of the solution; this and the errors are of W before it is scaled.
        encoding_error: ``||W X - S||^2 / ||S||^2``.
        decoding_error: ``||X - W^T S||^2 / ||X||^2``.
        dead_units: share of units that are zero.
        seconds: time spent on this layer.
    """

    name: str
    kind: str
    action: Action
    reason: str = ""
    shape: tuple[int, ...] = ()
    code: str = ""
    rows: int = 0
    solver: str = ""
    rank: int | None = None
    encoding_weight: float | None = None
    residual: float | None = None
    encoding_error: float | None = None
    decoding_error: float | None = None
    dead_units: float | None = None
    seconds: float = 0.0


LEGEND = (
    "residual: of the Sylvester equation; encode: ||W X - S||^2 / ||S||^2; decode: ||X - W'S||^2 / ||X||^2; "
    "dead: share of units that are zero"
)


@dataclass(frozen=True, repr=False)
class Report:
    """What `initialize_` did.

    Attributes:
        layers: in the order in which the data met them; those left alone last, in the model's order.
        samples: number of calibration samples.
        seconds: wall time of the whole call.
        solve_seconds: the part of it spent on layers rather than on running the model.
        task: what the head was asked for, one of `sylinit.data.tasks.TASKS`.
        task_reason: what that was read off.
        before: how well the model as it now stands meets its targets on the calibration data, before any training.
        notes: anything about the whole model that a user should know.
        config: the constants of the method that it was computed with.
        offloaded_peak: the largest number of bytes of activations that ``offload=`` held elsewhere at one time.
        offloaded_total: bytes that it moved away in all.
    """

    layers: tuple[LayerReport, ...]
    samples: int
    seconds: float
    solve_seconds: float
    task: str = "none"
    task_reason: str = ""
    before: Before = field(default_factory=Before)
    notes: tuple[str, ...] = ()
    config: Config = field(default_factory=Config)
    offloaded_peak: int = 0
    offloaded_total: int = 0

    @property
    def initialized(self) -> tuple[LayerReport, ...]:
        """The layers whose weights were computed."""
        return tuple(layer for layer in self.layers if layer.action == "initialized")

    @property
    def left_alone(self) -> tuple[LayerReport, ...]:
        """The layers whose weights were left as they were, each with its reason."""
        return tuple(layer for layer in self.layers if layer.action == "left alone")

    def __getitem__(self, name: str) -> LayerReport:
        """The record of one layer by name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r} in the report; it has {', '.join(layer.name for layer in self.layers)}")

    def __iter__(self) -> Iterator[LayerReport]:
        """The records of all layers, in the order of `layers`."""
        return iter(self.layers)

    def __len__(self) -> int:
        """The number of records."""
        return len(self.layers)

    def __contains__(self, name: object) -> bool:
        """Whether a layer of this name has a record."""
        return any(layer.name == name for layer in self.layers)

    def __str__(self) -> str:
        """A table for a terminal, one line a layer."""
        head = (
            "layer",
            "kind",
            "shape",
            "code",
            "solver",
            "rows",
            "rank",
            "residual",
            "encode",
            "decode",
            "dead",
            "seconds",
        )
        done = [layer for layer in self.layers if layer.action == "initialized"]
        first = self.headline()
        lines = _table([head, *(_cells(layer) for layer in done)]) if done else ["no layer was initialized"]
        lines = [first, "", *lines]
        others: dict[tuple[str, str], list[str]] = {}
        for layer in self.layers:
            if layer.action != "initialized":
                others.setdefault((layer.action, layer.reason), []).append(layer.name)
        for (action, reason), names in others.items():
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            lines.append(f"{action}: {shown}" + (f" ({reason})" if reason else ""))
        lines += [f"note: {layer.name}: {layer.reason}" for layer in done if layer.reason]
        lines += [f"note: {note}" for note in self.notes]
        if self.offloaded_total:
            peak, total = (f"{size / 1e6:.0f} MB" for size in (self.offloaded_peak, self.offloaded_total))
            lines.append(f"note: at most {peak} of activations were offloaded at one time, {total} in all")
        matrices = f"{len(done)} {'matrix' if len(done) == 1 else 'matrices'}"
        lines.append(
            f"{matrices} from {self.samples} samples in {self.seconds:.2f} s "
            f"({self.solve_seconds:.2f} s of it on layers, the rest running the model)"
        )
        if done:
            lines.append(LEGEND)
        return "\n".join(lines)

    def headline(self) -> str:
        """What was gained, in one line."""
        what = f"{len(self.initialized)} of {len(self.layers)} layers computed"
        task = "" if self.task == "none" else f" for {self.task} ({self.task_reason})"
        gain = str(self.before)
        return f"{gain or what}{task if not gain else ''}" if gain == "" else f"{gain}; {what}{task}"

    def __repr__(self) -> str:
        """One line."""
        return f"<sylinit.Report: {self.headline()}>"

    def _repr_html_(self) -> str:
        """For notebooks: the gain, and the table folded."""
        table = html.escape(str(self))
        return (
            f"<p><b>{html.escape(self.headline())}</b></p><details><summary>layers and notes</summary>"
            f"<pre>{table}</pre></details>"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, strings, lists and dictionaries."""
        return asdict(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text; also written to ``path`` if one is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw encoding and decoding error and residual of each layer; needs ``sylinit[plot]``.

        Args:
            path: where to save the picture; its suffix gives the format.

        Returns:
            The two matplotlib axes, errors and residuals; ``axes[0].figure`` is the figure.
        """
        from matplotlib.figure import Figure

        done = self.initialized
        place = range(len(done))
        figure = Figure(figsize=(7, 1.2 + 0.28 * max(1, len(done))), layout="constrained")
        errors, residuals = figure.subplots(1, 2, sharey=True, width_ratios=[2, 1])
        for values, label, color, marker in (
            ([layer.encoding_error for layer in done], "encoding", "#0072B2", "o"),
            ([layer.decoding_error for layer in done], "decoding", "#D55E00", "s"),
        ):
            errors.plot(values, place, marker, color=color, label=label)
        errors.set(xlabel="error / energy of what is to be matched", ylim=(len(done) - 0.5, -0.5))
        errors.set_yticks(list(place), [f"{layer.name}  [{layer.code}]" for layer in done])
        errors.set_xlim(left=0)
        errors.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False)
        residuals.plot([max(layer.residual or 0.0, 1e-17) for layer in done], place, "D", color="#444444", ms=4)
        residuals.set(xlabel="residual of the solve", xscale="log", xlim=(1e-17, 1.0))
        residuals.set_xticks([1e-16, 1e-8, 1e0])
        for axes in (errors, residuals):
            axes.grid(alpha=0.3)
        if path is not None:
            figure.savefig(path, dpi=150)
        return errors, residuals


def report_from_dict(values: dict[str, Any]) -> Report:
    """The report of which `Report.to_dict` gave these values, perhaps by way of JSON."""
    before = dict(values["before"])
    left_out = before.pop("cross_validated")
    judged = Before(
        **{**before, "constant": Score(**before["constant"])},
        cross_validated=None if left_out is None else Score(**left_out),
    )
    layers = tuple(LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in values["layers"])
    known = {**values, "layers": layers, "before": judged, "notes": tuple(values["notes"])}
    return Report(**{**known, "config": Config(**values["config"])})


def _cells(layer: LayerReport) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    groups, units, dim = layer.shape
    return (
        layer.name,
        layer.kind,
        f"{units}x{dim}" if groups == 1 else f"{groups}x{units}x{dim}",
        layer.code,
        layer.solver,
        str(layer.rows),
        number(layer.rank, "d"),
        number(layer.residual, ".0e"),
        number(layer.encoding_error, ".2f"),
        number(layer.decoding_error, ".2f"),
        number(layer.dead_units, ".0%"),
        f"{layer.seconds:.3f}",
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Left-aligned text columns, right-aligned numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text = 5
    lines = [
        "  ".join(
            cell.ljust(width) if column < text else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:], ""]

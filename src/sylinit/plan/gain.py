"""What was gained: the model's actual output beside its targets, and beside what the heads' solutions promised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

from torch import Tensor

from sylinit.data.goals import Goal
from sylinit.data.score import Before, Score, constant_score, flat, score_of, score_sums
from sylinit.errors import warn
from sylinit.layers.convolution import ConvView
from sylinit.layers.view import LayerView
from sylinit.plan.heads import Heads, module_name
from sylinit.plan.sites import Promise
from sylinit.plan.trace import Output, Trace
from sylinit.runtime.processes import Processes

BROKEN_PROMISE = 0.05
"""A difference in accuracy or R² between output and promise that rounding does not explain."""

LONG_WEIGHTS = 10.0
"""Weights so many times as long as PyTorch makes them are torn apart by the first steps at the usual learning rate."""


def judge(
    heads: Heads,
    trace: Trace,
    outputs: Mapping[int, Sequence[Tensor]],
    promises: Mapping[str, Promise],
    processes: Processes,
    held_out: float | None,
) -> tuple[Before, list[str]]:
    """The score of the first head's output on the samples of all processes, and what is to be known of all heads.

    Args:
        heads: the heads and their goals.
        trace: which layers made which output.
        outputs: the tensors of the model's output, by batch.
        promises: what each head's solution said of its predictions.
        processes: the group.
        held_out: accuracy, or R², of the first computed head on samples that no layer had seen, where that is known.
    """
    before, notes = Before(), []
    for number, (view, goal) in enumerate(heads.goals.items()):
        promise = promises.get(view.name, Promise())
        found = _score_of(view, goal, trace, outputs, processes)
        if found is None and trace.outputs and view.name in promises:
            notes.append(f"head {view.name!r}: no output has the form of its targets, so how it predicts is not stated")
        if found is not None and not _is_number(goal, found[0]):
            notes.append(_not_finite(view))
            before = Before(loss=found[0].loss, constant=found[1]) if number == 0 else before
            continue
        if number == 0 and found is not None:
            actual, constant = found
            left_out = promise.cross_validated
            if held_out is not None and view.name in promises:  # it is of the first head that was computed
                left_out = Score(accuracy=held_out) if goal.task.has_logits else Score(r2=held_out)
            before = Before(**asdict(actual), constant=constant, cross_validated=left_out)
        if found is not None and promise.value is not None and found[0].value is not None:
            difference = promise.value - found[0].value
            if difference > BROKEN_PROMISE:
                notes.append(_broken(view, promise.value, found[0].value))
        if goal.task.has_logits and promise.weight_ratio > LONG_WEIGHTS:
            notes.append(_long(view, promise.weight_ratio))
    return before, notes


def _score_of(
    view: LayerView, goal: Goal, trace: Trace, outputs: Mapping[int, Sequence[Tensor]], processes: Processes
) -> tuple[Score, Score] | None:
    """The score of the output that a head made, and of a constant prediction; None where no output has its form."""
    made = [i for i, out in enumerate(trace.outputs) if module_name(view) in out.made_by]

    def at(place: int) -> tuple[Tensor, Tensor] | None:
        tensors = [parts[place] for _, parts in sorted(outputs.items()) if place < len(parts)]
        if len(tensors) != len(goal.targets) or not all(t.is_floating_point() and t.ndim for t in tensors):
            return None
        return predictions(view, goal, trace.outputs[place], tensors)

    for place in dict.fromkeys([*made, *range(len(trace.outputs))]):
        found = processes.together(partial(at, place))
        rows = -1 if found is None else len(found[1])
        counts = processes.agree(partial(int, rows))
        if found is None or min(counts) < 0 or max(counts) == 0:
            continue
        sums = processes.sum_(processes.together(partial(score_sums, goal, *found)))
        return score_of(goal, sums), constant_score(goal, sums)
    return None


def predictions(view: LayerView, goal: Goal, output: Output, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """A head's predictions and their targets, as `flat` gives them; None where an output does not have their form.

    Args:
        view: the head.
        goal: what it was to predict.
        output: of the model, as the trial run showed it.
        tensors: the same, by batch.
    """
    return flat(
        goal,
        tensors,
        view.units,
        channels_first=isinstance(view, ConvView),
        probabilities=module_name(view) in output.probabilities,
    )


def _is_number(goal: Goal, found: Score) -> bool:
    """Whether a loss says anything: classes that a model rules out have an infinite one."""
    loss = found.loss or 0.0
    return math.isfinite(loss) or (goal.task.has_logits and not math.isnan(loss))


def _not_finite(view: LayerView) -> str:
    note = (
        f"head {view.name!r}: the model's output on the calibration data is not finite, though the features are; look "
        "at what comes behind the head"
    )
    warn(note)
    return note


def _broken(view: LayerView, promised: float, actual: float) -> str:
    note = (
        f"head {view.name!r}: its solution promised {promised:.2f} and the model's output gives {actual:.2f}; what "
        "comes behind the head may change its outputs (averaged, permuted or scaled), or its features differ from call "
        "to call"
    )
    warn(note)
    return note


def _long(view: LayerView, ratio: float) -> str:
    return (
        f"head {view.name!r}: its weights are {ratio:.0f} times as long as usual, since its features tell the targets "
        "apart by small differences; the first training steps may tear them apart: lower Config.logit_deviation, warm "
        "the learning rate up, or divide it by ten for this layer"
    )

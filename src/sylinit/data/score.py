"""How well outputs meet their targets, before any training: of the model as it stands, and of a constant prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sylinit.data.goals import Goal


@dataclass(frozen=True)
class Score:
    """How well predictions meet targets. What has no meaning for a task is None.

    Attributes:
        accuracy: share of right classes, or, with several labels, of right labels.
        balanced_accuracy: the mean over classes of the share that is right; over labels of which any is
            known, of each one's two classes.
        loss: mean cross-entropy in nats; of values, mean squared error.
        r2: ``1 - sum (t - y)^2 / sum (t - mean t)^2``, over all values together.
    """

    accuracy: float | None = None
    balanced_accuracy: float | None = None
    loss: float | None = None
    r2: float | None = None

    @property
    def value(self) -> float | None:
        """The number that tells most: accuracy, or R²."""
        return self.r2 if self.accuracy is None else self.accuracy


@dataclass(frozen=True)
class Before(Score):
    """The score of a model on its calibration data, before any training.

    Attributes:
        constant: of the best constant prediction.
        cross_validated: of the head, each sample predicted by the head of all others, in closed form, with the
            frequencies of the classes among all; None where that is not to be had. The layers before the head have
            seen the sample, so it is a little too kind.
    """

    constant: Score = Score()
    cross_validated: Score | None = None

    @property
    def constant_accuracy(self) -> float | None:
        """Of the most frequent class or, with several labels, of the most frequent value of each."""
        return self.constant.accuracy

    def __str__(self) -> str:
        """One line."""
        if self.value is None:
            return ""
        name, unit = ("R²", "{:.2f}") if self.accuracy is None else ("accuracy", "{:.1%}")
        extra = []
        if self.cross_validated is not None and self.cross_validated.value is not None:
            extra.append(f"cross-validated {unit.format(self.cross_validated.value)}")
        if self.constant.value is not None:
            extra.append(f"a constant prediction {unit.format(self.constant.value)}")
        rest = f" ({', '.join(extra)})" if extra else ""
        balanced = self.balanced_accuracy
        balance = "" if balanced is None else f", balanced {balanced:.1%}"
        return f"before training: {name} {unit.format(self.value)}{balance}{rest}, loss {self.loss:.3g}"


def flat(
    goal: Goal, outputs: Sequence[Tensor], units: int, *, channels_first: bool, probabilities: bool
) -> tuple[Tensor, Tensor] | None:
    """Outputs ``[n, k]`` and targets ``[n]`` or ``[n, c]`` of all places with a target; None where shapes do not fit.

    Args:
        goal: what was to be predicted.
        outputs: of the model, by batch.
        units: k.
        channels_first: whether the head's units lie behind the samples.
        probabilities: whether a sigmoid or a softmax comes last; logits are returned all the same.
    """
    rows, wanted = [], []
    for output, target in zip(outputs, goal.targets, strict=True):
        lead = target.shape if goal.task.classes else target.shape[:-1]
        y = output.flatten(1) if goal.task.flat else _units_last(output, lead, units, channels_first)
        if y is None or y.shape[-1] != units:
            return None
        t = target.flatten() if goal.task.classes else target.flatten(0, -2)
        known = t >= 0 if goal.task.classes else ~t.isnan().all(-1)
        rows.append(y.flatten(0, -2)[known].double())
        wanted.append(t[known])
    y = torch.cat(rows)
    return as_logits(y) if probabilities and goal.task.has_logits else y, torch.cat(wanted)


def _units_last(output: Tensor, lead: Sequence[int], units: int, channels_first: bool) -> Tensor | None:
    """An output as ``[*lead, k]``: as the head made it, or as losses want it; None where it has another form."""
    last, second = (*lead, units), (lead[0], units, *lead[1:])
    shape = tuple(output.shape)
    if shape == second and (channels_first or shape != last):
        return output.movedim(1, -1)
    forms = [last, (math.prod(lead), units), *([tuple(lead)] if units == 1 else [])]
    return output.reshape(last) if shape in forms else None


def as_logits(y: Tensor) -> Tensor:
    """The probabilities ``[n, k]`` of a sigmoid or a softmax as logits; anything else as it is."""
    if not len(y) or float(y.amin()) < 0 or float(y.amax()) > 1:
        return y
    of_softmax = y.shape[1] > 1 and bool(((y.sum(1) - 1).abs() < 0.01).all())
    return y.clamp(min=1e-12).log() if of_softmax else y.logit(1e-12)


def score(goal: Goal, y: Tensor, t: Tensor) -> Score:
    """The score of outputs.

    Args:
        goal: what was to be predicted.
        y: ``[n, k]`` outputs.
        t: ``[n]`` class indices, or ``[n, c]`` values, NaN where missing.
    """
    return score_of(goal, score_sums(goal, y, t))


def score_sums(goal: Goal, y: Tensor, t: Tensor) -> Tensor:
    """The sums of which a score is made, float64, so that those of several processes may be added.

    Of classes and labels: the loss, how many of each class are right ``[l, c]``, and how many there are ``[l, c]``;
    l = 1, or c = 2 for l labels. Of values: the squared error, then ``[3, c]``: of the values less the goal's mean, of
    their squares, and how many are known.

    Args:
        goal: what was to be predicted.
        y: ``[n, k]`` outputs.
        t: as in `score`.
    """
    task = goal.task
    if task.classes and y.shape[1] == 1:
        loss = F.binary_cross_entropy_with_logits(y[:, 0], t.double(), reduction="sum")
        return torch.cat([loss.view(1), _right_of_each((y[:, 0] > 0).long(), t, 2)])
    if task.classes:
        loss = F.cross_entropy(y, t, reduction="sum")
        return torch.cat([loss.view(1), _right_of_each(y.argmax(1), t, y.shape[1])])
    if task.name in ("multiclass", "binary"):  # shares of classes
        loss = F.cross_entropy(y, t, reduction="sum")
        return torch.cat([loss.view(1), _right_of_each(y.argmax(1), t.argmax(1), y.shape[1])])
    known = ~t.isnan()
    if task.name == "multilabel":
        loss = F.binary_cross_entropy_with_logits(y[known], t[known], reduction="sum")
        label, place = (t > 0.5).long(), 2 * torch.arange(t.shape[1], device=t.device)
        guess, label = ((each + place)[known] for each in ((y > 0).long(), label))
        return torch.cat([loss.view(1), _right_of_each(guess, label, 2 * t.shape[1])])
    away = torch.where(known, t - goal.mean, 0)
    error = (y - t)[known].square().sum()
    return torch.cat([error.view(1), away.sum(0), away.square().sum(0), known.double().sum(0)])


def score_of(goal: Goal, sums: Tensor) -> Score:
    """The score that `score_sums` make, of all samples that they are of."""
    first = sums[0]
    if goal.task.has_logits:
        right, count = sums[1:].view(2, -1, 2) if goal.task.name == "multilabel" else sums[1:].view(2, 1, -1)
        if not bool(count.any()):
            return Score()
        each = torch.where(count > 0, right / count.clamp(min=1), 0).sum(1)  # of each label or of the one question
        classes = (count > 0).sum(1)
        balanced = (each / classes)[classes > 0].mean()
        return Score(float(right.sum() / count.sum()), float(balanced), float(first / count.sum()))
    away, square, count = sums[1:].view(3, -1)
    if not bool(count.any()):
        return Score()
    total = float((square - away.square() / count.clamp(min=1)).sum())
    return Score(loss=float(first / count.sum()), r2=1 - float(first) / total if total > 0 else None)


def _right_of_each(guess: Tensor, label: Tensor, classes: int) -> Tensor:
    """``[2 c]``: how many samples of each class are right, and how many there are."""
    return torch.cat([label[guess == label].bincount(minlength=classes), label.bincount(minlength=classes)]).double()


def worth_of(goal: Goal, y: Tensor, t: Tensor, spread: float) -> Tensor:
    """What each prediction is worth: 1 or 0 for classes, the share of right labels, or 1 - squared error / spread.

    A prediction with NaN is worth NaN.

    Args:
        goal: what was to be predicted.
        y: ``[n, k]`` outputs.
        t: ``[n]`` class indices, or ``[n, c]`` values, NaN where missing.
        spread: variance of the values.
    """
    unknown = y.isnan().any(1)
    if goal.task.classes:
        guess = (y[:, 0] > 0).long() if y.shape[1] == 1 else y.argmax(1)
        return (guess == t).double().masked_fill(unknown, torch.nan)
    if goal.task.name in ("multiclass", "binary"):  # shares of classes
        return (y.argmax(1) == t.argmax(1)).double().masked_fill(unknown, torch.nan)
    known = ~t.isnan()
    count = known.double().sum(1).clamp(min=1)
    if goal.task.name == "multilabel":
        return ((((y > 0) == (t > 0.5)) & known).double().sum(1) / count).masked_fill(unknown, torch.nan)
    return 1 - torch.where(known, y - t, 0).square().sum(1) / (count * spread)


def fitted_score(goal: Goal, y: Tensor, t: Tensor) -> Score:
    """The score of a head's outputs on the vectors that it was fitted to.

    Args:
        goal: what was to be predicted.
        y: ``[n, k]`` outputs.
        t: ``[n, c]``: one-hot vectors of classes, or values.
    """
    return score(goal, y, t.argmax(1) if goal.task.classes else t)


def target_sums(goal: Goal, t: Tensor, outputs: int) -> Tensor:
    """How many there are of each class, or ``[2 c]``: of the values, and how many are known."""
    if goal.task.classes:
        return torch.bincount(t, minlength=max(2, outputs)).double()
    return torch.cat([t.nansum(0), (~t.isnan()).double().sum(0)])


def constant_prediction(goal: Goal, sums: Tensor, outputs: int) -> Tensor:
    """The outputs ``[1, k]`` of the best constant prediction: the frequencies of the classes as logits, or the mean."""
    if goal.task.classes:
        logits = (sums / sums.sum().clamp(min=1)).clamp(min=1e-12).log()
        return (logits[1] - logits[0]).view(1, 1) if outputs == 1 else logits.unsqueeze(0)
    total, count = sums.view(2, -1)
    mean = total / count.clamp(min=1)
    if goal.task.name == "multilabel":
        mean = mean.clamp(1e-12, 1 - 1e-12).logit()
    elif goal.task.has_logits:  # shares of classes
        mean = mean.clamp(min=1e-12).log()
    return mean.unsqueeze(0)

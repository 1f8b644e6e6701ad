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
        cross_validated: each sample predicted by a head that has not seen it; None where that is not to be had. Where
            ``code="auto"`` has computed the body, it is the score that it was chosen by, and no layer has seen the
            sample. Else each sample is predicted by the head of all others, in closed form, with the frequencies of the
            classes among all: honest for a body that was kept, too kind for layers that have been told its label.
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
    """The sums of which scores are made, float64, so that those of several processes may be added.

    Of classes and labels: the loss, how many of each class are right ``[l, c]``, and how many there are ``[l, c]``;
    l = 1, or c = 2 for l labels; of shares of classes then their sums ``[c]``. Of values: the squared error, then
    ``[3, c]``: of the values less the goal's mean, of their squares, and how many are known.

    Args:
        goal: what was to be predicted.
        y: ``[n, k]`` outputs.
        t: as in `score`.
    """
    if goal.task.classes and y.shape[1] == 1:
        loss = F.binary_cross_entropy_with_logits(y[:, 0], t.double(), reduction="sum")
        return torch.cat([loss.view(1), *_right_of_each((y[:, 0] > 0).long(), t, 2)])
    if goal.task.classes:
        return torch.cat([F.cross_entropy(y, t, reduction="sum").view(1), *_right_of_each(y.argmax(1), t, y.shape[1])])
    if goal.task.of_shares:
        loss, counts = F.cross_entropy(y, t, reduction="sum"), _right_of_each(y.argmax(1), t.argmax(1), y.shape[1])
        return torch.cat([loss.view(1), *counts, t.sum(0)])
    known = ~t.isnan()
    if goal.task.name == "multilabel":
        loss = F.binary_cross_entropy_with_logits(y[known], t[known], reduction="sum")
        place = 2 * torch.arange(t.shape[1], device=t.device)
        guess, label = ((each.long() + place)[known] for each in (y > 0, t > 0.5))
        return torch.cat([loss.view(1), *_right_of_each(guess, label, 2 * t.shape[1])])
    away = torch.where(known, t - goal.mean, 0)
    error = (y - t)[known].square().sum()
    return torch.cat([error.view(1), away.sum(0), away.square().sum(0), known.double().sum(0)])


def score_of(goal: Goal, sums: Tensor) -> Score:
    """The score that `score_sums` make, of all samples that they are of."""
    first, *others = sums.tolist()
    if goal.task.has_logits:
        right, count, _ = _of_each(goal, others)
        return _score_of_counts(first, right, count)
    total, known = _distance(others)
    return Score(loss=first / known, r2=1 - first / total if total > 0 else None) if known else Score()


def constant_score(goal: Goal, sums: Tensor) -> Score:
    """The score of the best constant prediction: the frequencies of the classes, or the mean of the values."""
    _, *others = sums.tolist()
    if not goal.task.has_logits:
        total, known = _distance(others)
        return Score(loss=total / known, r2=0.0 if total > 0 else None) if known else Score()
    _, count, share = _of_each(goal, others)
    right, loss = [], 0.0
    for counts, shares in zip(count, share, strict=True):
        best, whole = shares.index(max(shares)), sum(shares)
        right.append([number * (place == best) for place, number in enumerate(counts)])
        loss -= sum(part * math.log(part / whole) for part in shares if part > 0)
    return _score_of_counts(loss, right, count)


def _of_each(goal: Goal, sums: list[float]) -> tuple[list[list[float]], ...]:
    """How many of each class are right, how many there are, and the sums of their shares, ``[l][c]`` each."""
    parts = 3 if goal.task.of_shares else 2
    size = len(sums) // parts
    step = 2 if goal.task.name == "multilabel" else size
    right, count, *share = [[sums[i : i + step] for i in range(p, p + size, step)] for p in range(0, len(sums), size)]
    return right, count, *(share or [count])


def _score_of_counts(loss: float, right: list[list[float]], count: list[list[float]]) -> Score:
    """Of the sum of losses, and how many of each class are right, and are there, ``[l][c]``."""
    each = [[r / n for r, n in zip(*pair, strict=True) if n] for pair in zip(right, count, strict=True)]
    means = [sum(shares) / len(shares) for shares in each if shares]
    rows = sum(map(sum, count))
    return Score(sum(map(sum, right)) / rows, sum(means) / len(means), loss / rows) if rows else Score()


def _distance(sums: list[float]) -> tuple[float, float]:
    """The squared distance of values from their mean, and how many are known."""
    width = len(sums) // 3
    away, square, known = (sums[start : start + width] for start in (0, width, 2 * width))
    return sum(s - a * a / max(n, 1) for a, s, n in zip(away, square, known, strict=True)), sum(known)


def _right_of_each(guess: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """How many samples of each class are right, and how many there are, ``[c]`` each."""
    return label[guess == label].bincount(minlength=classes), label.bincount(minlength=classes)


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
    if goal.task.of_shares:
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

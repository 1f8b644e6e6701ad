"""Training a network from its initialization, the same way for every initialization."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sylinit import SylinitError

OUTPUTS = ("logits", "prediction", "predictions", "output", "out")
"""What mappings and output objects call the predictions."""

Context = Callable[[], AbstractContextManager[object]]
"""Makes what every forward pass runs under, such as ``lambda: torch.autocast("cpu", torch.bfloat16)``."""

EVALUATE = 100
"""Samples a forward pass when measuring accuracy: few enough to stay in a cache."""


@dataclass(frozen=True)
class Recipe:
    """How to train: a OneCycle schedule over SGD with Nesterov momentum 0.9 or AdamW, cross-entropy unsmoothed.

    Attributes:
        lr: peak learning rate, reached after a quarter of the steps.
        optimizer: ``"sgd"`` or ``"adamw"``.
        epochs: passes over the data.
        batch_size: samples a step; 0 takes a tenth of the data, at least 16 and at most 128.
        weight_decay: of every parameter; None is 5e-4 for SGD and 0.01 for AdamW.
        flip: mirror each image left to right half of the time.
        crop: shift each image by up to so many pixels, zeros filling in.
        points: how often the learning curve is measured.
    """

    lr: float
    optimizer: str = "sgd"
    epochs: int = 20
    batch_size: int = 0
    weight_decay: float | None = None
    flip: bool = False
    crop: int = 0
    points: int = 10

    def size(self, samples: int) -> int:
        """Samples a step."""
        return min(samples, self.batch_size or min(128, max(16, samples // 10)))

    def make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer over `parameters`."""
        if self.optimizer == "sgd":
            decay = 5e-4 if self.weight_decay is None else self.weight_decay
            return torch.optim.SGD(parameters, self.lr, momentum=0.9, nesterov=True, weight_decay=decay)
        if self.optimizer == "adamw":
            decay = 0.01 if self.weight_decay is None else self.weight_decay
            return torch.optim.AdamW(parameters, self.lr, weight_decay=decay)
        raise SylinitError(f"optimizer: expected 'sgd' or 'adamw', got {self.optimizer!r}")

    def make_schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        """One cycle over `steps` steps; momentum stays as it is."""
        # OneCycleLR divides by zero where the rise is one step long, which is at four steps
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.lr, total_steps=max(5, steps), pct_start=0.25, cycle_momentum=False
        )


@dataclass(frozen=True)
class Outcome:
    """What training gave. Accuracies are shares in [0, 1]; in a regression R² stands in their place.

    Attributes:
        before: accuracy before the first step.
        after: accuracy at the end; chance (1 / classes, R² 0) if training diverged.
        curve: ``(epoch, accuracy)`` pairs on a fixed part of the evaluation data, the first before training.
        area: mean height of the curve (trapezoids) over the epochs.
        diverged: whether a loss or a logit became infinite or NaN.
        seconds: spent on training steps, without measuring.
    """

    before: float
    after: float
    curve: tuple[tuple[float, float], ...]
    area: float
    diverged: bool
    seconds: float


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    recipe: Recipe,
    *,
    classes: int,
    seed: int,
    curve_size: int = 1000,
    context: Context = nullcontext,
) -> Outcome:
    """Train `model` in place and measure it.

    Args:
        model: with its initialization already written.
        x: training samples ``[n, ...]``, on the model's device.
        y: int64 ``[n]`` of classes, or float32 ``[n, classes]`` of values.
        test_x: evaluation samples, never trained on.
        test_y: their labels.
        recipe: how to train.
        classes: number of classes, or of values.
        seed: of the order of samples and of flips; equal for all initializations, so that they see equal batches.
        curve_size: number of evaluation samples that the learning curve is measured on.
        context: what the forward passes of steps and measurements run under; weights and loss stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    size, chance = recipe.size(len(x)), 0.0 if y.is_floating_point() else 1 / classes
    optimizer = recipe.make_optimizer([p for p in model.parameters() if p.requires_grad])
    schedule = recipe.make_schedule(optimizer, math.ceil(len(x) / size) * recipe.epochs)
    part = _fixed_part(len(test_x), curve_size)
    # the curve's part of the evaluation data is not run twice where all of it is measured
    hits = correct(model, test_x, test_y, context)
    before, curve = _or(share(hits), chance), [(0.0, _or(share(hits[part]), chance))]
    measured = {round(recipe.epochs * i / recipe.points) for i in range(1, recipe.points + 1)}
    after, seconds = math.nan, 0.0
    for epoch in range(1, recipe.epochs + 1):
        began = time.perf_counter()
        model.train()
        for index in batches(len(x), size, generator):
            with context():
                output = prediction(model(augment(x[index], recipe, generator)))
            loss = loss_of(output, y[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        finite = math.isfinite(loss.item())
        seconds += time.perf_counter() - began
        if not finite:
            break
        if epoch == recipe.epochs:
            hits = correct(model, test_x, test_y, context)
            after = share(hits)
            curve.append((float(epoch), share(hits[part])))
        elif epoch in measured:
            curve.append((float(epoch), accuracy(model, test_x[part], test_y[part], context)))
    diverged = not math.isfinite(after)
    if diverged:
        curve = [*[point for point in curve if math.isfinite(point[1])], (float(recipe.epochs), chance)]
    return Outcome(before, _or(after, chance), tuple(curve), area_under(curve), diverged, seconds)


def prediction(output: Any) -> Tensor:
    """The predictions in what a model returns: a tensor, or the one in a tuple, a mapping or an output object.

    Raises:
        SylinitError: there is no tensor of real numbers in it.
    """
    values = output
    if isinstance(output, Mapping):
        named = [output[key] for key in OUTPUTS if key in output]
        values = named or list(output.values())
    elif not isinstance(output, (Tensor, tuple, list)):
        values = [value for key in OUTPUTS if (value := getattr(output, key, None)) is not None]
    if isinstance(values, Tensor):
        values = [values]
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0:
            return value
    raise SylinitError(
        f"model: expected a tensor of predictions, or a tuple or mapping with one (such as {OUTPUTS[0]!r}), got "
        f"{type(output).__name__}"
    )


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy, in float32 at least."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of classes ``[n]``, the mean squared error of values ``[n, c]``."""
    return F.mse_loss(output.float(), y) if y.is_floating_point() else cross_entropy(output, y)


@torch.no_grad()
def correct(model: nn.Module, x: Tensor, y: Tensor, context: Context = nullcontext) -> Tensor:
    """What each sample contributes to the score: ``[n]``, whose mean is the accuracy, or R² of values.

    Of classes 1 if the largest logit is the class's, else 0. Of values ``1 - (squared error) / (mean squared deviation
    of all targets)``. NaN where an output is not finite.
    """
    training = model.training
    model.eval()
    variance = (y - y.mean(0)).square().sum(1).mean().clamp(min=1e-30) if y.is_floating_point() else None
    hits = []
    for part, wanted in zip(x.split(EVALUATE), y.split(EVALUATE), strict=True):
        with context():
            output = prediction(model(part))
        if variance is None:
            right = (output.argmax(1) == wanted).float()
        else:
            right = 1 - (output.float() - wanted).square().sum(1) / variance
        hits.append(right.masked_fill(~output.isfinite().all(1), math.nan))
    model.train(training)
    return torch.cat(hits)


def accuracy(model: nn.Module, x: Tensor, y: Tensor, context: Context = nullcontext) -> float:
    """Share of samples whose largest logit is their class's, or R² of values; NaN if an output is not finite."""
    return share(correct(model, x, y, context))


def share(hits: Tensor) -> float:
    """Mean of what samples contribute, to the last digit."""
    return hits.sum(dtype=torch.float64).item() / len(hits)


def area_under(curve: list[tuple[float, float]]) -> float:
    """Mean height of a curve of ``(epoch, accuracy)`` points over its epochs, by trapezoids."""
    pieces = [(b - a) * (p + q) / 2 for (a, p), (b, q) in pairwise(curve)]
    length = curve[-1][0] - curve[0][0]
    return sum(pieces) / length if length else curve[-1][1]


def batches(samples: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """One epoch's batches of indices; a last batch of a single sample is left out (BatchNorm cannot use it)."""
    parts = list(torch.randperm(samples, generator=generator).split(size))
    return parts[:-1] if len(parts) > 1 and len(parts[-1]) == 1 else parts


def augment(x: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Mirror and shift each image of a batch by chance; anything but images passes."""
    if x.dim() != 4:
        return x
    if recipe.crop:
        padded = F.pad(x, (recipe.crop,) * 4)
        top, left = torch.randint(0, 2 * recipe.crop + 1, (2, len(x)), generator=generator)
        rows = top[:, None, None] + torch.arange(x.shape[2])[:, None]
        columns = left[:, None, None] + torch.arange(x.shape[3])
        x = padded[torch.arange(len(x))[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
    if recipe.flip:
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(3), x)
    return x


def _or(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise


def _fixed_part(samples: int, size: int) -> Tensor:
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    return order[:size].sort().values if size < samples else torch.arange(samples)

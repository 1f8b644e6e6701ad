"""One run: a network is initialized and trained, or a reference is fitted, and measured."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studies.suite.data import Parts, Samples, parts
from studies.suite.methods import REFERENCES, initialize, inputs_of
from studies.suite.networks import NETWORKS
from studies.suite.tasks import TASKS, Task

CURVE = (0.0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0)
"""Shares of the steps after which a network is measured on the validation subset."""

MILESTONES = (0.0, 0.1, 0.3, 1.0)
"""Shares of the steps after which it is measured on the test set, too."""

WEIGHT_DECAY = {"adamw": 0.01, "sgd": 5e-4}

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises to its peak; then it falls to zero along half a cosine."""

LOWEST_R2 = -1.0
"""R2 below this counts as this."""


@dataclass(frozen=True)
class Run:
    """What is run.

    Attributes:
        task: name of the task; for a reference, of the first task on its data.
        method: name of the initialization, or of the reference.
        seed: of the subsets, the random weights and the order of the samples.
        test: whether the test set is read.
        optimizer: "adamw" or "sgd"; empty for a reference.
        lr: peak learning rate; None for a reference.
        steps: training steps; 0 for a reference.
    """

    task: str
    method: str
    seed: int
    test: bool
    optimizer: str = ""
    lr: float | None = None
    steps: int = 0


def execute(run: Run, directory: Path | None = None, device: torch.device | None = None) -> dict[str, Any]:
    """Run it and return what came out.

    Args:
        run: what to run.
        directory: of data that no package carries.
        device: None takes a GPU where there is one.

    Returns:
        ``curve``: ``[step, validation, test or None]``, accuracies, or R2 where values are predicted;
        ``initialization_seconds`` and ``training_seconds`` (without measuring); ``diverged``, whether a loss was not
        finite, after which the network counts as one that guesses; ``samples``, of the three parts.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = TASKS[run.task]
    data = parts(task.data, task.size, run.seed, directory, test=run.test)
    result = reference(run, task, data) if run.method in REFERENCES else trained(run, task, data, device)
    sizes = (len(data.train), len(data.validation), len(data.test) if data.test else 0)
    return {**result, "samples": dict(zip(("train", "validation", "test"), sizes, strict=True))}


def reference(run: Run, task: Task, data: Parts) -> dict[str, Any]:
    """Fit a reference on the train subset; its curve is one point."""
    kind, regression = task.data_set.kind, task.data_set.regression
    began = time.perf_counter()
    estimator = REFERENCES[run.method][0](regression)
    estimator.fit(
        inputs_of(data.train.x, kind), data.train.y.squeeze(-1).numpy() if regression else data.train.y.numpy()
    )
    seconds = time.perf_counter() - began

    def value(part: Samples) -> float:
        predicted = torch.as_tensor(estimator.predict(inputs_of(part.x, kind)))
        if regression:
            return r2(predicted.float().view(-1, 1), part.y)
        return (predicted == part.y).double().mean().item()

    point = [0, value(data.validation), value(data.test) if data.test else None]
    return {"curve": [point], "initialization_seconds": 0.0, "training_seconds": seconds, "diverged": False}


def trained(run: Run, task: Task, data: Parts, device: torch.device) -> dict[str, Any]:
    """Initialize and train a network."""
    train, validation = data.train.to(device), data.validation.to(device)
    test = data.test.to(device) if data.test else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(run.seed)
        model = NETWORKS[task.network](data.shape, data.outputs).to(device)
        batches = list(zip(train.x.split(1000), train.y.split(1000), strict=True))
        initialization = initialize(run.method, model, batches, torch.Generator().manual_seed(run.seed))
        torch.manual_seed(run.seed)  # dropout is the same whatever the method has drawn
        optimizer = make_optimizer(run, [p for p in model.parameters() if p.requires_grad])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape_of_rate(step / max(1, run.steps)))
        measured, read = ({round(share * run.steps) for share in shares} for shares in (CURVE, MILESTONES))
        order = sample_order(len(train), task.batch_size, run.seed)
        curve: list[list[Any]] = []
        seconds, diverged = 0.0, False
        for step in range(run.steps + 1):
            if step in measured:
                of_test = measure(model, test, diverged) if test and step in read else None
                curve.append([step, measure(model, validation, diverged), of_test])
            if step == run.steps or diverged:
                continue
            began = time.perf_counter()
            index = next(order)
            loss = loss_of(model(train.x[index]), train.y[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            diverged = not math.isfinite(loss.item())
            seconds += time.perf_counter() - began
    return {
        "curve": curve,
        "initialization_seconds": initialization,
        "training_seconds": seconds,
        "diverged": diverged,
    }


def make_optimizer(run: Run, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum of 0.9."""
    assert run.lr is not None
    decay = WEIGHT_DECAY[run.optimizer]
    if run.optimizer == "adamw":
        return torch.optim.AdamW(parameters, run.lr, weight_decay=decay)
    return torch.optim.SGD(parameters, run.lr, momentum=0.9, nesterov=True, weight_decay=decay)


def shape_of_rate(share: float) -> float:
    """The learning rate after a share of the steps, over its peak; the first step is above zero."""
    if share < WARM_UP:
        return (share + 0.01) / (WARM_UP + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def sample_order(count: int, size: int, seed: int) -> Any:
    """Endless batches of indices: each sample once in a pass, what does not fill a batch left out of it."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, count)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // size * size].split(size)


def loss_of(output: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy for classes, mean squared error for values."""
    return F.mse_loss(output, y) if y.is_floating_point() else F.cross_entropy(output, y)


@torch.no_grad()
def measure(model: nn.Module, part: Samples, diverged: bool = False) -> float:
    """Accuracy or R2 of a network in evaluation mode; one that has diverged guesses."""
    model.eval()
    outputs = torch.cat([model(x) for x in part.x.split(250)])
    model.train()
    if part.y.is_floating_point():
        return LOWEST_R2 if diverged else r2(outputs, part.y)
    if diverged:
        return 1 / outputs.shape[1]
    return (outputs.argmax(1) == part.y).double().mean().item()


def r2(predicted: Tensor, y: Tensor) -> float:
    """``1 - sum (y - predicted)^2 / sum (y - mean y)^2``, at least `LOWEST_R2`."""
    value = 1 - (y - predicted).square().sum() / (y - y.mean()).square().sum()
    return max(LOWEST_R2, value.item()) if bool(value.isfinite()) else LOWEST_R2

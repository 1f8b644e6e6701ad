"""Fine-tuning: from some classes to others, or from one data set to another, with few labels."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from studies.precision import autocast
from sylinit import SylinitError, initialize_
from sylinit.comparison.data import Dataset, cache_directory, load
from sylinit.comparison.experiment import Experiment
from sylinit.comparison.initializations import BATCH, apply_initialization
from sylinit.comparison.models import build
from sylinit.comparison.runner import Report, load_data
from sylinit.comparison.runs import device, fit, subset
from sylinit.comparison.training import Recipe, train

PRETRAIN_EPOCHS = 10


def run_finetune(experiment: Experiment) -> dict[str, Any]:
    """Take the pretrained network, give it a new head as `experiment.initialization` says, and train all of it.

    The setting names ``source`` (a data set), ``pretrain_classes`` and ``classes`` (first and last, as in ``"0-4"``;
    None is all), ``pretrain_epochs`` and ``pretrain_samples`` (None is all).
    """
    source = load(str(experiment.get("source") or experiment.dataset))
    data = resized(only(load(experiment.dataset), experiment.get("classes")), source.shape)
    part = subset(data, experiment)
    model, source_accuracy = pretrained(experiment)
    torch.manual_seed(experiment.seed)
    began = time.perf_counter()
    replace_head(model, data.classes)
    model.to(device())
    if experiment.initialization not in HEADS:
        raise SylinitError(f"initialization {experiment.initialization!r}: fine-tuning knows {', '.join(HEADS)}")
    HEADS[experiment.initialization](model, part.x, part.y, experiment.seed)
    seconds = time.perf_counter() - began
    context = partial(autocast, device(), experiment.get("precision") or "float32")
    result = fit(model, part, experiment, data, init_seconds=seconds, context=context)
    return {**result, "source_accuracy": source_accuracy}


def prepare_finetune(experiments: Sequence[Experiment], report: Report) -> None:
    """Read the data and pretrain, once each."""
    load_data(experiments, report)
    for experiment in {replace(e.method, initialization="", options=()): e for e in experiments}.values():
        report(f"pretraining {experiment.model} on {experiment.get('source') or experiment.dataset}")
        pretrained(experiment)


def pretrained(experiment: Experiment) -> tuple[nn.Module, float]:
    """The network trained on the source classes, and its accuracy on their test part.

    Trained once, from He's initialization with AdamW, then read from the cache directory.

    Raises:
        SylinitError: if it learned next to nothing.
    """
    from safetensors.torch import load_file, save_file

    name = str(experiment.get("source") or experiment.dataset)
    source = only(load(name), experiment.get("pretrain_classes"))
    epochs = int(experiment.get("pretrain_epochs") or PRETRAIN_EPOCHS)
    samples = experiment.get("pretrain_samples")
    torch.manual_seed(0)
    model = build(experiment.model, source.shape, source.classes)
    size = (len(source.train_x), tuple(source.shape), float(source.train_x[:100].sum()))
    identity = f"adamw {name} {experiment.get('pretrain_classes')} {experiment.model} {epochs} {samples} {size}"
    path = cache_directory() / f"pretrained-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
    if path.exists():
        stored = load_file(path)
        reached = stored.pop("source_accuracy").item()
        model.load_state_dict(stored)
        return model, reached
    index = torch.randperm(len(source.train_y), generator=torch.Generator().manual_seed(0))[:samples]
    x, y = source.train_x[index].to(device()), source.train_y[index].to(device())
    apply_initialization("he-normal", model.to(device()), x, y, 0)
    # AdamW, because SGD at the rate that suits one data set kills a plain network on another
    recipe = Recipe(1e-3, "adamw", epochs, batch_size=64, flip=source.shape[0] == 3, points=1)
    test_x, test_y = source.test_x.to(device()), source.test_y.to(device())
    reached = train(model, x, y, test_x, test_y, recipe, classes=source.classes, seed=0).after
    if reached < 2 / source.classes:
        raise SylinitError(
            f"model {experiment.model!r}: pretraining on {name} reached {reached:.0%} of {source.classes} classes, "
            "which is hardly more than chance; give it more epochs or samples"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    state = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
    save_file({**state, "source_accuracy": torch.tensor(reached, dtype=torch.float64)}, partial)
    partial.replace(path)
    return model.cpu(), reached


def only(data: Dataset, classes: str | None) -> Dataset:
    """The samples of classes ``"first-last"``, renumbered from 0."""
    if classes is None:
        return data
    first, last = map(int, str(classes).split("-"))
    train, test = ((y >= first) & (y <= last) for y in (data.train_y, data.test_y))
    return replace(
        data,
        train_x=data.train_x[train],
        train_y=data.train_y[train] - first,
        test_x=data.test_x[test],
        test_y=data.test_y[test] - first,
        classes=last - first + 1,
    )


def resized(data: Dataset, shape: tuple[int, ...]) -> Dataset:
    """The images scaled to the height and width of `shape`."""
    if data.shape == shape:
        return data
    if len(data.shape) != 3 or data.shape[0] != shape[0]:
        raise SylinitError(f"{data.name}: samples of shape {data.shape} cannot go into a network made for {shape}")
    scaled = (F.interpolate(x, shape[1:], mode="bilinear", antialias=True) for x in (data.train_x, data.test_x))
    train_x, test_x = scaled
    return replace(data, train_x=train_x, test_x=test_x)


def layer_names(model: nn.Module) -> list[str]:
    """Names of the layers with weights, in the model's order, without shortcuts."""
    kinds = (nn.Linear, _ConvNd)
    return [name for name, m in model.named_modules() if isinstance(m, kinds) and "shortcut" not in name]


def replace_head(model: nn.Module, classes: int) -> nn.Linear:
    """Put a new linear layer in the place of the last one."""
    name = layer_names(model)[-1]
    parent_name, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    if not isinstance(old, nn.Linear):
        raise SylinitError(f"layer {name!r}: expected a Linear as the last layer, got {type(old).__name__}")
    head = nn.Linear(old.in_features, classes)
    setattr(model.get_submodule(parent_name), leaf, head)
    return head


def _head(model: nn.Module) -> nn.Linear:
    head = model.get_submodule(layer_names(model)[-1])
    assert isinstance(head, nn.Linear)
    return head


@torch.no_grad()
def features(model: nn.Module, x: Tensor) -> Tensor:
    """What the head reads, ``[n, d]``."""
    head, seen = _head(model), []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    training = model.training
    model.eval()
    try:
        for part in x.split(BATCH):
            model(part)
    finally:
        hook.remove()
        model.train(training)
    return torch.cat(seen)


def random_head(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> None:
    """Leave the new head as PyTorch draws it."""


def linear_probe(model: nn.Module, x: Tensor, y: Tensor, seed: int, penalty: float = 0.1) -> None:
    """Train the head alone to convergence (logistic regression by L-BFGS), before everything is trained.

    Features are centerd and scaled to unit root mean square, and `penalty` / 2 times the squared weights is added. Of
    1e-3, 1e-2 and 0.1, and of scaling each feature by itself, this was best on held-back images of CIFAR-10.

    Source: Kumar, Raghunathan, Jones, Ma and Liang, *Fine-Tuning can Distort Pretrained Features and Underperform
    Out-of-Distribution*, ICLR 2022.
    """
    rows, head = features(model, x), _head(model)
    mean = rows.mean(0)
    scale = (rows - mean).square().mean().sqrt().clamp(min=1e-12)
    z = (rows - mean) / scale
    weight = torch.zeros_like(head.weight).requires_grad_()
    bias = torch.zeros_like(head.bias).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(z, weight, bias), y) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias - (weight / scale) @ mean)


@torch.no_grad()
def fit_ridge(rows: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor, float]:
    """Ridge regression of the one-hot labels on rows; the penalty of least leave-one-out error.

    With X = U diag(s) V^T centerd, the fit is H Y with H = U diag(s^2 / (s^2 + p)) U^T, and the leave-one-out
    residual of a sample is its residual over (1 - H_ii - 1/n).

    Args:
        rows: ``[n, d]``.
        y: int64 ``[n]``.
        classes: number of classes.

    Returns:
        Weight ``[classes, d]`` and bias ``[classes]``, both float64, and the penalty p.
    """
    rows, targets = rows.double(), F.one_hot(y, classes).double()
    mean, center = rows.mean(0), targets.mean(0)
    u, s, vh = torch.linalg.svd(rows - mean, full_matrices=False)
    projected = u.T @ (targets - center)
    best, penalty = float("inf"), 0.0
    for power in torch.linspace(-6, 2, 33).tolist():
        tried = 10**power * s[0].square().item()
        shrink = s.square() / (s.square() + tried)
        residual = targets - center - u @ (shrink[:, None] * projected)
        leverage = (u.square() @ shrink) + 1 / len(rows)
        error = (residual / (1 - leverage).clamp(min=1e-9)[:, None]).square().mean().item()
        if error < best:
            best, penalty = error, tried
    weight = (vh.T @ ((s / (s.square() + penalty))[:, None] * projected)).T
    return weight, center - weight @ mean, penalty


@torch.no_grad()
def ridge_head(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> None:
    """A head in closed form: `fit_ridge` on the features."""
    head = _head(model)
    weight, bias, _ = fit_ridge(features(model, x), y, head.out_features)
    head.weight.copy_(weight)
    head.bias.copy_(bias)


def sylinit_part(which: Callable[[nn.Module], list[str]]) -> Callable[[nn.Module, Tensor, Tensor, int], None]:
    """Compute the layers that `which` names, the head among them, and keep the others as pretrained."""

    def initialize(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> None:
        parts = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
        initialize_(model, parts, layers=which(model), generator=torch.Generator().manual_seed(seed))

    return initialize


def last_block(model: nn.Module) -> list[str]:
    """The head and the last block of the network; where layers stand alone, the last three of them."""
    names = layer_names(model)
    tops = [name for name in names[:-1] if "." in name]
    block = tops[-1].rpartition(".")[0] if tops else None
    return names[-3:] if block is None else [block, names[-1]]


HEADS: dict[str, Callable[[nn.Module, Tensor, Tensor, int], None]] = {
    "random head": random_head,
    "LP-FT": linear_probe,
    "ridge head": ridge_head,
    "sylinit head": sylinit_part(lambda model: layer_names(model)[-1:]),
    "sylinit last two": sylinit_part(lambda model: layer_names(model)[-2:]),
    "sylinit last block": sylinit_part(last_block),
    "sylinit all": sylinit_part(layer_names),
}

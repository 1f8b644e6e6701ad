"""Initializations that are compared, and methods that a user might take instead of a network.

An initialization is a function ``(model, batches, generator)`` that writes into a freshly built network; `initialize`
runs one by name and returns the seconds it took. Besides the names in `METHODS`, any call of `sylinit.initialize_` has
a name: its keyword arguments, as in ``code=mixed:0.5`` or ``code=auto;config.logit_deviation=0.1``. What follows a
``#`` in a name is a label that keeps records apart, as in ``default#shrinkage``.

Add a method: a function, and its line in `METHODS`.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import sylinit
from studies.suite.data import embeddings
from studies.suite.networks import Network

Batches = list[tuple[Tensor, Tensor]]
"""The train subset as ``(x, y)`` pairs."""

Method = Callable[[Network, Batches, torch.Generator], None]

RANDOM = ("own", "he", "xavier", "orthogonal", "lsuv")
"""Initializations that need no labels and, but for the scales of LSUV, no data."""

PRETRAINED_METHODS = ("own", "own-head", "lp-ft", "default")
"""Those that make sense where the body has been trained before."""


def initialize(name: str, model: Network, batches: Batches, generator: torch.Generator) -> float:
    """Initialize `model` in place.

    Args:
        name: in `METHODS`, or the keyword arguments of `sylinit.initialize_`.
        model: freshly built, in training mode, on the device of the batches.
        batches: the train subset.
        generator: of what is random in the method, on the CPU.

    Returns:
        Seconds.
    """
    function = method_named(name)
    began = time.perf_counter()
    function(model, batches, generator)
    if batches[0][0].is_cuda:
        torch.cuda.synchronize()
    model.train()
    return time.perf_counter() - began


def method_named(name: str) -> Method:
    """The initialization that a name means.

    Raises:
        ValueError: it means none.
    """
    base = name.partition("#")[0]
    if base in METHODS:
        return METHODS[base]
    if "=" in base:
        return partial(call_sylinit, **options_in(base))
    raise ValueError(f"method {base!r}: expected {', '.join(METHODS)}, or arguments as in code=mixed:0.5")


def options_in(text: str) -> dict[str, Any]:
    """Keyword arguments in ``key=value;key=value``; ``config.key`` is a field of `sylinit.Config`."""
    options: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    for pair in text.split(";"):
        key, _, written = pair.partition("=")
        try:
            value = ast.literal_eval(written)
        except (ValueError, SyntaxError):
            value = written
        if key.startswith("config."):
            constants[key.removeprefix("config.")] = value
        else:
            options[key] = value
    if constants:
        options["config"] = replace(sylinit.Config(), **constants)
    return options


# ---------------------------------------------------------------------------------------------------------------------
# Random weights


def own(model: Network, batches: Batches, generator: torch.Generator) -> None:
    """The weights that the network came with."""


def weights_of(module: nn.Module) -> list[Tensor]:
    """The weight matrices of a layer; of a recurrent layer, each gate's."""
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        return [module.weight]
    if isinstance(module, nn.GRU):
        matrices = [weight for name, weight in module.named_parameters() if name.startswith("weight")]
        return [gate for matrix in matrices for gate in matrix.chunk(3)]
    return []


@torch.no_grad()
def draw(model: Network, batches: Batches, generator: torch.Generator, *, distribution: Callable[..., Any]) -> None:
    """Every weight matrix from one distribution, biases zero, normalizations as they are."""
    for module in model.modules():
        weights = weights_of(module)
        for weight in weights:
            drawn = torch.empty(weight.shape)
            distribution(drawn, generator=generator)
            weight.copy_(drawn)
        if weights:
            for name, parameter in module.named_parameters(recurse=False):
                if name.startswith("bias"):
                    parameter.zero_()


he = partial(draw, distribution=partial(nn.init.kaiming_normal_, nonlinearity="relu"))
xavier = partial(draw, distribution=nn.init.xavier_normal_)
orthogonal = partial(draw, distribution=nn.init.orthogonal_)


@torch.no_grad()
def lsuv(model: Network, batches: Batches, generator: torch.Generator) -> None:
    """Orthogonal weights, each layer divided by the deviation of its output on the first batch.

    One pass is enough: biases are zero, so a layer's output scales with its weight.
    Source: Mishkin and Matas, *All you need is a good init*, ICLR 2016.
    """
    orthogonal(model, batches, generator)
    scaled: set[nn.Module] = set()

    def scale(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if layer in scaled:
            return output
        scaled.add(layer)
        deviation = output.std().clamp(min=1e-8)
        layer.weight.div_(deviation)  # type: ignore[operator]
        return output / deviation

    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    hooks = [layer.register_forward_hook(scale) for layer in layers]
    modes = [(norm, norm.momentum) for norm in model.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    try:
        for norm, _ in modes:
            norm.momentum = 0.0  # each batch by its own statistics, and none of them kept
        model(batches[0][0])
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in modes:
            norm.momentum = momentum


# ---------------------------------------------------------------------------------------------------------------------
# Computed weights


def call_sylinit(model: Network, batches: Batches, generator: torch.Generator, **options: Any) -> None:
    """`sylinit.initialize_`, on the layers that are to be trained."""
    if "layers" not in options and not all(parameter.requires_grad for parameter in model.parameters()):
        options["layers"] = is_trained
    sylinit.initialize_(model, batches, generator=generator, **options)


def is_trained(name: str, module: nn.Module) -> bool:
    """Whether no parameter of a layer is frozen."""
    return all(parameter.requires_grad for parameter in module.parameters())


@torch.no_grad()
def pca(model: Network, batches: Batches, generator: torch.Generator) -> None:
    """Each unit a whitened principal component of its layer's input, below a head as the network came with it.

    Source: Krähenbühl, Doersch, Donahue and Darrell, *Data-dependent Initializations of Convolutional Neural Networks*,
    ICLR 2016.
    """
    head = {name: value.clone() for name, value in model.head.state_dict().items()}
    call_sylinit(model, batches, generator, code="pca", head=None)
    model.head.load_state_dict(head)


def own_head(model: Network, batches: Batches, generator: torch.Generator) -> None:
    """The body as the network came with it, its BatchNorm statistics measured, below a computed head."""
    update_bn((x for x, _ in batches), model)
    sylinit.initialize_(model, batches, layers="head", generator=generator)


def lp_ft(model: Network, batches: Batches, generator: torch.Generator) -> None:
    """A linear probe before everything is trained: logistic or ridge regression on the body's features.

    Features share one scale; the penalty is chosen by cross-validation.
    Source: Kumar, Raghunathan, Jones, Ma and Liang, *Fine-Tuning can Distort Pretrained Features and Underperform
    Out-of-Distribution*, ICLR 2022.
    """
    update_bn((x for x, _ in batches), model)
    model.eval()
    with torch.no_grad():
        features = torch.cat([model.body(x) for x, _ in batches]).double().cpu().numpy()
    targets = torch.cat([y for _, y in batches]).cpu().numpy()
    mean = features.mean(0)
    scale = max(float((features - mean).std()), 1e-12)
    probe = linear_probe((features - mean) / scale, targets)
    weight, bias = np.atleast_2d(probe.coef_) / scale, np.atleast_1d(probe.intercept_)
    if model.head.out_features == 2:  # scikit-learn keeps the difference of the two logits only
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    with torch.no_grad():
        model.head.weight.copy_(torch.as_tensor(weight))
        model.head.bias.copy_(torch.as_tensor(bias - weight @ mean))


def linear_probe(features: np.ndarray, targets: np.ndarray) -> Any:
    """A fitted linear model of scikit-learn."""
    from sklearn.linear_model import RidgeCV

    if targets.ndim == 2:
        return RidgeCV(np.logspace(-3, 3, 13)).fit(features, targets[:, 0])
    return cross_validated_logistic(np.logspace(-3, 1, 5)).fit(features, targets)


def cross_validated_logistic(strengths: np.ndarray) -> Any:
    """Logistic regression; of the inverse penalties, that of least cross-entropy in three folds."""
    from sklearn.linear_model import LogisticRegressionCV

    return LogisticRegressionCV(
        Cs=strengths, cv=3, l1_ratios=(0.0,), scoring="neg_log_loss", use_legacy_attributes=False, max_iter=300
    )


METHODS: dict[str, Method] = {
    "own": own,
    "he": he,
    "xavier": xavier,
    "orthogonal": orthogonal,
    "lsuv": lsuv,
    "pca": pca,
    "pca-head": partial(call_sylinit, code="pca"),
    "own-head": own_head,
    "lp-ft": lp_ft,
    "default": call_sylinit,
}
"""Every initialization by name."""


# ---------------------------------------------------------------------------------------------------------------------
# What a user might take instead


def inputs_of(x: Tensor, kind: str) -> np.ndarray:
    """Samples as the references read them: a text by the pretrained encoder."""
    return (embeddings(x) if kind == "text" else x).cpu().numpy()


def minirocket(regression: bool) -> Any:
    """Random convolutions and ridge regression on their proportions of positive values.

    Source: Dempster, Schmidt and Webb, *MiniRocket*, KDD 2021.
    """
    from aeon.classification.convolution_based import MiniRocketClassifier
    from aeon.regression.convolution_based import MiniRocketRegressor

    return (MiniRocketRegressor if regression else MiniRocketClassifier)(random_state=0)


def logistic(regression: bool) -> Any:
    """Logistic regression; ridge regression where values are predicted."""
    from sklearn.linear_model import RidgeCV

    return RidgeCV(np.logspace(-3, 3, 13)) if regression else cross_validated_logistic(np.logspace(-3, 3, 7))


def forest(regression: bool) -> Any:
    """A random forest with the defaults of scikit-learn."""
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    return (RandomForestRegressor if regression else RandomForestClassifier)(random_state=0)


def ridge(regression: bool) -> Any:
    """A ridge classifier with the penalty of least leave-one-out error."""
    from sklearn.linear_model import RidgeClassifierCV, RidgeCV

    return (RidgeCV if regression else RidgeClassifierCV)(np.logspace(-3, 3, 13))


REFERENCES: dict[str, tuple[Callable[[bool], Any], tuple[str, ...]]] = {
    "minirocket": (minirocket, ("series",)),
    "logistic": (logistic, ("table", "embedding")),
    "forest": (forest, ("table",)),
    "ridge": (ridge, ("embedding", "text")),
}
"""Name, estimator, and the kinds of data for which a user would take it."""

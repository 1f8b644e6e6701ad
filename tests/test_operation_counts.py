"""How many ATen operations `initialize_` dispatches for each matrix, the model's own forward pass excluded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sylinit
from conftest import Residual, images, vectors


class Operations(TorchDispatchMode):
    """Counts the operations that are dispatched in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations_for_each_matrix(model: nn.Module, x: Tensor, y: Tensor, **arguments: Any) -> float:
    """Of one call on one batch."""
    with torch.no_grad(), Operations() as forward:
        model.eval()(x)
    with Operations() as all_of_it:
        report = sylinit.initialize_(model, [(x, y)], code="mixed", **arguments)
    return (all_of_it.counts.total() - forward.counts.total()) / len(report.initialized)


def resnet() -> nn.Module:
    """Three stages of one block, 16 to 64 channels, with strided convolutions between them."""
    layers: list[nn.Module] = [nn.Conv2d(2, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for channels in (16, 32, 64):
        layers.append(Residual(channels))
        if channels < 64:
            layers += [nn.Conv2d(channels, 2 * channels, 3, 2, 1, bias=False), nn.BatchNorm2d(2 * channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))


def mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 3))


def depthwise(groups: int, few: bool = False) -> nn.Module:
    kernel = 5 if few else 3
    return nn.Sequential(
        nn.Conv2d(2, groups, 1),
        nn.ReLU(),
        nn.Conv2d(groups, groups, kernel, padding=kernel // 2, groups=groups),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(groups, 3),
    )


class ViT(nn.Module):
    """Two encoder layers over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 64, 4, 4)
        layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], int]] = {
    "resnet": (resnet, lambda: images(40, size=16), 490),
    "mlp": (mlp, lambda: vectors(300, 64), 250),
    "vit": (ViT, lambda: images(40, size=16), 275),
    "depthwise": (lambda: depthwise(192), images, 360),
}
"""Each with the most operations that it may take for a matrix."""

SLACK = 1.0 if torch.__version__.startswith("2.13.") else 1.1
"""The bounds are those of the pinned version of PyTorch; others dispatch some operations more."""


@pytest.mark.parametrize("name", NETWORKS)
def test_a_matrix_takes_few_operations(name: str) -> None:
    make, data, bound = NETWORKS[name]
    found = operations_for_each_matrix(make(), *data())
    assert found <= bound * SLACK


@pytest.mark.parametrize("few", [False, True])
def test_the_operations_do_not_depend_on_the_number_of_groups(few: bool) -> None:
    """Also where rows are fewer than inputs: 12 rows for kernels of 25."""
    x, y = images(3, size=2) if few else images()
    counts = [operations_for_each_matrix(depthwise(groups, few), x, y) for groups in (24, 96)]
    assert counts[1] <= 1.1 * counts[0]

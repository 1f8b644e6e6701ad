"""Small models and data that many tests share."""

from __future__ import annotations

import signal

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

settings.register_profile("sylinit", deadline=None, max_examples=30)
settings.load_profile("sylinit")

# A shell starts background jobs with Ctrl-C ignored, which they and their children inherit; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def images(count: int = 60, classes: int = 3, size: int = 8, seed: int = 0, channels: int = 2) -> tuple[Tensor, Tensor]:
    """Images with a class-dependent pattern in noise, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    patterns = torch.randn(classes, channels, size, size, generator=generator)
    return patterns[y] + 0.7 * torch.randn(count, channels, size, size, generator=generator), y


def vectors(count: int = 60, dim: int = 12, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows with a class-dependent mean in correlated noise, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % classes
    means = torch.randn(classes, dim, generator=generator)
    noise = torch.randn(count, dim, generator=generator) @ torch.randn(dim, dim, generator=generator)
    return means[y] + 0.5 * noise, y


class Residual(nn.Module):
    """A residual block with BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


def small_resnet(classes: int = 3, channels: int = 2) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        Residual(6),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )


def small_mlp(dim: int = 12, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, classes))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)

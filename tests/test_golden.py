"""Known results: accuracy before any training step, and the spectrum of a layer by each code.

A change of the method moves these numbers, and then they are to be renewed on purpose; a change of the code must not.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import pytest
import torch
from torch import Tensor, nn

import sylinit
from conftest import vectors
from sylinit.codes import CODES

SEEDS = range(5)
TRAIN = 200

Data = tuple[Tensor, Tensor]


def digits(seed: int) -> Data:
    """Images of 8x8 digits, shuffled."""
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = (torch.from_numpy(part) for part in datasets.load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return (x.float() / 16).view(-1, 1, 8, 8)[order], y.long()[order]


def patterns(seed: int) -> Data:
    """Synthetic images: one smooth pattern for each of ten classes, at any place, in as much noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(1200) % 10
    smooth = nn.functional.interpolate(torch.randn(10, 3, 4, 4, generator=generator), size=16, mode="bilinear")
    places = torch.randint(0, 16, (len(y), 2), generator=generator).tolist()
    x = torch.stack([image.roll(place, (1, 2)) for image, place in zip(smooth[y], places, strict=True)])
    return x + torch.randn(x.shape, generator=generator), y


def mlp() -> nn.Module:
    return nn.Sequential(*(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))


def cnn(channels: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


@pytest.mark.parametrize(
    ("data", "make", "code", "expected"),
    [
        (digits, mlp, "mixed", 0.772),
        (digits, lambda: cnn(1), "mixed", 0.933),
        (patterns, lambda: cnn(3), "mixed", 0.762),
        (patterns, lambda: cnn(3), "pca", 0.605),
        (patterns, lambda: cnn(3), "label", 0.922),
        (patterns, lambda: cnn(3), "random", 0.423),
    ],
)
def test_accuracy_before_training(
    data: Callable[[int], Data], make: Callable[[], nn.Module], code: str, expected: float
) -> None:
    """Mean over five draws of 200 training samples; each moves by 0.02 to 0.07 from draw to draw."""
    found = []
    for seed in SEEDS:
        x, y = data(seed)
        model = make()
        sylinit.initialize_(model, [(x[:TRAIN], y[:TRAIN])], code=code, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            found.append(float((model.eval()(x[TRAIN:]).argmax(1) == y[TRAIN:]).double().mean()))
    assert mean(found) == pytest.approx(expected, abs=0.01)


def clusters() -> Data:
    """Eight clusters far from one another, which k-means finds from any start."""
    generator = torch.Generator().manual_seed(0)
    cluster = torch.arange(400) % 8
    means = 40 * torch.randn(8, 12, generator=generator)
    return means[cluster] + torch.randn(400, 12, generator=generator), cluster % 4


def sources() -> Data:
    """Mixtures of independent uniform numbers, which independent component analysis takes apart from any start."""
    generator = torch.Generator().manual_seed(0)
    independent = torch.rand(2000, 12, generator=generator) * torch.linspace(2, 1, 12)
    mixing = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    return independent @ mixing, torch.arange(2000) % 4


Spectrum = tuple[Callable[[], Data], float, list[float]]
"""Data, tolerance as a share of the largest singular value, and the singular values."""


def ordinary(values: list[float]) -> Spectrum:
    return lambda: vectors(300, 12, 4), 2e-4, values


SPECTRA: dict[str, Spectrum] = {
    "pca": ordinary([0.8134, 0.6608, 0.5873, 0.4869, 0.4763, 0.3871, 0.3608, 0.2799]),
    "label": ordinary([0.9220, 0.7762, 0.6746, 0.6293, 0.5458, 0.4868, 0.4399, 0.3083]),
    "mixed": ordinary([0.7015, 0.6573, 0.5755, 0.4800, 0.4751, 0.3885, 0.3714, 0.2813]),
    "lda": ordinary([0.6269, 0.6218, 0.5936, 0.5390, 0.5031, 0.4406, 0.4089, 0.3333]),
    "random": ordinary([0.9366, 0.8643, 0.7859, 0.5384, 0.4444, 0.4158, 0.2828, 0.1145]),
    "random_projection": ordinary([0.6783, 0.6067, 0.5229, 0.4896, 0.4602, 0.4439, 0.3842, 0.3224]),
    "kmeans": (clusters, 0.03, [0.0351, 0.0326, 0.0276, 0.0242, 0.0221, 0.0177, 0.0155, 0.0044]),
    "ica": (sources, 1e-3, [2.5116, 2.3848, 2.1967, 2.1189, 2.0127, 1.9003, 1.8216, 1.7448]),
    "nmf": (sources, 1e-3, [2.4195, 2.3510, 2.2840, 2.1756, 2.0892, 1.9724, 1.7367, 1.0722]),
}
"""Singular values of a layer of eight units on twelve inputs, by code."""


def test_every_code_has_a_spectrum() -> None:
    assert set(SPECTRA) == set(CODES)


@pytest.mark.parametrize("code", SPECTRA)
def test_the_spectrum_of_a_layer(code: str) -> None:
    data, tolerance, values = SPECTRA[code]
    x, y = data()
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    sylinit.initialize_(model, [(x.double(), y)], code=code)
    found = torch.linalg.svdvals(model[0].weight.detach())
    expected = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * values[0])

"""Sums for normalization layers: as exact as float64, also far from zero, and whatever the cut into batches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sylinit.layers.normalization import norm_sums, write_statistics


@pytest.mark.parametrize(("offset", "rtol"), [(0.0, 3e-6), (3.0, 3e-6), (30.0, 3e-6), (3000.0, 1e-4)])
@pytest.mark.parametrize("shape", [(64, 6), (64, 6, 5), (64, 6, 9, 8)])
def test_statistics_are_those_of_float64(offset, rtol, shape):
    x = torch.randn(shape) + offset
    norm = nn.BatchNorm2d(6) if x.ndim == 4 else nn.BatchNorm1d(6)
    write_statistics(norm, norm_sums(norm, x[:20]) + norm_sums(norm, x[20:]))
    rows = x.double().transpose(0, 1).flatten(1)
    assert torch.allclose(norm.running_var.double(), rows.var(1), rtol=rtol)
    assert torch.allclose(norm.running_mean.double(), rows.mean(1), rtol=1e-6, atol=1e-6)


def test_the_cut_changes_nothing():
    x = torch.randn(40, 6, 9, 8) + 2
    norm = nn.BatchNorm2d(6)
    whole, parts = norm_sums(norm, x), sum(norm_sums(norm, part) for part in x.split(7))
    assert torch.allclose(whole, parts, rtol=1e-14)


def test_features_without_positions_are_exact_far_from_zero():
    x = 1e4 + 0.1 * torch.randn(40, 6)
    norm = nn.BatchNorm1d(6)
    write_statistics(norm, norm_sums(norm, x))
    assert torch.allclose(norm.running_var.double(), x.double().var(0), rtol=1e-5)

"""Targets as vectors: class indices, soft labels, real values, many classes, labels that are ignored."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sylinit.data.targets import IGNORED, MAX_CLASSES, TargetKind, describe, encode
from sylinit.errors import SylinitError

SMALL = st.integers(1, 4)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(st.lists(st.integers(-1, 4), min_size=3, max_size=12), st.booleans())
def test_encode_class_indices(labels, tokens):
    labels = [IGNORED if label < 0 else label for label in labels]
    target = torch.tensor([labels, labels[::-1]]) if tokens else torch.tensor(labels)
    result = encode(target, TargetKind(classes=5))
    assert result.shape == (*target.shape, 5)
    for place, label in zip(product(*map(range, target.shape)), target.flatten().tolist(), strict=True):
        for unit in range(5):
            value = float(result[(*place, unit)])
            assert math.isnan(value) if label == IGNORED else value == float(unit == label)


@given(st.integers(1, 6), st.lists(SMALL, max_size=2), SMALL, st.integers(0, 1000))
def test_encode_real_values(batch, positions, width, seed):
    target = numbers(batch, *positions, width, seed=seed).float()
    assert torch.equal(encode(target, TargetKind(width=width)), target.double())
    flat = target.flatten()
    assert torch.equal(encode(flat, TargetKind(width=1)), flat.double().unsqueeze(1))


def test_many_classes_are_told_apart_by_a_fixed_embedding():
    kind = TargetKind(classes=2000)
    every = encode(torch.arange(2000), kind)
    assert every.shape == (2000, MAX_CLASSES)
    assert bool((every.abs() == 1).all())
    overlap = every @ every.T / MAX_CLASSES - torch.eye(2000)
    assert float(overlap.abs().max()) < 0.35  # seven standard deviations of independent signs
    assert torch.equal(encode(torch.tensor([7, 7, IGNORED, 1999]), kind)[:2], every[[7, 7]])
    assert bool(encode(torch.tensor([IGNORED]), kind).isnan().all())
    assert encode(torch.tensor([3]), kind, one_hot=True).tolist() == torch.eye(2000)[3:4].tolist()
    assert encode(torch.tensor([3]), TargetKind(classes=MAX_CLASSES)).sum() == 1


@pytest.mark.parametrize(
    ("targets", "kind"),
    [
        ([], TargetKind()),
        ([torch.tensor([0, 2]), torch.tensor([1, IGNORED])], TargetKind(classes=3)),
        ([torch.tensor([IGNORED, IGNORED])], TargetKind()),
        ([torch.tensor([True, False])], TargetKind(classes=2)),
        ([torch.tensor([0, 255], dtype=torch.uint8)], TargetKind(classes=256)),
        ([torch.tensor([0.5, 2.0])], TargetKind(width=1)),
        ([torch.tensor([[0.5, 2.0]])], TargetKind(width=2)),
        ([torch.tensor([[0.5, 0.5], [0, 1.0]])], TargetKind(width=2, soft=True)),
        ([torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.6]])], TargetKind(width=2)),
        ([torch.tensor([[-0.5, 1.5]])], TargetKind(width=2)),
        ([torch.zeros(2, 3, 4)], TargetKind(width=4)),
    ],
)
def test_what_kind_of_targets_they_are(targets, kind):
    assert describe(targets) == kind


def test_wrong_targets_are_named():
    with pytest.raises(SylinitError, match="batch 1 has the label -3"):
        describe([torch.tensor([0, 1]), torch.tensor([2, -3])])
    with pytest.raises(SylinitError, match="target of batch 1 holds NaN"):
        describe([torch.zeros(2), torch.tensor([0.0, math.nan])])

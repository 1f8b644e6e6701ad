"""Targets of rows against slow loops: per sample, token or pixel, folded, sequence first, ignored, many classes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sylinit.data.targets import IGNORED, MAX_CLASSES, TargetKind, Targets, describe, encode, for_rows
from torch import Tensor

from sylinit.errors import SylinitError

SMALL = st.integers(1, 4)
SEEDS = st.integers(0, 1000)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def places(*sizes: int) -> list[tuple[int, ...]]:
    """Every place of a grid in the order in which rows are numbered, by counting."""
    found: list[tuple[int, ...]] = [()]
    for size in sizes:
        found = [(*place, step) for place in found for step in range(size)]
    return found


def compare(vectors: Tensor, samples: int, positions: tuple[int, ...], expected: list[Tensor], seed: int) -> None:
    """All rows, and any choice of rows, have the expected targets."""
    slow = torch.stack(expected)
    result = for_rows(vectors, samples, positions, None)
    assert result is not None
    torch.testing.assert_close(result, slow, rtol=1e-12, atol=1e-12)
    some = torch.randint(len(slow), (7,), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(for_rows(vectors, samples, positions, some), slow[some], rtol=1e-12, atol=1e-12)


@given(st.integers(5, 7), st.lists(SMALL, max_size=3), SMALL, SEEDS)
def test_a_target_for_each_sample_goes_to_all_of_its_rows(batch, positions, width, seed):
    vectors = numbers(batch, width, seed=seed)
    expected = [vectors[place[0]] for place in places(batch, *positions)]
    compare(vectors, batch, tuple(positions), expected, seed)


@given(st.integers(5, 7), st.lists(st.tuples(SMALL, SMALL), min_size=1, max_size=2), SMALL, SEEDS)
def test_a_target_for_each_position_at_another_resolution(batch, sizes, width, seed):
    """Row i of m positions lies at i / m of the way along, where target floor(i t / m) of t is."""
    spots, positions = [t for t, _ in sizes], [m for _, m in sizes]
    vectors = numbers(batch, *spots, width, seed=seed)
    expected = []
    for sample, *place in places(batch, *positions):
        target = vectors[sample]
        for step, spot, size in zip(place, spots, positions, strict=True):
            target = target[math.floor(step * spot / size + 1e-9)]
        expected.append(target)
    compare(vectors, batch, tuple(positions), expected, seed)


@given(st.integers(5, 7), st.lists(SMALL, min_size=1, max_size=2), SMALL, SEEDS)
def test_a_layer_without_positions_gets_the_mean_over_positions(batch, spots, width, seed):
    vectors = numbers(batch, *spots, width, seed=seed)
    vectors[0, 0] = math.nan  # not labeled: left out of the mean
    expected = []
    for sample in range(batch):
        labeled = [vectors[(sample, *spot)] for spot in places(*spots)]
        labeled = [t for t in labeled if not bool(t.isnan().any())]
        expected.append(sum(labeled) / len(labeled) if labeled else torch.full((width,), math.nan).double())
    result = for_rows(vectors, batch, (), None)
    torch.testing.assert_close(result, torch.stack(expected), rtol=1e-12, atol=1e-12, equal_nan=True)


@given(st.integers(5, 7), st.integers(8, 11), st.booleans(), SMALL, SEEDS)
def test_sequence_first(batch, length, per_token, width, seed):
    vectors = numbers(batch, *([length] if per_token else []), width, seed=seed)
    expected = [vectors[(s, t) if per_token else (s,)] for t, s in places(length, batch)]
    compare(vectors, length, (batch,), expected, seed)


@given(st.integers(2, 5), st.integers(2, 4), st.lists(SMALL, max_size=1), st.booleans(), SEEDS)
def test_a_folded_batch(batch, folds, positions, per_token, seed):
    """Time or windows folded into the batch: consecutive folds belong to one sample."""
    if positions and positions[0] == batch:
        return  # as ambiguous for a person
    vectors = numbers(batch, *([6] if per_token else []), 3, seed=seed)
    mean = [vectors[s].mean(0) if per_token else vectors[s] for s in range(batch)]
    expected = [mean[sample] for sample, _, *_ in places(batch, folds, *positions)]
    compare(vectors, batch * folds, tuple(positions), expected, seed)


def test_rows_that_cannot_be_told_apart_by_sample():
    assert for_rows(numbers(4, 2), 7, (3,), None) is None
    assert for_rows(numbers(4, 2), 2, (), None) is None


@given(st.lists(st.integers(-1, 4), min_size=3, max_size=12), st.booleans())
def test_encode_class_indices(labels, tokens):
    labels = [IGNORED if label < 0 else label for label in labels]
    target = torch.tensor([labels, labels[::-1]]) if tokens else torch.tensor(labels)
    result = encode(target, TargetKind(classes=5))
    assert result.shape == (*target.shape, 5)
    for place, label in zip(places(*target.shape), target.flatten().tolist(), strict=True):
        for unit in range(5):
            value = float(result[(*place, unit)])
            assert math.isnan(value) if label == IGNORED else value == float(unit == label)


@given(st.integers(1, 6), st.lists(SMALL, max_size=2), SMALL, SEEDS)
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


def test_rows_without_a_label_get_the_mean():
    mean = torch.tensor([0.25, 0.75], dtype=torch.float64)
    vectors = encode(torch.tensor([[0, IGNORED], [IGNORED, IGNORED], [1, 1]]), TargetKind(classes=2))
    targets = Targets((vectors,), mean)
    result = targets.of_rows(0, (3, (2,)), None)
    expected = [[1, 0], mean.tolist(), mean.tolist(), mean.tolist(), [0, 1], [0, 1]]
    assert result.tolist() == expected
    assert targets.of_rows(0, (3, ()), None).tolist() == [[1, 0], mean.tolist(), [0, 1]]
    assert targets.of_samples(0, 3) is None, "the rows of a sample do not share one target"


def test_samples_that_share_one_target():
    vectors = encode(torch.tensor([0, IGNORED, 1]), TargetKind(classes=2))
    targets = Targets((vectors,), torch.tensor([0.5, 0.5]).double())
    assert targets.of_samples(0, 3).tolist() == [[1, 0], [0.5, 0.5], [0, 1]]
    assert targets.of_samples(0, 6) is None


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

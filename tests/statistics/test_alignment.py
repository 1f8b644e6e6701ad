"""Which sample and place a row belongs to, against slow loops, and layouts read off the rows that change."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from sylinit.statistics.alignment import (
    UNKNOWN,
    Layout,
    align,
    has_positions,
    kept_rows,
    layout_of,
    targets_of_rows,
)
from sylinit.statistics.rows import Known

SMALL = st.integers(1, 3)
SAMPLES = st.integers(3, 6)
SEEDS = st.integers(0, 1000)

Row = tuple[int, tuple[int, ...]]
"""The sample of a row, and its other coordinates."""


@st.composite
def folds(draw: st.DrawFn, *, after: int = 2) -> tuple[Layout, tuple[int, ...], int]:
    """A layout, leading dimensions that it fits, and the number of samples."""
    samples, outer, inner = draw(SAMPLES), draw(SMALL), draw(SMALL)
    before = draw(st.lists(SMALL, max_size=1))
    behind = draw(st.lists(SMALL, max_size=after))
    return Layout(len(before), outer, inner), (*before, outer * samples * inner, *behind), samples


def slow(layout: Layout, lead: tuple[int, ...], samples: int) -> list[Row]:
    """Every row in order, by counting through all coordinates; those of size one in the fold are none."""
    before, behind = lead[: layout.axis], lead[layout.axis + 1 :]
    rows = []
    for first in product(*map(range, before)):
        for outer, sample, inner in product(range(layout.outer), range(samples), range(layout.inner)):
            folded = [place for place, size in ((outer, layout.outer), (inner, layout.inner)) if size > 1]
            rows += [(sample, (*first, *folded, *last)) for last in product(*map(range, behind))]
    return rows


def sizes_of(layout: Layout, lead: tuple[int, ...]) -> list[int]:
    folded = [size for size in (layout.outer, layout.inner) if size > 1]
    return [*lead[: layout.axis], *folded, *lead[layout.axis + 1 :]]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def compare(vectors: Tensor, fold: tuple[Layout, tuple[int, ...], int], expected: list[Tensor], seed: int) -> None:
    """All rows, and any choice of rows, have the expected targets."""
    layout, lead, _ = fold
    reference = torch.stack(expected)
    result = targets_of_rows(vectors, lead, layout, None)
    torch.testing.assert_close(result, reference, rtol=1e-12, atol=1e-12, equal_nan=True)
    some = torch.randint(len(reference), (7,), generator=torch.Generator().manual_seed(seed))
    result = targets_of_rows(vectors, lead, layout, some)
    torch.testing.assert_close(result, reference[some], rtol=1e-12, atol=1e-12, equal_nan=True)


@given(folds())
def test_where_each_row_lies(fold):
    layout, lead, samples = fold
    assert layout.in_batch(lead, samples) == layout
    sample, places, sizes = layout.locate(lead, samples, torch.arange(math.prod(lead)))
    assert sizes == sizes_of(layout, lead)
    found = list(zip(sample.tolist(), zip(*(p.tolist() for p in places), strict=True), strict=True)) if places else []
    assert (found or [(s, ()) for s in sample.tolist()]) == slow(layout, lead, samples)


@given(folds(), SMALL, SEEDS)
def test_a_target_for_each_sample_goes_to_all_of_its_rows(fold, width, seed):
    vectors = numbers(fold[2], width, seed=seed)
    compare(vectors, fold, [vectors[sample] for sample, _ in slow(*fold)], seed)


@given(folds(), st.data(), SMALL, SEEDS)
def test_a_target_for_each_position_at_another_resolution(fold, data, width, seed):
    """Row i of m positions lies at i / m of the way along, where target floor(i t / m) of t is."""
    sizes = sizes_of(fold[0], fold[1])
    assume(sizes)
    spots = [data.draw(st.integers(1, 4)) for _ in sizes]
    vectors = numbers(fold[2], *spots, width, seed=seed)
    expected = []
    for sample, place in slow(*fold):
        target = vectors[sample]
        for step, spot, size in zip(place, spots, sizes, strict=True):
            target = target[math.floor(step * spot / size + 1e-9)]
        expected.append(target)
    compare(vectors, fold, expected, seed)


@given(folds(after=1), st.lists(SMALL, min_size=4, max_size=5), SMALL, SEEDS)
def test_a_layer_without_such_positions_gets_the_mean_over_positions(fold, spots, width, seed):
    assume(len(spots) != len(sizes_of(fold[0], fold[1])))
    vectors = numbers(fold[2], *spots, width, seed=seed)
    vectors[0, 0] = math.nan  # not labeled: left out of the mean
    expected = []
    for sample, _ in slow(*fold):
        labeled = [vectors[(sample, *spot)] for spot in product(*map(range, spots))]
        labeled = [t for t in labeled if not bool(t.isnan().any())]
        expected.append(sum(labeled) / len(labeled) if labeled else torch.full((width,), math.nan).double())
    compare(vectors, fold, expected, seed)


@given(st.integers(5, 7), st.integers(8, 11), st.booleans(), SMALL, SEEDS)
def test_sequence_first(batch, length, per_token, width, seed):
    """Not known from a trial run: the dimension that counts the samples is taken."""
    vectors = numbers(batch, *([length] if per_token else []), width, seed=seed)
    layout = align((length, batch), batch, None)
    assert layout == Layout(1)
    expected = [vectors[(s, t) if per_token else (s,)] for t, s in product(range(length), range(batch))]
    compare(vectors, (layout, (length, batch), batch), expected, seed)


@given(folds(), SEEDS)
def test_the_rows_that_a_mask_keeps(fold, seed):
    layout, lead, samples = fold
    sizes = sizes_of(layout, lead)
    for length in {*sizes, 7}:
        mask = torch.rand(samples, length, generator=torch.Generator().manual_seed(seed)) < 0.5
        found = kept_rows(mask, lead, layout)
        if sizes.count(length) != 1:
            assert found is None
            continue
        which = sizes.index(length)
        rows = slow(layout, lead, samples)
        expected = [row for row, (sample, place) in enumerate(rows) if bool(mask[sample, place[which]])]
        assert found.tolist() == expected


def test_rows_without_a_label_get_the_mean():
    mean = torch.tensor([0.25, 0.75], dtype=torch.float64)
    nothing = [math.nan, math.nan]
    vectors = torch.tensor([[[1.0, 0.0], nothing], [nothing, nothing], [[0.0, 1.0], [0.0, 1.0]]], dtype=torch.float64)
    known = Known((vectors,), mean)
    rows = known.filled(targets_of_rows(vectors, (3, 2), Layout(), None))
    assert rows.tolist() == [[1, 0], mean.tolist(), mean.tolist(), mean.tolist(), [0, 1], [0, 1]]
    assert known.filled(targets_of_rows(vectors, (3,), Layout(), None)).tolist() == [[1, 0], mean.tolist(), [0, 1]]


# What is known of a layout


@pytest.mark.parametrize(
    ("lead", "samples", "seen", "expected"),
    [
        ((4, 3), 4, None, Layout(0)),
        ((3, 4), 4, None, Layout(1)),
        ((4, 4), 4, None, Layout(0)),
        ((7, 3), 4, None, None),
        ((8, 3), 4, None, None),  # a fold: which way round only a trial run can tell
        ((2,), 4, None, None),
        ((8, 3), 4, Layout(0, 1, 2), Layout(0, 1, 2)),
        ((8, 3), 4, Layout(0, 2, 1), Layout(0, 2, 1)),
        ((4, 4), 4, Layout(1), Layout(1)),
        ((9, 3), 4, Layout(0, 1, 2), None),  # not so in this batch
        ((8,), 4, Layout(1), None),
        ((4, 3), 4, UNKNOWN, None),
    ],
)
def test_a_layout_is_what_was_seen_or_the_dimension_that_counts_the_samples(lead, samples, seen, expected):
    assert align(lead, samples, seen) == expected


def changed_rows(layout: Layout, lead: tuple[int, ...], samples: int, marked: int) -> Tensor:
    """The rows of one sample, ``[*lead]``."""
    return torch.tensor([sample == marked for sample, _ in slow(layout, lead, samples)]).view(lead)


@given(folds(), st.data())
def test_the_layout_is_read_off_the_rows_of_one_sample(fold, data):
    layout, lead, samples = fold
    marked = data.draw(st.integers(0, samples - 1))
    changed = changed_rows(layout, lead, samples, marked)
    assert layout_of(changed, lead, samples, marked) == layout


@given(folds(), st.data(), SEEDS)
def test_dimensions_along_which_rows_are_not_told_apart_change_nothing(fold, data, seed):
    layout, lead, samples = fold
    changed = changed_rows(layout, lead, samples, 1)
    for axis in range(len(lead)):
        if axis != layout.axis and data.draw(st.booleans()):
            changed = changed.any(axis, keepdim=True)
    assert layout_of(changed, lead, samples, 1) == layout


@given(folds(), SEEDS)
def test_where_only_some_rows_of_the_sample_change_the_others_are_not_taken_for_it(fold, seed):
    layout, lead, samples = fold
    changed = changed_rows(layout, lead, samples, 1)
    some = changed & (torch.rand(lead, generator=torch.Generator().manual_seed(seed)) < 0.7)
    found = layout_of(some, lead, samples, 1)
    if not bool(some.any()):
        assert found is None
        return
    assert found is not None
    assert found != UNKNOWN  # the true one fits, at the least
    assert not bool((some & ~changed_rows(found, lead, samples, 1)).any())
    if bool((some == changed).all()):
        assert found == layout


@given(folds(), SEEDS)
def test_rows_of_several_samples_follow_no_pattern(fold, seed):
    layout, lead, samples = fold
    changed = changed_rows(layout, lead, samples, 1) | changed_rows(layout, lead, samples, 2)
    assume(not bool(changed.all()))
    assert layout_of(changed, lead, samples, 1) == UNKNOWN


def test_no_change_and_all_changed_tell_nothing():
    assert layout_of(torch.zeros(6, 2, dtype=torch.bool), (6, 2), 3, 1) is None
    assert layout_of(torch.ones(6, 2, dtype=torch.bool), (6, 2), 3, 1) is None


def test_of_several_streams_each_has_the_targets_of_its_own_positions():
    vectors = numbers(4, 5, 2)  # at each of five positions
    lead = (4, 3, 5)
    assert has_positions((5,), lead, 4, Layout())
    rows = targets_of_rows(vectors, lead, Layout(), None).view(4, 3, 5, 2)
    assert torch.equal(rows, vectors.unsqueeze(1).expand(4, 3, 5, 2))


@pytest.mark.parametrize("grid", [(6, 9), (2, 3)], ids=["every pixel", "patches"])
def test_a_flattened_grid_has_the_targets_of_the_picture(grid):
    vectors = numbers(4, 6, 9, 2)
    lead = (4, grid[0] * grid[1])
    assert has_positions((6, 9), lead, 4, Layout())
    rows = targets_of_rows(vectors, lead, Layout(), None)
    expected = targets_of_rows(vectors, (4, *grid), Layout(), None)
    assert torch.equal(rows, expected)


@pytest.mark.parametrize(
    ("spots", "lead"),
    [((5,), (4,)), ((5,), (4, 5, 5)), ((5,), (4, 2, 3)), ((6, 9), (4, 7)), ((6, 9), (4, 2, 2, 9))],
    ids=["pooled", "two alike", "others", "no grid", "a grid of others"],
)
def test_rows_at_other_positions_than_the_targets_are_told_the_mean(spots, lead):
    vectors = numbers(4, *spots, 2)
    assert not has_positions(spots, lead, 4, Layout())
    rows = targets_of_rows(vectors, lead, Layout(), None).view(4, -1, 2)
    assert torch.allclose(rows, vectors.flatten(1, -2).mean(1, keepdim=True))


def test_a_mask_of_all_positions_keeps_its_own_rows():
    mask = numbers(4, 3, 5) > 0
    assert torch.equal(kept_rows(mask, (4, 3, 5), Layout()), mask.flatten().nonzero().squeeze(1))
    assert kept_rows(mask, (4, 5, 3), Layout()) is None

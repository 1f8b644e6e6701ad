"""Moments: exact, additive, independent of how the rows are cut; the sample of rows is spread evenly."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sylinit.statistics.moments import BLOCK, Moments, sample_index


def problem(seed: int, groups: int = 2, count: int = 60, dim: int = 5, width: int = 3):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(groups, count, dim, generator=generator, dtype=torch.float64) * 3 + 10
    return rows, torch.randn(count, width, generator=generator, dtype=torch.float64)


def moments_of(rows, targets):
    return Moments.zeros(rows.shape[0], rows.shape[2], targets.shape[1]).update(rows, targets)


def same(one: Moments, other: Moments) -> bool:
    return all(torch.allclose(getattr(one, f), getattr(other, f), rtol=1e-13, atol=1e-10) for f in vars(one))


def test_blocks_are_the_second_moment_of_1_t_x():
    rows, targets = problem(0, groups=1)
    z = torch.cat([torch.ones(60, 1, dtype=torch.float64), targets, rows[0]], 1)
    gram = z.T @ z
    sums = moments_of(rows, targets)
    assert torch.allclose(sums.ss, gram[:4, :4])
    assert torch.allclose(sums.xs[0], gram[4:, :4])
    assert torch.allclose(sums.xx[0], gram[4:, 4:])


@pytest.mark.parametrize("dim", [BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_the_covariance_of_rows_wider_than_a_block_is_whole_and_symmetric(dim):
    rows, targets = problem(0, groups=2, count=40, dim=dim)
    cov = moments_of(rows, targets).covariance()
    for group, xx in zip(rows, cov.xx, strict=True):
        assert torch.allclose(xx, xx.T, rtol=1e-14, atol=1e-13)
        assert torch.allclose(xx, torch.cov(group.T, correction=0), rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 50), cuts=st.lists(st.integers(0, 60), max_size=16), shuffle=st.booleans())
def test_the_cut_and_the_order_do_not_matter(seed, cuts, shuffle):
    rows, targets = problem(seed)
    whole = moments_of(rows, targets)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed)) if shuffle else torch.arange(60)
    pieces = Moments.zeros(2, 5, 3)
    edges = [0, *sorted(cuts), 60]
    for start, stop in pairwise(edges):
        pieces.update(rows[:, order[start:stop]], targets[order[start:stop]])
    assert same(whole, pieces)


@given(seed=st.integers(0, 50), cut=st.integers(0, 60))
def test_merging_two_halves_is_addition(seed, cut):
    rows, targets = problem(seed)
    first, second = (moments_of(rows[:, s], targets[s]) for s in (slice(None, cut), slice(cut, None)))
    assert same(moments_of(rows, targets), first.merge(second))


def test_chunks_of_large_updates_do_not_matter():
    rows, targets = problem(1)
    pieces = Moments.zeros(rows.shape[0], rows.shape[2], targets.shape[1]).update(rows, targets, chunk=17)
    assert same(moments_of(rows, targets), pieces)


def test_reduce_sums_every_block():
    rows, targets = problem(2)
    doubled = moments_of(rows, targets).reduce(lambda flat: flat.mul_(2))
    assert same(doubled, moments_of(rows, targets).merge(moments_of(rows, targets)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_covariance_is_that_of_the_centered_rows(dtype):
    rows, targets = problem(3)
    rows = rows.to(dtype)
    cov = moments_of(rows, targets).covariance()
    x = rows.double() - rows.double().mean(1, keepdim=True)
    t = targets - targets.mean(0)
    assert torch.allclose(cov.xx, x.mT @ x / 60, atol=1e-11)
    assert torch.allclose(cov.xt, x.mT @ t / 60, atol=1e-11)
    assert torch.allclose(cov.tt, t.T @ t / 60, atol=1e-11)
    assert torch.allclose(cov.variance, x.square().mean((1, 2)))


@given(total=st.integers(2, 5000), budget=st.integers(2, 600), seed=st.integers(0, 5))
def test_sampled_rows_are_spread_over_all(total, budget, seed):
    index = sample_index(total, budget, torch.Generator().manual_seed(seed))
    if total <= budget:
        assert index is None
        return
    assert len(index) == budget
    assert bool((index.diff() >= 0).all())
    assert int(index[0]) >= 0
    assert int(index[-1]) < total
    # One row from each of `budget` equal strata: no gap is wider than two strata.
    assert int(index.diff().max()) <= 2 * total / budget + 1


def test_every_row_is_as_likely():
    hits = torch.zeros(97)
    for seed in range(400):
        hits[sample_index(97, 20, torch.Generator().manual_seed(seed))] += 1
    expected = 400 * 20 / 97
    assert float((hits - expected).abs().max()) < 5 * expected**0.5

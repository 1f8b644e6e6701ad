"""What stands for a whole eigendecomposition: of matrices that are nearly a multiple of the identity, and for ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sylinit.linalg.eigh import LARGE, bordered_eigh, robust_rank


def bordered(size: int, border: Tensor, groups: int = 2) -> Tensor:
    """A different multiple of the identity in each group, but for the rows and columns of ``border``."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(groups, size, size, dtype=torch.float64, generator=generator)
    keep = torch.zeros(size, dtype=torch.bool)
    keep[border] = True
    level = torch.arange(1, groups + 1).double().view(-1, 1, 1) * torch.eye(size, dtype=torch.float64)
    return torch.where(keep | keep.unsqueeze(1), draw + draw.mT, level)


@pytest.mark.parametrize("size", [LARGE - 1, LARGE, 2 * LARGE])
@pytest.mark.parametrize("border", [[], [0], [3, 90, 7], list(range(0, 150, 8)), list(range(100))])
def test_a_bordered_matrix_is_decomposed_like_any(size: int, border: list[int]) -> None:
    place = torch.tensor(border, dtype=torch.long)
    matrix = bordered(size, place)
    values, vectors = bordered_eigh(matrix, place)
    expected = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-11)
    assert bool((values.diff() >= -1e-12).all())
    torch.testing.assert_close((vectors * values.unsqueeze(1)) @ vectors.mT, matrix, rtol=0, atol=1e-11)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(size).double().expand_as(matrix), rtol=0, atol=1e-12)


def test_a_border_that_does_not_correlate_with_the_rest() -> None:
    matrix = torch.eye(LARGE, dtype=torch.float64).unsqueeze(0)
    matrix[0, 5, 5], matrix[0, 9, 9] = 0.0, 4.0
    values, vectors = bordered_eigh(matrix, torch.tensor([5, 9]))
    assert values[0].tolist() == pytest.approx([0.0, *[1.0] * (LARGE - 2), 4.0], abs=1e-14)
    torch.testing.assert_close((vectors * values.unsqueeze(1)) @ vectors.mT, matrix, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [8, LARGE, 2 * LARGE])
def test_the_rank_of_a_gram_matrix(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ranks = [0, 1, size // 3, size - 1, size]
    grams = []
    for rank in ranks:
        factor = torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64, generator=generator))[0]
        factor = factor * torch.logspace(0, -4, rank, dtype=torch.float64)
        grams.append(factor @ factor.T)
    assert [int(robust_rank(gram.unsqueeze(0), 1e-10)) for gram in grams] == ranks
    assert int(robust_rank(torch.stack(grams), 1e-10)) == sum(ranks)


def test_the_rank_does_not_depend_on_scale_or_order() -> None:
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(LARGE, 50, dtype=torch.float64, generator=generator)
    gram = (factor @ factor.T).unsqueeze(0)
    order = torch.randperm(LARGE, generator=generator)
    for matrix in (1e-20 * gram, 1e20 * gram, gram[:, order][:, :, order]):
        assert int(robust_rank(matrix, 1e-10)) == 50

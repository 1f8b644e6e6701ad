"""The solver against dense Kronecker and SciPy references, and the facts that the paper's objective implies."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sylinit.errors import SylinitError
from sylinit.linalg import sylvester
from sylinit.linalg.subspace import row_axes, row_space
from sylinit.linalg.sylvester import objective, robust_eigh, solve_sylvester, sylvester_


def psd(size: int, rank: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    factor = torch.randn(size, rank, dtype=torch.float64, generator=generator)
    return scale * factor @ factor.T / max(1, rank)


def system(
    k: int, d: int, rank_a: int, rank_b: int, seed: int = 0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """A consistent system: C lies in the range, as it does for every latent code."""
    generator = torch.Generator().manual_seed(seed)
    a, b = psd(k, rank_a, generator), psd(d, rank_b, generator, scale)
    w = torch.randn(k, d, dtype=torch.float64, generator=generator)
    return a, b, a @ w + w @ b


def kronecker(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Minimum-norm least squares of the dense k d x k d system."""
    k, d = c.shape
    eye_k, eye_d = torch.eye(k, dtype=a.dtype), torch.eye(d, dtype=a.dtype)
    operator = torch.kron(a, eye_d) + torch.kron(eye_k, b)
    return (torch.linalg.pinv(operator, hermitian=True, rtol=1e-11) @ c.reshape(-1)).view(k, d)


SIZES = [(1, 1), (1, 7), (5, 1), (3, 8), (16, 27), (32, 144), (64, 576), (256, 1152)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize(("k", "d"), SIZES)
def test_residual(k, d, full, dtype, bound):
    a, b, c = system(k, d, k if full else (k + 1) // 2, d if full else (d + 1) // 2)
    solution = solve_sylvester(a.to(dtype), b.to(dtype), c.to(dtype))
    assert float(solution.residual) <= bound
    w = solution.weight.double()
    assert torch.allclose(solution.residual.double(), (a @ w + w @ b - c).norm() / c.norm(), atol=bound)


def spectrum(size: int, rank: int, decades: float, seed: int) -> Tensor:
    """A symmetric matrix whose ``rank`` non-zero eigenvalues fall evenly from 1 to ``10^-decades``."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0][:, :rank]
    return (q * torch.logspace(0, -decades, rank, dtype=torch.float64)) @ q.T


@given(
    k=st.integers(1, 24),
    d=st.integers(1, 40),
    share_a=st.floats(0, 1),
    share_b=st.floats(0, 1),
    decades=st.sampled_from([0, 3, 6, 12]),
    scale_a=st.sampled_from([1e-18, 1e-8, 1.0, 1e8, 1e18]),
    scale_b=st.sampled_from([1e-18, 1e-8, 1.0, 1e8, 1e18]),
    single=st.booleans(),
    seed=st.integers(0, 99),
)
def test_residual_whatever_the_rank_scale_and_condition(
    k, d, share_a, share_b, decades, scale_a, scale_b, single, seed
):
    dtype, bound = (torch.float32, 1e-5) if single else (torch.float64, 1e-12)
    a = (scale_a * spectrum(k, round(share_a * k), decades, seed)).to(dtype)
    b = (scale_b * spectrum(d, round(share_b * d), decades, seed + 1)).to(dtype)
    w = torch.randn(k, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    c = (a.double() @ w + w @ b.double()).to(dtype)
    solution = solve_sylvester(a, b, c)
    found = solution.weight.double()
    left = a.double() @ found + found @ b.double() - c.double()
    true = float(left.norm() / c.double().norm()) if float(c.abs().max()) else float(found.norm())
    assert true <= bound
    assert abs(float(solution.residual) - true) <= 0.01 * bound


@pytest.mark.parametrize("scale", [1e-160, 1e160])
def test_sizes_whose_squares_leave_the_range_of_float64(scale):
    a, b, c = system(3, 5, 3, 4)
    solution = solve_sylvester(scale * a, scale * b, scale * c)
    assert float(solution.residual) <= 1e-12
    assert torch.allclose(solution.weight, solve_sylvester(a, b, c).weight)


def test_zero_matrices_give_zero():
    a, b, c = (torch.zeros(2, *shape) for shape in ((3, 3), (5, 5), (3, 5)))
    solution = solve_sylvester(a, b, c)
    assert solution.weight.count_nonzero() == 0
    assert solution.residual.tolist() == [0, 0]
    assert solution.rank.tolist() == [0, 0]
    assert solve_sylvester(a, b, c + 1).residual.tolist() == [1, 1], "nothing of C lies in the range of zero"


@pytest.mark.parametrize(("k", "d"), [(1, 1), (3, 8), (16, 27), (32, 144)])
def test_agrees_with_scipy_where_the_system_is_regular(k, d):
    a, b, c = system(k, d, 2 * k, 2 * d)
    reference = torch.from_numpy(scipy.linalg.solve_sylvester(a.numpy(), b.numpy(), c.numpy()))
    solution = solve_sylvester(a, b, c)
    assert torch.allclose(solution.weight, reference, rtol=1e-7, atol=1e-7)
    assert int(solution.rank) == k * d


@given(
    k=st.integers(1, 6),
    d=st.integers(1, 7),
    rank_a=st.integers(0, 6),
    rank_b=st.integers(0, 7),
    log_scale=st.integers(-4, 4),
    seed=st.integers(0, 99),
    consistent=st.booleans(),
)
def test_singular_systems_give_the_minimum_norm_answer(k, d, rank_a, rank_b, log_scale, seed, consistent):
    rank_a, rank_b = min(rank_a, k), min(rank_b, d)
    a, b, c = system(k, d, rank_a, rank_b, seed, 10.0**log_scale)
    if not consistent:
        c = c + torch.randn(k, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * c.abs().mean()
    solution = solve_sylvester(a, b, c, rtol=1e-11)
    reference = kronecker(a, b, c)
    assert bool(solution.weight.isfinite().all())
    scale = max(1.0, float(reference.abs().max()))
    assert torch.allclose(solution.weight, reference, rtol=1e-4, atol=1e-5 * scale)
    assert int(solution.rank) == k * d - (k - rank_a) * (d - rank_b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_only_its_rounding(dtype):
    a, b, c = (matrix.to(dtype) for matrix in system(8, 12, 8, 12))
    half = solve_sylvester(a, b, c, rtol=1e-6)
    exact = solve_sylvester(a.double(), b.double(), c.double(), rtol=1e-6)
    assert half.weight.dtype == half.residual.dtype == dtype
    assert torch.equal(half.weight, exact.weight.to(dtype))
    assert float(exact.residual) < 1e-12 < float(half.residual) < 4 * torch.finfo(dtype).eps


def test_a_batch_equals_its_members():
    systems = [system(5, 9, rank, 9 - rank, seed=rank) for rank in range(1, 6)]
    a, b, c = (torch.stack(matrices).view(1, 5, *matrices[0].shape) for matrices in zip(*systems, strict=True))
    together = solve_sylvester(a, b, c)
    assert together.residual.shape == together.rank.shape == (1, 5)
    for number, one in enumerate(systems):
        assert torch.allclose(together.weight[0, number], solve_sylvester(*one).weight, atol=1e-9)


def test_rotating_the_equation_rotates_the_solution():
    a, b, c = system(6, 10, 6, 4)
    u, v = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] for n in (6, 10))
    turned = solve_sylvester(u @ a @ u.T, v @ b @ v.T, u @ c @ v.T).weight
    assert torch.allclose(turned, u @ solve_sylvester(a, b, c).weight @ v.T, atol=1e-9)


@pytest.mark.parametrize("failures", range(5))
@pytest.mark.parametrize("shape", [(6, 6), (3, 6, 6)])
def test_eigh_falls_back_to_other_forms_of_the_matrix(monkeypatch, failures, shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrix = matrix @ matrix.mT
    expected = torch.linalg.eigvalsh(matrix.double())
    real, calls = torch.linalg.eigh, []

    def failing(x: Tensor):
        calls.append(x.dtype)
        if len(calls) <= failures:
            raise torch.linalg.LinAlgError("did not converge")
        return real(x)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    values, vectors = robust_eigh(matrix)
    assert calls == [torch.float32, *[torch.float64] * 4][: failures + 1]
    assert values.dtype == vectors.dtype == torch.float32
    assert torch.allclose(values.double(), expected, atol=1e-5)
    assert torch.allclose(vectors * values.unsqueeze(-2) @ vectors.mT, matrix, atol=1e-5)


def test_eigh_says_when_all_forms_fail():
    with pytest.raises(SylinitError, match="NaN or infinite"):
        robust_eigh(torch.full((3, 3), torch.nan))


@pytest.mark.parametrize("encoding_weight", [1e-3, 0.3, 1.0, 1e3])
@pytest.mark.parametrize("count", [100, 6])
def test_the_objective_is_stationary_at_the_solution(encoding_weight, count):
    x = torch.randn(count, 9, dtype=torch.float64) @ torch.randn(9, 9, dtype=torch.float64)
    s = torch.randn(count, 4, dtype=torch.float64)
    weight = sylvester_(torch.empty(4, 9, dtype=torch.float64), x, s, encoding_weight=encoding_weight)
    x, s = x - x.mean(0), s - s.mean(0)
    s = s * (x.square().mean() / s.square().mean()).sqrt()
    weight.requires_grad_()
    loss = objective(weight, x, s, encoding_weight)
    (gradient,) = torch.autograd.grad(loss, weight)
    zero = torch.zeros_like(weight).requires_grad_()
    (at_zero,) = torch.autograd.grad(objective(zero, x, s, encoding_weight), zero)
    assert float(gradient.norm()) < 1e-9 * float(at_zero.norm())
    nearby = objective(weight.detach() + 1e-3 * torch.randn_like(weight), x, s, encoding_weight)
    assert float(nearby) > float(loss.detach())


@given(log_weight=st.floats(-3, 3), seed=st.integers(0, 20))
def test_a_pca_code_gives_the_pca_basis_whatever_the_encoding_weight(log_weight, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, 7, dtype=torch.float64, generator=generator) @ torch.randn(
        7, 7, dtype=torch.float64, generator=generator
    )
    x = x - x.mean(0)
    basis = torch.linalg.svd(x, full_matrices=False)[2][:3]
    weight = sylvester_(torch.empty(3, 7, dtype=torch.float64), x, x @ basis.T, encoding_weight=10**log_weight)
    unit = weight / weight.norm(dim=1, keepdim=True)
    assert torch.allclose(unit, basis, atol=1e-9)


def test_row_space_is_an_orthonormal_basis_of_the_rows():
    x = torch.randn(6, 40)
    x = x - x.mean(0)
    basis, coordinates = row_space(x)
    assert basis.shape == (40, 5), "centring takes one dimension"
    assert torch.allclose(basis.T @ basis, torch.eye(5, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(coordinates @ basis.T, x.double(), atol=1e-9)
    assert bool((coordinates.square().sum(0).diff() <= 0).all())


class Sizes(TorchDispatchMode):
    """Records how many numbers each tensor has that is made."""

    def __init__(self):
        super().__init__()
        self.numbers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.numbers += [one.numel() for one in (made if isinstance(made, tuple) else (made,)) if torch.is_tensor(one)]
        return made


def test_row_space_never_forms_a_square_matrix_of_the_inputs():
    x = torch.randn(6, 40)
    whole = row_axes(x, 1e-10)
    with Sizes() as seen:
        pieces = row_axes(x, 1e-10, columns=16)
    assert max(seen.numbers) == 6 * 40
    assert torch.allclose(pieces[0], whole[0], atol=1e-9)


@pytest.mark.parametrize("rows", [5, 30])
def test_sylvester_equals_the_kronecker_reference(rows):
    x = torch.randn(rows, 8, dtype=torch.float64)
    s = torch.randn(rows, 3, dtype=torch.float64)
    weight = sylvester_(torch.empty(3, 2, 4, dtype=torch.float64), x, s, encoding_weight=0.7)
    x, s = x - x.mean(0), s - s.mean(0)
    s = s * (x.square().mean() / s.square().mean()).sqrt()
    assert torch.allclose(weight.view(3, 8), kronecker(s.T @ s, 0.7 * x.T @ x, 1.7 * s.T @ x), atol=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b, c: (a[:2], b, c), r"expected a \[\.\.\., k, k\]"),
        (lambda a, b, c: (a.float(), b, c), "one real floating-point dtype"),
        (lambda a, b, c: (a, b.clone().fill_(float("nan")), c), "b holds NaN"),
        (lambda a, b, c: (a, b, c[0]), "expected"),
        (lambda a, b, c: (a, b + torch.ones(5, 5).triu(1), c), "b is not symmetric"),
        (lambda a, b, c: (a[:0, :0], b, c[:0]), r"got a \[0, 0\]"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(SylinitError, match=message):
        solve_sylvester(*change(*system(3, 5, 3, 5)))


def test_bad_input_to_sylvester_is_named():
    with pytest.raises(SylinitError, match=r"needs x of shape \[n, 5\] and s of shape \[n, 3\]; got \[4, 6\]"):
        sylvester_(torch.empty(3, 5), torch.randn(4, 6), torch.randn(4, 3))
    with pytest.raises(SylinitError, match="at least 2"):
        sylvester_(torch.empty(3, 5), torch.randn(1, 5), torch.randn(1, 3))
    x, s = torch.randn(4, 5), torch.randn(4, 3)
    with pytest.raises(SylinitError, match="encoding_weight must be finite"):
        sylvester_(torch.empty(3, 5), x, s, encoding_weight=-1.0)
    with pytest.raises(SylinitError, match="s holds NaN"):
        sylvester_(torch.empty(3, 5), x, s / 0)
    with pytest.raises(SylinitError, match="at least 2 dimensions"):
        sylvester_(torch.empty(5), x, s)


@pytest.mark.parametrize("rows", [3, 9])
def test_rows_that_do_not_vary_give_zero(rows):
    weight = sylvester_(torch.ones(3, 5), torch.ones(rows, 5), torch.randn(rows, 3))
    assert weight.count_nonzero() == 0


@pytest.mark.parametrize(("decades", "short"), [(2, True), (6, False)])
def test_the_short_way_in_mixed_precision_is_for_regular_systems_and_as_exact(decades, short):
    size = sylvester.MIXED_PRECISION_SIZE
    a, b = (torch.stack([spectrum(n, n, decades, seed) for seed in (1, 2)]) for n in (40, size))
    c = 1e6 * torch.randn(2, 40, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = sylvester._mixed_precision(a, b, c)
    assert (found is not None) == short
    w, rank = sylvester._double_precision(a, b, c, 1e-13)
    solution = solve_sylvester(a, b, c)
    assert solution.rank.tolist() == rank.tolist() == [40 * size] * 2
    assert float(solution.residual.max()) <= (1e-13 if short else 1e-11)
    assert float((solution.weight - w).norm() / w.norm()) <= 1e-14 * 10**decades * size**0.5


def test_nothing_comes_of_nothing_in_mixed_precision_too():
    a, b = (torch.eye(n, dtype=torch.float64) for n in (3, sylvester.MIXED_PRECISION_SIZE))
    solution = solve_sylvester(a, b, torch.zeros(3, sylvester.MIXED_PRECISION_SIZE, dtype=torch.float64))
    assert not solution.weight.any()
    assert float(solution.residual) == 0

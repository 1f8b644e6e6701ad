"""The principal subspace and the projected solver against full decompositions; the choice between the solvers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sylinit.codes import CODES, Code
from sylinit.config import Config
from sylinit.linalg.projected import solve_projected
from sylinit.linalg.subspace import Subspace, principal_subspace, row_space, sketch
from sylinit.linalg.sylvester import solve_sylvester
from sylinit.solvers.projected import is_faster, subspace_rank


def covariance(dim: int, decay: float = 1.5, seed: int = 0) -> Tensor:
    """Variances that fall like a power of their rank, as those of images and of their features do."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))[0]
    variances = 100 * torch.arange(1, dim + 1, dtype=torch.float64) ** -decay
    return (axes * variances) @ axes.T


def subspace_of(cov: Tensor, rank: int, steps: int = 2) -> Subspace:
    return principal_subspace(cov, rank, torch.Generator().manual_seed(1), steps=steps)


def whitened_and_crossed(cov: Tensor, components: int, extra: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``A`` and ``S X^T`` of a code of whitened principal components and a few mixtures of a target."""
    generator = torch.Generator().manual_seed(seed)
    variances, axes = torch.linalg.eigh(cov)
    principal = (axes[:, -components:] * variances[-components:].rsqrt()).T
    regression = torch.randn(3, len(cov), dtype=torch.float64, generator=generator) / len(cov)
    mixtures = torch.randn(extra, 3, dtype=torch.float64, generator=generator) @ regression
    on_x = torch.cat([principal, mixtures])
    scale = (cov.diagonal().mean() / (on_x @ cov @ on_x.T).diagonal().mean()).sqrt()
    on_x = on_x * scale
    return on_x @ cov @ on_x.T, on_x @ cov


def relative_residual(a: Tensor, b: Tensor, c: Tensor, w: Tensor) -> float:
    return float((a @ w + w @ b - c).norm() / c.norm())


def test_principal_subspace_holds_what_its_fields_say():
    cov = covariance(200)
    found = subspace_of(cov, 40)
    basis = found.basis.double()
    assert torch.allclose(basis.T @ basis, torch.eye(40, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(basis.T @ cov @ basis, found.variances.diag(), atol=1e-4)
    assert torch.allclose(cov @ basis, found.image.double(), atol=1e-4)
    outside = torch.eye(200, dtype=torch.float64) - basis @ basis.T
    assert float(found.rest) == pytest.approx(float((outside @ cov).trace() / 160), rel=1e-4)
    assert bool((found.variances.diff() <= 0).all())
    assert bool((found.basis.gather(0, found.basis.abs().argmax(0, keepdim=True)) > 0).all())


def test_principal_subspace_converges_to_the_leading_axes():
    cov = covariance(200)
    exact = torch.linalg.eigvalsh(cov).flip(0)[:20]
    errors = [float(((exact - subspace_of(cov, 30, steps).variances[:20]) / exact).max()) for steps in (1, 2, 3, 7)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.05
    assert errors[3] < 1e-3


@given(dim=st.integers(1, 60), rank=st.integers(1, 60), seed=st.integers(0, 9))
def test_a_sketch_is_a_product_with_a_few_signs(dim, rank, seed):
    cov, rank = covariance(dim), min(rank, dim)
    entries = sketch(torch.eye(dim), rank, torch.Generator().manual_seed(seed))
    assert entries.shape == (dim, rank)
    assert bool((entries.abs().sum(1) == min(4, rank)).all())  # in each row so many, none upon another
    assert set(entries.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert torch.allclose(sketch(cov, rank, torch.Generator().manual_seed(seed)), cov @ entries.double(), rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_principal_subspace_finds_axes_of_single_coordinates(seed):
    """As in data whose coordinates do not correlate; a sketch of one sign a coordinate loses a quarter of them."""
    large = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:100]
    cov = torch.full((1000,), 1e-3, dtype=torch.float64).index_fill(0, large, 1.0).diag()
    found = principal_subspace(cov, 110, torch.Generator().manual_seed(seed))
    assert torch.allclose(found.variances[:100], torch.ones(100, dtype=torch.float64), rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_principal_subspace_of_any_scale(scale):
    cov = covariance(60)
    small, large = subspace_of(cov, 10), subspace_of(scale * cov, 10)
    assert torch.allclose(large.basis, small.basis, atol=1e-4)
    assert torch.allclose(large.variances, scale * small.variances, rtol=1e-5)


def test_principal_subspace_of_nothing_and_of_everything():
    assert not subspace_of(torch.zeros(9, 9), 3).variances.any()
    whole = subspace_of(covariance(9), 99)
    assert whole.basis.shape == (9, 9)
    assert torch.allclose(whole.variances, torch.linalg.eigvalsh(covariance(9)).flip(0), rtol=1e-4)


@given(
    components=st.integers(1, 40),
    extra=st.integers(0, 12),
    decay=st.floats(0, 3),
    log_weight=st.floats(-3, 3),
    log_scale=st.sampled_from([-12, 0, 12]),
    seed=st.integers(0, 9),
)
def test_projected_reports_its_true_residual_and_meets_the_tolerance(
    components, extra, decay, log_weight, log_scale, seed
):
    cov = covariance(150, decay, seed) * 10.0**log_scale
    weight = 10**log_weight
    a, cross = whitened_and_crossed(cov, components, extra, seed)
    c = (1 + weight) * cross
    subspace = subspace_of(cov, subspace_rank(components))
    found = solve_projected(a, cov, c, subspace, encoding_weight=weight, max_steps=40)
    assert float(found.residual) <= 1e-3
    assert relative_residual(a, weight * cov, c, found.weight) == pytest.approx(
        float(found.residual), rel=0.05, abs=1e-5
    )


def test_projected_approaches_the_exact_solution():
    cov = covariance(150)
    a, cross = whitened_and_crossed(cov, 20, 5)
    exact = solve_sylvester(a, 2.0 * cov, 3.0 * cross).weight
    found = solve_projected(
        a, cov, 3.0 * cross, subspace_of(cov, 30), encoding_weight=2.0, tolerance=1e-5, max_steps=40
    )
    assert float((found.weight - exact).norm() / exact.norm()) < 1e-3


def test_a_better_subspace_needs_fewer_steps():
    cov = covariance(150)
    a, cross = whitened_and_crossed(cov, 20, 5)
    steps = [
        solve_projected(a, cov, 5 * cross, subspace_of(cov, rank), encoding_weight=4.0, tolerance=1e-4).steps
        for rank in (1, 25, 150)
    ]
    assert steps[0] > steps[1] > steps[2]


def test_projected_gives_up_with_a_residual_that_says_so():
    cov = covariance(150)
    a, cross = whitened_and_crossed(cov, 20, 5)
    found = solve_projected(a, cov, 5 * cross, subspace_of(cov, 5, 1), encoding_weight=4.0, max_steps=1)
    assert found.steps == 1
    assert float(found.residual) > 1e-3
    assert relative_residual(a, 4 * cov, 5 * cross, found.weight) == pytest.approx(float(found.residual), rel=1e-3)


def test_projected_counts_what_lies_outside_the_range():
    """A right-hand side that no weight can reach leaves a residual instead of NaN."""
    cov = torch.zeros(8, 8, dtype=torch.float64)
    cov[0, 0] = 1.0
    found = solve_projected(
        torch.zeros(3, 3, dtype=torch.float64),
        cov,
        torch.ones(3, 8, dtype=torch.float64),
        subspace_of(cov, 2),
        encoding_weight=1.0,
    )
    assert bool(found.weight.isfinite().all())
    assert float(found.residual) == pytest.approx((7 / 8) ** 0.5, rel=1e-4)


def test_projected_solution_of_nothing_is_nothing():
    zero = torch.zeros(8, 8, dtype=torch.float64)
    found = solve_projected(zero[:3, :3], zero, zero[:3], subspace_of(zero, 2), encoding_weight=1.0)
    assert not found.weight.any()
    assert float(found.residual) == 0
    assert found.steps == 0


def test_the_projected_solver_is_for_few_components_of_many_dimensions():
    def serves(code: Code, units: int, dim: int) -> bool:
        components = code.with_label_share(Config(), normalized=False).leading_components(units)
        return components is not None and is_faster(components, dim, Config())

    mixed, lda = CODES["mixed"], CODES["lda"]
    assert serves(mixed, 512, 4608)
    assert serves(mixed, 512, 2304)
    assert serves(mixed, 64, 600)
    assert not serves(mixed, 16, 144), "small"
    assert not serves(mixed, 1365, 1024), "as many components as dimensions"
    assert not serves(lda, 512, 4608), "a code that reads weak axes"


VGG = """
import resource, torch
from sylinit import initialize_
x, y = torch.randn(1000, 25088), torch.arange(1000) % 10
model = torch.nn.Linear(25088, 4096)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(layer,) = initialize_(model, [(x, y)], head=None).initialized
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
assert (layer.solver, layer.rank) == ("row-space", 999) and layer.residual < 1e-9
assert model.weight.isfinite().all()
"""


@pytest.mark.slow
def test_the_first_fully_connected_layer_of_vgg_needs_little_memory():
    """25,088 inputs from 1,000 rows; one matrix of 25,088 squared would take 5 GB."""
    done = subprocess.run([sys.executable, "-c", VGG], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 3 * 1024**2  # in KiB


def test_row_space_of_constant_rows_is_empty():
    basis, coordinates = row_space(torch.zeros(4, 9))
    assert basis.shape == (9, 0)
    assert coordinates.shape == (4, 0)

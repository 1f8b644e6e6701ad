"""The solver of a wide layer: chosen by cost, true to its residual, exact where it falls short."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sylinit
from sylinit.codes import CODES, LinearCode, as_code
from sylinit.codes.linear import linear_code
from sylinit.config import Config
from sylinit.errors import SylinitError
from sylinit.solvers.exact import Exact, fit_exact
from sylinit.solvers.fit import Fit
from sylinit.solvers.problem import Declined, Problem, Source
from sylinit.solvers.projected import fit_projected
from sylinit.solvers.row_space import RowSpace
from sylinit.solvers.scaling import rescale
from sylinit.solvers.solve import SOLVERS
from sylinit.statistics.axes import Axes
from sylinit.statistics.moments import Covariance, Moments

DIM, UNITS, CLASSES = 600, 64, 10


def wide(count: int = 1500, rank: int = DIM, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of 600 numbers whose variances fall as those of images do, around a mean of their class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    deviations = 10 * torch.arange(1, rank + 1).float() ** -0.75
    x = torch.randn(count, rank, generator=generator) + torch.randn(CLASSES, rank, generator=generator)[y]
    return x * deviations @ torch.linalg.qr(torch.randn(DIM, rank, generator=generator))[0].T, y


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(DIM, UNITS), nn.ReLU(), nn.Linear(UNITS, CLASSES))


def covariance(groups: int = 1) -> tuple[Covariance, Tensor, Tensor]:
    """The statistics of wide rows, and the rows ``[g, n, d]`` and targets themselves."""
    data = [wide(seed=group) for group in range(groups)]
    x = torch.stack([x for x, _ in data]).double()
    t = nn.functional.one_hot(data[0][1]).double()
    return Moments.zeros(groups, DIM, CLASSES).update(x, t).covariance(), x, t


@pytest.mark.parametrize("code", ["mixed", "pca", "label"])
def test_a_wide_layer_is_projected_and_the_report_says_so(code):
    report = sylinit.initialize_(network(), [wide()], code=code)
    assert [layer.solver for layer in report.initialized] == ["projected", "exact"]
    assert 1e-8 < report["0"].residual <= 1e-3
    assert "projected" in str(report)


def test_a_projected_layer_of_more_units_than_its_code_is_made_of():
    units = 420  # 7/8 of them are components, of which a subspace of a tenth more is found
    model = nn.Sequential(nn.Linear(DIM, units), nn.ReLU(), nn.Linear(units, CLASSES))
    x, y = wide()
    report = sylinit.initialize_(model, [(x, y)], code="mixed", config=replace(Config(), projected_gain=1e-3))
    assert report["0"].solver == "projected"
    assert report["0"].residual <= 1e-3
    assert report["0"].shape == (1, units, DIM)
    assert abs(float(model[0](x).var(0).max()) - 1) < 0.01


@pytest.mark.parametrize("code", ["lda", "random_projection"])
def test_codes_that_read_weak_axes_are_solved_exactly(code):
    assert sylinit.initialize_(network(), [wide()], code=code)["0"].solver == "exact"


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("code", ["mixed", "pca", "label"])
def test_the_reported_residual_and_errors_are_those_of_the_rows(code, groups):
    """All is computed again from the code of every row: nothing here knows of principal axes or subspaces."""
    cov, x, t = covariance(groups)
    seen: list[tuple[Axes, LinearCode]] = []
    settled = CODES[code].with_label_share(Config(), normalized=False)

    def spied(axes: Axes, units: int, generator: torch.Generator) -> LinearCode:
        seen.append((axes, linear_code(settled, "layer", axes, units, generator, Config())))
        return seen[-1][1]

    problem = Problem("layer", replace(settled, function=spied), UNITS, seed=3)
    found = fit_projected(cov, problem, Config())
    assert isinstance(found, Fit)

    axes, linear = seen[0]
    x, t = x - x.mean(1, keepdim=True), t - t.mean(0)
    s = x @ axes.basis @ linear.on_x.mT + t @ linear.on_t.mT
    s = s * (x.square().mean((1, 2)) / s.square().mean((1, 2))).sqrt().view(-1, 1, 1)
    w, count = found.weight, x.shape[1]
    left = s.mT @ s @ w / count + 4 * w @ x.mT @ x / count
    right = 5 * s.mT @ x / count
    assert float((left - right).norm() / right.norm()) == pytest.approx(float(found.residual), rel=0.01, abs=1e-5)
    encoding = (x @ w.mT - s).square().sum() / s.square().sum()
    decoding = (x - s @ w).square().sum() / x.square().sum()
    assert float(encoding) == pytest.approx(float(found.encoding_error), abs=1e-5)
    assert float(decoding) == pytest.approx(float(found.decoding_error), abs=1e-5)


@pytest.mark.parametrize("code", ["mixed", "pca", "label"])
def test_both_solvers_reach_the_same_objective(code):
    cov, _, _ = covariance()
    problem = Problem("layer", CODES[code].with_label_share(Config(), normalized=False), UNITS, seed=3)
    exact, found = fit_exact(cov, problem, Config()), fit_projected(cov, problem, Config())
    assert isinstance(found, Fit)
    assert float(found.encoding_error) == pytest.approx(float(exact.encoding_error), abs=0.01)
    assert float(found.decoding_error) == pytest.approx(float(exact.decoding_error), abs=0.01)


def test_the_projected_weight_of_a_pca_code_spans_the_leading_principal_axes():
    cov, _, _ = covariance()
    found = fit_projected(cov, Problem("layer", CODES["pca"], UNITS, seed=3), Config())
    assert isinstance(found, Fit)
    span = torch.linalg.qr(found.weight[0].T)[0]
    variances, axes = torch.linalg.eigh(cov.xx[0])
    assert float((span.T @ cov.xx[0] @ span).trace()) > 0.99 * float(variances[-UNITS:].sum())
    assert float(torch.linalg.svdvals(span.T @ axes[:, -10:]).min()) > 0.999


def test_exact_on_request_and_by_default_where_the_residual_is_too_large():
    models = [network() for _ in range(3)]
    models[1:] = [copy.deepcopy(models[0]) for _ in models[1:]]
    projected = sylinit.initialize_(models[0], [wide()], code="mixed")
    exact = sylinit.initialize_(models[1], [wide()], code="mixed", config=Config(solver="exact"))
    fallen = sylinit.initialize_(models[2], [wide()], code="mixed", config=Config(residual_tolerance=1e-9))
    assert [report["0"].solver for report in (projected, exact, fallen)] == ["projected", "exact", "exact"]
    assert exact["0"].residual < 1e-10
    assert not exact["0"].reason
    assert "residual" in fallen["0"].reason
    assert not torch.equal(models[0][0].weight, models[1][0].weight)
    assert torch.equal(models[2][0].weight, models[1][0].weight)


def test_axes_that_float32_cannot_tell_from_rounding_are_found_exactly():
    report = sylinit.initialize_(network(), [wide(rank=30)], code="mixed")
    assert report["0"].solver == "exact"
    assert report["0"].dead_units == 0


def test_a_projected_layer_is_the_same_in_every_run():
    models = [network(), network()]
    for model in models:
        sylinit.initialize_(model, [wide()], code="mixed")
    assert torch.equal(models[0][0].weight, models[1][0].weight)


def test_few_rows_go_by_their_own_space_whatever_the_solver():
    models = [network(), network()]
    reports = [
        sylinit.initialize_(model, [wide(550)], code="mixed", config=Config(solver=solver))
        for model, solver in zip(models, ("auto", "exact"), strict=True)
    ]
    assert [report["0"].solver for report in reports] == ["row-space"] * 2
    assert torch.equal(models[0][0].weight, models[1][0].weight)


def test_the_network_is_as_good_by_either_solver():
    x, y = wide(3000)
    accuracy = []
    for solver in ("auto", "exact"):
        model = network()
        sylinit.initialize_(model, [(x[:1500], y[:1500])], code="mixed", config=Config(solver=solver))
        with torch.no_grad():
            accuracy.append(float((model(x[1500:]).argmax(1) == y[1500:]).double().mean()))
    assert accuracy[0] == pytest.approx(accuracy[1], abs=0.02)
    assert min(accuracy) > 0.5


@pytest.mark.parametrize("solver", ["projected", "", 1])
def test_an_unknown_solver_is_refused(solver: Any):
    with pytest.raises(SylinitError, match="solver must be 'auto' or 'exact', got"):
        sylinit.initialize_(network(), [wide()], code="mixed", config=Config(solver=solver))


class Columns:
    """A solver of a user: reads the first inputs of wide layers, whatever the code."""

    name = "columns"

    def __init__(self, declines: bool = False) -> None:
        self.declines = declines

    def applies(self, problem: Problem, source: Source, config: Config) -> bool:
        return source.dim == DIM

    def solve(self, problem: Problem, source: Source, config: Config) -> Fit | Declined:
        if self.declines:
            return Declined("no columns today")
        cov = source.covariance(torch.float64)
        weight = torch.eye(problem.units, source.dim, dtype=torch.float64).expand(source.groups, -1, -1)
        variance = cov.xx.diagonal(dim1=1, dim2=2)[:, : problem.units]
        alive = torch.ones(source.groups, dtype=torch.bool)
        return Fit(weight, 1.0, 0.0, 0.5, 0.5, self.name, alive, statistics=cov, output_variance=variance)


def test_a_solver_is_one_class_and_one_line(monkeypatch):
    monkeypatch.setattr("sylinit.solvers.solve.SOLVERS", [Columns(), *SOLVERS])
    model = network()
    report = sylinit.initialize_(model, [wide()], code="mixed")
    assert [layer.solver for layer in report.initialized] == ["columns", "exact"]
    assert torch.equal(model[0].weight.detach() != 0, torch.eye(UNITS, DIM) != 0)


def test_a_solver_that_declines_leaves_the_layer_to_the_next_and_says_why(monkeypatch):
    monkeypatch.setattr("sylinit.solvers.solve.SOLVERS", [Columns(declines=True), *SOLVERS])
    models = [network(), network()]
    report = sylinit.initialize_(models[0], [wide()], code="mixed")
    assert report["0"].solver == "projected"
    assert report["0"].reason == "no columns today"
    monkeypatch.undo()
    sylinit.initialize_(models[1], [wide()], code="mixed")
    assert torch.equal(models[0][0].weight, models[1][0].weight)


def test_a_layer_without_a_solver_is_an_error(monkeypatch):
    monkeypatch.setattr("sylinit.solvers.solve.SOLVERS", [])
    with pytest.raises(SylinitError, match="layer '0': no solver applies"):
        sylinit.initialize_(network(), [wide()], code="mixed")


@dataclass(frozen=True)
class Given:
    """Rows at hand, as a source."""

    x: Tensor
    t: Tensor

    @property
    def groups(self) -> int:
        return self.x.shape[0]

    @property
    def count(self) -> int:
        return self.x.shape[1]

    @property
    def dim(self) -> int:
        return self.x.shape[2]

    @property
    def width(self) -> int:
        return self.t.shape[1]

    def covariance(self, dtype: torch.dtype) -> Covariance:
        return Moments.zeros(self.groups, self.dim, self.width, dtype=dtype).update(self.x, self.t).covariance()

    def rows(self) -> tuple[Tensor, Tensor]:
        return self.x, self.t

    def together(self, work: Any) -> Any:
        return work()

    def agree(self, held: bool) -> bool:
        return held


@given(
    groups=st.integers(1, 4),
    count=st.integers(3, 20),
    units=st.integers(1, 12),
    extra=st.integers(0, 12),
    code=st.sampled_from(["mixed", "pca", "label", "lda", "mixed:0.5"]),
    role=st.sampled_from(["units", "directions"]),
    seed=st.integers(0, 99),
)
def test_few_rows_of_any_grouped_layer_give_the_same_outputs_by_either_exact_solver(
    groups, count, units, extra, code, role, seed
):
    """What units say on the rows is the same; weights could differ by what no row sees, and do not."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, count, count + extra, dtype=torch.float64, generator=generator)
    x = x * torch.logspace(0, -2, count + extra, dtype=torch.float64) + 3
    t = nn.functional.one_hot(torch.arange(count) % 3, 3).double()
    problem = Problem("layer", as_code(code).with_label_share(Config(), normalized=False), units, seed, role)
    fits = [
        rescale(solver.solve(problem, Given(x, t), Config()), role, Config())  # type: ignore[arg-type]
        for solver in (RowSpace(), Exact())
    ]
    for fit in fits:
        assert fit.bias is not None
        assert fit.residual < 1e-9
        mean = (x @ fit.weight.mT).mean(1) + fit.bias
        assert float(mean.abs().max()) < 1e-8
    if code == "lda":  # its discriminants may turn where several are equally good
        return
    one, other = (x @ fit.weight.mT + fit.bias.unsqueeze(1) for fit in fits if fit.bias is not None)
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
    assert fits[0].rank == fits[1].rank


def test_a_rescaled_fit_holds_no_statistics():
    cov, _, _ = covariance()
    fit = fit_exact(cov, Problem("layer", CODES["pca"], 4, 0), Config())
    assert (fit.bias, fit.dead, fit.rank) == (None, None, None)
    done = rescale(fit, "units", Config())
    assert (done.statistics, done.output_variance) == (None, None)
    assert (done.rank, done.residual) == (4, fit.residual)
    assert done.weight.shape == (1, 4, DIM)

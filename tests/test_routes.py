"""The route by which a wide layer is solved: chosen by cost, true to its residual, exact where it falls short."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sylinit
from sylinit import layer
from sylinit.codes.registry import CODES, Axes, LinearCode
from sylinit.errors import SylinitError
from sylinit.solve import Problem, fit_exact, fit_projected
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
    assert [layer.solver for layer in report.initialised] == ["projected", "exact"]
    assert 1e-8 < report["0"].residual <= 1e-3
    assert "projected" in str(report)


@pytest.mark.parametrize("code", ["lda", "random_projection"])
def test_codes_that_read_weak_axes_are_solved_exactly(code):
    assert sylinit.initialize_(network(), [wide()], code=code)["0"].solver == "exact"


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("code", ["mixed", "pca", "label"])
def test_the_reported_residual_and_errors_are_those_of_the_rows(code, groups):
    """All is computed again from the code of every row: nothing here knows of principal axes or subspaces."""
    cov, x, t = covariance(groups)
    seen: list[tuple[Axes, LinearCode]] = []

    def spied(axes: Axes, units: int, generator: torch.Generator) -> LinearCode:
        seen.append((axes, CODES[code].function(axes, units, generator)))
        return seen[-1][1]

    problem = Problem("layer", replace(CODES[code], function=spied), UNITS, 4.0, 1.0, seed=3)
    found = fit_projected(cov, problem)
    assert found is not None

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
def test_both_routes_reach_the_same_objective(code):
    cov, _, _ = covariance()
    problem = Problem("layer", CODES[code], UNITS, 4.0, 1.0, seed=3)
    exact, found = fit_exact(cov, problem), fit_projected(cov, problem)
    assert found is not None
    assert float(found.encoding_error) == pytest.approx(float(exact.encoding_error), abs=0.01)
    assert float(found.decoding_error) == pytest.approx(float(exact.decoding_error), abs=0.01)


def test_the_projected_weight_of_a_pca_code_spans_the_leading_principal_axes():
    cov, _, _ = covariance()
    found = fit_projected(cov, Problem("layer", CODES["pca"], UNITS, 4.0, 1.0, seed=3))
    assert found is not None
    span = torch.linalg.qr(found.weight[0].T)[0]
    variances, axes = torch.linalg.eigh(cov.xx[0])
    assert float((span.T @ cov.xx[0] @ span).trace()) > 0.99 * float(variances[-UNITS:].sum())
    assert float(torch.linalg.svdvals(span.T @ axes[:, -10:]).min()) > 0.999


def test_exact_on_request_and_by_default_where_the_residual_is_too_large(monkeypatch):
    models = [network() for _ in range(3)]
    models[1:] = [copy.deepcopy(models[0]) for _ in models[1:]]
    projected = sylinit.initialize_(models[0], [wide()])
    exact = sylinit.initialize_(models[1], [wide()], solver="exact")
    monkeypatch.setattr(layer, "TOLERANCE", 1e-9)
    fallen = sylinit.initialize_(models[2], [wide()])
    assert [report["0"].solver for report in (projected, exact, fallen)] == ["projected", "exact", "exact"]
    assert exact["0"].residual < 1e-10
    assert not exact["0"].reason
    assert "residual" in fallen["0"].reason
    assert not torch.equal(models[0][0].weight, models[1][0].weight)
    assert torch.equal(models[2][0].weight, models[1][0].weight)


def test_axes_that_float32_cannot_tell_from_rounding_are_found_exactly():
    report = sylinit.initialize_(network(), [wide(rank=30)])
    assert report["0"].solver == "exact"
    assert report["0"].dead_units == 0


def test_a_projected_layer_is_the_same_in_every_run():
    models = [network(), network()]
    for model in models:
        sylinit.initialize_(model, [wide()])
    assert torch.equal(models[0][0].weight, models[1][0].weight)


def test_few_rows_go_by_their_own_space_whatever_the_solver():
    models = [network(), network()]
    reports = [
        sylinit.initialize_(model, [wide(550)], solver=solver)
        for model, solver in zip(models, ("auto", "exact"), strict=True)
    ]
    assert [report["0"].solver for report in reports] == ["row-space"] * 2
    assert torch.equal(models[0][0].weight, models[1][0].weight)


def test_the_network_is_as_good_by_either_route():
    x, y = wide(3000)
    accuracy = []
    for solver in ("auto", "exact"):
        model = network()
        sylinit.initialize_(model, [(x[:1500], y[:1500])], solver=solver)
        with torch.no_grad():
            accuracy.append(float((model(x[1500:]).argmax(1) == y[1500:]).double().mean()))
    assert accuracy[0] == pytest.approx(accuracy[1], abs=0.02)
    assert min(accuracy) > 0.5


@pytest.mark.parametrize("solver", ["projected", "", None, 1])
def test_an_unknown_solver_is_refused(solver: Any):
    with pytest.raises(SylinitError, match="solver must be 'auto' or 'exact', got"):
        sylinit.initialize_(network(), [wide()], solver=solver)

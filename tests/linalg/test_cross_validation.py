"""The encoding weight of a head, against hat matrices written out and rows left out one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sylinit
from sylinit.codes import HEAD
from sylinit.config import Config
from sylinit.linalg.cross_validation import FARTHER, WEIGHTS, least_error_weight
from sylinit.linalg.sylvester import sylvester_
from sylinit.solvers.exact import fit_exact
from sylinit.solvers.problem import Problem
from sylinit.statistics.moments import Moments

COUNT, DIM, CLASSES = 40, 12, 3


def data(noise: float, seed: int = 0, count: int = COUNT) -> tuple[Tensor, Tensor]:
    """Rows around the mean of their class, and the classes; float64."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    means = torch.randn(CLASSES, DIM, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -2, DIM, dtype=torch.float64)
    rows = means[y] + noise * torch.randn(count, DIM, generator=generator, dtype=torch.float64)
    return rows * scales, y


def head_weight(x: Tensor, y: Tensor) -> float:
    """What the library chooses for a head on these rows."""
    t = nn.functional.one_hot(y).double()
    cov = Moments.zeros(1, x.shape[1], CLASSES).update(x.unsqueeze(0), t).covariance()
    return fit_exact(cov, Problem("head", HEAD, CLASSES, 0, "logits"), Config()).encoding_weight


def scaled_code(x: Tensor, y: Tensor) -> Tensor:
    """Centered one-hot labels at the root mean square of the centered rows."""
    s = nn.functional.one_hot(y).double()
    s = s - s.mean(0)
    return s * (x - x.mean(0)).square().mean().sqrt() / s.square().mean().sqrt()


ALL = torch.cat([WEIGHTS, FARTHER])


@pytest.mark.parametrize("noise", [0.1, 1.0, 5.0])
def test_the_weight_has_the_least_error_by_hat_matrices_written_out(noise):
    x, y = data(noise)
    s = scaled_code(x, y)
    a, u = torch.linalg.eigh(s.T @ s / COUNT)
    centered = x - x.mean(0)
    covariance = centered.T @ centered / COUNT
    errors = []
    for weight in ALL.tolist():
        error = 0.0
        for size, code in zip(a, (s @ u).T, strict=True):
            if size < 1e-12:
                continue
            inverse = torch.linalg.inv(size * torch.eye(DIM, dtype=torch.float64) + weight * covariance)
            hat = weight * centered @ inverse @ centered.T / COUNT + 1 / COUNT
            rest = code - hat @ code
            error += float(rest.square().mean()) / (1 - float(hat.trace()) / COUNT) ** 2
        errors.append(error)
    assert head_weight(x, y) == pytest.approx(float(ALL[torch.tensor(errors).argmin()]))


def test_what_tells_the_classes_may_be_far_smaller_than_what_all_rows_share():
    x, y = data(0.1, count=300)
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    x = torch.cat([1e-4 * x, wide], 1)
    assert head_weight(x, y) > float(WEIGHTS[-1])
    model = nn.Linear(DIM + 4, CLASSES).double()
    sylinit.initialize_head_(model, [(x, y)])
    assert (model(x).argmax(1) == y).double().mean() == 1


def test_rows_that_are_too_few_are_not_explained_altogether():
    x, y = data(1.0, count=9)
    assert head_weight(x, y) <= float(WEIGHTS[-1])


def test_the_weight_predicts_left_out_rows_about_as_well_as_the_best():
    """Leaving every row out, one after the other, and looking at the error there."""
    x, y = data(2.0, seed=3)
    s = scaled_code(x, y)

    def left_out(weight: float) -> float:
        total = 0.0
        for row in range(COUNT):
            rest = torch.arange(COUNT) != row
            known = s[rest] - s[rest].mean(0)
            w = sylvester_(torch.empty(CLASSES, DIM, dtype=torch.float64), x[rest], known, encoding_weight=weight)
            scale = (x[rest] - x[rest].mean(0)).square().mean().sqrt() / known.square().mean().sqrt()
            shrunk = (x[row] - x[rest].mean(0)) @ w.T * weight / (1 + weight) / scale
            total += float((shrunk - (s[row] - s[rest].mean(0))).square().sum())
        return total

    best = min(left_out(weight) for weight in WEIGHTS[::4].tolist())
    assert left_out(head_weight(x, y)) <= 1.05 * best


def test_the_fewer_and_noisier_the_rows_the_more_a_head_shrinks():
    few, many = (head_weight(*data(5.0, count=count)) for count in (20, 2000))
    assert few < many


def test_the_number_of_weights_that_are_compared_at_once_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    a, variances = torch.rand(2, 4, generator=generator).double(), torch.rand(2, 6, generator=generator).double()
    variances[:, -1] = 0
    cross = torch.randn(2, 4, 6, generator=generator).double() * variances.unsqueeze(1) / 3
    chosen = {least_error_weight(a, variances, cross, torch.tensor(30.0), chunk) for chunk in (1, 100, 1 << 22)}
    assert len(chosen) == 1


def test_constant_rows_choose_something():
    zero = torch.zeros(1, 3, dtype=torch.float64)
    assert least_error_weight(zero, zero, torch.zeros(1, 3, 3).double(), torch.tensor(5.0)) in WEIGHTS.tolist()


def test_only_the_head_chooses_and_only_where_nothing_is_asked_for():
    x, y = data(1.0)
    batches = [(x.float(), y)]

    def weights(**arguments: object) -> list[float | None]:
        model = nn.Sequential(nn.Linear(DIM, 8), nn.ReLU(), nn.Linear(8, CLASSES))
        return [
            layer.encoding_weight
            for layer in sylinit.initialize_(model, batches, code="mixed", **arguments).initialized
        ]

    inner, head = weights()
    assert inner == 4.0
    assert head in WEIGHTS.tolist()
    assert weights(config=Config(encoding_weight=2.0, head_encoding_weight=2.0)) == [2.0, 2.0]
    assert weights(config=Config(head_encoding_weight=3.0)) == [4.0, 3.0]
    assert weights(head=None) == [4.0, 4.0]


def test_within_standard_errors_the_smallest_weight_is_taken():
    """The error is written out as above for every weight, of one code with one axis that tells it."""
    a, variances = torch.tensor([[1.0]]).double(), torch.tensor([[1.0, 0.5, 0.1]]).double()
    cross, count = torch.tensor([[[0.6, 0.3, 0.05]]]).double(), torch.tensor(40.0).double()
    kept = WEIGHTS.unsqueeze(1) * variances / (1.0 + WEIGHTS.unsqueeze(1) * variances)
    left = 1.0 - (kept * (2 - kept) * cross[0] ** 2 / variances).sum(1)
    errors = left / (1 - (kept.sum(1) + 1) / 40) ** 2
    chosen = [least_error_weight(a, variances, cross, count, standard_errors=k) for k in (0.0, 1.0, 2.0)]
    for k, weight in zip((0.0, 1.0, 2.0), chosen, strict=True):
        allowed = errors <= (1 + k * (2 / 40) ** 0.5) * errors.min()
        assert weight == float(WEIGHTS[allowed].min())
    assert chosen[0] > chosen[1] > chosen[2]


@pytest.mark.parametrize("alone", [None, "the function", "head", "2"])
def test_a_head_of_values_shrinks_where_it_is_to_be_trained(alone: str | None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 12, generator=generator)
    y = x[:, :1] + torch.randn(60, 1, generator=generator)
    found = {}
    for errors in (0.0, 1.0):
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 1))
        torch.manual_seed(0)
        for part in model[::2]:
            part.reset_parameters()
        constants = Config(value_standard_errors=errors)
        if alone == "the function":
            sylinit.initialize_head_(model, [(x, y)], config=constants)
        elif alone:
            sylinit.initialize_(model, [(x, y)], layers=alone, config=constants)
        else:
            sylinit.initialize_(model, [(x, y)], code="own", config=constants)
        found[errors] = float(model[2].weight.detach().norm())
    assert (found[1.0] < found[0.0]) is (alone is None)


def test_a_head_of_values_with_fewer_rows_than_features_does_not_explain_the_noise():
    """The features are random functions of ten inputs, of which the target is a noisy sum."""
    found = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(450, 10, generator=generator)
        y = x[:, :4].sum(1, keepdim=True) + 2 * torch.randn(450, 1, generator=generator)
        model = nn.Sequential(nn.Linear(10, 200), nn.ReLU(), nn.Linear(200, 1))
        report = sylinit.initialize_head_(model, [(x[:50], y[:50])])
        with torch.no_grad():
            rest = (model(x[50:]) - y[50:]).square().sum() / (y[50:] - y[50:].mean()).square().sum()
        assert report.before.r2 < 0.99
        found.append(1 - float(rest))
    assert sum(found) / len(found) > 0.2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prior", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("form", ["one logit", "two logits", "labels"])
def test_the_cross_validated_score_of_rare_classes_is_that_of_heads_without_the_sample(
    form: str, prior: float, bias: bool
):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 6 == 0
    x = torch.randn(60, 8, generator=generator) + y[:, None]
    outputs = {"one logit": 1, "two logits": 2, "labels": 2}[form]
    target = {
        "one logit": y.float()[:, None],
        "two logits": y.long(),
        "labels": torch.stack([y, torch.arange(60) % 5 < 2], 1).float(),
    }[form]
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 24), nn.ReLU()), nn.Linear(24, outputs, bias=bias))
    report = sylinit.initialize_head_(model, [(x, target)], config=Config(prior=prior))
    constants = Config(prior=prior, head_encoding_weight=report["1"].encoding_weight)
    right = 0.0
    for out in range(60):
        rest = torch.arange(60) != out
        sylinit.initialize_head_(model, [(x[rest], target[rest])], config=constants)
        with torch.no_grad():
            output = model(x[out])
        guess, truth = (output.argmax(), y[out]) if form == "two logits" else (output > 0, target[out])
        right += float((guess == truth).float().mean())
    assert report.before.cross_validated is not None
    assert report.before.cross_validated.accuracy == pytest.approx(right / 60, abs=0.02 if bias else 0.04)


def test_the_cross_validated_score_of_values_is_that_of_the_head_that_was_written():
    """Against heads from which one sample was left out, with the same weight."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=generator)
    y = x[:, :1] + torch.randn(40, 1, generator=generator)
    body = nn.Sequential(nn.Linear(8, 24), nn.ReLU())
    model = nn.Sequential(body, nn.Linear(24, 1))
    report = sylinit.initialize_head_(model, [(x, y)])
    weight = Config(head_encoding_weight=report["1"].encoding_weight)
    errors = 0.0
    for out in range(40):
        rest = torch.arange(40) != out
        sylinit.initialize_head_(model, [(x[rest], y[rest])], config=weight)
        with torch.no_grad():
            errors += float((model(x[out : out + 1]) - y[out]).square())
    assert report.before.cross_validated is not None
    assert report.before.cross_validated.r2 == pytest.approx(
        1 - errors / float((y - y.mean()).square().sum()), abs=0.06
    )

"""Networks, initializations, training, statistics, figures."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from comparing import TINY, record
from conftest import images, vectors
from sylinit import SylinitError
from sylinit.comparison.figures import before_and_after, learning_curves, lines, save, style
from sylinit.comparison.initializations import INITIALIZATIONS, apply_initialization, equal_rates
from sylinit.comparison.models import MODELS, build
from sylinit.comparison.statistics import interval, paired
from sylinit.comparison.summary import Row
from sylinit.comparison.training import Recipe, accuracy, area_under, augment, prediction, train


@pytest.mark.parametrize("name", MODELS)
def test_models_map_samples_to_logits(name: str) -> None:
    shape = {"resnet18": (3, 64, 64), "fcn": (3, 40), "fcn-small": (3, 40)}.get(name, (3, 16, 16))
    model = build(name, shape, 7).eval()
    assert model(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(("name", "parameters"), [("resnet20", 269_722), ("resnet56", 853_018)])
def test_residual_networks_have_the_size_of_the_paper(name: str, parameters: int) -> None:
    # 0.27 M and 0.85 M as in the paper, with its option A, plus the two 1x1 shortcuts with BatchNorm of option B
    option_b = 16 * 32 + 32 * 64 + 2 * 32 + 2 * 64
    model = build(name, (3, 32, 32), 10)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == parameters + option_b
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) + 1 == int(name[6:])


def test_models_of_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo_for_test.py").write_text(
        "from torch import nn\n"
        "def two(shape, classes): return nn.Linear(shape[0], classes)\n"
        "def none(): return nn.Linear(4, 3)\n"
        "def wrong(): return 3\n"
        "def broken(shape, classes): raise RuntimeError('no')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert build("zoo_for_test:two", (5,), 2).weight.shape == (2, 5)
    assert build("zoo_for_test:none", (4,), 3).weight.shape == (3, 4)
    for spec, message in {
        "resnet21": "did you mean 'resnet20'",
        "nowhere_at_all:f": "cannot import",
        "zoo_for_test:absent": "no function or class",
        "zoo_for_test:wrong": "expected a torch.nn.Module",
        "zoo_for_test:broken": "RuntimeError: no",
    }.items():
        with pytest.raises(SylinitError, match=message):
            build(spec, (4,), 3)
    with pytest.raises(SylinitError, match="expected images"):
        build("cnn", (4,), 3)


@pytest.mark.parametrize("name", INITIALIZATIONS)
def test_initializations_depend_on_the_seed_alone(name: str) -> None:
    x, y = images(count=40)
    first = build("resnet20", (2, 8, 8), 3)
    second = copy.deepcopy(first)
    with torch.no_grad():
        for p in second.parameters():
            p.fill_(0.5)
    state = torch.get_rng_state()
    assert apply_initialization(name, first, x, y, 5) > 0
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(77)
    apply_initialization(name, second, x, y, 5)
    third = copy.deepcopy(first)
    apply_initialization(name, third, x, y, 6)
    pairs = list(zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True)) or (
        name == "sylinit"  # few rows: nothing is sampled, so nothing is random
    )


@pytest.mark.parametrize(
    ("name", "variance"),
    [("he-normal", 2 / 32), ("he-uniform", 2 / 32), ("xavier-normal", 2 / 96), ("xavier-uniform", 2 / 96)],
)
def test_random_initializations_have_their_variance(name: str, variance: float) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64))
    nn.init.constant_(model[1].weight, 3)
    apply_initialization(name, model, torch.randn(4, 32), torch.zeros(4).long(), 0)
    assert model[0].weight.var().item() == pytest.approx(variance, rel=0.1)
    assert model[0].bias.abs().max() == 0
    assert model[1].weight.eq(1).all()
    assert name.endswith("uniform") == (model[0].weight.abs().max().item() <= math.sqrt(3 * variance) * 1.0001)


@pytest.mark.parametrize("name", ["pca-whitening", "pca-whitening-rescaled"])
def test_pca_whitening_decorrelates(name: str) -> None:
    x, y = vectors(count=300, dim=12)
    model = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))
    apply_initialization(name, model, x, y, 0)
    out = model[0](x)
    covariance = torch.cov(out.T, correction=0)
    torch.testing.assert_close(covariance / covariance[0, 0], torch.eye(6), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.mean(0), torch.zeros(6), atol=1e-4, rtol=0)


def _rates(model: nn.Module, x: torch.Tensor, draws: int = 200) -> list[float]:
    """Root mean square of the gradient of random linear losses of single samples, over that of the weights."""
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    squares = [0.0] * len(weights)
    generator = torch.Generator().manual_seed(0)
    for i in range(draws):
        output = model(x[i % len(x)][None])
        gradients = torch.autograd.grad(output, weights, torch.randn(output.shape, generator=generator))
        squares = [total + g.square().sum().item() for total, g in zip(squares, gradients, strict=True)]
    return [math.sqrt(s / w.square().sum().item()) for s, w in zip(squares, weights, strict=True)]


def test_rescaled_layers_change_at_equal_rates() -> None:
    x, _ = images(count=200)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    with torch.no_grad():
        for layer, size in ((model[0], 5.0), (model[3], 0.2)):
            layer.weight.mul_(size)
    layers, before, output = [model[0], model[3], model[6]], _rates(model, x), model(x)
    with torch.no_grad():
        equal_rates(model, layers, x)
    after = _rates(model, x)
    assert max(before) > 5 * min(before)
    assert max(after) < 1.3 * min(after)
    torch.testing.assert_close(model(x), output, atol=1e-4, rtol=1e-3)


def test_networks_that_rescaling_would_change_are_left_alone() -> None:
    x, _ = vectors()
    model = nn.Sequential(nn.Linear(12, 8), nn.Sigmoid(), nn.Linear(8, 3))
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        equal_rates(model, [model[0], model[2]], x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_unknown_initialization_names_the_nearest() -> None:
    with pytest.raises(SylinitError, match="did you mean 'lsuv'"):
        apply_initialization("lsuw", nn.Linear(2, 2), torch.zeros(1, 2), torch.zeros(1).long(), 0)


def test_training_learns_and_its_curve_agrees() -> None:
    x, y = vectors(count=90)
    model = nn.Linear(12, 3)
    outcome = train(model, x, y, x, y, Recipe(lr=0.05, epochs=8, points=4), classes=3, seed=0)
    assert outcome.after > max(0.9, outcome.before)
    assert outcome.after == accuracy(model, x, y) == outcome.curve[-1][1]
    assert [epoch for epoch, _ in outcome.curve] == [0, 2, 4, 6, 8]
    assert not outcome.diverged


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_divergence_is_an_outcome(optimizer: str) -> None:
    x, y = vectors()
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    outcome = train(model, x, y, x, y, Recipe(lr=1e25, optimizer=optimizer, epochs=4), classes=3, seed=0)
    assert outcome.diverged
    assert outcome.after == outcome.curve[-1][1] == pytest.approx(1 / 3)
    assert math.isfinite(outcome.area)


def test_unknown_optimizer() -> None:
    with pytest.raises(SylinitError, match="'sgd' or 'adamw'"):
        Recipe(lr=0.1, optimizer="lion").make_optimizer([torch.zeros(1)])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
def test_area_is_the_mean_height(heights: list[float]) -> None:
    curve = [(2.0 * place, height) for place, height in enumerate(heights)]
    span = 2.0 * (len(heights) - 1)
    assert area_under(curve) == pytest.approx(np.trapezoid(heights, dx=2.0) / span)


def test_augmentation_mirrors_and_shifts_whole_images() -> None:
    x = torch.randn(64, 2, 6, 6)
    mirrored = augment(x, Recipe(lr=1, flip=True), torch.Generator().manual_seed(0))
    kinds = [(torch.equal(a, b), torch.equal(a, b.flip(2))) for a, b in zip(mirrored, x, strict=True)]
    assert set(kinds) == {(True, False), (False, True)}
    shifted = augment(x, Recipe(lr=1, crop=2), torch.Generator().manual_seed(0))
    assert shifted.shape == x.shape
    padded = nn.functional.pad(x, (2,) * 4)
    for a, b in zip(shifted, padded, strict=True):
        assert any(torch.equal(a, b[:, i : i + 6, j : j + 6]) for i in range(5) for j in range(5))
    assert not torch.equal(shifted, x)


numbers = st.lists(st.floats(-100, 100), min_size=3, max_size=12)


@given(numbers)
def test_interval_is_scipys(values: list[float]) -> None:
    found = interval(values)
    assert found.mean == pytest.approx(np.mean(values), abs=1e-9)
    scale = stats.sem(values)
    if scale > 1e-9:
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), scale)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6, abs=1e-9)
    else:
        assert found.half == pytest.approx(0, abs=1e-6)


@given(numbers, st.floats(-5, 5))
def test_paired_differences_ignore_what_the_pairs_share(values: list[float], gap: float) -> None:
    difference = paired([value + gap for value in values], values)
    assert difference.mean == pytest.approx(gap, abs=1e-9)
    assert difference.half == pytest.approx(0, abs=1e-9)


def test_statistics_say_what_is_missing() -> None:
    assert math.isnan(interval([0.5]).half)
    assert interval([0.5]).percent() == "50.0"
    assert interval([0.4, 0.6]).percent() == "50.0"  # two values would give ± 127.1
    assert interval([0.4, 0.5, 0.6]).percent() == "50.0 ± 24.8"
    with pytest.raises(SylinitError, match="at least one"):
        interval([])
    with pytest.raises(SylinitError, match="as many values"):
        paired([1.0], [1.0, 2.0])


@pytest.mark.parametrize("steps", range(1, 12))
def test_schedules_of_any_length(steps: int) -> None:
    recipe = Recipe(lr=0.1)
    optimizer = recipe.make_optimizer([torch.zeros(1, requires_grad=True)])
    schedule = recipe.make_schedule(optimizer, steps)
    for _ in range(steps):
        assert 0 <= optimizer.param_groups[0]["lr"] <= 0.1
        optimizer.step()
        schedule.step()


def test_an_initialization_has_one_color_everywhere() -> None:
    alone, among = style(["he-normal", "sylinit"]), style(["lsuv", "LP-FT", "sylinit code=pca", "sylinit", "he-normal"])
    for name in ("he-normal", "sylinit"):
        assert alone[name] == among[name]
    assert len({look["color"] for look in among.values()}) == len(among)
    everything = style(list(INITIALIZATIONS))
    assert len({look["color"] for look in everything.values()}) == len(everything)


def test_axes_end_where_accuracies_do_and_intervals_begin_at_three_seeds() -> None:
    def row(name: str, scores: list[float]) -> Row:
        method = replace(TINY, initialization=name)
        return Row(method, 0.1, tuple(record(replace(method, seed=seed), score) for seed, score in enumerate(scores)))

    for scores, bars in (([0.99, 0.1], False), ([0.99, 0.9, 0.1], True)):
        rows = [row("sylinit", scores), row("lsuv", [score / 2 for score in scores])]
        for figure in (before_and_after(rows, "a title"), learning_curves(rows, "a title")):
            axes = figure.axes[0]
            low, high = axes.get_xlim() if "before" in axes.get_xlabel() else axes.get_ylim()
            assert low >= 0
            assert high <= 100
        assert ("intervals" in before_and_after(rows, "a title").axes[0].get_xlabel()) == bars
        segments = [s for c in before_and_after(rows, "t").axes[0].collections for s in c.get_segments()]
        assert all(0 <= x <= 100 for segment in segments for x, _ in segment)


def test_regression_is_measured_by_the_explained_variance() -> None:
    x, _ = vectors(count=200)
    y = x[:, :1] * 2 + 1
    perfect = nn.Linear(12, 1)
    with torch.no_grad():
        perfect.weight.zero_()[0, 0] = 2
        perfect.bias.fill_(1)
    assert accuracy(perfect, x, y) == pytest.approx(1, abs=1e-5)
    assert accuracy(nn.Linear(12, 1), x, y) < 0.9
    outcome = train(nn.Linear(12, 1), x, y, x, y, Recipe(lr=0.03, epochs=20), classes=1, seed=0)
    assert outcome.after > 0.95
    assert train(nn.Linear(12, 1), x, y, x, y, Recipe(lr=1e30, epochs=4), classes=1, seed=0).after == 0.0


@dataclass
class Output:
    logits: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: z,
        lambda z: (z, z.sum()),
        lambda z: [None, z],
        lambda z: {"loss": z.sum(), "logits": z},
        lambda z: {"other": z},
        lambda z: Output(z),
    ],
)
def test_predictions_are_found_in_any_output(wrap: Callable[[torch.Tensor], Any]) -> None:
    logits = torch.randn(4, 3)
    assert prediction(wrap(logits)) is logits


@pytest.mark.parametrize("output", ["text", None, {"mask": torch.zeros(3, dtype=torch.long)}, ()])
def test_outputs_without_predictions_are_refused(output: Any) -> None:
    with pytest.raises(SylinitError, match="expected a tensor of predictions"):
        prediction(output)


def test_figures_are_written_twice_and_name_every_line(tmp_path: Path) -> None:
    series = {name: [(x, interval([x / 9, x / 8])) for x in (1.0, 2.0, 4.0)] for name in ("sylinit", "he-normal")}
    figure = lines(series, "a title", "shots", "accuracy", log_x=True)
    png, svg = save(figure, tmp_path / "deep" / "figure")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in svg.read_text()
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(texts) == ["he-normal", "sylinit"]
    again = save(lines(series, "a title", "shots", "accuracy", log_x=True), tmp_path / "again")
    assert again[1].read_bytes() == svg.read_bytes()

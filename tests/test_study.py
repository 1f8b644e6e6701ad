"""Models, starts, training, statistics, figures."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from conftest import images, vectors
from sylinit.errors import SylinitError
from sylinit.study.figures import lines, save
from sylinit.study.finetune import HEADS, features, replace_head
from sylinit.study.models import MODELS, build
from sylinit.study.precision import RoundedProducts, autocast, fast_precision
from sylinit.study.presets import starts_for
from sylinit.study.starts import STARTS, apply_start, equal_rates
from sylinit.study.statistics import exponent, interval, paired
from sylinit.study.train import Recipe, accuracy, area_under, augment, train


@pytest.mark.parametrize("name", MODELS)
def test_models_map_images_to_logits(name: str) -> None:
    shape = (3, 64, 64) if name == "resnet18" else (3, 16, 16)
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


@pytest.mark.parametrize("name", STARTS)
def test_starts_depend_on_the_seed_alone(name: str) -> None:
    x, y = images(count=40)
    first = build("resnet20", (2, 8, 8), 3)
    second = copy.deepcopy(first)
    with torch.no_grad():
        for p in second.parameters():
            p.fill_(0.5)
    state = torch.get_rng_state()
    assert apply_start(name, first, x, y, 5) > 0
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(77)
    apply_start(name, second, x, y, 5)
    third = copy.deepcopy(first)
    apply_start(name, third, x, y, 6)
    pairs = list(zip(first.state_dict().values(), second.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True)) or (
        name == "sylinit"  # few rows: nothing is sampled, so nothing is random
    )


@pytest.mark.parametrize(
    ("name", "variance"),
    [("he-normal", 2 / 32), ("he-uniform", 2 / 32), ("xavier-normal", 2 / 96), ("xavier-uniform", 2 / 96)],
)
def test_random_starts_have_their_variance(name: str, variance: float) -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64))
    nn.init.constant_(model[1].weight, 3)
    apply_start(name, model, torch.randn(4, 32), torch.zeros(4).long(), 0)
    assert model[0].weight.var().item() == pytest.approx(variance, rel=0.1)
    assert model[0].bias.abs().max() == 0
    assert model[1].weight.eq(1).all()
    assert name.endswith("uniform") == (model[0].weight.abs().max().item() <= math.sqrt(3 * variance) * 1.0001)


@pytest.mark.parametrize("start", ["pca-whitening", "pca-whitening-rescaled"])
def test_pca_whitening_decorrelates(start: str) -> None:
    x, y = vectors(count=300, dim=12)
    model = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))
    apply_start(start, model, x, y, 0)
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


def test_presets_leave_out_a_start_only_where_it_equals_another() -> None:
    assert set(starts_for("cnn")) == set(STARTS)
    assert set(STARTS) - set(starts_for("resnet20")) == {"pca-whitening-rescaled"}
    x, y = images(20)
    models = [build("resnet20", (2, 8, 8), 3) for _ in range(2)]
    for model, start in zip(models, ("pca-whitening", "pca-whitening-rescaled"), strict=True):
        apply_start(start, model, x, y, 0)
    state, other = (model.state_dict() for model in models)
    assert all(torch.equal(value, other[name]) for name, value in state.items())


def test_unknown_start_names_the_nearest() -> None:
    with pytest.raises(SylinitError, match="did you mean 'lsuv'"):
        apply_start("lsuw", nn.Linear(2, 2), torch.zeros(1, 2), torch.zeros(1).long(), 0)


def test_training_learns_and_its_curve_agrees() -> None:
    x, y = vectors(count=90)
    model = nn.Linear(12, 3)
    outcome = train(model, x, y, x, y, Recipe(lr=0.05, epochs=8, points=4), classes=3, seed=0)
    assert outcome.after > max(0.9, outcome.before)
    assert outcome.after == accuracy(model, x, y) == outcome.curve[-1][1]
    assert [epoch for epoch, _ in outcome.curve] == [0, 2, 4, 6, 8]
    assert not outcome.diverged


def test_mixed_precision_rounds_steps_and_measurements_and_not_the_weights() -> None:
    x, y = vectors(count=90)
    start = nn.Linear(12, 3)
    trained, outcomes = [], []
    for precision in ("float32", "bfloat16"):
        model, dtypes = copy.deepcopy(start), set()
        model.register_forward_hook(lambda m, _, out, found=dtypes: found.add((m.training, out.dtype)))
        recipe = Recipe(lr=0.05, epochs=8, points=4, precision=precision)
        outcomes.append(train(model, x, y, x, y, recipe, classes=3, seed=0))
        assert dtypes == {(True, getattr(torch, precision)), (False, getattr(torch, precision))}
        assert model.weight.dtype == torch.float32
        trained.append(model.weight.detach())
    assert not torch.equal(*trained)
    torch.testing.assert_close(*trained, rtol=0.05, atol=0.02)
    assert outcomes[1].after > 0.9


@pytest.mark.parametrize("native", [False, True])
def test_mixed_precision_is_not_for_gpus_that_emulate_it(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert fast_precision(torch.device("cuda")) == ("bfloat16" if native else "float32")
    assert fast_precision(torch.device("cpu")) == "bfloat16"


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    # at least 128 numbers in every tensor, of which one may be a tie
    "conv1d": (lambda: nn.Conv1d(6, 128, 3), (16, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 16, 3, padding=1, bias=False), (4, 6, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(6, 128, 3, groups=2), (2, 6, 5, 5, 5)),
    "linear": (lambda: nn.Linear(60, 128), (32, 60)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rounded_products_are_those_of_bfloat16_instructions(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape)

    def run(layer: nn.Module, x: Tensor, *modes: Any) -> list[Tensor]:
        """Output and gradients, each of which was rounded to bfloat16."""
        layer.zero_grad()
        sample = x.clone().requires_grad_()
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            out = layer(sample)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.bfloat16).view(out.shape).to(out.dtype))
        tensors = [out, sample.grad, *(p.grad for p in layer.parameters())]
        assert all(t.dtype == p.dtype for t, p in zip(tensors[2:], layer.parameters(), strict=True))
        return [t.detach().bfloat16() for t in tensors]

    # in double precision, so that only the last rounding is left
    slow = copy.deepcopy(layer).double()
    for p in slow.parameters():
        p.data = p.data.bfloat16().double()
    expected = run(slow, x.bfloat16().double())
    rounded = run(layer, x, torch.autocast("cpu", torch.bfloat16), RoundedProducts())
    native = run(layer, x, torch.autocast("cpu", torch.bfloat16))
    plain = run(layer, x)
    for a, b, c in zip(expected, rounded, native, strict=True):
        assert (a == b).float().mean() > 0.99  # but for sums in the middle between two numbers
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)
        # PyTorch's emulation rounds parts of a convolution's gradient too; instructions do not
        torch.testing.assert_close(b, c, rtol=0, atol=0.02 * c.abs().max().item())
    assert (rounded[0] == native[0]).float().mean() > 0.99
    assert not torch.equal(rounded[0], plain[0])  # operands are rounded, not only results


@pytest.mark.parametrize(
    ("able", "native"),
    [
        ({"avx2": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        (None, False),  # older PyTorch cannot be asked
    ],
)
def test_mixed_precision_takes_the_way_that_the_processor_has(
    able: dict[str, bool] | None, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if able is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    seen = []
    monkeypatch.setattr(RoundedProducts, "__torch_function__", _recorded(RoundedProducts.__torch_function__, seen))
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    with autocast(torch.device("cpu"), "bfloat16"):
        assert layer(x).dtype == torch.bfloat16
    assert (nn.functional.linear in seen) is not native
    seen.clear()
    with autocast(torch.device("cpu"), "float32"):
        assert layer(x).dtype == torch.float32
    layer(x)
    assert not seen


def _recorded(method: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    def record(self: Any, func: Any, *rest: Any, **named: Any) -> Any:
        seen.append(func)
        return method(self, func, *rest, **named)

    return record


def test_unknown_precision() -> None:
    x, y = vectors()
    with pytest.raises(SylinitError, match="'float32' or 'bfloat16'"):
        train(nn.Linear(12, 3), x, y, x, y, Recipe(lr=0.1, precision="float8"), classes=3, seed=0)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_divergence_is_an_outcome(optimiser: str) -> None:
    x, y = vectors()
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    outcome = train(model, x, y, x, y, Recipe(lr=1e25, optimiser=optimiser, epochs=4), classes=3, seed=0)
    assert outcome.diverged
    assert outcome.after == outcome.curve[-1][1] == pytest.approx(1 / 3)
    assert math.isfinite(outcome.area)


def test_unknown_optimiser() -> None:
    with pytest.raises(SylinitError, match="'sgd' or 'adamw'"):
        Recipe(lr=0.1, optimiser="lion").make_optimiser([torch.zeros(1)])


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


numbers = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


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
    assert interval([0.4, 0.6]).percent() == "50.0 ± 127.1"
    with pytest.raises(SylinitError, match="at least one"):
        interval([])
    with pytest.raises(SylinitError, match="as many values"):
        paired([1.0], [1.0, 2.0])
    with pytest.raises(SylinitError, match="two different"):
        exponent([2, 2], [1, 1])


@given(st.floats(-3, 3), st.floats(0.1, 10))
def test_exponent_of_a_power_law(power: float, factor: float) -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    fit = exponent(x, [factor * v**power for v in x])
    assert fit.power == pytest.approx(power, abs=1e-9)
    assert fit.half == pytest.approx(0, abs=1e-6)


def test_the_interval_of_an_exponent_is_scipys() -> None:
    x, y = [1.0, 2.0, 4.0, 8.0, 16.0], [1.1, 3.9, 17.0, 60.0, 270.0]
    fit, reference = exponent(x, y), stats.linregress(np.log(x), np.log(y))
    assert fit.power == pytest.approx(reference.slope)
    assert fit.half == pytest.approx(stats.t.ppf(0.975, 3) * reference.stderr)


@pytest.mark.parametrize("steps", range(1, 12))
def test_schedules_of_any_length(steps: int) -> None:
    recipe = Recipe(lr=0.1)
    optimiser = recipe.make_optimiser([torch.zeros(1, requires_grad=True)])
    schedule = recipe.make_schedule(optimiser, steps)
    for _ in range(steps):
        assert 0 <= optimiser.param_groups[0]["lr"] <= 0.1
        optimiser.step()
        schedule.step()


def test_figures_are_written_twice_and_name_every_line(tmp_path: Path) -> None:
    series = {name: [(x, interval([x / 9, x / 8])) for x in (1.0, 2.0, 4.0)] for name in ("sylinit", "he-normal")}
    figure = lines(series, "a title", "shots", "after", log=True)
    png, svg = save(figure, tmp_path / "deep" / "figure")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in svg.read_text()
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(texts) == ["he-normal", "sylinit"]
    again = save(lines(series, "a title", "shots", "after", log=True), tmp_path / "again")
    assert again[1].read_bytes() == svg.read_bytes()


@pytest.mark.parametrize("name", HEADS)
def test_heads_use_the_features(name: str) -> None:
    x, y = images(count=60, classes=3)
    model = build("cnn", (2, 8, 8), 5)
    replace_head(model, 3)
    before = copy.deepcopy(model.state_dict())
    HEADS[name](model, x, y, 0)
    assert model(x).shape == (60, 3)
    moved = {key.rpartition(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    expected = {"random head": 0, "LP-FT": 1, "ridge head": 1, "sylinit head": 1, "sylinit last two": 2}
    assert len(moved) == {**expected, "sylinit last block": 3, "sylinit all": 6}[name]
    if name != "random head":
        assert accuracy(model, x, y) > 0.6


def test_the_sylvester_head_is_a_ridge_head_at_another_scale() -> None:
    """With balanced classes every code has the same variance, so the equation is ridge regression at one penalty."""
    x, y = images(count=60, classes=3)
    model = replace_in(build("cnn", (2, 8, 8), 5), 3)
    rows, targets = features(model, x).double(), nn.functional.one_hot(y, 3).double()
    HEADS["sylinit head"](model, x, y, 0)
    ours = model(x).detach().double()
    ours = (ours - ours.mean(0)) / (ours - ours.mean(0)).norm()
    u, s, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)

    def ridge(penalty: float) -> tuple[float, float]:
        """How far its outputs are from ours, and its leave-one-out error."""
        shrink = s.square() / (s.square() + penalty)
        fit = u @ (shrink[:, None] * (u.T @ (targets - targets.mean(0))))
        left_out = (targets - targets.mean(0) - fit) / (1 - u.square() @ shrink - 1 / 60)[:, None]
        return (fit / fit.norm() - ours).abs().max().item(), left_out.square().sum().item()

    penalties = (10 ** torch.linspace(-8, 2, 2001) * s[0].square()).tolist()
    distances, errors = zip(*map(ridge, penalties), strict=True)
    assert min(distances) < 2e-4
    assert errors[distances.index(min(distances))] < 1.02 * min(errors)


def replace_in(model: nn.Module, classes: int) -> nn.Module:
    replace_head(model, classes)
    return model


def test_ridge_head_takes_the_penalty_of_least_left_out_error() -> None:
    """Against leaving one sample out at a time, literally, with centring inside."""
    x, y = vectors(count=24, dim=5)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
    HEADS["ridge head"](model, x, y, 0)
    rows, targets = features(model, x).double(), nn.functional.one_hot(y, 3).double()

    def solve(f: torch.Tensor, t: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        c = f - f.mean(0)
        w = torch.linalg.solve(c.T @ c + penalty * torch.eye(5).double(), c.T @ (t - t.mean(0)))
        return w, t.mean(0) - f.mean(0) @ w

    top = torch.linalg.matrix_norm(rows - rows.mean(0), 2).item() ** 2
    errors = {}
    for power in torch.linspace(-6, 2, 33).tolist():
        error = 0.0
        for i in range(24):
            keep = torch.arange(24) != i
            w, b = solve(rows[keep], targets[keep], 10**power * top)
            error += (rows[i] @ w + b - targets[i]).square().sum().item()
        errors[power] = error
    w, b = solve(rows, targets, 10 ** min(errors, key=errors.__getitem__) * top)
    torch.testing.assert_close(model[1].weight.double(), w.T, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(model[1].bias.double(), b, atol=1e-4, rtol=1e-3)

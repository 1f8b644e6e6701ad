"""Mixed precision, heads, exponents."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from conftest import images, vectors
from studies.exponents import exponent
from studies.finetune import HEADS, features, replace_head
from studies.precision import RoundedProducts, autocast, fast_precision
from studies.presets import initializations_for
from sylinit import SylinitError
from sylinit.comparison.initializations import INITIALIZATIONS, apply_initialization
from sylinit.comparison.models import build
from sylinit.comparison.training import Recipe, accuracy, train

pytestmark = pytest.mark.studies


def test_presets_leave_out_an_initialization_only_where_it_equals_another() -> None:
    assert set(initializations_for("cnn")) == set(INITIALIZATIONS)
    assert set(INITIALIZATIONS) - set(initializations_for("resnet20")) == {"pca-whitening-rescaled"}
    x, y = images(20)
    models = [build("resnet20", (2, 8, 8), 3) for _ in range(2)]
    for model, name in zip(models, ("pca-whitening", "pca-whitening-rescaled"), strict=True):
        apply_initialization(name, model, x, y, 0)
    state, other = (model.state_dict() for model in models)
    assert all(torch.equal(value, other[name]) for name, value in state.items())


def test_mixed_precision_rounds_steps_and_measurements_and_not_the_weights() -> None:
    x, y = vectors(count=90)
    start = nn.Linear(12, 3)
    trained, outcomes = [], []
    for precision in ("float32", "bfloat16"):
        model, dtypes = copy.deepcopy(start), set()
        model.register_forward_hook(lambda m, _, out, found=dtypes: found.add((m.training, out.dtype)))
        context = partial(autocast, x.device, precision)
        recipe = Recipe(lr=0.05, epochs=8, points=4)
        outcomes.append(train(model, x, y, x, y, recipe, classes=3, seed=0, context=context))
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
    with pytest.raises(SylinitError, match="'float32' or 'bfloat16'"), autocast(torch.device("cpu"), "float8"):
        pass


def test_exponents_need_two_sizes() -> None:
    with pytest.raises(SylinitError, match="two different"):
        exponent([2, 2], [1, 1])
    assert math.isnan(exponent([1, 2], [1, 2]).half)


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

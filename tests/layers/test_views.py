"""Views: rows times weight plus bias is what the module computes, and what is written is what the module then uses."""

from __future__ import annotations

import copy
import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from sylinit.errors import UnsupportedLayerError
from sylinit.layers.registry import hypotheses, is_stock
from sylinit.layers.view import LayerView

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZES = (7, 6, 5)


def the_view(module: nn.Module) -> LayerView:
    (view,) = hypotheses(module, "layer")[0]
    return view


@torch.no_grad()
def agreeing(module: nn.Module, *args: Any, **kwargs: Any) -> list[LayerView]:
    """The views that a module's own output agrees with."""
    y = module(*args, **kwargs)
    return [view for views in hypotheses(module, "layer") for view in views if view.agrees(args, kwargs, y)]


def outputs(view: LayerView, x: Any, index: Tensor | None = None) -> Tensor:
    """``rows @ W.mT + bias`` as ``[n, groups * units]``."""
    bias = view.bias()
    out = view.rows(x, index) @ view.weight().mT
    out = out if bias is None else out + bias.unsqueeze(1)
    return out.transpose(0, 1).flatten(1)


def expected(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The module's own output as ``[n, features]``, rows ordered by (sample, position)."""
    y = module(*args, **kwargs).detach()
    if isinstance(module, nn.modules.conv._ConvNd):
        y = y.unsqueeze(0) if y.ndim == len(module.kernel_size) + 1 else y
        y = y.movedim(1, -1)
    return y.reshape(-1, y.shape[-1])


def check(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The exact fact, before and after writing, for all rows and for any choice; and the view sees it itself."""
    (view,) = agreeing(module, *args, **kwargs)
    x = view.input(args, kwargs)
    samples, positions = view.positions(x)
    for _ in range(2):
        want = expected(module, *args, **kwargs)
        assert want.shape == (samples * math.prod(positions), view.groups * view.units)
        torch.testing.assert_close(outputs(view, x), want)
        index = torch.randint(len(want), (2 * len(want) + 1,))
        torch.testing.assert_close(outputs(view, x, index), want[index])
        weight = torch.randn(view.groups, view.units, view.dim, dtype=torch.float64)
        bias = torch.randn(view.groups, view.units, dtype=torch.float64) if view.has_bias else None
        view.write(weight, bias)
        torch.testing.assert_close(view.weight().double(), weight)


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (4,), (4, 3), (2, 3, 4)])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    check(nn.Linear(5, 3, bias=bias), torch.randn(*shape, 5))


def test_linear_positions() -> None:
    view = the_view(nn.Linear(5, 3))
    assert view.positions(torch.randn(5)) == (1, ())
    assert view.positions(torch.randn(4, 5)) == (4, ())
    assert view.positions(torch.randn(4, 2, 3, 5)) == (4, (2, 3))


def test_linear_of_a_transposed_input() -> None:
    check(nn.Linear(5, 3), torch.randn(4, 6, 5).transpose(0, 1))
    check(nn.Linear(5, 3), input=torch.randn(4, 5, 6).mT)


def test_a_linear_layer_that_only_has_another_name() -> None:
    check(nn.modules.linear.NonDynamicallyQuantizableLinear(5, 3), torch.randn(4, 5))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_bilinear(shape: tuple[int, ...]) -> None:
    first, second = torch.randn(*shape, 3), torch.randn(*shape, 4)
    check(nn.Bilinear(3, 4, 5), first, second)
    check(nn.Bilinear(3, 4, 5, bias=False), first, input2=second)
    check(nn.Bilinear(3, 4, 5), input1=first, input2=second)


class Conv1D(nn.Module):
    """As in ``transformers.pytorch_utils``: a linear layer with a transposed weight."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_conv1d_of_transformers() -> None:
    check(Conv1D(3, 5), torch.randn(4, 2, 5))
    check(Conv1D(3, 5), x=torch.randn(4, 5))
    check(Conv1D(5, 5), torch.randn(4, 5))  # square: the shape does not tell how the weight lies


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("padding", ["valid", "same", 1, "uneven"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_convolution(ndim: int, mode: str, padding: Any, groups: int) -> None:
    uneven = (2, 1, 0)[:ndim]
    for stride, dilation, kernel in product([1, 2, (2, 1, 3)[:ndim]], [1, 2], [1, 2, (3, 2, 1)[:ndim]]):
        if padding == "same" and stride != 1:
            continue
        options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": groups != 2}
        place = uneven if padding == "uneven" else padding
        conv = CONVS[ndim](4, 8, kernel, padding=place, padding_mode=mode, **options)
        check(conv, torch.randn(2, 4, *SIZES[:ndim]))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_transposed_convolution(ndim: int, stride: int, dilation: int, groups: int) -> None:
    uneven = (1, 0, 2)[:ndim]
    for padding, more, kernel in product([0, 1, uneven], [0, 1], [2, (3, 1, 4)[:ndim]]):
        if more >= max(stride, dilation):
            continue
        options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": groups != 2}
        conv = TRANSPOSED[ndim](4, 8, kernel, padding=padding, output_padding=more, **options)
        check(conv, torch.randn(2, 4, *[4] * ndim))


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_transposed_convolution_with_an_output_size(ndim: int) -> None:
    conv = TRANSPOSED[ndim](2, 3, 3, stride=3, padding=1)
    x = torch.randn(2, 2, *[3] * ndim)
    for more in range(3):
        size = [7 + more, 7, 8][:ndim]
        check(conv, x, size)
        check(conv, x, output_size=[2, 3, *size])
        check(conv, x[0], output_size=torch.Size([3, *size]))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_unbatched_and_channels_last_convolutions(kind: Any) -> None:
    conv = kind(4, 6, 3, stride=2, padding=1, groups=2)
    x = torch.randn(3, 4, 6, 5)
    check(conv, x[0])
    assert the_view(conv).positions(x[0])[0] == 1
    check(conv.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    check(conv, torch.randn(3, 4, 5, 6).mT)


@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 3),
    padding=st.integers(0, 3),
    size=st.integers(4, 9),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
)
def test_any_convolution(kernel: int, stride: int, dilation: int, padding: int, size: int, mode: str) -> None:
    if size + 2 * padding <= dilation * (kernel - 1):
        return
    check(nn.Conv1d(2, 3, kernel, stride, padding, dilation, padding_mode=mode), torch.randn(2, 2, size))


def test_no_row_is_asked_for() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert the_view(nn.Conv2d(2, 3, 3)).rows(torch.randn(2, 2, 5, 5), none).shape == (1, 0, 18)
    assert the_view(nn.Linear(2, 3)).rows(torch.randn(4, 2), none).shape == (1, 0, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_keep_the_numbers_and_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 6, 6)
    for module in (nn.Conv2d(4, 2, 3, padding=1), nn.ConvTranspose2d(4, 2, 3, stride=2), nn.Linear(6, 3)):
        rows = the_view(module.to(dtype)).rows(x.to(dtype))
        assert rows.dtype == dtype
        assert torch.equal(rows, the_view(module).rows(x.to(dtype).double()).to(dtype))


def test_infinite_numbers_outside_of_a_patch_stay_outside() -> None:
    x = torch.full((1, 1, 3, 3), math.inf)
    rows = the_view(nn.Conv2d(1, 1, 3, padding=2)).rows(x)
    assert not rows.isnan().any()
    assert rows[0, 0].isinf().sum() == 1


# Writing


LAYERS = {
    "linear": lambda: nn.Linear(5, 3),
    "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "bilinear": lambda: nn.Bilinear(2, 3, 4),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "separate attention": lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", LAYERS)
def test_writing_keeps_every_parameter_where_and_what_it_is(kind: str, dtype: torch.dtype) -> None:
    module = LAYERS[kind]().to(dtype)
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in module.named_parameters()}
    views = hypotheses(module, "")[0]
    for view in views:
        view.write(torch.randn_like(view.weight(), dtype=torch.float64), torch.randn(view.groups, view.units))
    assert {id(p) for view in views for p in view.parameters} == {id(p) for p in module.parameters()}
    for name, p in module.named_parameters():
        old, place, numbers = before[name]
        assert p is old
        assert p.dtype == dtype
        assert p.data_ptr() == place
        assert p.requires_grad
        assert not torch.equal(p, numbers)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_view_changes_its_own_numbers_only(kind: str) -> None:
    module = LAYERS[kind]()
    views = hypotheses(module, "")[0]
    for mine in views:
        others = [(v.weight().clone(), v.bias().clone()) for v in views]
        weight, bias = torch.randn_like(mine.weight()), torch.randn(mine.groups, mine.units)
        mine.write(weight, bias)
        mine.write(weight, None)  # no bias: it stays
        for view, (its_weight, its_bias) in zip(views, others, strict=True):
            torch.testing.assert_close(view.weight(), weight if view is mine else its_weight)
            assert torch.equal(view.bias(), bias if view is mine else its_bias)


# Attention


ATTENTION = {
    "packed": {},
    "batch first": {"batch_first": True},
    "separate": {"kdim": 3, "vdim": 5, "batch_first": True},
    "no bias": {"bias": False},
    "added keys": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}


def attention_inputs(module: nn.MultiheadAttention, batch: int | None = 3) -> tuple[Tensor, Tensor, Tensor]:
    def tokens(count: int, width: int) -> Tensor:
        if batch is None:
            return torch.randn(count, width)
        return torch.randn(*((batch, count) if module.batch_first else (count, batch)), width)

    return tokens(4, module.embed_dim), tokens(5, module.kdim), tokens(5, module.vdim)


@pytest.mark.parametrize("fastpath", [True, False])
@pytest.mark.parametrize("batch", [3, None])
@pytest.mark.parametrize("kind", ATTENTION)
def test_attention(kind: str, batch: int | None, fastpath: bool) -> None:
    """A loop over samples and heads, fed with the views' rows and weights, is the module."""
    module = nn.MultiheadAttention(6, 2, **ATTENTION[kind]).eval()
    q, k, v = inputs = attention_inputs(module, batch)
    mask = torch.randn(4, 5)
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fastpath)
    try:
        with torch.no_grad():
            query, key, value, out = views = hypotheses(module, "attn")[0]
            names = ["in_proj.query", "in_proj.key", "in_proj.value", "out_proj"]
            assert [view.name for view in views] == [f"attn.{name}" for name in names]
            for call in ((q, k, v), (q, k)):
                named = {"value": v} if len(call) == 2 else {}
                for view in views:
                    bias = torch.randn_like(view.bias()) if view.has_bias else None
                    view.write(torch.randn_like(view.weight()), bias)
                want = module(*call, attn_mask=mask, **named)[0]
                before = copy.deepcopy(module.state_dict())
                heads = out.input(call, {"attn_mask": mask, **named})
                assert all(torch.equal(before[name], numbers) for name, numbers in module.state_dict().items())
                projected = [outputs(view, view.input(call, named)) for view in (query, key, value)]
                assert heads.shape == (batch or 1, 4, 6)
                torch.testing.assert_close(heads, slow_attention(module, projected, mask, batch or 1))
                y = outputs(out, heads).view(heads.shape)
                torch.testing.assert_close(y, batch_first(module, want))
    finally:
        torch.backends.mha.set_fastpath_enabled(was)
    assert query.positions(query.input(inputs, {})) == (batch or 1, (4,))
    assert value.positions(value.input(inputs, {})) == (batch or 1, (5,))


def batch_first(module: nn.MultiheadAttention, x: Tensor) -> Tensor:
    if x.ndim == 2:
        return x.unsqueeze(0)
    return x if module.batch_first else x.transpose(0, 1)


def slow_attention(module: nn.MultiheadAttention, projected: list[Tensor], mask: Tensor, batch: int) -> Tensor:
    """Softmax attention, one sample and one head at a time: ``[B, T, E]``."""
    q, k, v = (part.view(batch, -1, module.embed_dim) for part in projected)
    mask = torch.nn.functional.pad(mask, (0, (module.bias_k is not None) + module.add_zero_attn))
    heads = torch.zeros_like(q)
    for sample, head in product(range(batch), range(module.num_heads)):
        mine = slice(head * module.head_dim, (head + 1) * module.head_dim)
        keys, values = k[sample, :, mine], v[sample, :, mine]
        if module.bias_k is not None:
            keys = torch.cat([keys, module.bias_k[0, :, mine]])
            values = torch.cat([values, module.bias_v[0, :, mine]])
        if module.add_zero_attn:
            keys, values = (torch.cat([part, torch.zeros_like(part[:1])]) for part in (keys, values))
        scores = q[sample, :, mine] @ keys.T / math.sqrt(module.head_dim) + mask
        heads[sample, :, mine] = scores.softmax(1) @ values
    return heads


def test_self_attention_where_pytorch_takes_its_fast_path() -> None:
    module = nn.MultiheadAttention(6, 2, batch_first=True).eval()
    x = torch.randn(3, 4, 6)
    out = hypotheses(module, "")[0][-1]
    assert out.name == "out_proj"
    with torch.no_grad():
        heads = out.input((x, x, x), {"need_weights": False})
        want = module(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(outputs(out, heads).view(want.shape), want)


def test_an_exception_inside_attention_leaves_out_proj_as_it_was() -> None:
    module = nn.MultiheadAttention(6, 2)
    kept = dict(module.out_proj._parameters)
    with pytest.raises((AssertionError, RuntimeError)):
        hypotheses(module, "")[0][-1].input((torch.randn(4, 3, 6),) * 3, {"attn_mask": torch.randn(9, 9)})
    assert all(module.out_proj._parameters[name] is p for name, p in kept.items())


# Parametrizations


def unchanged(module: nn.Module, action: Any) -> None:
    """``action`` raises `UnsupportedLayerError` and every parameter and buffer stays, bit for bit and in its place."""
    tensors = [*module.parameters(), *module.buffers()]
    before = [(t.data_ptr(), t.detach().clone()) for t in tensors]
    with pytest.raises(UnsupportedLayerError, match="parametrization"):
        action()
    for tensor, now, (place, numbers) in zip(tensors, [*module.parameters(), *module.buffers()], before, strict=True):
        assert tensor is now
        assert tensor.data_ptr() == place
        assert torch.equal(tensor, numbers)


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 3), lambda: nn.ConvTranspose2d(4, 6, 3, stride=2)])
def test_weight_norm(make: Any) -> None:
    module = parametrizations.weight_norm(make())
    assert the_view(module).kind == type(make()).__name__
    check(module, torch.randn(2, 4, 3, 3) if isinstance(module, nn.ConvTranspose2d) else torch.randn(4, 5))


def test_weight_norm_takes_a_unit_that_is_zero() -> None:
    module = parametrizations.weight_norm(nn.Linear(5, 3))
    weight = torch.randn(1, 3, 5)
    weight[0, 1] = 0
    the_view(module).write(weight, torch.zeros(1, 3))
    torch.testing.assert_close(module(torch.eye(5)), weight[0].T, rtol=1e-12, atol=1e-12)


def test_reading_a_parametrized_weight_changes_nothing() -> None:
    module = parametrizations.spectral_norm(nn.Linear(5, 3)).train()
    before = copy.deepcopy(module.state_dict())
    view = the_view(module)
    view.weight()
    assert all(torch.equal(before[name], numbers) for name, numbers in module.state_dict().items())
    assert all(part.training for part in module.modules())


@pytest.mark.parametrize("training", [True, False])
def test_a_parametrization_that_cannot_hold_the_weight_is_left_as_it_was(training: bool) -> None:
    for wrap in (parametrizations.spectral_norm, parametrizations.orthogonal):
        module = wrap(nn.Linear(5, 5)).train(training)
        view = the_view(module)
        unchanged(module, lambda view=view: view.write(7 * torch.randn(1, 5, 5), torch.ones(1, 5)))


class Doubled(nn.Module):
    """A parametrization without a right inverse."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_parametrization_without_right_inverse_is_left_as_it_was() -> None:
    module = nn.Linear(5, 3)
    parametrize.register_parametrization(module, "weight", Doubled())
    unchanged(module, lambda: the_view(module).write(torch.ones(1, 3, 5), torch.ones(1, 3)))


def test_a_bias_that_cannot_be_written_takes_the_weight_back() -> None:
    module = nn.Linear(5, 3)
    parametrize.register_parametrization(module, "bias", Doubled())
    unchanged(module, lambda: the_view(module).write(torch.ones(1, 3, 5), torch.ones(1, 3)))


# What is left alone


class Scaled(nn.Linear):
    """Computes something else than a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Standardized(nn.Conv2d):
    """A convolution with weight standardization."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Patched(nn.Linear):
    """A linear layer whose forward was replaced on the instance."""

    def __init__(self) -> None:
        super().__init__(5, 3)
        self.forward = lambda x: nn.functional.linear(x, self.weight, self.bias).tanh()


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.zeros(3))


def integers() -> nn.Module:
    module = nn.Linear(5, 3)
    module.weight = nn.Parameter(torch.ones(3, 5, dtype=torch.int8), requires_grad=False)
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Embedding(5, 3), "lookup table"),
        (lambda: nn.EmbeddingBag(5, 3), "lookup table"),
        (lambda: nn.LSTM(5, 3), "recurrent"),
        (lambda: nn.GRU(5, 3), "recurrent"),
        (lambda: nn.GRUCell(5, 3), "recurrent"),
        (lambda: nn.PReLU(), "activation"),
        (lambda: nn.LazyLinear(3), "run one batch through the model first"),
        (lambda: nn.LazyConv2d(3, 3), "run one batch through the model first"),
        (lambda: nn.Linear(5, 3, dtype=torch.complex64), "complex64"),
        (integers, "int8"),
        (Tokens, "position"),
        (lambda: prune.l1_unstructured(nn.Linear(5, 3), "weight", 0.5), "no parameter"),
        (lambda: prune.l1_unstructured(nn.Linear(5, 3), "bias", 0.4), "its bias is no parameter"),
        (lambda: nn.utils.spectral_norm(nn.Linear(5, 3)), "no parameter"),
        (lambda: parametrizations.weight_norm(nn.MultiheadAttention(4, 2), "in_proj_weight"), "parametrization"),
    ],
)
def test_left_alone_with_a_reason(make: Any, reason: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=reason):
        hypotheses(make(), "layer")[0]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_weight_norm_of_old_is_left_alone() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"use torch\.nn\.utils\.parametrizations"):
        hypotheses(nn.utils.weight_norm(nn.Linear(5, 3)), "layer")[0]


def test_a_lazy_layer_is_served_once_it_has_met_a_batch() -> None:
    for module, x in ((nn.LazyLinear(3), torch.randn(4, 5)), (nn.LazyConv2d(4, 3), torch.randn(2, 3, 5, 5))):
        module(x)
        check(module, x)


@pytest.mark.parametrize(
    ("module", "shape"), [(Scaled(5, 3), (4, 5)), (Standardized(5, 3, 3), (4, 5, 6, 6)), (Patched(), (4, 5))]
)
def test_a_layer_that_computes_something_else_agrees_with_no_view(module: nn.Module, shape: tuple[int, ...]) -> None:
    module.double()
    assert hypotheses(module, "layer")
    assert not is_stock(module)
    assert not agreeing(module, torch.randn(shape))


@torch.no_grad()
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(5, 3), (4, 5)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 9)),
        (nn.ConvTranspose2d(4, 6, 1, stride=3, groups=2, bias=False), (2, 4, 9, 9)),  # eight of nine outputs are zero
    ],
)
def test_another_output_is_told_from_the_views_own(module: nn.Module, shape: tuple[int, ...]) -> None:
    module.double()
    view, x = the_view(module), torch.randn(shape)
    y = module(x)
    assert view.agrees((x,), {}, y)
    assert not view.agrees((x,), {}, 1.01 * y)
    assert not view.agrees((x,), {}, y[..., :-1])
    assert not view.agrees((x,), {}, (y, y))


def test_what_is_stock_is_so_by_its_forward_alone() -> None:
    same, other = nn.Linear(5, 3), nn.Linear(5, 3)
    other.forward = lambda x: nn.functional.linear(x, other.weight, other.bias)  # type: ignore[method-assign]
    assert is_stock(same)
    assert is_stock(Named())
    assert not is_stock(other)
    check(other, torch.randn(4, 5))


class Named(nn.Conv2d):
    """A subclass that computes what its base does."""

    def __init__(self) -> None:
        super().__init__(4, 6, 3, padding="same")


def test_a_subclass_that_computes_the_same_is_served() -> None:
    check(Named(), torch.randn(2, 4, 5, 5))
    assert the_view(Named()).kind == "Named"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_do_not_wait_for_the_device() -> None:
    modules = {
        nn.Conv2d(4, 8, 3, padding=1, groups=2): (3, 4, 9, 9),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"): (3, 4, 9, 9),
        nn.ConvTranspose2d(4, 8, 3, stride=2): (3, 4, 9, 9),
        nn.Linear(4, 8): (3, 9, 4),
    }
    for module, shape in modules.items():
        view, x = the_view(module), torch.randn(shape)
        samples, positions = view.positions(x)
        index = torch.randint(samples * math.prod(positions), (50,))
        on_device = x.cuda(), index.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            view.positions(on_device[0])
            rows = view.rows(*on_device)
            all_rows = view.rows(on_device[0])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(rows.cpu(), view.rows(x, index))
        assert torch.equal(all_rows.cpu(), view.rows(x))

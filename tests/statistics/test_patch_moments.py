"""The moments of all patches, against the patches themselves."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sylinit.layers.registry import hypotheses
from sylinit.layers.view import LayerView
from sylinit.statistics import patch_moments as correlation
from sylinit.statistics.moments import Moments
from sylinit.statistics.patch_moments import correlate, patch_moments, serves, stream

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = (6, 5, 4)


def the_view(module: nn.Module) -> Any:
    (view,) = hypotheses(module, "layer")[0]
    return view


def dense(view: LayerView, x: Any, targets: Tensor) -> Moments:
    """All rows at once, and one product."""
    rows = view.rows(x).double()
    count = rows.shape[1]
    t = targets.double().repeat_interleave(count // len(targets), 0)
    s = torch.cat([t.new_ones(count, 1), t], 1)
    return Moments(s.T @ s, rows.mT @ s, rows.mT @ rows)


def same(got: Moments, want: Moments) -> None:
    for field in fields(Moments):
        mine, its = getattr(got, field.name), getattr(want, field.name)
        assert mine.dtype == torch.float64
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12 * max(1.0, float(want.ss[0, 0])))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("padding", ["valid", "same", 1, 3])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_correlations_are_the_moments_of_the_patches(ndim: int, mode: str, padding: Any, groups: int) -> None:
    for kernel, dilation in ((3, 1), (2, 2), ((3, 1, 2)[:ndim], 1), (1, 1)):
        view = the_view(CONVS[ndim](4, 4, kernel, padding=padding, padding_mode=mode, dilation=dilation, groups=groups))
        x, t = torch.randn(3, 4, *SIZES[:ndim]), torch.randn(3, 2)
        same(correlate(view, [(x, t)]), dense(view, x, t))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_strides_over_any_padding(ndim: int, stride: int, mode: str) -> None:
    """Against a layer without padding on images that were padded before."""
    conv = CONVS[ndim](4, 4, 3, stride=stride, padding=1, padding_mode=mode, groups=2)
    plain = CONVS[ndim](4, 4, 3, stride=stride, groups=2)
    x, t = torch.randn(3, 4, *SIZES[:ndim]), torch.randn(3, 2)
    padded = nn.functional.pad(x, [1] * 2 * ndim, "constant" if mode == "zeros" else mode)
    same(patch_moments(the_view(conv), [(x, t)]), dense(the_view(plain), padded, t))


@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
)
def test_any_kernel_on_any_image(kernel: Any, dilation: Any, padding: Any, size: Any) -> None:
    if any(n + 2 * p <= d * (k - 1) for n, p, d, k in zip(size, padding, dilation, kernel, strict=True)):
        return  # the kernel does not fit
    view = the_view(nn.Conv2d(2, 2, kernel, padding=padding, dilation=dilation))
    x, t = torch.randn(2, 2, *size), torch.randn(2, 1)
    same(correlate(view, [(x, t)]), dense(view, x, t))


MODULES = {
    "correlated": (nn.Conv2d(16, 4, 3, padding=1), (5, 16, 7, 6)),
    "unbatched": (nn.Conv2d(16, 4, 3, padding=1), (16, 7, 6)),
    "strided": (nn.Conv2d(4, 4, 3, stride=2, padding=1), (5, 4, 7, 6)),
    "transposed": (nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2), (5, 4, 4, 3)),
    "linear": (nn.Linear(5, 3), (5, 4, 5)),
}


@pytest.mark.parametrize("targets", [True, False])
@pytest.mark.parametrize("kind", MODULES)
def test_moments_of_any_view_in_any_cut(kind: str, targets: bool) -> None:
    module, shape = MODULES[kind]
    view, x = the_view(module), torch.randn(shape)
    samples = view.positions(x)[0]
    t = torch.randn(samples, 3 if targets else 0)
    for chunk in (1, 700, 1 << 20):
        same(patch_moments(view, [(x, t)], chunk=chunk), dense(view, x, t))


def test_halves_add_up() -> None:
    view, x, t = the_view(nn.Conv2d(4, 4, 3)), torch.randn(6, 4, 8, 8), torch.randn(6, 2)
    halves = patch_moments(view, [(x[:2], t[:2])]).merge(patch_moments(view, [(x[2:], t[2:])]))
    same(halves, patch_moments(view, [(x, t)]))


def test_batches_of_any_sizes_add_up() -> None:
    """Large images are correlated, tiny ones are not; their sums are those of all patches."""
    view = the_view(nn.Conv2d(4, 4, 3, padding=1))
    inputs = [(torch.randn(3, 4, *size), torch.randn(3, 2)) for size in ((8, 8), (1, 2), (9, 6))]
    assert [serves(view, x) for x, _ in inputs] == [True, False, True]
    together, apart = patch_moments(view, inputs).covariance(), [dense(view, x, t) for x, t in inputs]
    one_by_one = apart[0].merge(apart[1]).merge(apart[2]).covariance()
    for field in ("mean_x", "mean_t", "xx", "xt", "tt"):
        torch.testing.assert_close(getattr(together, field), getattr(one_by_one, field), rtol=1e-12, atol=1e-12)


def test_single_precision_is_as_good_as_its_rounding() -> None:
    view, x, t = the_view(nn.Conv2d(4, 4, 3, padding=1)), torch.randn(6, 4, 8, 8), torch.randn(6, 2)
    single, double = patch_moments(view, [(x, t)], torch.float32), patch_moments(view, [(x, t)])
    assert single.xx.dtype == torch.float32
    torch.testing.assert_close(single.xx.double(), double.xx, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(single.xs, double.xs, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(single.ss, double.ss, rtol=1e-12, atol=1e-12)


def test_half_precision_is_summed_in_double_precision() -> None:
    view, t = the_view(nn.Conv2d(4, 4, 3, padding=1).half()), torch.randn(40, 2)
    x = (300 * torch.rand(40, 4, 8, 8)).half()
    assert serves(view, x)
    same(patch_moments(view, [(x, t)]), dense(view, x, t))


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor made, in numbers."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.numbers = 0
        self._known = known.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() != self._known:
            self.numbers = max(self.numbers, made.untyped_storage().nbytes() // made.element_size())
        return made


def correlated(view: Any, x: Tensor, t: Tensor, chunk: int) -> None:
    correlate(view, [(x, t)], chunk=chunk)


def streamed(view: Any, x: Tensor, t: Tensor, chunk: int) -> None:
    stream(Moments.zeros(view.groups, view.dim, t.shape[1]), view, x, t, chunk)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("way", [correlated, streamed])
def test_memory_does_not_grow_with_the_samples(way: Any, mode: str) -> None:
    view = the_view(nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode))
    largest = []
    for samples in (20, 200):
        x, t = torch.randn(samples, 4, 8, 8), torch.randn(samples, 2).double()
        way(view, x, t, 4000)  # constants are made once
        with Largest(x) as seen:
            way(view, x, t, 4000)
        largest.append(seen.numbers)
    assert largest[0] == largest[1] < x.numel() / 4


def test_the_short_way_is_taken_only_where_it_serves() -> None:
    x = torch.randn(2, 4, 9, 9)
    assert serves(the_view(nn.Conv2d(4, 4, 3, padding=1)), x)
    assert not serves(the_view(nn.Conv2d(4, 4, 3, stride=(1, 2), padding=1)), x)
    assert not serves(the_view(nn.ConvTranspose2d(4, 4, 3)), x)
    assert not serves(the_view(nn.Conv2d(4, 4, 6, padding=3)), x)
    assert not serves(the_view(nn.Conv2d(4, 4, 3, padding=1)), x[:, :, :2, :2])


def test_a_three_by_three_kernel_has_thirteen_products() -> None:
    windows = correlation._windows(the_view(nn.Conv2d(4, 4, 3, padding=1)), torch.randn(1, 4, 9, 9))
    assert len(windows.pairs) == 13
    assert sum(map(len, windows.pairs.values())) == math.comb(9 + 1, 2)

"""Offloading: the same weights bit for bit, one batch's activations at a time, everything back after a failure."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import Residual, images, small_mlp, small_resnet, vectors
from sylinit import Report, initialize_
from sylinit.errors import SylinitError
from sylinit.runtime import offload
from sylinit.runtime.offload import Offload


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 1)


@pytest.fixture
def stays(monkeypatch):
    """Batches run interleaved, as with ``offload=``, but nothing is large enough to be moved."""

    def run(*arguments: Any, **options: Any) -> Report:
        with monkeypatch.context() as patch:
            patch.setattr(offload, "SMALLEST", 1 << 62)
            report = initialize_(*arguments, **options, offload="disk")
        assert report.offloaded_total == 0
        return report

    return run


LAST: list[Tensor] = []
"""Activations that `Remembering` keeps: not in the model, which is watched."""


class Remembering(nn.Module):
    """A residual network that keeps one batch's activations for the next, in views too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.first, self.second = Residual(6), Residual(6)
        self.head = nn.Linear(6, 3)
        self.fail = False
        LAST.clear()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu_()
        held = x[:, :3].transpose(2, 3)
        if LAST:
            x = x + 0.1 * LAST[-1].mean()
        LAST.append(x)
        x = self.second(self.first(x))
        if self.fail:
            raise RuntimeError("at the end")
        return self.head(x.mean((2, 3)) + held.mean())


def kept(run: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, list[Tensor]]:
    """What a run gives, and the activations that outlive it."""
    LAST.clear()
    result = run(*arguments, **options)
    return result, list(LAST)


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    x, y = images(60)
    return list(zip(x.tensor_split(count), y.tensor_split(count), strict=True))


def test_the_weights_are_bit_for_bit_the_same(stays):
    torch.manual_seed(0)
    plain = Remembering()
    moved = copy.deepcopy(plain)
    _, expected = kept(stays, plain, batches())
    report, last = kept(initialize_, moved, batches(), offload="disk")
    for (name, one), (_, other) in zip(plain.state_dict().items(), moved.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    for one, other in zip(expected, last, strict=True):
        assert torch.equal(one, other)
    assert report.offloaded_peak > 0
    assert "offloaded" in str(report)


def test_the_weights_are_those_of_one_batch():
    torch.manual_seed(0)
    plain = small_resnet().double()
    moved = copy.deepcopy(plain)
    apart = [(x.double(), y) for x, y in batches()]
    initialize_(plain, apart)
    assert initialize_(moved, apart, offload="disk").offloaded_total > 0
    for one, other in zip(plain.parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


def test_an_operation_may_read_several_batches_at_once(stays):
    """The rows of a 1x1 convolution and of a linear layer are the activations themselves; few of them are joined."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.Flatten(), nn.Linear(8 * 64, 3))
    moved = copy.deepcopy(plain)
    for code in ("mixed", "random"):
        stays(plain, batches(), code=code)
        initialize_(moved, batches(), code=code, offload="disk")
        for one, other in zip(plain.parameters(), moved.parameters(), strict=True):
            assert torch.equal(one, other)


def test_what_outlives_a_failure_is_whole(stays):
    plain, moved = Remembering(), Remembering()
    moved.load_state_dict(plain.state_dict())
    outlived = []
    for run, model in ((stays, plain), (functools.partial(initialize_, offload="disk"), moved)):
        LAST.clear()
        model.fail = True
        with pytest.raises(RuntimeError, match="at the end"):
            run(model, batches(), code="mixed", forward=late)
        outlived.append(list(LAST))
    expected, last = outlived
    assert len(last) == 2 + 4
    assert [t.untyped_storage().nbytes() for t in last] == [t.numel() * 4 for t in expected]
    for one, other in zip(expected, last, strict=True):
        assert torch.equal(one, other)


def late(model: nn.Module, batch: Any) -> Tensor:
    """Fail after the trial run, which has fewer samples than a batch."""
    model.fail = len(batch[0]) > 5
    return model(batch[0])


def test_the_device_holds_one_batchs_activations(monkeypatch):
    most = 0
    need = Offload.need

    def counting(self, storages):
        nonlocal most
        need(self, storages)
        here = {page.worker for page in self._pages.values() if page.here and page.storage() is not None}
        most = max(most, len(here))

    monkeypatch.setattr(Offload, "need", counting)
    x, y = vectors()
    initialize_(small_mlp(), list(zip(x.split(10), y.split(10), strict=True)), offload="disk")
    assert most == 1


def test_a_model_on_the_cpu_has_nowhere_else_to_put_them(stays):
    plain, asked = Remembering(), Remembering()
    asked.load_state_dict(plain.state_dict())
    kept(stays, plain, batches())
    report, _ = kept(initialize_, asked, batches(), offload=True)
    assert report.offloaded_total == 0
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), asked.parameters(), strict=True))


def test_an_unknown_place_is_refused():
    with pytest.raises(SylinitError, match="offload must be True, False or 'disk', got 'moon'"):
        initialize_(Remembering(), batches(), offload="moon")

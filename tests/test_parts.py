"""`layers="head"`, `"new"` and `"last:N"`: parts of a model by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sylinit
from conftest import small_mlp, vectors


def changed(model: nn.Module, before: nn.Module) -> list[str]:
    pairs = zip(model.named_parameters(), before.parameters(), strict=True)
    return sorted({name.rpartition(".")[0] for (name, new), old in pairs if not torch.equal(new, old)})


@pytest.mark.parametrize(
    ("layers", "expected"),
    [("head", ["4"]), ("last:1", ["4"]), ("last:2", ["2", "4"]), ("last:9", ["0", "2", "4"])],
)
def test_parts_by_name(layers, expected):
    model = small_mlp()
    before = copy.deepcopy(model)
    report = sylinit.initialize_(model, [vectors()], layers=layers)
    assert changed(model, before) == expected
    assert [layer.name for layer in report.initialized] == expected
    assert report["4"].code == "head"


def test_the_order_is_that_of_the_data():
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 3)
            self.body = nn.Linear(12, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.body(x).relu())

    report = sylinit.initialize_(Backwards(), [vectors()], layers="last:1")
    assert [layer.name for layer in report.initialized] == ["out"]


def test_a_module_of_that_name_comes_first():
    model = nn.Sequential()
    model.add_module("new", nn.Linear(12, 8))
    model.add_module("out", nn.Linear(8, 3))
    report = sylinit.initialize_(model, [vectors()], layers="new")
    assert [layer.name for layer in report.initialized] == ["new"]


def test_new_layers_are_those_that_were_not_loaded():
    model = small_mlp()
    for parameter in list(model.parameters())[:4]:
        parameter._is_hf_initialized = True
    report = sylinit.initialize_(model, [vectors()], layers="new")
    assert [layer.name for layer in report.initialized] == ["4"]
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    with pytest.raises(sylinit.SylinitError, match="none is new"):
        sylinit.initialize_(model, [vectors()], layers="new")


@pytest.mark.parametrize(
    ("layers", "message"),
    [("new", "nothing tells"), ("last:0", "how many"), ("last:x", "how many"), ("tail", "no layer")],
)
def test_what_cannot_be_read_is_refused(layers, message):
    with pytest.raises(sylinit.SylinitError, match=message):
        sylinit.initialize_(small_mlp(), [vectors()], layers=layers)

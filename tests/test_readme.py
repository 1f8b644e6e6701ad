"""The Python of the README runs, statement by statement."""

from __future__ import annotations

import ast
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import sylinit
from conftest import images

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
STATEMENTS = [
    ast.unparse(statement)
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for statement in ast.parse(block).body
]


class MyNetwork(nn.Sequential):
    """With the layers that the README names."""

    def __init__(self) -> None:
        layers: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(2, 8, 3),
            "relu": nn.ReLU(),
            "flat": nn.Flatten(),
            "fc": nn.Linear(288, 3),
        }
        super().__init__(OrderedDict(layers))


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def my_function(x: Tensor, target: Tensor, units: int) -> Tensor:
    return x[:, :units]


def test_the_readme_can_be_read_in_minutes() -> None:
    assert len(README.splitlines()) <= 120
    assert len(README.split()) <= 800


def test_the_readme_has_statements() -> None:
    assert sum("initialize_" in statement for statement in STATEMENTS) >= 8


@pytest.mark.usefixtures("one_process")
def test_every_statement_runs() -> None:
    x, y = images()
    names: dict[str, Any] = {
        "sylinit": sylinit, "torch": torch, "MyNetwork": MyNetwork, "my_function": my_function,
        "x": x, "y": y, "batches": [(x, y)], "mappings": [{"inputs": {"input": x}, "labels": y}],
        "train": lambda model: None, "model": MyNetwork(), "layer": nn.Linear(x[0].numel(), 4),
        "a": torch.eye(2), "b": torch.eye(3), "c": torch.ones(2, 3), "s": torch.randn(len(x), 4),
    }  # fmt: skip
    for statement in STATEMENTS:
        names["x"] = x.flatten(1) if "sylvester_" in statement else x  # rows of one layer, or images
        exec(statement, names)
    assert "initialized" in {layer.action for layer in names["report"].layers}

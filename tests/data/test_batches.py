"""What of a batch reaches the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sylinit
from conftest import vectors


class Masked(nn.Module):
    """Reads sequences and, if given, how much of each is data."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.seen: list[Any] = []

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        self.seen.append(lengths)
        known = torch.ones(x.shape[:2]) if lengths is None else (torch.arange(x.shape[1]) < lengths[:, None]).float()
        hidden = torch.relu(self.body(x)) * known.unsqueeze(2)
        return self.head(hidden.sum(1) / known.sum(1, keepdim=True))


class Switched(nn.Module):
    """Reads a pair of tensors as one argument; what follows is a switch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)

    def forward(self, pair: tuple[Tensor, Tensor], features: bool = False) -> Any:
        joined = torch.cat(pair, 1)
        return joined if features else self.head(joined)


def test_an_optional_tensor_is_an_input() -> None:
    x, y = torch.randn(60, 5, 6), torch.arange(60) % 3
    x[:, :, 0] += 3 * y[:, None]
    model = Masked()
    report = sylinit.initialize_(model, [((x, 1 + torch.arange(60) % 5), y)])
    assert all(isinstance(lengths, Tensor) for lengths in model.seen)
    assert report.before.accuracy > 0.9


def test_a_switch_is_none() -> None:
    x, y = vectors(60, 12, 3)
    report = sylinit.initialize_(Switched(), [((x[:, :6], x[:, 6:]), y)])
    assert report["head"].action == "initialized"


class Two(nn.Module):
    """Gives a class and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(12, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.body(x))
        return {"kind": self.kind(hidden), "size": self.size(hidden)}


def test_targets_by_key_are_no_inputs_and_other_keys_are_left_out_with_a_note() -> None:
    x, y = vectors(60, 12, 3)
    batch = {"x": x, "which": y, "amount": x[:, 0], "row": torch.arange(60)}
    report = sylinit.initialize_(Two(), [batch], head={"kind": "which", "size": "amount"})
    assert [report[name].action for name in ("kind", "size")] == ["initialized"] * 2
    assert any("'row'" in note and "'which'" not in note for note in report.notes)


def test_keys_of_which_the_model_takes_none() -> None:
    x, y = vectors(60, 12, 3)
    with pytest.raises(sylinit.SylinitError, match=r"'inputs'.*forward\(x\).*forward="):
        sylinit.initialize_(Two(), [{"inputs": x, "labels": y}])

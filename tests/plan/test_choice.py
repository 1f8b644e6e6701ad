"""``code="auto"``: recipes judged on held-out samples, the model's own body among them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sylinit
from conftest import small_mlp, vectors
from sylinit.errors import SylinitError
from sylinit.plan.choice import _best
from sylinit.plan.recipes import RECIPES


class Fourier(nn.Module):
    """Features that no principal component has: sines of the input, to which the task is linear."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 64), nn.Linear(64, 2)
        nn.init.normal_(self.body.weight, std=3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sin(self.body(x)))


def test_the_own_body_stays_bit_for_bit_where_it_is_best():
    generator = torch.Generator().manual_seed(0)
    model = Fourier()
    x = torch.randn(300, 4, generator=generator)
    y = (torch.sin(x @ model.body.weight[0].detach() + model.body.bias[0].detach()) > 0).long()
    before = copy.deepcopy(model.body.state_dict())
    report = sylinit.initialize_(model, [(x, y)], code="auto")
    assert report.notes[0].startswith("code='auto' took 'own'")
    assert all(torch.equal(value, before[key]) for key, value in model.body.state_dict().items())
    assert report["body"].action == "left alone"
    assert report["head"].code == "head"


def test_a_better_recipe_is_taken_and_gives_what_its_name_gives():
    x, y = vectors(300)
    auto, named = small_mlp(), small_mlp()
    named.load_state_dict(auto.state_dict())
    note = sylinit.initialize_(auto, [(x, y)], code="auto").notes[0]
    assert all(f"{name} 0." in note or f"{name} 1." in note for name in RECIPES)
    taken = note.split("'")[3]
    code = {"mixed": "mixed", "half": "mixed:0.5", "own-attention": "mixed:0.5", "pca": "pca"}
    assert taken in (*code, "own", "first")
    if taken in code:
        sylinit.initialize_(named, [(x, y)], code=code[taken])
        for ours, theirs in zip(auto.parameters(), named.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batches", [[torch.randn(40, 12)], [(torch.randn(8, 12), torch.arange(8) % 3)]])
def test_without_labels_or_with_few_samples_one_recipe_is_taken_and_a_note_says_so(batches):
    report = sylinit.initialize_(small_mlp(), batches, code="auto", task="auto" if len(batches[0]) == 2 else "none")
    assert "so 'mixed' was taken" in report.notes[0]


def test_a_failure_while_choosing_leaves_the_model_as_it_was():
    x, y = vectors(60)
    model = small_mlp()
    before = copy.deepcopy(model.state_dict())
    calls = 0

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise SylinitError("enough")
        return model(batch[0])

    with pytest.raises(SylinitError, match="enough"):
        sylinit.initialize_(model, [(x, y)], code="auto", forward=forward)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_within_a_standard_error_the_own_body_is_preferred():
    own = torch.tensor([1.0, 0.0] * 50)
    level, better = own.clone(), own.clone()
    level[1] = 1.0
    better[1:40:2] = 1.0
    values = {name: torch.zeros(100) for name in RECIPES} | {"own": own}
    assert _best(values | {"pca": level}).recipe.name == "own"
    assert _best(values | {"pca": better}).recipe.name == "pca"

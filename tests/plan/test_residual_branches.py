"""Which layers end a residual branch, as the trial run shows it, and what the recipe "half" makes of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sylinit
from conftest import vectors
from sylinit.plan.inventory import take_inventory
from sylinit.plan.recipes import ENDS
from sylinit.plan.trace import trace

WIDTH = 12


class Branches(nn.Module):
    """A stream with a stem and branches, joined as `join` says."""

    def __init__(self, join: str) -> None:
        super().__init__()
        self.join = join
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.norm = nn.LayerNorm(WIDTH)
        self.inner, self.outer, self.other = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.scale = nn.Parameter(0.5 * torch.ones(WIDTH))
        self.position = nn.Parameter(torch.ones(5, WIDTH))
        self.heads = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branch = self.outer(self.inner(self.norm(x)).relu())
        if self.join == "sum":
            x = x + branch
        elif self.join == "in place, scaled":
            x = x.clone()
            x += self.scale * branch
        elif self.join == "parallel":
            x = branch + self.other(self.norm(x)) + x
        elif self.join == "one after the other":
            x = x + branch + self.other(self.norm(x))
        elif self.join == "attention":
            tokens = x.unsqueeze(1).repeat(1, 2, 1)
            x = (tokens + self.heads(tokens, tokens, tokens)[0]).mean(1)
        elif self.join == "beside":  # as an adapter beside its base
            x = self.other(x) + branch
        elif self.join == "constant":
            x = branch + self.position.mean(0)
        elif self.join == "gate":
            x = x * branch.sigmoid()
        return self.head(x)


CASES = [
    ("sum", {"outer"}),
    ("in place, scaled", {"outer"}),
    ("parallel", {"outer", "other"}),
    ("one after the other", {"outer", "other"}),
    ("attention", {"heads"}),
    ("beside", set()),
    ("constant", set()),
    ("gate", set()),
]


@pytest.mark.parametrize(("join", "ends"), CASES)
def test_the_end_of_a_branch_is_what_is_added_to_what_it_was_made_from(join: str, ends: set[str]) -> None:
    model = Branches(join).eval()
    x, _ = vectors(5, WIDTH)
    candidates = {candidate.module: candidate for candidate in take_inventory(model).candidates}
    with torch.no_grad():
        assert trace(model, candidates, model, x, len(x), lambda: None).ends == ends


def deviations(join: str, code: str) -> dict[str, float]:
    """Of the outputs of each layer on the data, after it was computed."""
    torch.manual_seed(0)
    model, found = Branches(join), {}
    x, y = vectors(300, WIDTH)
    sylinit.initialize_(model, [(x, y)], code=code)

    def keep(name: str) -> None:
        def look(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            found[name] = float(output.detach().var(0).mean().sqrt())

        getattr(model, name).register_forward_hook(look)

    for name in ("stem", "inner", "outer"):
        keep(name)
    model.eval()(x)
    return found


def test_half_adds_little_to_a_residual_stream_and_mixed_as_much_as_any_layer_gives() -> None:
    half, mixed = deviations("sum", "half"), deviations("sum", "mixed")
    assert half["outer"] == pytest.approx(ENDS, rel=0.05)
    assert mixed["outer"] == pytest.approx(1, rel=0.05)
    assert half["inner"] == pytest.approx(1, rel=0.05)
    assert deviations("beside", "half")["outer"] == pytest.approx(1, rel=0.05)


def test_of_attention_only_the_last_projection_ends_a_branch() -> None:
    torch.manual_seed(0)
    model = Branches("attention")
    x, y = vectors(300, WIDTH)
    sylinit.initialize_(model, [(x, y)], code="half")
    with torch.no_grad():
        tokens = model.stem(x).unsqueeze(1).repeat(1, 2, 1)
        given = model.heads(tokens, tokens, tokens)[0]
        query = tokens @ model.heads.in_proj_weight[:WIDTH].T
    assert float(given.var((0, 1)).mean().sqrt()) == pytest.approx(ENDS, rel=0.1)
    assert float(query.var((0, 1)).mean().sqrt()) == pytest.approx(1, rel=0.1)

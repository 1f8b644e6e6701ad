"""The constants of the method: validated, documented, frozen; an ablation is a replaced field."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

import sylinit
from conftest import images as pictures
from conftest import small_mlp, small_resnet, vectors
from sylinit.config import RANGES, Config
from sylinit.errors import SylinitError


def test_every_field_is_documented_and_has_a_range():
    names = [field.name for field in fields(Config)]
    assert list(RANGES) == names
    documented = re.findall(r"^        (\w+): ", Config.__doc__ or "", re.MULTILINE)
    assert documented[: len(names)] == names


POSITIVE = ("encoding_weight", "variance", "logit_deviation", "norm_scale")
WRONG = (0, -1.0, float("inf"), float("nan"), "1")


def test_a_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Config().variance = 2.0  # type: ignore[misc]


@pytest.mark.parametrize("name", [field.name for field in fields(Config)])
@pytest.mark.parametrize("value", [float("nan"), -1, "many", True, [], object()])
def test_a_value_out_of_range_is_refused_by_name(name, value):
    if name == "norm_offset" and value == -1:
        value = float("inf")  # an offset may be negative
    if name == "prior" and value is True:
        value = 1.5  # a share, or a switch
    with pytest.raises(SylinitError, match=rf"Config: {name} must be .*, got "):
        replace(Config(), **{name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_share": 1.5}, "label_share must be a number from 0 to 1, got 1.5"),
        ({"rows": 1}, "rows must be an integer of at least 2, 'all' or None, got 1"),
        ({"solver": "projected"}, "solver must be 'auto' or 'exact', got 'projected'"),
        ({"variance": 0.0}, "variance must be a positive finite number, got 0.0"),
        ({"filter_length": 0}, "filter_length must be a positive finite number or None, got 0"),
        *[({name: v}, f"{name} must be a positive finite number, got {v!r}") for name in POSITIVE for v in WRONG],
        *[({"rows": v}, "rows must be an integer of at least 2, 'all' or None") for v in (0, 1, -5, 2.5, "some", True)],
        ({"max_steps": 2.0}, "max_steps must be an integer of at least 1, got 2.0"),
    ],
)
def test_a_message_says_what_was_expected_and_what_came(change, message):
    with pytest.raises(SylinitError, match=re.escape(message)):
        Config(**change)


def test_the_share_of_label_units_is_configured():
    x, y = vectors()
    weights = []
    for code, config in (("mixed:0.5", Config()), ("mixed", Config(label_share=0.5)), ("mixed", Config())):
        model = small_mlp()
        sylinit.initialize_(model, [(x, y)], code=code, config=config)
        weights.append(model[0].weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_filters_before_a_normalization_are_as_long_as_configured_or_of_unit_variance():
    x, y = pictures()
    for length in (2**0.5, 0.7, None):
        model = small_resnet()
        sylinit.initialize_(model, [(x, y)], code="mixed", config=Config(filter_length=length))
        filters = model[3].conv1.weight.detach().flatten(1)
        seen = []
        model[3].conv1.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
        model.eval()(x)
        deviation = seen[0].detach().transpose(0, 1).flatten(1).std(1, correction=0)
        if length is None:
            assert float(deviation.max()) < 1.001
        else:
            torch.testing.assert_close(filters.norm(dim=1), torch.full((6,), length), rtol=1e-5, atol=0)


def test_logits_are_as_large_as_configured():
    x, y = vectors()
    model = small_mlp()
    sylinit.initialize_(model, [(x, y)], config=Config(logit_deviation=0.1))
    logits = model(x).detach()
    assert float((logits - logits.mean(0)).square().mean().sqrt()) == pytest.approx(0.1, rel=1e-3)

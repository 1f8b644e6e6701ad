"""The right answer for every task: targets as losses take them, batches as trainers give them, heads of every kind.

Accuracies are those of the computed start, before any step, on its calibration data. Beside them stand those of a ridge
regression on the same features, or of the same call on the undisturbed data.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import socket
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    Bag,
    Record,
    accuracy,
    attempt,
    balanced_accuracy,
    bits,
    check_refusal,
    clusters,
    cut,
    features_into,
    label_accuracy,
    mlp,
    r_squared,
    readout_accuracy,
    refused,
    ridge,
    same_weights,
    served,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import sylinit

ONE_RECIPE = {"code": "mixed"}
"""One recipe is one pass that computes every layer; ``code="auto"`` may keep a body as it came."""

POINTS = 0.03
"""A computed head may be so much below a ridge regression on the same features."""


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The model's output in eval mode, without gradients."""
    with torch.no_grad():
        return model.eval()(*args, **kwargs)


# ---- Targets: the table of forms ----

X = torch.randn(400, 20, generator=torch.Generator().manual_seed(0))
SIX = (X[:, :6] + 0.3 * X[:, 6:12] > 0).float()
ONE = SIX[:, 0]
CLASSES = X[:, :4].argmax(1)
VALUES = torch.stack([X[:, 0] + X[:, 1], 3 + 5 * X[:, 2]], 1)
HOLES = torch.rand(400, 6, generator=torch.Generator().manual_seed(1)) < 0.3
NOISE = torch.randn(400, generator=torch.Generator().manual_seed(2))

ONE_LOGIT = {
    "float [n]": ONE,
    "float [n, 1]": ONE[:, None],
    "double [n]": ONE.double(),
    "int [n]": ONE.long(),
    "int [n, 1]": ONE.long()[:, None],
    "bool [n]": ONE.bool(),
    "uint8 [n, 1]": ONE.to(torch.uint8)[:, None],
    "missing [n, 1]": ONE.masked_fill(HOLES[:, 0], torch.nan)[:, None],
}
SIX_LOGITS = {
    "float": SIX,
    "double": SIX.double(),
    "int": SIX.long(),
    "bool": SIX.bool(),
    "missing": SIX.masked_fill(HOLES, torch.nan),
}
FOUR_CLASSES = {
    "int64 [n]": CLASSES,
    "int32 [n]": CLASSES.int(),
    "uint8 [n]": CLASSES.to(torch.uint8),
    "int [n, 1]": CLASSES[:, None],
    "one-hot float": F.one_hot(CLASSES, 4).float(),
    "soft": 0.9 * F.one_hot(CLASSES, 4) + 0.025,
    "numpy": CLASSES.numpy(),
    "list": CLASSES.tolist(),
}
REAL_VALUES = {
    "[n]": VALUES[:, 0],
    "[n, 1]": VALUES[:, :1],
    "[n, c]": VALUES,
    "double": VALUES.double(),
    "missing": VALUES.masked_fill(HOLES[:, :2], torch.nan),
    "counts as float": (2 + VALUES[:, :1]).clamp(min=0).round(),
}


@pytest.mark.parametrize("cuts", [400, 90])
@pytest.mark.parametrize("form", ONE_LOGIT)
def test_binary_targets_of_any_form_give_a_logit_whose_boundary_is_zero(form, cuts):
    model = mlp(20, 1)
    report = served(model, cut(X, ONE_LOGIT[form], cuts), **ONE_RECIPE).report
    assert report.task == "binary"
    reference = (ridge(features_into(model, "2", X), 2 * ONE[:, None] - 1) > 0).float().eq(ONE[:, None]).float().mean()
    assert reference > 0.85
    assert label_accuracy(run(model, X)[:, 0], ONE) >= reference - POINTS


@pytest.mark.parametrize("form", [form for form in ONE_LOGIT if not form.startswith("missing")])
def test_binary_targets_of_any_form_serve_two_logits(form):
    model = mlp(20, 2)
    report = served(model, [(X, ONE_LOGIT[form])]).report
    assert report.task in ("binary", "multiclass")
    assert accuracy(run(model, X), ONE) >= readout_accuracy(features_into(model, "2", X), ONE.long()) - POINTS


@pytest.mark.parametrize("cuts", [400, 90])
@pytest.mark.parametrize("form", SIX_LOGITS)
def test_multilabel_targets_of_any_form_give_logits(form, cuts):
    model = mlp(20, 6)
    target = SIX_LOGITS[form]
    report = served(model, cut(X, target, cuts)).report
    assert report.task == "multilabel"
    assert report["2"].code == "head"
    reference = label_accuracy(ridge(features_into(model, "2", X), 2 * SIX - 1), SIX)
    assert reference > 0.8
    assert label_accuracy(run(model, X), SIX) >= reference - POINTS
    assert (report["2"].dead_units or 0) == 0


def test_rare_labels_keep_zero_as_their_boundary():
    """One positive in ten: read as a regression, few logits would reach 0.5, and nearly all would be above 0."""
    labels = (X[:, :3] > 1.28).float()
    model = mlp(20, 3)
    served(model, [(X, labels)], config=dataclasses.replace(sylinit.Config(), prior=False))
    for output, label in zip(run(model, X).T, labels.T, strict=True):
        assert balanced_accuracy((output > 0).long(), label.long()) > 0.75


@pytest.mark.parametrize(("rare", "bias"), [(0.04, True), (0.1, True), (0.3, True), (0.1, False), (0.3, False)])
@pytest.mark.parametrize("form", ["one logit", "two logits", "labels"])
def test_a_rare_class_is_told_on_new_samples(form: str, rare: float, bias: bool):
    """Better than a constant, and most of the rare class is found."""
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(4000, generator=generator) < rare
    x = torch.randn(4000, 20, generator=generator) + y[:, None] * 0.7
    labels = torch.stack([y, x[:, 3] > 0.5, x[:, 4] > 1], 1)
    target = {"one logit": y.float()[:, None], "two logits": y.long(), "labels": labels.float()}[form]
    model = mlp(20, {"one logit": 1, "two logits": 2, "labels": 3}[form])
    model[2].bias = model[2].bias if bias else None
    served(model, [(x[:800], target[:800])])
    output = run(model, x[800:])
    guess = output.argmax(1) if form == "two logits" else (output[:, 0] > 0).long()
    assert (guess == y[800:]).double().mean() > max(1 - rare, 0.9)
    assert balanced_accuracy(guess, y[800:].long()) > 0.8


@pytest.mark.parametrize("weight", [None, 1e-4])
@pytest.mark.parametrize("form", ["one logit", "two logits", "four logits", "labels"])
def test_features_that_tell_nothing_give_no_huge_bias(form: str, weight: float | None):
    """Their logits are scaled up like any, and the frequencies with them: biases reached thousands."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(300, 16, generator=generator), torch.rand(300, 4, generator=generator) < 0.1
    target = {"one logit": y[:, :1].float(), "labels": y.float()}.get(form, y[:, 0].long())
    model = mlp(16, outputs := {"one logit": 1, "two logits": 2, "four logits": 4, "labels": 4}[form])
    config = dataclasses.replace(sylinit.Config(), prior=1.0, head_encoding_weight=weight)
    before = served(model, [(x, target)], call=sylinit.initialize_head_, config=config).report.before
    assert before.accuracy == pytest.approx(before.constant.accuracy, abs=0.02)
    assert before.loss < math.log(max(2, outputs if form.endswith("logits") else 0))
    assert run(model, x).abs().max() < 2


@pytest.mark.parametrize("form", ["one logit", "two logits", "labels"])
def test_a_head_without_a_bias_is_not_promised_what_a_bias_would_give(form: str):
    """A warning said that the output was not what the solution promised."""
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(5))
    y = x[:, 0] > 1.1
    target = {"one logit": y.float()[:, None], "labels": torch.stack([y, y, y], 1).float()}.get(form, y.long())
    model = mlp(16, outputs := {"one logit": 1, "two logits": 2, "labels": 3}[form])
    model[2] = nn.Linear(32, outputs, bias=False)
    outcome = served(model, [(x, target)], call=sylinit.initialize_head_)
    assert not outcome.warnings
    assert outcome.report.before.accuracy > 0.9


@pytest.mark.parametrize("outputs", [1, 2])
def test_with_the_whole_prior_a_head_decides_as_least_squares(outputs: int):
    x, y = imbalanced()
    model = mlp(20, outputs)
    target = y if outputs == 2 else y.float()[:, None]
    report = served(model, [(x, target)], code="own", config=dataclasses.replace(sylinit.Config(), prior=1.0)).report
    features = features_into(model, "2", x).double()
    centered, share = features - features.mean(0), y.double().mean()
    penalty = centered.square().mean() * outputs / report["2"].encoding_weight
    gram = centered.T @ centered / len(x) + penalty * torch.eye(centered.shape[1])
    fitted = centered @ torch.linalg.solve(gram, centered.T @ (y.double() - share) / len(x)) + share - 0.5
    output = run(model, x).double()
    logit = output[:, 0] if outputs == 1 else output[:, 1] - output[:, 0]
    assert torch.allclose(logit / logit.norm(), fitted / fitted.norm(), atol=1e-4)


@pytest.mark.parametrize("cuts", [400, 90])
@pytest.mark.parametrize("form", FOUR_CLASSES)
def test_class_targets_of_any_form_give_the_same_head(form, cuts):
    target = FOUR_CLASSES[form]
    model = mlp()
    batches = [(X[i : i + cuts], target[i : i + cuts]) for i in range(0, 400, cuts)]
    report = served(model, batches).report
    assert report.task == "multiclass"
    reference = readout_accuracy(features_into(model, "2", X), CLASSES)
    assert reference > 0.7
    assert accuracy(run(model, X), CLASSES) >= reference - POINTS


@pytest.mark.parametrize("cuts", [400, 90])
@pytest.mark.parametrize("form", REAL_VALUES)
def test_real_targets_of_any_form_are_predicted(form, cuts):
    target = REAL_VALUES[form]
    two = target if target.ndim == 2 else target[:, None]
    model = mlp(20, two.shape[1])
    report = served(model, cut(X, target, cuts)).report
    assert report.task == "regression"
    features, known = features_into(model, "2", X), ~two.isnan()
    expected = torch.cat([ridge(features[k], t[k][:, None])[:, 0] for t, k in zip(two.T, known.T, strict=True)])
    reference = r_squared(expected, torch.cat([t[k] for t, k in zip(two.T, known.T, strict=True)]))
    got = run(model, X).T.flatten()[known.T.flatten()]
    assert reference > 0.75
    assert r_squared(got, two.T.flatten()[known.T.flatten()]) >= reference - POINTS


def test_zeros_and_ones_are_a_regression_if_the_user_says_so():
    model = mlp(20, 1)
    report = served(model, [(X, ONE[:, None])], task="regression").report
    assert report.task == "regression"
    output = run(model, X)[:, 0]
    assert output.mean().item() == pytest.approx(ONE.mean().item(), abs=0.02)
    assert ((output > 0.5) == ONE.bool()).float().mean() > 0.85


@pytest.mark.parametrize("task", ["classification", "Binary", 3])
def test_an_unknown_task_is_refused_with_the_known_ones(task):
    refused(mlp(), [(X, CLASSES)], task=task, names=("task",), remedies=("multiclass",))


def test_task_none_uses_no_labels():
    model, without = mlp(), mlp()
    without.load_state_dict(model.state_dict())
    report = served(model, [(X, CLASSES)], task="none", code="pca").report
    served(without, [X], code="pca")
    assert report.task == "none"
    same_weights(model, without)


@pytest.mark.parametrize("key", ["labels", "label", "target", "targets", "y"])
@pytest.mark.parametrize("kind", [dict, Bag])
@pytest.mark.parametrize("way", ["by itself", "forward="])
def test_a_mapping_may_name_its_target_in_any_usual_way(key, kind, way):
    model, plain = mlp(), mlp()
    plain.load_state_dict(model.state_dict())
    served(plain, [(X, CLASSES)])
    name = "input" if way == "by itself" else "image"
    batches = [kind({name: x, key: y}) for x, y in cut(X, CLASSES, 150)]
    options = {} if way == "by itself" else {"forward": lambda m, batch: m(batch["image"])}
    report = served(model, batches, **options).report
    assert report.task == "multiclass"
    same_weights(model, plain)
    assert accuracy(run(model, X), CLASSES) > 0.7


@pytest.mark.parametrize("target", ["answer", lambda batch: batch["answer"]], ids=["key", "function"])
def test_the_target_may_be_named_or_computed(target):
    model = mlp()
    options = {"target": target, "forward": lambda m, batch: m(batch["features"])}
    report = served(model, [{"features": x, "answer": y} for x, y in cut(X, CLASSES, 150)], **options).report
    assert report.task == "multiclass"
    assert accuracy(run(model, X), CLASSES) > 0.7


def test_a_target_key_that_is_not_there_is_refused_with_those_that_are():
    refused(
        mlp(),
        [{"input": X, "answer": CLASSES}],
        target="anser",
        names=("anser",),
        remedies=("answer",),
    )


# ---- How many classes there are ----


@pytest.mark.parametrize("present", [4, 3, 2])
@pytest.mark.parametrize("options", [{}, {"classes": 6}])
def test_the_head_is_computed_though_the_sample_lacks_the_highest_classes(present, options):
    x, y = clusters(200, classes=present)
    model = mlp(20, 6)
    report = served(model, [(x, y)], **options).report
    assert report["2"].code == "head"
    assert report.task == "multiclass"
    assert accuracy(run(model, x), y) > 0.95


def test_the_head_is_computed_though_a_class_in_the_middle_is_missing():
    x, y = clusters(200)
    y = torch.tensor([0, 2, 3, 5])[y]
    model = mlp(20, 6)
    assert served(model, [(x, y)]).report["2"].code == "head"
    assert accuracy(run(model, x), y) > 0.95


def test_a_label_beyond_the_width_of_the_head_is_refused():
    x, y = clusters(200, classes=5)
    refused(mlp(), [(x, y)], names=("'2'", "label 4"), remedies=("0 to 3", "head="))


def test_classes_that_contradict_the_head_are_refused():
    refused(mlp(), [(X, CLASSES)], classes=7, names=("classes",), remedies=("4", "head="))


@pytest.mark.parametrize("ignored", [255, -1, 3])
def test_ignored_labels_do_not_count(ignored):
    x, y = clusters(200, classes=3)
    known = torch.arange(200) % 5 != 0
    model, plain = mlp(), mlp()
    plain.load_state_dict(model.state_dict())
    served(plain, [(x, y.masked_fill(~known, -100))], **ONE_RECIPE)
    served(model, [(x, y.masked_fill(~known, ignored))], ignore_index=ignored, **ONE_RECIPE)
    same_weights(model, plain)
    assert accuracy(run(model, x), y) > 0.95


# ---- Targets at every position ----


def pixel_task() -> tuple[Tensor, Tensor]:
    """Images, and for each pixel whether its surroundings are brighter than half of the image."""
    x = torch.randn(24, 1, 24, 24, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(x, 5, 1, 2)[:, 0]
    return x, (smooth > smooth.flatten(1).median(1).values[:, None, None]).long()


IMAGES, MASK = pixel_task()
ONE_HOT = F.one_hot(MASK, 2).permute(0, 3, 1, 2).float()


def pixel_net(outputs: int, width: int = 24) -> nn.Sequential:
    """Its first layer is as wide as the images: no reason to take it for the head."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, outputs, 1),
    )


PIXEL_TARGETS = {
    "int [n, H, W]": (2, MASK),
    "int [n, 1, H, W]": (2, MASK[:, None]),
    "uint8 [n, 1, H, W]": (2, MASK[:, None].to(torch.uint8)),
    "bool [n, H, W]": (2, MASK.bool()),
    "one-hot [n, 2, H, W]": (2, ONE_HOT),
    "soft [n, 2, H, W]": (2, 0.8 * ONE_HOT + 0.1),
    "float [n, 1, H, W], one logit": (1, MASK[:, None].float()),
    "float [n, H, W], one logit": (1, MASK.float()),
    "int [n, 1, H, W], one logit": (1, MASK[:, None]),
}


@pytest.mark.parametrize("form", PIXEL_TARGETS)
@pytest.mark.parametrize("size", [24, 10])
def test_masks_of_any_form_train_the_last_layer_of_the_net(form, size):
    outputs, target = PIXEL_TARGETS[form]
    reference, model = pixel_net(2), pixel_net(outputs)
    model.load_state_dict(reference.state_dict() | {k: v for k, v in model.state_dict().items() if k.startswith("4")})
    served(reference, [(IMAGES, MASK)], **ONE_RECIPE)
    report = served(model, cut(IMAGES, target, size), **ONE_RECIPE).report
    assert [layer.name for layer in report.layers if layer.code == "head"] == ["4"]
    assert report.task in (("binary",) if outputs == 1 else ("binary", "multiclass"))
    output = run(model, IMAGES)
    guess = output.argmax(1) if outputs == 2 else (output[:, 0] > 0).long()
    expected = balanced_accuracy(run(reference, IMAGES).argmax(1), MASK)
    assert expected > 0.8
    assert balanced_accuracy(guess, MASK) >= expected - POINTS


def test_several_masks_of_an_image_are_labels_of_each_pixel():
    both = torch.stack([MASK, 1 - MASK.roll(1, 0)], 1).float()
    both[:, 1] = (IMAGES[:, 0] > 0.5).float()
    model = pixel_net(2)
    report = served(model, [(IMAGES, both)]).report
    assert report.task == "multilabel"
    logits = run(model, IMAGES)
    assert balanced_accuracy((logits[:, 0] > 0).long(), MASK) > 0.75
    assert balanced_accuracy((logits[:, 1] > 0).long(), both[:, 1].long()) > 0.75


def test_real_images_as_targets_are_a_regression():
    smooth = F.avg_pool2d(IMAGES, 3, 1, 1)
    model = pixel_net(1)
    report = served(model, [(IMAGES, smooth)], **ONE_RECIPE).report
    assert report.task == "regression"
    assert [layer.name for layer in report.layers if layer.code == "head"] == ["4"]
    features = features_into(model, "4", IMAGES).permute(0, 2, 3, 1).flatten(0, 2)
    wanted = smooth.flatten()
    reference = r_squared(ridge(features, wanted[:, None])[:, 0], wanted)
    assert reference > 0.5
    assert r_squared(run(model, IMAGES).flatten(), wanted) >= reference - POINTS


def test_masks_with_an_ignored_border_are_refused_with_the_remedy_or_read_by_ignore_index():
    border = MASK.clone()
    border[:, :2], border[:, :, -2:] = 255, 255
    refused(pixel_net(2), [(IMAGES, border)], names=("255",), remedies=("ignore_index", "-100"))
    model, plain = pixel_net(2), pixel_net(2)
    plain.load_state_dict(model.state_dict())
    served(plain, [(IMAGES, border.masked_fill(border == 255, -100))], **ONE_RECIPE)
    served(model, [(IMAGES, border)], ignore_index=255, **ONE_RECIPE)
    same_weights(model, plain)


TOKENS = torch.randn(50, 7, 20, generator=torch.Generator().manual_seed(3))
TOKEN_CLASSES = TOKENS[..., :4].argmax(-1)


@pytest.mark.parametrize(
    "target",
    [TOKEN_CLASSES, F.one_hot(TOKEN_CLASSES, 4).float(), 0.9 * F.one_hot(TOKEN_CLASSES, 4) + 0.025],
    ids=["int [n, T]", "one-hot [n, T, c]", "soft [n, T, c]"],
)
def test_targets_at_every_token_of_any_form_give_the_same_head(target):
    model = mlp()
    report = served(model, [(TOKENS, target)]).report
    assert report.task == "multiclass"
    assert [layer.name for layer in report.layers if layer.code == "head"] == ["2"]
    features = features_into(model, "2", TOKENS).flatten(0, 1)
    reference = readout_accuracy(features, TOKEN_CLASSES.flatten())
    assert reference > 0.8
    assert accuracy(run(model, TOKENS).flatten(0, 1), TOKEN_CLASSES.flatten()) >= reference - POINTS


@pytest.mark.parametrize("outputs", [6, 12])
def test_integer_labels_are_positions_or_labels_by_the_shape_of_the_output(outputs):
    """[n, 6] of 0 and 1: six labels of a model that gives [n, 6], six tokens of one that gives [n, 6, 2]."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(20, 64), nn.Linear(64, outputs)

        def forward(self, x: Tensor) -> Tensor:
            out = self.head(torch.relu(self.body(x)))
            return out if outputs == 6 else out.unflatten(1, (6, 2))

    model = Positions()
    outcome = attempt(model, [(X, SIX.long())])
    if outputs == 12 and not outcome.served:  # one layer for six positions is no layer of one position's logits
        check_refusal(outcome, ("head",), ("head=",))
        return
    assert outcome.served, outcome.error
    out = run(model, X)
    if outputs == 6:
        assert outcome.report.task == "multilabel"
        assert label_accuracy(out, SIX) > 0.75
    else:
        assert (out.argmax(-1) == SIX.long()).float().mean() > 0.75 or outcome.report.notes


# ---- Autoencoders ----


def autoencoder(dim: int = 20) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, 32), nn.Tanh(), nn.Linear(32, 8), nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, dim)
    )


class ConvAutoencoder(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 8, 3, 2, 1),
            nn.Tanh(),
            nn.ConvTranspose2d(8, 8, 2, 2),
            nn.Tanh(),
            nn.Conv2d(8, 1, 3, padding=1),
        )


def correlated(shape: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if shape == "rows":
        return torch.randn(300, 6, generator=generator) @ torch.randn(6, 20, generator=generator) / 6**0.5
    return F.avg_pool2d(torch.randn(40, 1, 12, 12, generator=generator), 3, 1, 1) * 3


@pytest.mark.parametrize("shape", ["rows", "images"])
@pytest.mark.parametrize("way", ["by itself", "target is the input", "task=", "target="])
def test_autoencoders_reconstruct_and_start_no_worse_than_they_came(shape, way):
    x = correlated(shape)
    model = autoencoder() if shape == "rows" else ConvAutoencoder()
    before = (run(model, x) - x).square().mean().item()
    batches: list[Any] = [(x, x)] if way == "target is the input" else [x]
    options = {"task=": {"task": "reconstruction"}, "target=": {"target": lambda batch: batch}}.get(way, {})
    report = served(model, batches, **options).report
    assert report.task in (("regression", "reconstruction") if "target" in way else ("reconstruction",))
    after = (run(model, x) - x).square().mean().item()
    assert after <= before
    last = "5" if shape == "rows" else "4"
    assert report[last].code == "head"
    if shape == "rows":
        wanted = r_squared(ridge(features_into(model, last, x), x), x)
        assert wanted > 0.5
        assert r_squared(run(model, x), x) >= wanted - POINTS


def test_a_net_that_maps_to_its_inputs_width_by_chance_may_be_told_to_have_no_task():
    report = served(mlp(20, 20), [X], task="none", **ONE_RECIPE).report
    assert report.task == "none"


# ---- Which sample a row came from ----


class Folded(nn.Module):
    """Puts several rows of a sample into the batch, in one of many ways, and takes their mean."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.f, self.h = way, nn.Linear(20, 32), nn.Linear(32, 4)

    def net(self, z: Tensor) -> Tensor:
        return self.h(torch.relu(self.f(z)))

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        if self.way == "plain":
            return self.net(x)
        if self.way == "two views, torch.cat":
            return sum(self.net(torch.cat([x, x + 0.01])).chunk(2))
        if self.way == "a view in reversed order":
            out = self.net(torch.cat([x, x.flip(0)]))
            return out[:n] + out[n:].flip(0)
        if self.way == "shuffled":
            order = torch.arange(n).flip(0).roll(7)
            return self.net(x[order])[order.argsort()]
        s = x[:, None].expand(-1, n if self.way == "time first, T == B" else 3, -1)
        if self.way == "time first, T == B":
            return self.net(s.transpose(0, 1)).mean(0)
        if self.way == "time first":
            return self.net(s.transpose(0, 1)).mean(0)
        if self.way == "packed":
            p = pack_sequence(list(s))
            out = PackedSequence(self.net(p.data), *p[1:])
            return pad_packed_sequence(out, batch_first=True)[0].mean(1)
        if self.way == "windows first":
            w = s.flatten(1).unfold(1, 20, 20)  # [n, 3, 20]
            return self.net(torch.cat(list(w.unbind(1)))).unflatten(0, (3, n)).mean(0)
        if self.way == "sample-major fold":
            return self.net(s.flatten(0, 1)).unflatten(0, (n, 3)).mean(1)
        assert self.way == "time-major fold"
        return self.net(s.transpose(0, 1).flatten(0, 1)).unflatten(0, (3, n)).mean(0)


RECOGNIZED = ["plain", "sample-major fold", "time first"]
FOLDS = [
    "two views, torch.cat",
    "a view in reversed order",
    "shuffled",
    "time-major fold",
    "packed",
    "windows first",
    "time first, T == B",
]


@pytest.mark.parametrize("way", [*RECOGNIZED, *FOLDS])
@pytest.mark.parametrize("size", [120, 40])
def test_labels_reach_the_rows_of_their_own_sample_or_none(way, size):
    x, y = clusters(120)
    model = Folded(way)
    outcome = served(model, cut(x, y, size), code="mixed")
    reached = accuracy(run(model, x), y)
    if way in RECOGNIZED or reached >= 0.97:
        assert reached >= 0.97
        assert outcome.report["h"].code == "head"
        return
    assert outcome.report["h"].code != "head", f"labels went to wrong rows: accuracy {reached}"
    told = [*outcome.report.notes, *(layer.reason for layer in outcome.report.layers), *outcome.warnings]
    assert any("label" in text and "sample" in text for text in told), told


# ---- Which layer is the head ----


class Auxiliary(nn.Module):
    """Two classifiers of one width; only ``cls`` makes the output. The order of registration misleads."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "registered first":
            self.cls = nn.Linear(32, 4)
        self.f, self.g = nn.Linear(20, 32), nn.Linear(32, 32)
        if kind != "registered first":
            self.cls = nn.Linear(32, 4)
        self.aux = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.f(x))
        out = self.cls(torch.relu(self.g(h)))
        if self.kind == "in training only":
            return (out, self.aux(h)) if self.training else out
        if self.kind == "called last, discarded":
            self.aux(h)
            return out
        if self.kind == "scaled output":
            self.aux(h)
            return out / 2.0
        if self.kind == "a gate of the same width":
            return out * 1.0 + 0.0 * self.aux(h)
        if self.kind == "mapping":
            return {"features": h, "logits": out}
        if self.kind == "features first":
            return h, out
        if self.kind == "log-probabilities":
            return out.log_softmax(1)
        return out


def logits_of(output: Any) -> Tensor:
    return output["logits"] if isinstance(output, dict) else output[1] if isinstance(output, tuple) else output


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        "in training only",
        "called last, discarded",
        "scaled output",
        "registered first",
        "mapping",
        "features first",
        "log-probabilities",
    ],
)
def test_the_head_is_the_layer_that_made_the_output(kind, mode):
    x, y = clusters()
    model = Auxiliary(kind).train(mode)
    report = served(model, [(x, y)]).report
    assert report["cls"].code == "head"
    assert accuracy(logits_of(run(model, x)), y) > 0.97


def test_a_layer_behind_the_classifier_is_the_head():
    x, y = clusters()

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)
            self.f, self.cls = nn.Linear(20, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(torch.relu(self.cls(torch.relu(self.f(x)))))

    model = Projected()
    report = served(model, [(x, y)], **ONE_RECIPE).report
    assert [layer.name for layer in report.layers if layer.code == "head"] == ["mix"]
    assert accuracy(run(model, x), y) >= readout_accuracy(features_into(model, "mix", x), y) - POINTS


def test_a_head_that_is_not_reached_is_warned_of():
    """The user's ``forward`` stops before the head."""
    x, y = clusters()

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(20, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.body(x)))

    outcome = served(Cut(), [(x, y)], forward=lambda m, batch: m.body(batch[0]), **ONE_RECIPE)
    assert outcome.report["head"].action == "left alone"
    assert any("head" in text for text in [*outcome.warnings, *outcome.report.notes])


class Several(nn.Module):
    """Three networks, or three exits of one, for one target."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.bodies = nn.ModuleList(nn.Linear(32 if i and kind == "exits" else 20, 32) for i in range(3))
        self.heads = nn.ModuleList(nn.Linear(32, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        outputs, h = [], x
        for body, head in zip(self.bodies, self.heads, strict=True):
            h = torch.relu(body(h if self.kind == "exits" else x))
            outputs.append(head(h))
        if self.kind == "dict":
            return {f"member {number}": output for number, output in enumerate(outputs)}
        if self.kind == "stacked":
            return torch.stack(outputs, 1)
        return tuple(outputs) if self.kind == "tuple" else outputs

    def members(self, x: Tensor) -> list[Tensor]:
        out = run(self, x)
        return list(out.values()) if isinstance(out, dict) else list(out.unbind(1)) if isinstance(out, Tensor) else out


@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "stacked", "exits"])
@pytest.mark.parametrize("size", [200, 80])
def test_every_head_of_one_target_is_computed_from_its_own_input(kind, size):
    x, y = clusters()
    model = Several(kind)
    report = served(model, cut(x, y, size)).report
    assert [layer.name for layer in report.layers if layer.code == "head"] == ["heads.0", "heads.1", "heads.2"]
    assert min(accuracy(output, y) for output in model.members(x)) > 0.97


def test_a_list_of_heads_is_served_or_refused_with_the_form_that_is():
    x, y = clusters()
    model = Several("list")
    outcome = attempt(model, [(x, y)], head=["heads.0", "heads.1", "heads.2"])
    if outcome.served:
        assert min(accuracy(output, y) for output in model.members(x)) > 0.97
    else:
        check_refusal(outcome, ("head",), ("{", "mapping", "dict"))


class TwoTasks(nn.Module):
    """One body, a classifier of four classes and another output."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(20, 64), nn.Linear(64, 4), nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.body(x))
        return self.first(h), self.second(h)


def two_tasks() -> tuple[Tensor, Tensor, Tensor]:
    x, y = clusters()
    return x, y, x[:, :3].argmax(1)


HEADS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "keys": (lambda x, a, b: (x, {"a": a, "b": b}), lambda a, b: {"first": "a", "second": "b"}),
    "keys of the batch": (
        lambda x, a, b: {"x": x, "a": a, "b": b},
        lambda a, b: {"first": "a", "second": "b"},
    ),
    "indices": (lambda x, a, b: (x, (a, b)), lambda a, b: {"first": 0, "second": 1}),
    "a list": (lambda x, a, b: (x, [a, b]), lambda a, b: {"first": 0, "second": 1}),
    "functions": (
        lambda x, a, b: (x, {"a": a, "b": b}),
        lambda a, b: {"first": lambda batch: batch[1]["a"], "second": lambda batch: batch[1]["b"]},
    ),
    "tensors": (lambda x, a, b: x, lambda a, b: {"first": a, "second": b}),
}


@pytest.mark.parametrize("form", HEADS)
@pytest.mark.parametrize("size", [200, 80])
def test_two_heads_get_two_targets(form, size):
    x, a, b = two_tasks()
    batch, heads = HEADS[form]
    model = TwoTasks()
    batches = [batch(*parts) for parts in zip(x.split(size), a.split(size), b.split(size), strict=True)]
    options = {"forward": lambda m, batch: m(batch["x"])} if form == "keys of the batch" else {}
    report = served(model, batches, head=heads(a, b), **options).report
    assert {layer.name for layer in report.layers if layer.code == "head"} == {"first", "second"}
    first, second = run(model, x)
    features = features_into(model, "second", x)
    assert accuracy(first, a) > 0.95
    assert accuracy(second, b) >= readout_accuracy(features, b) - POINTS


def test_keys_that_are_named_as_targets_do_not_reach_a_model_that_takes_no_such_argument():
    x, a, b = two_tasks()
    model = TwoTasks()
    served(model, [{"x": x, "kind": a, "size": b}], head={"first": "kind", "second": "size"})
    assert accuracy(run(model, x)[0], a) > 0.95
    single = nn.Sequential(nn.Linear(x.shape[1], 32), nn.ReLU(), nn.Linear(32, int(a.max()) + 1))
    served(single, [{"input": x, "kind": a}], target="kind")
    assert accuracy(run(single, x), a) > 0.95


def test_a_classifier_and_a_regression_share_a_body():
    x, y, _ = two_tasks()
    values = torch.stack([x[:, 0] + x[:, 1], x[:, 2] - x[:, 3]], 1)
    model = TwoTasks(2)
    served(model, [(x, {"class": y, "value": values})], head={"first": "class", "second": "value"})
    first, second = run(model, x)
    assert accuracy(first, y) > 0.95
    wanted = r_squared(ridge(features_into(model, "second", x), values), values)
    assert wanted > 0.5
    assert r_squared(second, values) >= wanted - POINTS


@pytest.mark.parametrize("form", ["keys", "indices", "a list"])
def test_several_targets_without_heads_are_served_or_refused_with_the_remedy(form):
    x, a, b = two_tasks()
    model = TwoTasks()
    outcome = attempt(model, [HEADS[form][0](x, a, b)])
    if outcome.served:
        first, second = run(model, x)
        assert accuracy(first, a) > 0.95
        assert accuracy(second, b) >= readout_accuracy(features_into(model, "second", x), b) - POINTS
    else:
        check_refusal(outcome, ("target", "'a'", "several"), ("head=", "target="))


def test_a_head_that_does_not_exist_is_refused_with_the_nearest_name():
    x, a, b = two_tasks()
    refused(
        TwoTasks(),
        [(x, {"a": a, "b": b})],
        head={"frist": "a", "second": "b"},
        names=("frist",),
        remedies=("first",),
    )


# ---- Next tokens ----


def sequences(vocabulary: int = 24, length: int = 10, count: int = 48) -> Tensor:
    """Each token determines the next."""
    generator = torch.Generator().manual_seed(0)
    step = torch.randperm(vocabulary, generator=generator)
    ids = [torch.randint(vocabulary, (count, 1), generator=generator)]
    for _ in range(length - 1):
        ids.append(step[ids[-1]])
    return torch.cat(ids, 1)


IDS = sequences()


class Decoder(nn.Module):
    """A causal language model of one layer; its output may be bare or a mapping."""

    def __init__(self, vocabulary: int = 24, width: int = 32, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            nn.init.normal_(self.embedding.weight, std=0.2)
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1]).to(self.norm.weight)
        return self.head(self.norm(self.layer(self.embedding(input_ids), src_mask=causal, is_causal=True)))


def next_token_accuracy(logits: Tensor, ids: Tensor) -> float:
    return (logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean().item()


def next_token_loss(logits: Tensor, ids: Tensor) -> float:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def next_token_readout(model: nn.Module, head: str, ids: Tensor) -> float:
    features = features_into(model, head, ids)[:, :-1].flatten(0, 1)
    return readout_accuracy(features, ids[:, 1:].flatten())


PROMPT = IDS.masked_fill(torch.arange(10) < 4, -100)
SHIFTED = F.pad(IDS[:, 1:], (0, 1), value=-100)


@pytest.mark.parametrize(
    ("batch", "options", "task"),
    [
        ({"input_ids": IDS, "labels": IDS}, {}, "next-token"),
        (Bag(input_ids=IDS, labels=IDS.clone()), {}, "next-token"),
        ({"input_ids": IDS, "labels": PROMPT}, {}, "next-token"),
        ((IDS, IDS), {"task": "next-token"}, "next-token"),
        ({"input_ids": IDS}, {"task": "next-token"}, "next-token"),
        ((IDS, SHIFTED), {}, "multiclass"),
    ],
    ids=["labels are the input", "BatchEncoding", "prompt ignored", "task=", "task= without labels", "shifted by hand"],
)
@pytest.mark.parametrize("cuts", [1, 3])
def test_a_causal_model_is_told_the_next_token(batch, options, task, cuts):
    model = Decoder().eval()
    keys = list(batch) if isinstance(batch, dict) else None
    parts = zip(*(value.chunk(cuts) for value in (batch.values() if keys else batch)), strict=True)
    batches = [type(batch)(zip(keys, part, strict=True)) if keys else part for part in parts]
    report = served(model, batches, **options).report
    assert report.task == task
    assert report["head"].code == "head"
    logits, reference = run(model, IDS), next_token_readout(model, "head", IDS)
    assert reference > 0.8
    assert next_token_accuracy(logits, IDS) >= reference - POINTS
    assert (logits.argmax(-1) == IDS).float().mean() < 0.2, "it copies its input"


def test_labels_that_are_not_the_input_are_no_next_tokens():
    """A tagger: labels beside input_ids, at the same positions."""
    tags = IDS % 3
    model = Decoder()
    model.head = nn.Linear(32, 3)
    report = served(model, [{"input_ids": IDS, "labels": tags}]).report
    assert report.task == "multiclass"
    assert (run(model, IDS).argmax(-1) == tags).float().mean() > 0.9


def test_a_tied_head_keeps_the_embedding_and_the_model_is_not_made_worse():
    model = Decoder(tied=True).eval()
    before, embedding = next_token_loss(run(model, IDS), IDS), bits(model.embedding.weight)
    outcome = served(model, [{"input_ids": IDS, "labels": IDS}], computes=False)
    assert bits(model.embedding.weight) == embedding
    assert model.head.weight is model.embedding.weight
    assert "tied" in outcome.told
    assert next_token_loss(run(model, IDS), IDS) <= before + 1e-4


def test_transformers_causal_models_are_told_the_next_token():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    report = served(model, [{"input_ids": IDS, "labels": IDS}]).report
    assert report.task == "next-token"
    logits = run(model, IDS).logits
    assert next_token_accuracy(logits, IDS) >= next_token_readout(model, "lm_head", IDS) - POINTS
    assert next_token_accuracy(logits, IDS) > 0.8
    assert run(model, IDS, labels=IDS).loss.item() < torch.tensor(24.0).log()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_transformers_models_with_tied_heads_are_not_made_worse(family):
    transformers = pytest.importorskip("transformers")
    if family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=24,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        model = transformers.LlamaForCausalLM(config).eval()
    else:
        config = transformers.GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        model = transformers.GPT2LMHeadModel(config).eval()
    before, embedding = run(model, IDS, labels=IDS).loss.item(), bits(model.get_input_embeddings().weight)
    outcome = served(model, [{"input_ids": IDS, "labels": IDS}], computes=False)
    assert bits(model.get_input_embeddings().weight) == embedding
    assert "tied" in outcome.told
    assert run(model, IDS, labels=IDS).loss.item() <= before + 1e-4


# ---- Features of any scale and offset ----


def raised(column: Tensor, x: Tensor) -> Tensor:
    return torch.cat([x.to(column.dtype), column], 1)


def column(seed: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(200, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def log_scales(x: Tensor) -> Tensor:
    powers = torch.linspace(-3, 3, x.shape[1])[torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(6))]
    return x * 10**powers


UNEVEN: dict[str, Callable[[Tensor], Tensor]] = {
    "a constant of 1e6": lambda x: raised(torch.full((200, 1), 1e6), x),
    "a constant of 1e7": lambda x: raised(torch.full((200, 1), 1e7), x),
    "a constant of 1e12, double": lambda x: raised(torch.full((200, 1), 1e12, dtype=torch.float64), x),
    "time stamps, double": lambda x: raised(1.7e9 + 1e3 * column(dtype=torch.float64), x),
    "time stamps, float": lambda x: raised((1.7e9 + 1e5 * column(dtype=torch.float64)).float(), x),
    "years": lambda x: raised(2000 + 10 * column(), x),
    "every column at 1e4": lambda x: x + 1e4,
    "a deviation of 1e3": lambda x: raised(1e3 * column(), x),
    "a deviation of 1e4": lambda x: raised(1e4 * column(), x),
    "a deviation of 1e5": lambda x: raised(1e5 * column(), x),
    "a deviation of 1e6": lambda x: raised(1e6 * column(), x),
    "signal of 1e-6 beside noise of 1": lambda x: raised(column(), 1e-6 * x),
    "scales from 1e-3 to 1e3": log_scales,
}


@pytest.mark.parametrize("kind", UNEVEN)
@pytest.mark.parametrize("size", [200, 50])
def test_features_of_any_scale_and_offset_serve_as_well_as_standardized_ones(kind, size):
    x, y = clusters()
    data = UNEVEN[kind](x)
    deviation, mean = torch.std_mean(data.double(), 0)
    standardized = torch.where(deviation > 0, (data - mean) / deviation.clamp(min=1e-30), 0.0).to(data.dtype)
    undisturbed = mlp(data.shape[1]).to(data.dtype)
    model = copy.deepcopy(undisturbed)
    served(undisturbed, [(standardized, y)], **ONE_RECIPE)
    reference = accuracy(run(undisturbed, standardized), y)
    assert reference > 0.95
    outcome = attempt(model, cut(data, y, size), **ONE_RECIPE)
    if not outcome.served:
        check_refusal(outcome, ("'0'", "input", "feature", "column"), ("standardi", "center", "scale"))
        return
    assert [layer.action for layer in outcome.report.layers] == ["initialized"] * 2, outcome.report
    output = run(model, data)
    assert bool(output.isfinite().all())
    assert accuracy(output, y) >= reference - 0.02


def test_points_that_differ_in_the_last_digits_are_not_called_constant():
    """Both points are exact in float32."""
    two = torch.tensor([[1e7, 1e7 - 1], [1e7 - 1, 1e7]])
    model = nn.Linear(2, 2)
    outcome = attempt(model, [two], head=None, **ONE_RECIPE)
    if not outcome.served:
        check_refusal(outcome, ("input",), ("standardi", "center", "scale"))
        return
    (layer,) = outcome.report.layers
    assert "constant" not in layer.reason
    assert layer.action == "initialized"
    outputs = run(model.double(), two.double())
    assert (outputs[0] - outputs[1]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["all zero", "rank one", "huge", "tiny"])
def test_no_bare_error_of_linear_algebra_reaches_the_user(dtype, kind):
    x, y = clusters()
    x = {
        "all zero": lambda: torch.zeros(200, 20),
        "rank one": lambda: x[:, :1].expand(-1, 20),
        "huge": lambda: x * (1e3 if dtype is torch.float16 else 1e12),
        "tiny": lambda: x * (1e-4 if dtype is torch.float16 else 1e-12),
    }[kind]()
    model = mlp().to(dtype)
    outcome = attempt(model, [(x.to(dtype), y)], **ONE_RECIPE)
    if not outcome.served:
        check_refusal(outcome, ("'0'", "'2'", "input"), ("standardi", "scale", "float32", "constant"))
        return
    output = run(model, x.to(dtype))
    assert bool(output.isfinite().all())
    if kind == "all zero":
        assert outcome.report["0"].action == "left alone"
        assert "constant" in outcome.report["0"].reason
    elif kind != "rank one":
        assert accuracy(output, y) > 0.9
    else:
        assert accuracy(output, y) >= readout_accuracy(features_into(model, "2", x.to(dtype)), y) - POINTS


# ---- Experts ----


class Experts(nn.Module):
    """Sends ``few`` rows of each call to the third expert."""

    def __init__(self, few: int) -> None:
        super().__init__()
        self.few, self.e, self.h = few, nn.ModuleList(nn.Linear(20, 16) for _ in range(3)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        route = torch.arange(len(x)) % 2
        route[: self.few] = 2
        out = x.new_zeros(len(x), 16)
        for number, expert in enumerate(self.e):
            out[route == number] = expert(x[route == number])
        return self.h(torch.relu(out))


@pytest.mark.parametrize("few", [0, 1, 2, 50])
@pytest.mark.parametrize("way", ["one batch", "batches that join", "offload"])
def test_experts_that_met_no_row_or_one_are_left_alone(few, way):
    x, y = clusters()
    model = Experts(few)
    before = bits(model.e[2].weight)
    batches = [(x, y)] if way == "one batch" else cut(x, y, 100)
    options = ONE_RECIPE | ({"offload": "disk"} if way == "offload" else {})
    report = served(model, batches, **options).report
    rows = few * (2 if way == "offload" else 1)
    assert report["e.0"].action == report["e.1"].action == report["h"].action == "initialized"
    assert (report["e.2"].action == "left alone") == (rows < 2)
    assert (bits(model.e[2].weight) == before) == (rows < 2)
    if rows < 2:
        assert "row" in report["e.2"].reason or "reach" in report["e.2"].reason
    if way == "one batch":
        assert accuracy(run(model, x), y) >= readout_accuracy(features_into(model, "h", x), y) - POINTS


def test_a_switch_transformer_with_idle_experts_is_served():
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    config = transformers.SwitchTransformersConfig(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        num_experts=16,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    outcome = served(model, [{"input_ids": ids, "labels": ids}], head=None, **ONE_RECIPE)
    experts = [layer for layer in outcome.report.layers if "expert" in layer.name]
    assert {layer.action for layer in experts} == {"initialized", "left alone"}
    assert all(layer.reason for layer in experts if layer.action == "left alone")


# ---- Many outputs ----


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.fixture
def two_gigabytes() -> Iterator[None]:
    """Lets the process have two gigabytes more than it has, and no more."""
    resource = pytest.importorskip("resource")
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("needs /proc to tell how much memory the process has")
    has = int(status.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (has + (2 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.usefixtures("two_gigabytes")
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("outputs", [1500, 3000])
def test_the_cost_of_many_outputs_grows_with_samples_and_rank(outputs, labels):
    x, y = clusters(100, dim=24, classes=10)
    model = mlp(24, outputs, hidden=24)
    spread = y * (outputs // 10)
    largest = Largest()

    def call(*args: Any, **kwargs: Any) -> Any:
        with largest:
            return sylinit.initialize_(*args, **kwargs)

    served(model, [(x, spread)] if labels else [x], call=call, **({} if labels else {"code": "pca"}))
    assert largest.elements <= 4 * 125 * outputs, "something of outputs x outputs was made"
    if labels:
        assert accuracy(run(model, x), spread) > 0.9


@pytest.mark.usefixtures("two_gigabytes")
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "no labels"])
def test_fifty_thousand_outputs_work(labels):
    x, y = clusters(60, dim=24, classes=10)
    model = mlp(24, 50_000, hidden=24)
    spread = y * 5000
    served(model, [(x, spread)] if labels else [x], **({} if labels else {"code": "pca"}))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    if labels:
        assert accuracy(run(model, x), spread) > 0.9


# ---- Batches as loaders give them ----


class Pair(nn.Module):
    """Takes two inputs: as two arguments, or as one pair."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(torch.cat([a, b], 1))


class PairInOne(Pair):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(*pair)


@pytest.mark.parametrize("kind", [Pair, PairInOne])
@pytest.mark.parametrize("container", [tuple, list])
@pytest.mark.parametrize("size", [400, 150])
def test_several_inputs_in_a_tuple_reach_the_model_as_it_takes_them(kind, container, size):
    model = kind()
    batches = [(container((x[:, :8], x[:, 8:])), y) for x, y in cut(X, CLASSES, size)]
    outcome = served(model, batches)
    assert outcome.report.samples == 400
    assert accuracy(run(model.net, X), CLASSES) > 0.7


def test_three_members_of_a_batch_are_two_inputs_and_a_target():
    model = Pair()
    served(model, [(X[:, :8], X[:, 8:], CLASSES)])
    assert accuracy(run(model.net, X), CLASSES) > 0.7


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numpy_arrays_are_served_like_tensors(dtype):
    model, plain = mlp(), mlp()
    plain.load_state_dict(model.state_dict())
    served(plain, [(X, CLASSES)])
    served(model, [(x.numpy().astype(dtype), y.numpy()) for x, y in cut(X, CLASSES, 150)])
    same_weights(model, plain)


class Bytes(nn.Module):
    """Takes images of bytes, and scales them by itself if asked so."""

    def __init__(self, *, scales: bool) -> None:
        super().__init__()
        self.scales, self.net = scales, nn.Sequential(nn.Flatten(), *mlp(64))
        self._seen = Record()

    def forward(self, x: Tensor) -> Tensor:
        self._seen.append(x)
        return self.net(x.float() / 255 if self.scales else x)


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("size", [200, 80])
def test_images_of_bytes_are_scaled_by_the_model_or_by_nobody(scales, size):
    rows, y = clusters(200, dim=64)
    x = (rows * 20 + 128).clamp(0, 255).round().to(torch.uint8).view(200, 1, 8, 8)
    model = Bytes(scales=scales)
    outcome = attempt(model, cut(x, y, size), code="mixed")
    if not scales and not outcome.served:
        check_refusal(outcome, ("uint8", "integer", "byte"), ("float()",))
        return
    assert outcome.served, outcome.error
    seen = torch.cat([entry for entry in model._seen.entries if len(entry) > 10])
    assert torch.equal(seen.float(), x.float()), "scaled behind the user's back"
    assert (seen.dtype == torch.uint8) == scales
    assert accuracy(run(model, x if scales else x.float()), y) > 0.95


class Clips(nn.Module):
    """Video of any length: frames folded into the batch, sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.h = nn.Conv2d(1, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        frames = torch.relu(self.c(x.flatten(0, 1))).amax((2, 3))
        return self.h(frames).unflatten(0, x.shape[:2]).mean(1)


def test_clips_of_several_lengths_are_served():
    generator = torch.Generator().manual_seed(0)
    patterns = 3 * torch.randn(4, 1, 8, 8, generator=generator)
    y = torch.arange(24) % 4

    def clips(frames: int) -> Tensor:
        return patterns[y][:, None] + torch.randn(24, frames, 1, 8, 8, generator=generator)

    batches = [(clips(5), y), (clips(7), y)]
    model = Clips()
    report = served(model, batches, **ONE_RECIPE).report
    assert report.samples == 48
    reached = sum(accuracy(run(model, x), t) for x, t in batches) / 2
    features = torch.cat([features_into(model, "h", x).unflatten(0, x.shape[:2]).mean(1) for x, _ in batches])
    assert reached >= readout_accuracy(features, torch.cat([y, y])) - 0.1
    assert reached > 0.7


def test_missing_values_of_a_task_are_no_values():
    """Each of two outputs is computed from the samples that have it."""
    target = VALUES.clone()
    target[:200, 0], target[200:, 1] = torch.nan, torch.nan
    model = mlp(20, 2)
    report = served(model, [(X, target)]).report
    assert report.task == "regression"
    output = run(model, X)
    assert r_squared(output[200:, 0], VALUES[200:, 0]) > 0.8
    assert r_squared(output[:200, 1], VALUES[:200, 1]) > 0.8


@pytest.mark.parametrize("shape", [(400, 4), (400,)])
def test_targets_without_any_value_are_refused(shape):
    refused(
        mlp(20, shape[1] if len(shape) > 1 else 1),
        [(X, torch.full(shape, torch.nan))],
        names=("nan", "missing"),
        remedies=("without", "task", "label", "drop", "remove"),
    )


def test_infinite_targets_are_refused():
    target = VALUES.clone()
    target[3, 0] = torch.inf
    refused(mlp(20, 2), [(X, target)], names=("infinit",), remedies=("drop", "remove", "clean", "nan"))


# ---- Errors with the right remedy ----


class Pairs(Dataset):
    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], CLASSES[index]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(X, CLASSES, strict=True)


class TrainingStepOnly(nn.Module):
    """A LightningModule that only trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def training_step(self, batch: Any, index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


BOXES = [{"boxes": torch.rand(3, 4)} for _ in range(2)]
WORDS = ["a", "b", "c", "d"] * 100

WRONG: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "a pair instead of batches": (mlp, (X, CLASSES), {}, ("batches",), ("[(x, y)]",)),
    "a single tensor": (mlp, X, {}, ("batches",), ("[x]", "[(x, y)]")),
    "numpy instead of batches": (mlp, X.numpy(), {}, ("batches",), ("[x]", "[(x, y)]")),
    "a pair of numpy arrays": (mlp, (X.numpy(), CLASSES.numpy()), {}, ("batches",), ("[(x, y)]",)),
    "a dataset": (mlp, TensorDataset(X, CLASSES), {}, ("batches", "dataset"), ("DataLoader",)),
    "a dataset of the user's own": (mlp, Pairs(), {}, ("batches", "dataset"), ("DataLoader",)),
    "a dataset that streams": (mlp, Stream(), {}, ("batches", "dataset"), ("DataLoader",)),
    "labels as strings": (mlp, [(X, WORDS)], {}, ("string", "str"), ("class ind", "integer")),
    "inputs as strings": (mlp, [(WORDS, CLASSES)], {}, ("string", "str"), ("token",)),
    "a mapping of strings": (mlp, [{"text": WORDS, "label": CLASSES}], {}, ("'text'",), ("token",)),
    "detection": (mlp, [([X[0], X[1]], BOXES)], {}, ("target", "boxes"), ("target=", "task=", "without", "forward=")),
    "a module without forward": (TrainingStepOnly, [(X, CLASSES)], {}, ("forward",), ("forward=",)),
    "a group by name": (mlp, [(X, CLASSES)], {"group": "x"}, ("group",), ("torch.distributed", "process group")),
    "targets of another length": (mlp, [(X, CLASSES[:7])], {}, ("400", "7"), ("first dimension", "one target")),
    "a target of another width": (
        lambda: mlp(20, 3),
        [(X, VALUES)],
        {"head": "2"},
        ("'2'", "2 values"),
        ("head=", "3 outputs", "outputs"),
    ),
    "unknown head": (mlp, [(X, CLASSES)], {"head": "3"}, ("head",), ("'2'",)),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_input_is_refused_with_the_right_remedy(kind):
    model, batches, options, names, remedies = WRONG[kind]
    refused(model(), batches, names=names, remedies=remedies, **options)


def test_integer_counts_are_a_regression_or_refused_with_the_remedy():
    counts = (20 * X[:, 0].abs() + 1).round().long()
    model = mlp(20, 1)
    outcome = attempt(model, [(X, counts)])
    if outcome.served:
        assert outcome.report.task == "regression"
        features = features_into(model, "2", X)
        wanted = r_squared(ridge(features, counts[:, None])[:, 0], counts.double())
        assert r_squared(run(model, X)[:, 0], counts.double()) >= wanted - POINTS
    else:
        check_refusal(outcome, ("label", "target"), ("float()", 'task="regression"', "task='regression'"))
        assert "0 to 0" not in str(outcome.error)


@pytest.mark.parametrize("count", [2, 4])
def test_one_sample_of_each_class_is_enough_or_refused_with_the_remedy(count):
    x, y = clusters(count, classes=count)
    model = mlp(20, count)
    outcome = attempt(model, [(x, y)])
    if outcome.served:
        assert accuracy(run(model, x), y) == 1.0
    else:
        check_refusal(outcome, ("sample", "class"), ("more",))


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    """Run the command as a shell does; returns the exit code and what was printed as an error, in one line."""
    cli = pytest.importorskip("sylinit.cli")
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return int(stop.value.code or 0), " ".join(capsys.readouterr().err.split())


def test_a_file_that_is_no_npz_is_called_so(tmp_path, capsys):
    pytest.importorskip("typer")
    junk = tmp_path / "junk.npz"
    junk.write_text("junk")
    code, error = call(capsys, "init", "mlp", "--data", junk, "--out", tmp_path / "w")
    assert code == 1
    assert "pickle" not in error
    assert "junk.npz" in error
    assert "savez" in error or "no .npz" in error or "not a .npz" in error


def test_a_path_that_does_not_exist_is_called_so(tmp_path, capsys, monkeypatch):
    pytest.importorskip("typer")
    monkeypatch.chdir(tmp_path)
    code, error = call(capsys, "init", "mlp", "--data", "./typo", "--out", tmp_path / "w")
    assert code == 1
    assert "HFValidationError" not in error
    assert "no such" in error or "does not exist" in error


def test_a_name_that_is_nowhere_is_looked_up_once(tmp_path, capsys, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    lookups: list[str] = []
    naps: list[float] = []

    def offline(host: Any, *_: Any, **__: Any) -> Any:
        lookups.append(str(host))
        raise socket.gaierror("offline")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr("time.sleep", naps.append)
    code, error = call(capsys, "init", "mlp", "--data", "typo", "--out", tmp_path / "w")
    assert code == 1
    assert "typo" in error
    assert len(lookups) <= 3
    assert sum(naps) < 2, "it waits between attempts"


def test_a_model_in_a_file_is_named_by_its_module(tmp_path, capsys, monkeypatch):
    pytest.importorskip("typer")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("mods_of_a_user.py").write_text(
        "from torch import nn\ndef good(shape, classes): return nn.Linear(*shape, classes)\n"
    )
    status, error = call(capsys, "init", "mods_of_a_user.py:good", "--data", "digits", "--out", tmp_path / "w")
    assert status == 1
    assert "mods_of_a_user:good" in error


def test_gray_and_color_images_mixed_are_called_so(tmp_path, capsys):
    pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    for name in ("a", "b"):
        (tmp_path / "mixed" / name).mkdir(parents=True)
        for number in range(4):
            image.new("RGB" if number % 2 else "L", (8, 8)).save(tmp_path / "mixed" / name / f"{number}.png")
    code, error = call(capsys, "init", "mlp", "--data", tmp_path / "mixed", "--out", tmp_path / "w")
    assert code == 1
    assert "resize" not in error
    assert "RGB" in error
    assert "convert" in error


def test_data_of_one_sample_a_class_is_called_so(tmp_path, capsys):
    pytest.importorskip("typer")
    np = pytest.importorskip("numpy")
    np.savez(tmp_path / "single.npz", x=np.random.default_rng(0).normal(size=(6, 5)), y=np.arange(6))
    code, error = call(capsys, "init", "mlp", "--data", tmp_path / "single.npz", "--out", tmp_path / "w")
    assert code == 1
    assert "train_size" not in error
    assert "class" in error
    assert "x_test" in error or "at least 2" in error or "at least two" in error


# ---- What starts at zero stays at zero ----


class LowRank(nn.Module):
    """A frozen layer with an adapter."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, 4, bias=False)
        self.lora_B = nn.Linear(4, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def with_adapters() -> nn.Sequential:
    return nn.Sequential(LowRank(nn.Linear(20, 32)), nn.ReLU(), LowRank(nn.Linear(32, 32)), nn.ReLU(), nn.Linear(32, 4))


TRAINABLE = {"layers": lambda name, module: all(p.requires_grad for p in module.parameters())}


@pytest.mark.parametrize(
    "options",
    [{}, TRAINABLE, {"layers": ["0.lora_A", "2.lora_A", "4"]}],
    ids=["default", "trainable", "by name"],
)
def test_adapters_keep_the_pretrained_function(options):
    x, y = clusters()
    model = with_adapters()
    body = model[:4]
    before = run(body, x)
    report = served(model, [(x, y)], **options, **ONE_RECIPE).report
    assert torch.equal(run(body, x), before)
    for name in ("0.lora_B", "2.lora_B"):
        assert report[name].action == "left alone"
        assert "zero" in report[name].reason or "layers" in options
        assert not model.get_submodule(name).weight.any()
    assert report["4"].code == "head"
    assert accuracy(run(model, x), y) > 0.95


def test_frozen_layers_are_skipped_and_reported():
    x, y = clusters()
    model = mlp()
    model[0].requires_grad_(False)
    before = bits(model[0].weight)
    report = served(model, [(x, y)]).report
    assert bits(model[0].weight) == before
    assert report["0"].action == "left alone"
    assert "frozen" in report["0"].reason
    assert accuracy(run(model, x), y) > 0.95


def test_frozen_layers_that_the_user_names_are_refused():
    x, y = clusters()
    model = mlp()
    model[0].requires_grad_(False)
    refused(model, [(x, y)], layers="0", names=("'0'",), remedies=("unfreeze", "requires_grad"))


def test_a_model_that_is_frozen_throughout_is_refused():
    x, y = clusters()
    refused(mlp().requires_grad_(False), [(x, y)], names=("frozen",), remedies=("unfreeze", "requires_grad"))


class ZeroBranch(nn.Module):
    """A residual branch whose last layer, or whose gate, is zero at the start."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.inner = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.gate = nn.Linear(8, 16)  # adaLN-Zero
        self.head = nn.Linear(8, 4)
        if kind == "batchnorm":
            nn.init.zeros_(self.norm.weight)
        else:
            zero = self.last if kind == "convolution" else self.gate
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        branch = torch.relu(self.inner(h))
        if self.kind == "gate":
            scale, shift = self.gate(h.mean((2, 3)))[..., None, None].chunk(2, 1)
            h = h + scale * branch + shift
        elif self.kind == "convolution":
            h = h + self.last(branch)
        else:
            h = h + self.norm(self.last(branch))
        return self.head(h.amax((2, 3)))


@pytest.mark.parametrize("kind", ["convolution", "gate", "batchnorm"])
@pytest.mark.parametrize("options", [{}, ONE_RECIPE], ids=["default", "one recipe"])
def test_branches_that_start_at_zero_stay_at_zero(kind, options):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 4
    x = (3 * torch.randn(4, 1, 8, 8, generator=generator))[y] + torch.randn(80, 1, 8, 8, generator=generator)
    model = ZeroBranch(kind)
    outcome = served(model, [(x, y)], **options)
    name = {"convolution": "last", "gate": "gate", "batchnorm": "norm"}[kind]
    layer = model.get_submodule(name)
    assert not layer.weight.any()
    if kind != "batchnorm":
        assert not layer.bias.any()
        assert outcome.report[name].action == "left alone"
        assert "zero" in outcome.report[name].reason
    assert accuracy(run(model, x), y) > 0.7


def test_a_head_that_starts_at_zero_is_computed():
    """Vision transformers come so; a zero head is no branch."""
    x, y = clusters()
    model = mlp()
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    assert served(model, [(x, y)]).report["2"].code == "head"
    assert accuracy(run(model, x), y) > 0.95


@pytest.mark.parametrize("options", [{}, TRAINABLE], ids=["default", "trainable"])
def test_adapters_of_peft_keep_the_pretrained_function(options):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    ids = torch.randint(5, 60, (64, 12), generator=torch.Generator().manual_seed(0))
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    base = transformers.BertModel(config).eval()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["query", "value"])).eval()
    before = run(model, ids).last_hidden_state
    outcome = attempt(model, [ids], **options)
    if not outcome.served:
        pytest.fail(f"adapters are refused: {outcome.error}")
    assert torch.equal(run(model, ids).last_hidden_state, before)
    zero = [layer for layer in outcome.report.layers if "lora_B" in layer.name]
    assert zero
    assert all(layer.action == "left alone" and "zero" in layer.reason for layer in zero)
    frozen = [layer for layer in outcome.report.layers if layer.name.endswith("query.base_layer")]
    assert all(layer.action == "left alone" for layer in frozen)


# ---- Padding ----


class Pooled(nn.Module):
    """The mean over the tokens that count."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        m = attention_mask[..., None].to(x)
        return self.h((torch.relu(self.a(x)) * m).sum(1) / m.sum(1))


def padded(places: int, *, left: bool = False, count: int = 60, length: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of real tokens and of padding that looks like nothing else, their mask and their classes."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count) % 4
    real = torch.randn(4, 8, generator=generator)[y][:, None] + torch.randn(count, length, 8, generator=generator)
    filling = torch.full((count, places, 8), 7.0)
    mask = torch.cat([torch.ones(count, length), torch.zeros(count, places)], 1).long()
    x = torch.cat([real, filling], 1)
    return (x.flip(1), mask.flip(1), y) if left else (x, mask, y)


def mapping_of(x: Tensor, mask: Tensor, y: Tensor, key: str = "attention_mask") -> dict[str, Tensor]:
    value = ~mask.bool() if key == "src_key_padding_mask" else mask
    return {"x": x, key: value, "labels": y}


@pytest.mark.parametrize("places", [1, 45])
@pytest.mark.parametrize("left", [False, True])
def test_padding_does_not_count_as_data(places, left):
    x, mask, y = padded(places, left=left)
    model = Pooled()
    served(model, [mapping_of(x, mask, y)], **ONE_RECIPE)
    with torch.no_grad():
        units = model.a(x[mask.bool()])
    assert units.mean(0).abs().max() < 1e-3
    assert units.std(0).mean().item() == pytest.approx(1.0, abs=0.05)
    assert accuracy(run(model, x, mask), y) > 0.9


class Encoded(nn.Module):
    """A transformer layer between two linear layers, and the mean over the tokens that count."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key
        self.embed = nn.Linear(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.h = nn.Linear(16, 4)

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        mask = masks[self.key]
        hidden = mask if self.key == "src_key_padding_mask" else ~mask.bool()
        m = (~hidden)[..., None].to(x)
        return self.h((self.layer(self.embed(x), src_key_padding_mask=hidden) * m).sum(1) / m.sum(1))


@pytest.mark.parametrize("key", ["attention_mask", "src_key_padding_mask"])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("options", [{}, ONE_RECIPE], ids=["default", "one recipe"])
def test_padded_places_change_no_logit(key, left, options):
    model = Encoded(key).double()
    start = copy.deepcopy(model)
    logits = []
    for places in (0, 20):
        x, mask, y = padded(places, left=left)
        model.load_state_dict(start.state_dict())
        served(model, [mapping_of(x.double(), mask, y, key)], **options)
        bare = padded(0, left=left)
        logits.append(
            run(model, **{k: v for k, v in mapping_of(bare[0].double(), *bare[1:], key).items() if k != "labels"})
        )
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
    assert accuracy(logits[0], y) > 0.9


@pytest.mark.parametrize("mask", ["keep", lambda batch: batch["keep"]], ids=["key", "function"])
def test_a_mask_of_another_name_may_be_named_or_computed(mask):
    class Kept(Pooled):
        def forward(self, x: Tensor, keep: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, keep)

    x, keep, y = padded(20)
    model, plain = Kept(), Pooled()
    plain.load_state_dict(model.state_dict())
    served(plain, [mapping_of(x, keep, y)], **ONE_RECIPE)
    served(model, [{"x": x, "keep": keep, "labels": y}], mask=mask, **ONE_RECIPE)
    same_weights(model, plain)


def test_padded_tokens_with_targets_at_every_token_do_not_count():
    x, mask, _ = padded(20)
    target = x[..., :4].argmax(-1).masked_fill(mask == 0, 3)  # padding would be a class of its own
    plain, model = mlp(8), mlp(8)
    plain.load_state_dict(model.state_dict())
    options = {"forward": lambda m, batch: m(batch["x"])} | ONE_RECIPE
    served(plain, [{"x": x[:, :5], "labels": target[:, :5]}], **options)
    served(model, [{"x": x, "attention_mask": mask, "labels": target}], **options)
    same_weights(model, plain)


def classifier_of(family: str) -> Any:
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 64, "num_labels": 4, "pad_token_id": 0}
    torch.manual_seed(0)
    if family == "bert":
        config = transformers.BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **common
        )
        return transformers.BertForSequenceClassification(config)
    if family == "distilbert":
        config = transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, **common)
        return transformers.DistilBertForSequenceClassification(config)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **common,
    )
    return transformers.LlamaForSequenceClassification(config)


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_padded_places_change_no_logit_of_transformers(family):
    model = classifier_of(family).double().eval()
    start = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(48) % 4
    ids = torch.randint(10, 60, (48, 6), generator=generator)
    ids[:, 5] = 1 + y  # the class stands in the last token
    logits = []
    for places in (0, 20):
        model.load_state_dict(start)
        batch = {
            "input_ids": F.pad(ids, (0, places)),
            "attention_mask": F.pad(torch.ones_like(ids), (0, places)),
            "labels": y,
        }
        served(model, [batch], **ONE_RECIPE)
        logits.append(run(model, ids, attention_mask=torch.ones_like(ids)).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
    assert accuracy(logits[0], y) > 0.8


# ---- Heads, statistics, trained models, imbalance ----


def weak_net(strength: float) -> nn.Sequential:
    """Its features hardly move with the input."""
    model = nn.Sequential(OrderedDict(body=nn.Linear(20, 32), act=nn.Tanh(), last=nn.Linear(32, 4)))
    with torch.no_grad():
        model.body.weight.mul_(strength)
    return model


@pytest.mark.parametrize("way", ["layers=", "initialize_head_"])
def test_a_head_of_huge_weights_is_warned_of_with_advice(way):
    x, y = clusters()
    advice = ("logit", "warm", "learning rate")

    def told(strength: float) -> list[str]:
        model = weak_net(strength)
        usual = model.last.weight.norm().item()
        options: dict[str, Any] = {"layers": "last"} if way == "layers=" else {"call": sylinit.initialize_head_}
        outcome = served(model, [(x, y)], **options)
        assert accuracy(run(model, x), y) > 0.9
        assert (model.last.weight.norm().item() > 10 * usual) == (strength < 1)
        texts = [*outcome.warnings, *outcome.report.notes]
        return [text for text in texts if "last" in text and any(word in text for word in advice)]

    assert told(1e-3)
    assert not told(1.0)


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.bn, self.fc2 = nn.Linear(20, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.bn(self.fc1(x))))


@pytest.mark.parametrize("way", ["layers=", "initialize_head_"])
@pytest.mark.parametrize("size", [200, 70])
def test_a_head_behind_batchnorm_that_has_seen_no_data_fits_both_modes(way, size):
    x, y = clusters()
    x = 10 * x + 3
    model = Normalized()
    body = bits(model.fc1.weight)
    options: dict[str, Any] = {"layers": "fc2"} if way == "layers=" else {"call": sylinit.initialize_head_}
    outcome = served(model, cut(x, y, size), **options)
    assert bits(model.fc1.weight) == body
    if way == "layers=" and any("'bn'" in text for text in outcome.warnings):
        return  # the user is told
    assert accuracy(run(model, x), y) > 0.95
    with torch.no_grad():
        assert accuracy(copy.deepcopy(model).train()(x), y) > 0.95
        torch.testing.assert_close(model.bn.running_mean, model.fc1(x).mean(0), rtol=1e-2, atol=1e-2)


def trained() -> tuple[Normalized, Tensor, Tensor]:
    x, y = clusters()
    model = Normalized()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, x, y


def test_a_model_that_looks_trained_is_not_remade_unless_asked():
    model, x, y = trained()
    before = bits(model.fc1.weight), bits(model.bn.running_mean)
    outcome = attempt(model, [(x, y)])
    if outcome.served:
        assert any("initialize_head_" in text and "overwrite" in text for text in outcome.warnings)
        assert outcome.changed_besides_results == []
    else:
        check_refusal(outcome, ("trained",), ("initialize_head_", "overwrite"))
    assert (bits(model.fc1.weight), bits(model.bn.running_mean)) == before
    assert accuracy(run(model, x), y) > 0.97


@pytest.mark.parametrize("options", [{"overwrite": True}, {"layers": ["fc1", "fc2"]}], ids=["overwrite", "layers"])
def test_a_trained_model_is_remade_if_asked(options):
    model, x, y = trained()
    before = bits(model.fc1.weight)
    report = served(model, [(x, y)], **options, **ONE_RECIPE).report
    assert report["fc1"].action == "initialized"
    assert bits(model.fc1.weight) != before
    assert accuracy(run(model, x), y) > 0.95


def test_a_fresh_model_is_told_nothing_of_training():
    x, y = clusters()
    outcome = served(Normalized(), [(x, y)])
    assert not any("overwrite" in text for text in [*outcome.warnings, *outcome.report.notes])


def imbalanced() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = (torch.arange(400) % 20 == 0).long()
    return y[:, None] * 0.6 + torch.randn(400, 20, generator=generator), y


@pytest.mark.parametrize("form", ["classes", "one logit"])
def test_imbalance_is_stated_and_the_prior_is_at_hand(form):
    x, y = imbalanced()
    model = mlp(20, 2 if form == "classes" else 1)
    target = y if form == "classes" else y.float()[:, None]

    def guess() -> Tensor:
        output = run(model, x)
        return output.argmax(1) if form == "classes" else (output[:, 0] > 0).long()

    start = copy.deepcopy(model.state_dict())
    found: dict[bool, tuple[float, float]] = {}
    for prior in (False, True):
        model.load_state_dict(start)
        config = dataclasses.replace(sylinit.Config(), prior=prior)
        before = served(model, [(x, target)], config=config).report.before
        assert before.constant_accuracy == pytest.approx(0.95, abs=0.001)
        assert before.accuracy == pytest.approx((guess() == y).float().mean().item(), abs=0.005)
        assert before.balanced_accuracy == pytest.approx(balanced_accuracy(guess(), y), abs=0.005)
        found[prior] = before.accuracy, before.balanced_accuracy
    assert found[True][0] >= 0.94, "with the prior, not below the majority"
    assert found[False][1] > found[True][1] - 0.02, "without it, no class is favored"


# ---- The gain, stated ----

STATED: dict[str, tuple[Callable[[], nn.Module], Any, str, str]] = {
    "multiclass": (mlp, (X, CLASSES), "accuracy", "accuracy"),
    "binary": (lambda: mlp(20, 1), (X, ONE), "accuracy", "accuracy"),
    "multilabel": (lambda: mlp(20, 6), (X, SIX), "accuracy", "accuracy"),
    "regression": (lambda: mlp(20, 2), (X, VALUES), "r2", "R²"),
}


@pytest.mark.parametrize("task", STATED)
@pytest.mark.parametrize("size", [400, 150])
def test_the_report_states_what_the_model_does_before_training(task, size):
    make, data, field, word = STATED[task]
    model = make()
    report = served(model, cut(*data, size)).report
    output, target = run(model, X), data[1]
    actual = {
        "multiclass": lambda: accuracy(output, target),
        "binary": lambda: label_accuracy(output[:, 0], target),
        "multilabel": lambda: label_accuracy(output, target),
        "regression": lambda: r_squared(output, target),
    }[task]()
    if task == "regression":  # over all values together, or the mean over outputs
        each = sum(r_squared(output[:, i], target[:, i]) for i in range(2)) / 2
        assert min(abs(report.before.r2 - actual), abs(report.before.r2 - each)) < 0.01
        assert report.before.accuracy is None
    else:
        assert getattr(report.before, field) == pytest.approx(actual, abs=0.005)
        assert report.before.r2 is None
        loss = {
            "multiclass": lambda: F.cross_entropy(output, target),
            "binary": lambda: F.binary_cross_entropy_with_logits(output[:, 0], target),
            "multilabel": lambda: F.binary_cross_entropy_with_logits(output, target),
        }[task]()
        assert report.before.loss == pytest.approx(loss.item(), rel=0.02)
    assert word in str(report).splitlines()[0]


def test_without_a_task_the_report_states_no_accuracy():
    report = served(mlp(), [X], **ONE_RECIPE).report
    assert report.task == "none"
    assert report.before.accuracy is None
    assert report.before.r2 is None
    assert "accuracy" not in str(report).splitlines()[0]


def test_an_output_that_is_not_what_the_head_promised_is_warned_of():
    """The head is computed on features in eval mode; behind it the model spoils its logits."""
    x, y = clusters()

    class Spoiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).roll(1, 1)

    outcome = served(Spoiled(), [(x, y)], head="net.2")
    texts = [*outcome.warnings, *outcome.report.notes]
    assert any("net.2" in text and ("promise" in text or "differ" in text or "expect" in text) for text in texts)
    assert outcome.report.before.accuracy < 0.5


# ---- The head alone ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_initialize_head_computes_the_head_alone(dtype, frozen):
    x, y = clusters()
    model = mlp().to(dtype)
    model[0].requires_grad_(not frozen)
    body = bits(model[0].weight), bits(model[0].bias)
    report = served(model, [(x, y)], call=sylinit.initialize_head_).report
    assert (bits(model[0].weight), bits(model[0].bias)) == body
    assert [layer.name for layer in report.layers if layer.action == "initialized"] == ["2"]
    assert accuracy(run(model, x.to(dtype)), y) > 0.95


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_initialize_head_serves_transformers(family):
    model = classifier_of(family).eval()
    y = torch.arange(64) % 4
    ids = torch.randint(10, 60, (64, 6), generator=torch.Generator().manual_seed(0))
    ids[:, :] = torch.where(torch.arange(6) % 2 == 1, 1 + y[:, None], ids)
    name = {"llama": "score"}.get(family, "classifier")
    others = {key: bits(value) for key, value in model.state_dict().items() if not key.startswith(name)}
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": y}
    report = served(model, [batch], call=sylinit.initialize_head_).report
    assert [layer.name for layer in report.layers if layer.action == "initialized"] == [name]
    assert {key: bits(value) for key, value in model.state_dict().items() if not key.startswith(name)} == others
    features = features_into(model, name, ids)
    reference = readout_accuracy(features[:, -1] if features.ndim == 3 else features, y)
    assert reference > 0.4
    assert accuracy(run(model, ids).logits, y) >= reference - POINTS


def test_initialize_head_serves_the_modules_that_peft_saves():
    peft = pytest.importorskip("peft")
    base = classifier_of("bert")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = peft.get_peft_model(base, config).eval()
    y = torch.arange(64) % 4
    ids = torch.randint(10, 60, (64, 6), generator=torch.Generator().manual_seed(0))
    ids[:, :] = torch.where(torch.arange(6) % 2 == 1, 1 + y[:, None], ids)
    report = served(model, [{"input_ids": ids, "labels": y}], call=sylinit.initialize_head_).report
    (head,) = [layer.name for layer in report.layers if layer.action == "initialized"]
    assert "modules_to_save" in head
    reference = readout_accuracy(features_into(model, head, input_ids=ids), y)
    assert reference > 0.4
    assert accuracy(run(model, input_ids=ids).logits, y) >= reference - POINTS


def test_a_loader_of_the_usual_kind_is_served():
    x, y = clusters()
    model = mlp()
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(0))
    assert served(model, loader).report.task == "multiclass"
    assert accuracy(run(model, x), y) > 0.95


@pytest.mark.parametrize(
    ("labels", "outputs", "asked", "task"),
    [
        ("classes", 3, None, "multiclass"),
        ("classes", 1, None, "regression"),
        ("one-hot", 3, None, "multilabel"),
        ("one-hot", 3, "multi_label_classification", "multilabel"),
        ("values", 1, "regression", "regression"),
    ],
)
def test_the_task_is_that_of_transformers_own_loss(labels, outputs, asked, task):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32},
        **{"vocab_size": 50, "num_labels": outputs, "problem_type": asked},
    )
    model = transformers.BertForSequenceClassification(config)
    y = torch.arange(48) % 3
    ids = torch.randint(10, 50, (48, 8))
    ids[:, :4] = (y + 3).unsqueeze(1)
    given = {"classes": y, "one-hot": nn.functional.one_hot(y, 3).float(), "values": y.float()}[labels]
    report = sylinit.initialize_head_(model, [{"input_ids": ids, "labels": given}])
    assert report.task == task
    assert model.config.problem_type == asked
    model(input_ids=ids, labels=given).loss.backward()

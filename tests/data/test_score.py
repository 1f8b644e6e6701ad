"""What the report says of a model's outputs before training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sylinit
from conftest import vectors
from sylinit import Report


def computed(
    units: int, y: Tensor, *behind: nn.Module, x: Tensor | None = None, **options: Any
) -> tuple[nn.Module, Report]:
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, units), *behind)
    x = vectors(len(y), 12, 3)[0] if x is None else x
    return model, sylinit.initialize_(model, [(x, y)], **options)


@pytest.mark.parametrize(
    ("units", "behind"), [(1, nn.Sigmoid()), (3, nn.Sigmoid()), (3, nn.Softmax(1)), (3, nn.LogSoftmax(1))]
)
def test_probabilities_count_as_the_logits_that_they_come_from(units: int, behind: nn.Module) -> None:
    y = vectors(90, 12, 3)[1]
    target = {1: (y > 1).float().unsqueeze(1), 3: nn.functional.one_hot(y, 3).float()}[units]
    if isinstance(behind, nn.Sigmoid) and units == 3:
        target[:, 2] = target[:, 0]  # several labels
    target = target if isinstance(behind, nn.Sigmoid) else y
    torch.manual_seed(0)
    _, plain = computed(units, target)
    torch.manual_seed(0)
    _, report = computed(units, target, behind)
    assert report.before.accuracy == plain.before.accuracy
    assert report.before.loss == pytest.approx(plain.before.loss, rel=1e-4)


CONSTANT = {
    "one logit, all 1": (1, torch.ones(60)),
    "one logit, all 0": (1, torch.zeros(60)),
    "two logits, all 1": (2, torch.ones(60).long()),
    "four classes, all 2": (4, torch.full((60,), 2)),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_target_that_never_changes_is_predicted(name: str) -> None:
    units, y = CONSTANT[name]
    report = computed(units, y)[1]
    assert report.before.accuracy == 1
    assert report.before.cross_validated.accuracy == 1
    assert report.before.loss < nn.functional.cross_entropy(torch.zeros(1, max(2, units)), torch.zeros(1).long())


def test_labels_that_never_change_beside_some_that_do() -> None:
    y = torch.zeros(90, 3)
    x, classes = vectors(90, 12, 3)
    y[:, 1], y[:, 2] = 1, (classes > 0).float()
    model, _ = computed(3, y, x=x)
    outputs = model(x)
    assert bool((outputs[:, 0] < 0).all())
    assert bool((outputs[:, 1] > 0).all())


def test_cross_validation_of_noise_is_at_chance() -> None:
    """A left-out sample's class is rarer among the rest: a head that went by that would be wrong on every one."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(5):
        x, y = torch.randn(100, 12, generator=generator), torch.arange(100) % 4
        found.append(computed(4, y, x=x)[1].before.cross_validated.accuracy)
    assert 0.15 < sum(found) / len(found) < 0.45


def test_cross_validation_of_noise_in_equal_classes_is_at_chance() -> None:
    """Of a left-out sample's class there is one less than of the others, which told its bias that it is another."""
    x = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
    for prior in (0.5, 1.0):
        y = torch.arange(200) % 4
        found = computed(4, y, x=x, config=sylinit.Config(prior=prior))[1].before.cross_validated.accuracy
        assert 0.15 < found < 0.45


def test_a_label_of_which_nothing_is_known_counts_nowhere() -> None:
    y = (torch.randn(60, 3, generator=torch.Generator().manual_seed(0)) > 0).float()
    y[:, 1] = torch.nan
    before = computed(3, y)[1].before
    assert 0 < before.balanced_accuracy <= 1


@pytest.mark.parametrize("form", ["units second", "all places in one dimension"])
def test_outputs_in_the_form_of_their_loss_are_scored(form: str) -> None:
    """Tokens by a linear layer: `cross_entropy` wants units second, or places in one dimension."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.head(self.body(x).relu())
            return logits.transpose(1, 2) if form == "units second" else logits.flatten(0, 1)

    x = torch.randn(60, 7, 12, generator=torch.Generator().manual_seed(0))
    y = x[..., :4].argmax(2)
    report = sylinit.initialize_(model := Tagger(), [(x, y)])
    guess = model(x).argmax(1)
    assert report.before.accuracy == pytest.approx((guess.flatten() == y.flatten()).double().mean().item(), abs=1e-9)
    assert report.before.accuracy > 0.6
    assert "held-out samples" in report.notes[0]


def test_two_shares_that_are_asked_for_as_binary_are_two_classes() -> None:
    """They were scored as one label of which the first output is the logit."""
    x = torch.randn(90, 12, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0.8).long()
    model, report = computed(2, nn.functional.one_hot(y, 2).float(), x=x, task="binary")
    assert report.before.accuracy == (model(x).argmax(1) == y).double().mean()
    assert report.before.loss == pytest.approx(float(nn.functional.cross_entropy(model(x).detach(), y)), rel=1e-5)


def test_an_output_of_another_form_than_the_targets_is_said_to_be_unscored() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).relu())[:, ::2]

    x = torch.randn(60, 8, 12, generator=torch.Generator().manual_seed(0))
    report = sylinit.initialize_head_(Halved(), [(x, x[..., :4].argmax(2))])
    assert report.before.accuracy is None
    assert report.notes == ("head 'head': no output has the form of its targets, so how it predicts is not stated",)

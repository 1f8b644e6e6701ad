"""``code="auto"``: recipes judged on held-out samples, the model's own body among them."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sylinit
from conftest import images, small_mlp, small_resnet, vectors
from sylinit.data.tasks import Task
from sylinit.plan import choice
from sylinit.plan.choice import _best, _still_racing
from sylinit.plan.heads import Heads
from sylinit.plan.plan import Plan
from sylinit.plan.recipes import FALLBACK, RECIPES


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


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.inner, self.outer, self.head = (nn.Linear(12, width) for width in (12, 12, 12, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.outer(self.inner(x).relu()))


@pytest.mark.parametrize("name", ["half", "own-attention"])
def test_a_recipe_that_is_tried_is_that_of_its_name(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choice, "TRIED", (RECIPES["own"], RECIPES["mixed"], RECIPES[name]))
    monkeypatch.setattr(choice, "_best", lambda values, plans, failed: choice.Choice(plans[name]))
    tried, named = Residual(), Residual()
    sylinit.initialize_(tried, [vectors(300)], code="auto")
    sylinit.initialize_(named, [vectors(300)], code=name)
    assert all(map(torch.equal, tried.state_dict().values(), named.state_dict().values()))


def taken(report: sylinit.Report) -> str:
    """The recipe that the report says was taken."""
    return report.notes[0].split("'")[3]


@pytest.mark.parametrize(("make", "data"), [(small_mlp, vectors(300)), (small_resnet, images(300))])
def test_what_is_taken_is_what_its_name_gives(make: Callable[[], nn.Module], data: tuple[Tensor, Tensor]):
    auto = make()
    named = copy.deepcopy(auto)
    report = sylinit.initialize_(auto, [data], code="auto")
    assert taken(report) in RECIPES
    sylinit.initialize_(named, [data], code=taken(report))
    assert all(map(torch.equal, auto.state_dict().values(), named.state_dict().values()))


def test_recipes_that_do_the_same_are_tried_once():
    note = sylinit.initialize_(small_resnet(), [images(90)]).notes[0]
    assert "mixed 0." in note or "mixed 1." in note
    assert "half" not in note.partition("error): ")[2]  # its only Linear layer is the head


def test_where_only_a_head_is_computed_there_is_nothing_to_choose():
    report = sylinit.initialize_(nn.Linear(12, 3), [vectors()], code="auto")
    assert not [note for note in report.notes if "code='auto'" in note]


@pytest.mark.parametrize(
    ("batches", "options", "reason"),
    [
        ([torch.randn(40, 12)], {"task": "none"}, "no labels, so the code 'auto' fell back to 'pca'"),
        ([(torch.randn(8, 12), torch.arange(8) % 3)], {}, "so 'mixed' was taken"),
        ([(torch.randn(40, 12), torch.arange(40) % 3)], {"head": None}, "so 'mixed' was taken"),
        ([(torch.randn(40, 12), torch.where(torch.arange(40) < 9, 0, -100))], {}, "so 'mixed' was taken"),
    ],
)
def test_where_recipes_cannot_be_judged_one_is_taken_and_a_note_says_so(batches, options, reason):
    report = sylinit.initialize_(small_mlp(), batches, code="auto", **options)
    assert any(reason in note for note in report.notes)


def test_layers_that_are_named_are_computed_even_where_the_own_body_is_better():
    model = Fourier()
    x = torch.randn(300, 4)
    y = (torch.sin(x @ model.body.weight[0].detach() + model.body.bias[0].detach()) > 0).long()
    report = sylinit.initialize_(model, [(x, y)], layers=["body", "head"])
    assert report["body"].action == "initialized"
    assert not [note for note in report.notes if "code='auto'" in note]


@pytest.mark.parametrize("data", [vectors(90), images(90)])
def test_the_cut_into_batches_changes_nothing(data: tuple[Tensor, Tensor]):
    x, y = data[0].double(), data[1]
    whole = (small_mlp() if x.ndim == 2 else small_resnet()).double()
    apart = copy.deepcopy(whole)
    first = sylinit.initialize_(whole, [(x, y)], code="auto")
    batches = list(zip(x.split(25), y.split(25), strict=True))
    second = sylinit.initialize_(apart, batches, code="auto", offload="disk")
    assert first.notes[0] == second.notes[0]
    for one, other in zip(whole.state_dict().values(), apart.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)


def test_values_are_judged_by_their_squared_error():
    x, _ = vectors(300)
    report = sylinit.initialize_(small_mlp(classes=2), [(x, x[:, :2] + 0.1 * x[:, 2:4])], code="auto")
    scores = [float(score) for score in re.findall(r"[a-z] (-?[0-9.]+)", report.notes[0].partition("error): ")[2])]
    assert 0.5 < max(scores) < 1


class Tokens(nn.Module):
    """A logit for each class at each place of a sequence."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 5)
        self.body, self.head = nn.Linear(5, 5), nn.Linear(5, 5)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(input_ids)).relu())


def test_the_places_of_a_sequence_count_as_one_sample():
    ids = torch.randint(0, 5, (60, 7), generator=torch.Generator().manual_seed(0))
    report = sylinit.initialize_(
        Tokens(tied=False), [{"input_ids": ids, "labels": ids.roll(1, 0) % 5}], code="auto", task="multiclass"
    )
    assert "of 60 held-out samples" in report.notes[0]


@pytest.mark.filterwarnings("ignore::sylinit.SylinitWarning")
def test_a_model_whose_head_is_tied_stays_as_it_is():
    ids = torch.randint(0, 5, (60, 7), generator=torch.Generator().manual_seed(0))
    model = Tokens(tied=True)
    before = copy.deepcopy(model.state_dict())
    sylinit.initialize_(model, [{"input_ids": ids}], code="auto", task="next-token")
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_a_model_that_takes_whole_batches_only_gets_one_recipe():
    x, y = vectors(60)

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if len(batch[0]) != 60:
            raise ValueError("60 samples, please")
        return model(batch[0])

    report = sylinit.initialize_(small_mlp(), [(x, y)], code="auto", forward=forward)
    assert "60 samples, please" in report.notes[0]
    assert f"so {FALLBACK.name!r} was taken" in report.notes[0]


def test_an_interrupt_while_choosing_leaves_the_model_as_it_was():
    x, y = vectors(60)
    model = small_mlp()
    before = copy.deepcopy(model.state_dict())
    calls = 0

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return model(batch[0])

    with pytest.raises(KeyboardInterrupt):
        sylinit.initialize_(model, [(x, y)], code="auto", forward=forward)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_best_recipe_is_taken_and_of_equal_ones_the_own_body():
    own = torch.tensor([1.0, 0.0] * 50)
    better = own.clone()
    better[1] = 1.0
    plans = dict.fromkeys(RECIPES, Plan((), (), Heads({}, None, Task("none", "")), ()))
    values = {"own": own.tolist(), "half": own.tolist()}
    assert "took 'own'" in _best(values, plans, {}).notes[0]
    assert "took 'pca'" in _best(values | {"pca": better.tolist()}, plans, {}).notes[0]
    assert "took 'own'" in _best(values | {"pca": [math.nan] * 100}, plans, {}).notes[0]
    assert "took 'half'" in _best(values | {"own": [math.nan] * 100}, plans, {}).notes[0]


def test_what_is_credibly_worse_is_tried_no_further():
    generator = torch.Generator().manual_seed(0)
    best = (torch.rand(60, generator=generator) < 0.9).double()
    near = best.clone()
    near[:2] = 1 - best[:2]
    values = {"own": (1 - best).tolist(), "mixed": best.tolist(), "half": near.tolist()}
    assert _still_racing(values) == ["mixed", "half"]
    assert _still_racing({name: each[:10] for name, each in values.items()}) == list(values)  # too few to tell
    assert _still_racing({"own": [1.0] * 60, "half": [1.0] * 60}) == ["own"]  # alike on every sample
    assert _still_racing({"own": [math.nan] * 60, "half": [0.5, 1.0] * 30}) == ["half"]


def test_a_recipe_out_of_the_race_is_compared_where_both_were_tried():
    plans = dict.fromkeys(RECIPES, Plan((), (), Heads({}, None, Task("none", "")), ()))
    note = _best({"own": [0.0, 1.0] * 20, "mixed": [1.0] * 60, "half": [0.5, 1.0] * 30}, plans, {}).notes[0]
    assert "took 'mixed'" in note
    assert "scores of 60 held-out samples" in note
    assert "mixed 1.000 (+0.500 ± 0.080), half 0.750 (+0.250 ± 0.040), own 0.500 (of 40)" in note


def test_a_clear_race_ends_after_one_fold():
    model, sizes = Fourier(), []
    x = torch.randn(150, 4, generator=torch.Generator().manual_seed(0))
    y = (torch.sin(x @ model.body.weight[0].detach() + model.body.bias[0].detach()) > 0).long()

    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        sizes.append(len(batch[0]))
        return model(batch[0])

    report = sylinit.initialize_(model, [(x, y)], forward=forward)
    assert "scores of 50 held-out samples" in report.notes[0]
    assert sizes[-7:-1] == 3 * [100, 50]  # between trial run and pass, three recipes on one fold and on the rest


def test_where_the_head_stays_no_recipe_is_judged_and_the_body_is_computed():
    model = small_mlp()
    head = model[-1].requires_grad_(False)
    before = copy.deepcopy(head.state_dict())
    report = sylinit.initialize_(model, [vectors(90)])
    assert report.notes[0] == "code='auto': the head keeps its weights, and judges no recipe, so 'mixed' was taken"
    assert len(report.initialized) == len(list(model.parameters())) // 2 - 1
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x).relu()
        return self.first(x), self.second(x)


def test_of_several_heads_the_first_that_is_computed_is_judged():
    x, y = vectors(90)
    model = TwoHeads()
    model.first.requires_grad_(False)
    other = torch.full_like(y, -100)
    other[:60] = y[:60]  # so many can be judged
    report = sylinit.initialize_(model, [(x, (y, other))], head={"first": 0, "second": 1})
    assert "scores of 60 held-out samples" in report.notes[0]
    assert report["second"].code == "head"


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.mul_(0.1))


def test_each_recipe_is_tried_on_the_samples_as_they_are():
    x, y = vectors(90)
    model = WritesIntoItsInput()
    alike = copy.deepcopy(model.net)
    report = sylinit.initialize_(model, [(x.clone(), y)])
    assert report.notes[0] == sylinit.initialize_(alike, [(0.1 * x, y)]).notes[0]


@pytest.mark.parametrize("scale", [1e-12, 1e25])
def test_the_unit_of_the_values_does_not_matter(scale: float):
    x, y = vectors(90)
    values = (x[:, :2] @ torch.tensor([[1.0], [2.0]])) + y[:, None]
    model = small_mlp(classes=1)
    reports = [sylinit.initialize_(copy.deepcopy(model), [(x, values * unit)]) for unit in (1.0, scale)]
    assert taken(reports[0]) == taken(reports[1])
    scores = [[float(number) for number in re.findall(r"-?\d\.\d{3}", report.notes[0])] for report in reports]
    assert scores[0] == pytest.approx(scores[1], abs=0.01)


def test_a_failure_of_a_trial_is_told_in_a_line():
    def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if len(batch[0]) not in (5, 90):
            raise RuntimeError("this size is\n" + 100 * "not served\n")
        return model(batch[0])

    report = sylinit.initialize_(small_mlp(), [vectors(90)], forward=forward)
    told = "code='auto': the recipes could not be tried on parts of the samples (RuntimeError: this size is)"
    assert report.notes[0] == f"{told}, so 'mixed' was taken"


class Positive(nn.Module):
    """A logarithm stands behind the body: what is computed has negative outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(12, 24), nn.Linear(24, 3)
        nn.init.uniform_(self.body.weight, 0, 0.05)
        nn.init.constant_(self.body.bias, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).log())


def test_a_recipe_that_the_model_cannot_run_with_is_out_of_the_race():
    report = sylinit.initialize_(Positive(), [vectors(90)])
    assert report.notes[0].startswith("code='auto' took 'own'")
    reasons = report.notes[0].split("mixed failed (")[1].split("half failed (")
    assert all("its input holds NaN or infinite numbers" in reason for reason in reasons)


class Broken(nn.Module):
    """Its output is not finite, whatever the head gives."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.net, self.value = small_mlp(), value

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.value


def test_an_output_of_nan_is_no_prediction():
    with pytest.warns(sylinit.SylinitWarning, match="the model's output on the calibration data is not finite"):
        report = sylinit.initialize_(Broken(math.nan), [vectors(90)])
    assert "the model's output on held-out samples is not finite, so 'mixed' was taken" in report.notes[0]
    assert report.before.accuracy is None


@pytest.mark.parametrize("name", ["own", "half"])
def test_of_a_computed_body_the_report_states_what_no_layer_has_seen(name: str, monkeypatch: pytest.MonkeyPatch):
    (x, y), model = vectors(120), small_mlp()
    same = copy.deepcopy(model)
    best, worse = choice._best, {other: [0.0] * 120 for other in ("own", "mixed", "half") if other != name}
    monkeypatch.setattr(choice, "_still_racing", list)
    monkeypatch.setattr(choice, "_best", lambda values, *others: best(values | worse, *others))
    report = sylinit.initialize_(model, [(x, y)])
    alone = sylinit.initialize_(same, [(x, y)], code=name).before
    held_out = float(re.search(rf"{name} (0\.\d+)", report.notes[0].partition("error): ")[2])[1])
    stated = report.before.cross_validated.accuracy
    assert stated == pytest.approx(held_out if name == "half" else alone.cross_validated.accuracy, abs=5e-4)
    assert alone.cross_validated.accuracy != pytest.approx(held_out, abs=5e-4)


def test_what_is_held_out_for_one_head_is_not_said_of_another_that_stays(monkeypatch: pytest.MonkeyPatch):
    x, y = vectors(120)
    model = TwoHeads()
    model.first.requires_grad_(False)
    best, worse = choice._best, dict.fromkeys(("own", "mixed"), [0.0] * 120)
    monkeypatch.setattr(choice, "_still_racing", list)
    monkeypatch.setattr(choice, "_best", lambda values, *others: best(values | worse, *others))
    report = sylinit.initialize_(model, [(x, y)], head=["first", "second"])
    assert taken(report) == "half"
    assert (report["first"].action, report["second"].action) == ("left alone", "initialized")
    assert report.before.accuracy is not None
    assert report.before.cross_validated is None

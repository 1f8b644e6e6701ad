"""Bad input: each a `SylinitError` that says what was wrong and what to do, and a model that is as it was."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sylinit
from conftest import images, small_mlp, small_resnet, vectors
from sylinit.config import Config
from sylinit.errors import SylinitError, SylinitWarning


def refused(model: nn.Module, batches: Any, *words: str, **arguments: Any) -> None:
    """The call is refused in these words, and the model keeps its bits."""
    before = [(t, None if _empty(t) else t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    modes = [module.training for module in model.modules()]
    with pytest.raises(SylinitError) as caught:
        sylinit.initialize_(model, batches, **arguments)
    message = str(caught.value)
    for word in words:
        assert re.search(word, message), f"{word!r} is not in: {message}"
    assert all(value is None or torch.equal(t, value) for t, value in before)
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_pre_hooks for module in model.modules() if not _empty(*module.parameters()))


def _empty(*tensors: Tensor) -> bool:
    return any(t.is_meta or isinstance(t, nn.parameter.UninitializedTensorMixin) for t in tensors)


X, Y = vectors()


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], ["batches: there are none", "fresh"]),
        (iter(()), ["batches: there are none", "exhausted"]),
        (X, ["single tensor", r"pass \[x\]"]),
        (7, ["got int", r"pass \[\(x, y\)\]"]),
        (None, ["got NoneType"]),
        ([()], ["batch 0 is an empty tuple"]),
        ([{}], ["batch 0 holds no tensor"]),
        ([("a", "b")], ["'input 0' of batch 0 holds strings", "tokenizer", "forward="]),
        ([{"text": ["a", "b"], "labels": Y[:2]}], ["'text' of batch 0 holds strings", "forward="]),
        ([None], ["batch 0 holds no tensor"]),
        ([(X, Y), (X[:0], Y[:0])], ["batch 1 is empty", r"\[0, 12\]", "drop it"]),
        ([(X[:0], Y[:0])], ["batch 0 is empty"]),
        ([(X, Y), (X[:, :11], Y)], ["layer '0' .Linear.", "expected 12 features", r"\[60, 11\]"]),
        ([(X, Y), (X[:, None], Y)], ["batch 1", r"\[60, 1, 12\]", "same dimensions"]),
        ([(X, Y), X], ["batch 1 has no target while others have one|other inputs"]),
        ([X, (X, Y)], ["batch 0 has no target"]),
        ([(X, Y), (X, X, Y)], ["batch 1 has other inputs"]),
        ([(X, Y), (X, Y.double())], ["target of batch 1", "one kind"]),
        ([(X, X[:, :3]), (X, X[:, :4])], ["target of batch 1", r"\[60, 4\]", r"\[60, 3\]", "one kind"]),
        ([(X.expand(6, 60, 12), Y)], ["6 samples", "forward=lambda model, batch"]),
        ([(X[0], Y)], ["12 samples|60|dimension"]),
        ([(X, Y[:59])], ["batch 0 has 60 samples", r"\[59\]", "count the samples"]),
        ([(X, Y[0])], ["batch 0 has 60 samples", r"shape \[\]"]),
        ([(X, Y - 1)], ["label -1", "start at 0", "-100"]),
        ([(X, Y), (X, Y + 1)], ["labels out of range", "label 3", "3 outputs", "0 to 2"]),
        ([(X, Y + 1000)], ["labels out of range", "label 1002"]),
        ([(X, Y * 1j)], ["complex"]),
        ([(X, X.masked_fill(X > 1, float("inf")))], ["targets hold infinite", "infinite numbers", "drop"]),
        ([(X, X[:, :5])], ["head|outputs"]),
    ],
)
def test_bad_batches(batches, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(small_mlp(), batches, *words, **({"head": "4"} if "head|outputs" in words else {}))


def test_labels_out_of_range_for_a_head_given_by_name():
    refused(small_mlp(), [(X, Y + 6)], "labels out of range", "label 8", "'2' has 8 outputs", head="2")


def test_a_grouped_convolution_is_no_head():
    x, y = images(40, 4)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2), nn.AdaptiveAvgPool2d(1))
    refused(model.append(nn.Flatten()), [(x, y)], "head='2'", "Conv2d of 2 groups", "head=None", head="2")
    with pytest.warns(sylinit.SylinitWarning, match="no head was taken: '2' is a Conv2d of 2 groups"):
        report = sylinit.initialize_(model, [(x, y)])
    assert {layer.code for layer in report.layers} == {"mixed"}


def test_integer_one_hot_labels_are_shares_of_classes():
    one_hot, index = small_mlp(), small_mlp()
    index.load_state_dict(one_hot.state_dict())
    report = sylinit.initialize_(one_hot, [(X, nn.functional.one_hot(Y, 3))])
    sylinit.initialize_(index, [(X, Y)])
    assert report.task == "multiclass"
    assert "Infinity" not in report.to_json()
    for ours, theirs in zip(one_hot.parameters(), index.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_single_row_that_only_a_late_layer_meets():
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    x, y = images(1)
    with pytest.warns(SylinitWarning, match="'3' keeps its weights"):
        report = sylinit.initialize_(model, [(x, y)], head="3")
    assert report["0"].action == "initialized"
    assert report["3"].action == "left alone"
    assert "fewer than two rows of input" in report["3"].reason


def test_a_single_sample_initializes_nothing():
    model = small_mlp()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(SylinitWarning, match="'4' keeps its weights"):
        report = sylinit.initialize_(model, [(X[2:3], Y[2:3])])
    assert not report.initialized
    assert all("fewer than two rows of input" in layer.reason for layer in report.left_alone)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


class TwoInputs(nn.Module):
    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.both, self.fc = nn.Bilinear(first, second, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.both(x, x))


class Attending(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attend, self.fc = nn.MultiheadAttention(width, 1, batch_first=True), nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2)
        return self.fc(self.attend(tokens, tokens, tokens)[0].mean(1))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(9, 3)), ["layer '1' .Linear.", "9 features", r"\[60, 128\]"]),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)), ["'0' .Conv2d.", "3 channels", "60, 2"]),
        (nn.Sequential(nn.Conv2d(2, 4, 9), nn.Flatten(), nn.Linear(4, 3)), ["'0' .Conv2d.", r"kernel \[9, 9\]"]),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.Flatten(), nn.Linear(400, 3)), ["'0'", "3 channels"]),
        (nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(24, 3)), ["'0' .Conv1d.", "1 spatial"]),
        (nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(144, 3)), ["'1'", "5 channels"]),
        (nn.Sequential(nn.InstanceNorm2d(60, track_running_stats=True), nn.Flatten(), nn.Linear(9, 3)), ["'0'", "60"]),
        (nn.Sequential(nn.Flatten(), TwoInputs(128, 9)), ["layer '1.both' .Bilinear.", "9 features", "second input"]),
        (Attending(32), [r"layer 'attend.in_proj.query'", "32 features", r"\[60, 2, 64\]"]),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_a_layer(model: nn.Module, words: list[str]) -> None:
    refused(model, [images()], *words, "make the layer or the data fit|larger inputs")


@pytest.mark.parametrize("code", ["label", "lda"])
def test_labels_missing_where_the_code_needs_them(code):
    refused(small_mlp(), [X], f"code '{code}' needs labels", r"\(x, y\)", "pca", code=code)
    refused(small_mlp(), [X], "layer '2'", code={"2": code})


@pytest.mark.parametrize(
    ("code", "near"), [("mixd", "mixed"), ("PCA", "pca"), ("labels", "label"), ("k-means", "kmeans")]
)
def test_unknown_code(code, near):
    refused(small_mlp(), [(X, Y)], re.escape(repr(code)), f"did you mean .*'{near}'", "Registered: ", code=code)
    refused(small_mlp(), [(X, Y)], f"did you mean .*'{near}'", code={"0": code})


@pytest.mark.parametrize("code", [3, None, object(), 1.5, b"pca"])
def test_something_that_is_no_code(code):
    refused(small_mlp(), [(X, Y)], "code= takes", type(code).__name__, code=code)


@pytest.mark.parametrize("argument", ["layers", "head", "code"])
def test_unknown_layer_pattern(argument):
    value: Any = {"3.conv9": "pca"} if argument == "code" else "3.conv9"
    words = f"{argument}: no layer matches '3.conv9'", r"nearest names are .*'3\.conv[12]'"
    refused(small_resnet(), [images()], *words, **{argument: value})


@pytest.mark.parametrize("layers", [3, 1.5, int, object()])
def test_layers_that_cannot_select(layers):
    refused(small_mlp(), [(X, Y)], "layers= takes", layers=layers)


def test_layers_that_select_nothing():
    refused(small_mlp(), [(X, Y)], "no layer", "not selected", layers=nn.Conv2d)
    refused(small_mlp(), [(X, Y)], "no layer", layers=[])
    refused(small_mlp(), [(X, Y)], "no layer", layers=lambda name, module: False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *[({"samples": v}, ["samples", "integer of at least 2"]) for v in (0, 1, -5, 2.5, "some", True, None)],
        *[({"target": v}, ["target must be a key", "function of a batch"]) for v in (3, [1])],
        *[({"mask": v}, ["mask must be a key", "function of a batch"]) for v in (3, [1])],
        ({"target": "y"}, ["target='y'", "which has no keys"]),
        ({"mask": lambda batch: batch[0][:3]}, ["mask: expected a tensor", "60 samples", r"\[3, 12\]"]),
        *[({"config": v}, ["config must be a sylinit.Config"]) for v in (3, None, {"rows": 3})],
        *[({"train_size": v}, ["train_size", "positive integer"]) for v in (0, -5, 2.5, "some", True)],
        ({"head": "1"}, ["head='1'", "no layer"]),
        ({"head": 3}, ["head"]),
        ({"code": torch.randn(59, 4)}, ["59 rows", "60 calibration samples"]),
        ({"code": torch.randn(60)}, ["code=", r"\[60\]"]),
        ({"code": torch.full((60, 4), float("nan"))}, ["code=", "finite"]),
        ({"code": {}, "layers": "9"}, ["layers"]),
        ({"generator": 3}, ["generator"]),
        ({"progress": 3}, ["progress"]),
        ({"forward": 3}, ["forward"]),
    ],
)
def test_bad_arguments(arguments, words):
    refused(small_mlp(), [(X, Y)], *words, **arguments)


def test_a_model_that_is_no_module():
    with pytest.raises(SylinitError, match=r"model must be .*Module"):
        sylinit.initialize_(lambda x: x, [(X, Y)])


@pytest.mark.parametrize("function", [lambda x: x, lambda x: x[:5], lambda x: x.sum(), lambda x: x[None]])
def test_a_code_function_of_the_wrong_shape(function):
    words = "layer '2'", "60 rows", "at most 8 units", "units"
    refused(small_mlp(), [(X, Y)], *words, code={"2": function})


@pytest.mark.parametrize("result", [None, "text", object()])
def test_a_code_function_that_returns_no_numbers(result):
    refused(small_mlp(), [(X, Y)], "layer '0'", "code", type(result).__name__, code=lambda x: result)


def test_a_code_function_that_returns_nan():
    refused(small_mlp(), [(X, Y)], "layer '0'", "NaN", code=lambda x: x[:, :2] * float("nan"))


def test_a_code_function_that_asks_for_something_unknown():
    refused(small_mlp(), [(X, Y)], "layer '0'", "color", code=lambda x, color: x)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_frozen_parameter(name):
    model = small_mlp()
    getattr(model[2], name).requires_grad_(False)
    refused(model, [(X, Y)], "layer '2' is frozen", "unfreeze", "layers=", layers="2")
    assert sylinit.initialize_(model, [(X, Y)])["2"].reason.startswith("frozen")
    report = sylinit.initialize_(model, [(X, Y)], layers=["0", "4"])
    assert {layer.name for layer in report.initialized} == {"0", "4"}


def test_a_meta_parameter():
    model = small_mlp()
    model[2].to("meta")
    refused(model, [(X, Y)], "layer '2' is on the meta device", "to_empty")
    with torch.device("meta"):
        model = small_resnet()
    refused(model, [images()], "layer '0' is on the meta device", "materialize")


class Integers(nn.Module):
    """A linear layer whose weight is int8 with a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 16, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.to(x).T * self.scale


def test_an_integer_quantized_layer():
    model = small_mlp()
    model[2] = Integers()
    refused(model, [(X, Y)], "layer '2'", "quantized", "before quantizing", "layers=")
    report = sylinit.initialize_(model, [(X, Y)], layers=["0", "4"])
    assert {layer.name for layer in report.initialized} == {"0", "4"}
    assert report["2"].action == "left alone"


def test_a_dynamically_quantized_layer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = pytest.importorskip("torch.ao.nn.quantized.dynamic")
        model = small_mlp()
        model[2] = quantized.Linear(16, 8)
    refused(model, [(X, Y)], "layer '2'", "quantized", "before quantizing")


@pytest.mark.parametrize("lazy", [nn.LazyLinear(8), nn.LazyConv2d(6, 3), nn.LazyBatchNorm1d()])
def test_lazy_modules(lazy):
    model = nn.Sequential(nn.Linear(12, 16), lazy, nn.Linear(8, 3))
    refused(model, [(X, Y)], "layer '1'", "lazy", "run one batch through")
    refused(model, [(X, Y)], "layer '1'", "lazy", "run one batch through", layers="0")


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(), nn.LayerNorm(12), nn.BatchNorm1d(12)])
def test_a_model_without_any_layer(model):
    refused(model, [(X, Y)], "no layer to initialize")


def test_a_model_that_only_looks_up():
    refused(nn.Embedding(5, 3), [(Y, Y)], "no layer to initialize", "lookup table")


def test_a_layer_of_complex_numbers_alone():
    batches = [(X.to(torch.complex64), Y)]
    refused(nn.Sequential(nn.Linear(12, 3, dtype=torch.complex64)), batches, "no layer to initialize", "real|complex")


@pytest.mark.parametrize("value", [0.0, 1.0, 3e4])
def test_constant_inputs_are_left_as_they_were_and_the_report_says_so(value):
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    before = [p.detach().clone() for p in model.parameters()]
    for rows in (None, "all", 5):
        x = torch.full((60, 12), value)
        with pytest.warns(sylinit.SylinitWarning, match="head '2' keeps its weights: its input is constant"):
            report = sylinit.initialize_(model, [(x, Y)], code="mixed", config=Config(rows=rows))
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert "constant" in report["0"].reason
        assert "left alone: 0" in str(report)


def test_a_constant_channel_of_a_depthwise_layer_keeps_its_weights():
    x, y = images()
    x[:, 1] = 2.0
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    before = model[0].weight.detach().clone()
    report = sylinit.initialize_(model, [(x, y)])
    assert torch.equal(model[0].weight[2:], before[2:])
    assert not torch.equal(model[0].weight[:2], before[:2])
    assert "1 of 2 groups" in report["0"].reason


@pytest.mark.parametrize("code", ["mixed", "label", "lda", "pca", "kmeans"])
def test_labels_of_one_class_alone(code):
    """Constant labels tell nothing: never a crash in the linear algebra."""
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    arguments: dict[str, Any] = {"code": code, "head": None}
    if code in ("label", "lda"):
        refused(model, [(X, torch.zeros_like(Y))], "layer '0'", f"'{code}'", "same", **arguments)
    else:
        sylinit.initialize_(model, [(X, torch.zeros_like(Y))], **arguments)
        assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_labels_that_are_all_ignored_count_as_none():
    with pytest.warns(sylinit.SylinitWarning, match="every label is -100"):
        report = sylinit.initialize_(small_mlp(), [(X, torch.full_like(Y, -100))])
    assert {layer.code for layer in report.initialized} == {"pca"}


def test_a_scripted_model():
    refused(torch.jit.script(nn.Sequential(nn.Linear(12, 3))), [(X, Y)], "scripted", "script it then")


@pytest.mark.parametrize(
    ("y", "outputs", "task", "words"),
    [
        (Y, 3, "multilabel", ["class indices", r"\[samples\]", "multiclass", "as many columns"]),
        (Y, 3, "binary", ["class indices", "multiclass", "one or two outputs"]),
    ],
)
def test_a_task_that_contradicts_the_targets_is_refused(y, outputs, task, words):
    refused(small_mlp(classes=outputs), [(X, y)], f"task='{task}'", *words, task=task)


@pytest.mark.parametrize(("y", "outputs", "task"), [(X[:, :3], 3, "multiclass"), (2.0 * (Y == 1) - 1, 1, "binary")])
def test_values_that_contradict_the_task_are_warned_of_or_refused(y, outputs, task):
    with (
        pytest.warns(sylinit.SylinitWarning, match=f"task='{task}': the targets are real numbers other than 0 and 1"),
        pytest.raises(SylinitError, match=f"task='{task}': the targets are real numbers other than 0 and 1"),
    ):
        sylinit.initialize_(small_mlp(classes=outputs), [(X, y)], task=task)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("owm", ["did you mean 'own'", "Recipes for a whole model: auto, own, half"]),
        ({"0": "own"}, ["'own' is a recipe for a whole model", "pass code='own'"]),
        ({"0": "auto"}, ["'auto' is a recipe for a whole model"]),
    ],
)
def test_recipes_are_named_where_a_code_is_unknown(code, words):
    refused(small_mlp(), [(X, Y)], *words, code=code)


def test_a_mask_by_its_key_needs_mappings():
    refused(small_mlp(), [(X, Y)], "mask='valid'", "has no keys", "function of the batch", mask="valid")


def test_class_indices_as_real_numbers_are_warned_of_with_the_remedy():
    with pytest.warns(sylinit.SylinitWarning, match=r"class indices must be integers, as y\.long\(\)"):
        sylinit.initialize_(small_mlp(), [(X, Y.float())])


@dataclass
class Pair:
    x: Tensor
    y: Tensor


def test_a_batch_of_which_no_samples_can_be_picked_gets_one_recipe():
    report = sylinit.initialize_(
        small_mlp(), [Pair(X, Y)], forward=lambda model, batch: model(batch.x), target=lambda batch: batch.y
    )
    assert "samples cannot be picked from a Pair), so 'mixed' was taken" in report.notes[0]
    assert report.before.accuracy > 0.8

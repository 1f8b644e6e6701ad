"""`initialize_` on the kinds of model and data that users have."""

from __future__ import annotations

import copy
import re
import warnings
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import sylinit
from conftest import images, small_mlp, small_resnet, vectors
from sylinit.config import Config
from sylinit.solvers.exact import Exact


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in model.state_dict().values()])


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize(("make", "data"), [(small_mlp, vectors), (small_resnet, images)])
def test_without_a_training_step_the_network_is_far_better_than_chance(make, data):
    x, y = data(600)
    model = make()
    before = accuracy(model, x[300:], y[300:])
    sylinit.initialize_(model, [(x[:300], y[:300])])
    after = accuracy(model, x[300:], y[300:])
    assert after > 0.7 > before


@pytest.mark.parametrize(
    ("sizes", "rows", "apart"),
    [
        *[(sizes, rows, False) for sizes in ([60], [1] * 60, [59, 1]) for rows in (None, 200, "all")],
        *[([20, 40], rows, "disk") for rows in (None, 200, "all")],
        ([59, 1], None, "disk"),
        ([7] * 8 + [4], "all", "disk"),
        ([1] * 60, 200, "disk"),
    ],
)
def test_the_cut_into_batches_does_not_matter(sizes, rows, apart):
    """Whether they are joined to one or run interleaved."""
    x, y = images()
    whole = small_resnet().double()
    cut = copy.deepcopy(whole)
    x = x.double()
    sylinit.initialize_(whole, [(x, y)], config=Config(rows=rows))
    sylinit.initialize_(cut, zip(x.split(sizes), y.split(sizes), strict=True), config=Config(rows=rows), offload=apart)
    assert torch.allclose(weights(whole), weights(cut), rtol=1e-7, atol=1e-8)


def test_a_rerun_gives_the_same_bits_and_the_seed_matters():
    x, y = images()

    def run(seed):
        model = small_resnet()
        sylinit.initialize_(model, [(x, y)], config=Config(rows=100), generator=torch.Generator().manual_seed(seed))
        return weights(model)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_the_result_does_not_depend_on_the_weights_it_replaces():
    x, y = images()
    first, second = small_resnet(), small_resnet()
    assert not torch.equal(first[0].weight, second[0].weight)
    for model in (first, second):
        sylinit.initialize_(model, [(x, y)], code="mixed")
    assert torch.equal(first[0].weight, second[0].weight)


def test_units_have_unit_variance_and_zero_mean_and_logits_are_small():
    x, y = vectors(300)
    model = small_mlp()
    seen = {}
    sylinit.initialize_(model, [(x, y)])
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda module, args, out, name=name: seen.__setitem__(name, out))
    logits = model(x)
    for name in ("0", "2"):
        assert torch.allclose(seen[name].mean(0), torch.zeros(()), atol=1e-4)
        variance = seen[name].detach().var(0, correction=0)
        assert float(variance.max()) < 1.001
        assert float((variance > 0.999).float().mean()) > 0.7  # the others are held by the floor
    assert torch.allclose(logits.mean(0), torch.zeros(()), atol=1e-5)
    assert float(logits.detach().std(correction=0)) == pytest.approx(Config().logit_deviation, rel=1e-3)


def test_a_fresh_normalization_starts_at_half_scale_and_the_function_is_the_same():
    x, y = images()
    half, whole = small_resnet(), small_resnet()
    whole.load_state_dict(half.state_dict())
    report = sylinit.initialize_(half, [(x, y)])
    sylinit.initialize_(whole, [(x, y)], config=Config(norm_scale=1.0))
    norms = [m for m in half.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    for norm in norms:
        assert torch.equal(norm.weight, torch.full_like(norm.weight, Config().norm_scale))
        assert torch.equal(norm.bias, torch.full_like(norm.bias, Config().norm_offset * Config().norm_scale))
    assert torch.allclose(half.eval()(x), whole.eval()(x), atol=1e-2)  # up to the eps of the normalizations
    reasons = [layer.reason for layer in report.layers if layer.action == "recalibrated"]
    assert reasons == ["running statistics, weight 0.5, bias 0.25"] * len(norms)


def test_with_many_training_samples_normalizations_are_as_pytorch_makes_them_and_filters_of_unit_variance():
    x, y = images()
    model, fewer, by_default = small_resnet(), small_resnet(), small_resnet()
    report = sylinit.initialize_(model, [(x, y)], code="mixed", train_size=Config().few_samples)
    sylinit.initialize_(fewer, [(x, y)], code="mixed", train_size=Config().few_samples - 1)
    note = [note for note in sylinit.initialize_(by_default, [(x, y)], code="mixed").notes if " few" in note]
    assert torch.equal(weights(fewer), weights(by_default))
    assert re.search(f"^{len(x)} samples are few.*; pass train_size= if it is on 3,000 or more", *note)
    assert not any(" few" in note for note in report.notes)
    assert not any(
        " few" in n for n in sylinit.initialize_(small_mlp(), [vectors()]).notes
    )  # nothing in it depends on their number
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert torch.equal(norm.bias, torch.zeros_like(norm.bias))
    assert {layer.reason for layer in report.layers if layer.action == "recalibrated"} == {"running statistics"}
    # The unit's variance is what the normalization reads; the floor holds some below it.
    variance = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).running_var
    assert float(variance.max()) < 1.05
    assert float((variance > 0.95).float().mean()) > 0.7
    before_norm = next(m for m in fewer.modules() if isinstance(m, nn.Conv2d) and m.bias is None)
    lengths = before_norm.weight.flatten(1).norm(dim=1)
    assert torch.allclose(lengths, torch.full_like(lengths, 2**0.5))


@pytest.mark.parametrize("started", ["trained", "at zero", "frozen", "not selected"])
def test_a_normalization_that_is_not_fresh_keeps_its_scale(started):
    x, y = images()
    model = small_resnet()
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        if started == "trained":
            norm.bias[0] = 0.1
        elif started == "at zero":
            norm.weight.zero_()
    norm.weight.requires_grad_(started != "frozen")
    before, bias = norm.weight.detach().clone(), norm.bias.detach().clone()
    layers = (lambda name, module: module is not norm) if started == "not selected" else None
    constant = pytest.warns(sylinit.SylinitWarning, match="constant") if started == "at zero" else nullcontext()
    with constant:  # what follows a scale of zero reads zeros, the head among it
        sylinit.initialize_(model, [(x, y)], layers=layers)
    assert torch.equal(norm.weight, before)
    assert torch.equal(norm.bias, bias)


def test_batchnorm_has_the_pooled_statistics_of_its_own_input():
    x, y = images()
    model = small_resnet()
    sylinit.initialize_(model, zip(x.split(17), y.split(17), strict=True))
    seen = {}
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, module in norms.items():
        module.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0]))
    with torch.no_grad():
        model.eval()(x)
    for name, module in norms.items():
        assert torch.allclose(module.running_mean, seen[name].mean((0, 2, 3)), atol=1e-5)
        assert torch.allclose(module.running_var, seen[name].var((0, 2, 3)), rtol=1e-4)


def test_a_report_is_walked_through_layer_by_layer_and_read_by_name():
    report = sylinit.initialize_(small_mlp(), [vectors()])
    assert [layer.name for layer in report] == [layer.name for layer in report.layers] != []
    assert len(report) == len(report.layers)
    assert all(report[layer.name] is layer for layer in report)
    assert report.layers[0].name in report
    assert "no such layer" not in report


def test_only_selected_layers_change_and_statistics_after_them():
    x, y = images()
    model = small_resnet()
    sylinit.initialize_(model, [(x, y)])
    before = copy.deepcopy(model.state_dict())
    report = sylinit.initialize_(model, [(x + 1, y)], layers=["3.conv2", "7"])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    # (the running variance after a layer of unit variance is the same number again)
    assert changed - {"3.norm2.running_var"} == {"3.conv2.weight", "3.norm2.running_mean", "7.weight", "7.bias"}
    assert report["3.norm2"].action == "recalibrated"
    assert report["3.norm2"].reason == "running statistics"
    assert report["0"].action == "left alone"
    assert report["1"].reason == "its input did not change"


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("3", {"3.conv1", "3.conv2"}),
        ("3.conv?", {"3.conv1", "3.conv2"}),
        (nn.Linear, {"7"}),
        ([nn.Linear, "0"], {"0", "7"}),
        (lambda name, module: name.endswith("1"), {"3.conv1"}),
    ],
)
def test_layers_are_selected_by_pattern_type_or_predicate(layers, expected):
    report = sylinit.initialize_(small_resnet(), [images()], layers=layers)
    assert {layer.name for layer in report.initialized} == expected


@pytest.mark.parametrize(("rows", "read"), [(None, 4096), (5000, 5000), (30_000, 20_000), ("all", 20_000)])
def test_codes_fitted_on_rows_read_at_most_20000(rows, read):
    def code(x, units):
        counts.append(len(x))
        return x[:, :units]

    counts = []
    sylinit.initialize_(nn.Linear(4, 3), [torch.randn(30_000, 4)], code=code, config=Config(rows=rows), samples=30_000)
    assert counts == [read]


def test_code_by_pattern():
    report = sylinit.initialize_(small_resnet(), [images()], code={"0": "pca", "3.conv1": "label"})
    assert [report[name].code for name in ("0", "3.conv1", "3.conv2", "7")] == ["pca", "label", "mixed", "head"]


def test_without_labels_the_default_falls_back_to_pca_and_says_so():
    x, _ = images()
    report = sylinit.initialize_(small_resnet(), [x])
    assert {layer.code for layer in report.initialized} == {"pca"}
    assert "no labels" in str(report)


def test_a_regressor_predicts_without_training():
    x, _ = vectors(400)
    target = x[:, :2] @ torch.randn(2, 2) + 5
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 2))
    sylinit.initialize_(model, [(x[:300], target[:300])])
    with torch.no_grad():
        error = (model(x[300:]) - target[300:]).square().mean(0)
    assert bool((error < 0.5 * target.var(0)).all())


def test_a_scalar_target_and_a_single_logit():
    x, y = vectors(300, classes=2)
    regressor = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 1))
    sylinit.initialize_(regressor, [(x, x[:, 0] + 3)])
    with torch.no_grad():
        assert float((regressor(x)[:, 0] - x[:, 0] - 3).square().mean()) < 0.5 * float(x[:, 0].var())
    classifier = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 1))
    report = sylinit.initialize_(classifier, [(x, y)])
    assert report["2"].code == "head"
    assert float(((classifier(x)[:, 0] > 0) == (y == 1)).float().mean()) > 0.7


def test_a_layer_of_one_output_is_no_head_where_another_has_two():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.attention = nn.Linear(12, 2), nn.Linear(12, 1)

        def forward(self, bag):
            return self.fc((self.attention(bag).softmax(1) * bag).sum(1))

    report = sylinit.initialize_(Pooled(), [(torch.randn(40, 5, 12), torch.arange(40) % 2)], code="mixed")
    assert report["fc"].code == "head"
    assert report["attention"].code == "mixed"


def test_the_head_is_what_makes_the_output_not_what_is_registered_last():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(3, 3), nn.Linear(12, 3)

        def forward(self, x):
            return self.head(self.body(x).relu())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = sylinit.initialize_(First(), [vectors()], code="mixed")
        assert [report[name].code for name in ("body", "head")] == ["mixed", "head"]
    with pytest.warns(sylinit.SylinitWarning, match="promised"):  # what comes behind it is no prediction any more
        report = sylinit.initialize_(First(), [vectors()], code="mixed", head="body")
    assert [report[name].code for name in ("body", "head")] == ["head", "mixed"]


def test_no_head_where_one_is_expected_is_warned_of():
    x, _ = vectors()
    batches = [(x, x[:, :2])]
    with pytest.warns(sylinit.SylinitWarning, match="no head was computed.*name the head by head=") as caught:
        report = sylinit.initialize_(small_mlp(), batches, code="mixed")
    assert {layer.code for layer in report.initialized} == {"mixed"}
    assert "'4' has 3 outputs" in str(report)
    assert caught[0].filename == __file__  # the user's own line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = small_mlp()
        before = weights(model)
        with pytest.raises(sylinit.SylinitWarning):
            sylinit.initialize_(model, batches)
        assert torch.equal(weights(model), before)
        sylinit.initialize_(model, batches, head=None)


def test_a_head_whose_targets_are_all_the_same_is_told_of_and_zero():
    x, _ = vectors()
    model = small_mlp()
    report = sylinit.initialize_(model, [(x, torch.tensor([[0.1, 0.2, 0.7]]).repeat(60, 1))])
    assert "all its rows have the same target" in report["4"].reason
    assert not model[4].weight.any()
    assert report["4"].decoding_error == 1


def test_soft_labels_equal_class_indices():
    x, y = vectors()
    hard, soft = small_mlp(), small_mlp()
    sylinit.initialize_(hard, [(x, y)])
    sylinit.initialize_(soft, [(x, nn.functional.one_hot(y, 3).float())])
    assert torch.allclose(weights(hard), weights(soft), atol=1e-5)


def test_token_labels_and_ignored_ones():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (40, 7), generator=generator)
    means = torch.randn(3, 12, generator=generator)
    x = means[y] + 0.3 * torch.randn(40, 7, 12, generator=generator)
    model = small_mlp()
    hidden = y.masked_fill(torch.rand(40, 7, generator=generator) < 0.5, -100)
    sylinit.initialize_(model, [(x, hidden)])
    assert float((model(x).argmax(-1) == y).float().mean()) > 0.9


def test_more_than_512_classes():
    x = torch.randn(1200, 30)
    y = torch.arange(1200) % 600
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 600))
    report = sylinit.initialize_(model, [(x, y)])
    assert report["2"].code == "head"
    assert report["2"].rank == 40


def test_shared_modules_and_tied_weights_are_computed_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(12, 12)
            self.tied = nn.Linear(12, 12)
            self.tied.weight = self.first.weight
            self.head = nn.Linear(12, 3)

        def forward(self, x):
            return self.head(self.tied(self.first(self.first(x).relu()).relu()).relu())

    model = Shared()
    report = sylinit.initialize_(model, [vectors()], code="mixed")
    assert {layer.name for layer in report.initialized} == {"first", "head"}
    assert "tied" in report["tied"].reason
    assert model.tied.weight is model.first.weight


def test_parameters_that_share_their_memory_are_tied():
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    model[2].weight.data = model[0].weight.data
    report = sylinit.initialize_(model, [vectors()])
    assert report["2"].reason == "its weight is tied to that of '0'"
    assert report["0"].action == "initialized"


def test_a_layer_tied_to_a_parameter_of_the_model_itself_is_left_alone():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 6))
            self.body, self.fc = nn.Linear(6, 6), nn.Linear(6, 3, bias=False)
            self.fc.weight = self.table

        def forward(self, index):
            return self.fc(self.body(nn.functional.embedding(index, self.table)).relu().mean(1))

    model = Table()
    before = model.table.clone()
    report = sylinit.initialize_(model, [(torch.randint(0, 3, (40, 5)), torch.arange(40) % 3)], overwrite=True)
    assert report["fc"].reason == "its weight is tied to that of '(the model itself)'"
    assert torch.equal(model.table, before)


def test_an_integer_parameter_of_the_model_itself_is_no_quantized_layer():
    class Ordered(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
            self.order = nn.Parameter(torch.arange(12).flip(0), requires_grad=False)

        def forward(self, x):
            return super().forward(x[:, self.order])

    model = Ordered()
    report = sylinit.initialize_(model, [vectors()])
    assert [layer.name for layer in report.initialized] == ["0", "2"]
    assert report["(the model itself)"].action == "left alone"
    assert torch.equal(model.order, torch.arange(12).flip(0))


def test_a_head_that_is_tied_to_an_embedding_is_left_alone():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.inner(self.embed(x)).relu())

    tokens = torch.randint(0, 9, (30, 6))
    before = (model := Language()).embed.weight.clone()
    report = sylinit.initialize_(model, [(tokens, tokens)], overwrite=True)
    assert {layer.name for layer in report.initialized} == {"inner"}
    assert "tied to that of 'embed'" in report["head"].reason
    assert torch.equal(before, model.embed.weight)


def test_a_head_that_is_tied_to_a_layer_that_is_computed_is_warned_of():
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    model[2].weight = model[0].weight
    x, y = vectors()
    with pytest.warns(sylinit.SylinitWarning, match="head '2' predicts nothing yet: its weight is tied to that of '0'"):
        report = sylinit.initialize_(model, [(x, y)])
    assert report["2"].action == "left alone"
    assert any("predicts nothing yet" in note for note in report.notes)


def test_the_nearest_names_are_named_once():
    with pytest.raises(sylinit.SylinitError, match=r"the nearest names are 'fc', 'head'$"):
        sylinit.initialize_(
            nn.Sequential(OrderedDict(fc=nn.Linear(12, 8), head=nn.Linear(8, 3))), [vectors()], layers="zzz"
        )


def test_a_selected_layer_does_not_change_one_that_is_tied_to_it():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3))
    model[1].weight = model[0].weight
    before = model[0].weight.clone()
    report = sylinit.initialize_(model, [vectors()], layers=["1", "2"])
    assert {layer.name for layer in report.initialized} == {"2"}
    assert torch.equal(before, model[0].weight)


def test_filters_that_feed_a_normalization_have_the_length_of_hes_start():
    model = small_resnet()
    sylinit.initialize_(model, [images()], code=sylinit.mixed(0.25))
    for conv in (model[3].conv1, model[3].conv2):
        assert torch.allclose(conv.weight.flatten(1).norm(dim=1), torch.full((6,), 2**0.5))
    lengths = model[0].weight.detach().flatten(1).norm(dim=1)  # has a bias: unit variance instead
    assert float(lengths.max() / lengths.min()) > 1.1


def test_lengths_may_differ_from_batch_to_batch():
    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv1d(1, 4, 9, stride=4), nn.Linear(4, 3)

        def forward(self, wave):
            return self.fc(self.conv(wave.unsqueeze(1)).relu().mean(2))

    y = torch.arange(10) % 3
    batches = [(torch.randn(10, length), y) for length in (300, 400)]
    assert sylinit.initialize_(Waves(), batches)["fc"].code == "head"

    tokens = [(torch.randn(10, length, 12), torch.randint(0, 3, (10, length))) for length in (5, 7)]
    assert sylinit.initialize_(small_mlp(), tokens)["4"].code == "head"  # class indices of each token


def test_inputs_may_lie_in_any_way_where_the_user_calls_the_model():
    x, y = torch.randn(6, 30, 12), torch.arange(30) % 3
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    report = sylinit.initialize_(model, [(x, y)], forward=lambda model, batch: model(batch[0]).mean(0))
    assert report.samples == 30
    nested = [{"images": {"left": x[:2]}}]  # no labels, and the tensors lie deeper
    report = sylinit.initialize_(model, nested, forward=lambda model, batch: model(batch["images"]["left"]))
    assert report.samples == 2


def test_the_targets_of_a_mapping_are_not_rounded_to_the_models_dtype():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12, 1)

        def forward(self, x):
            return self.fc(x)

    x = torch.randn(40, 12)
    target = 1000 + 0.1 * x[:, :1]
    ways = [Named().bfloat16(), Named().bfloat16()]
    for model, batch in zip(ways, ((x, target), {"x": x, "labels": target}), strict=True):
        with pytest.warns(sylinit.SylinitWarning, match="promised"):  # bfloat16 rounds the outputs, not the targets
            sylinit.initialize_(model, [batch])
    assert torch.equal(weights(ways[0]), weights(ways[1]))
    assert bool(ways[1].fc.weight.any())


def test_several_inputs_mappings_and_forward():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 3)

        def forward(self, left, right):
            return self.head((self.a(left) + self.b(right)).relu())

    x, y = vectors()
    ways = [Two().double() for _ in range(3)]
    state = ways[0].state_dict()
    for model in ways:
        model.load_state_dict(state)
    sylinit.initialize_(ways[0], [(x, x.flip(1), y)])
    sylinit.initialize_(ways[1], [{"left": x, "right": x.flip(1), "labels": y}])
    sylinit.initialize_(
        ways[2], [(x, y)], forward=lambda model, batch: model(batch[0].double(), batch[0].double().flip(1))
    )
    assert torch.equal(weights(ways[0]), weights(ways[1]))
    assert torch.allclose(weights(ways[0]), weights(ways[2]))


def test_a_layer_that_the_data_never_reaches_or_not_with_every_batch():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.high, self.never = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head((self.low if x.mean() < 0 else self.high)(x))

    x, y = vectors()
    before = (model := Routed()).never.weight.clone()
    report = sylinit.initialize_(model, [(x - 5, y), (x + 5, y), (x - 6, y)], offload="disk")  # kept apart
    assert report["low"].rows == 120
    assert report["high"].rows == 60
    assert report["head"].rows == 180
    assert report["never"].reason == "the data never reached it"
    assert torch.equal(before, model.never.weight)


class Routed(nn.Module):
    """Experts, each of which meets its own rows only."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(12, 8) for _ in range(3)), nn.Linear(8, 3)

    def forward(self, x):
        choice = (x[:, 0] > 0).long() + 2 * (torch.arange(len(x)) == 17)
        out = x.new_zeros(len(x), 8)
        for number, expert in enumerate(self.experts):
            out[choice == number] = expert(x[choice == number])
        return self.head(out)


def test_an_expert_that_met_fewer_than_two_rows_is_left_alone():
    x, y = vectors()
    x[17, 0] = -1.0
    before = (model := Routed()).experts[2].weight.clone()
    report = sylinit.initialize_(model, [(x, y)], code="mixed")
    assert report["experts.0"].rows + report["experts.1"].rows == 59
    assert "fewer than two rows of input" in report["experts.2"].reason
    assert torch.equal(model.experts[2].weight, before)
    assert report["head"].action == "initialized"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_models_of_other_precision(dtype):
    x, y = vectors(300)
    model = small_mlp().to(dtype)
    sylinit.initialize_(model, [(x, y)])
    assert model[0].weight.dtype == dtype
    assert accuracy(model, x.to(dtype), y) > 0.7


def test_autocast_and_inference_mode_around_the_call():
    x, y = vectors(300)
    model = small_mlp()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        sylinit.initialize_(model, zip(x.split(50), y.split(50), strict=True))
    assert accuracy(model, x, y) > 0.7
    model(x).sum().backward()  # weights written under inference mode still train
    assert model[0].weight.grad is not None


def test_weights_that_autocast_has_cast_before_are_cast_again():
    x, y = vectors()
    ways = [small_mlp(), small_mlp()]
    ways[1].load_state_dict(ways[0].state_dict())
    for model, looked in zip(ways, (False, True), strict=True):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            if looked:
                model(x)
            sylinit.initialize_(model, [(x, y)])
            inside = model(x)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(inside, model(x))
    assert torch.equal(weights(ways[0]), weights(ways[1]))


def test_a_compiled_model_runs_as_it_was_written():
    x, y = vectors()
    plain, broken = small_mlp(), torch.compile(small_mlp(), backend=never)
    broken.load_state_dict({f"_orig_mod.{name}": value for name, value in plain.state_dict().items()})
    inside = copy.deepcopy(plain)
    inside[0].compile(backend=never)
    for model in (plain, broken, inside):
        assert sylinit.initialize_(model, [(x[:30], y[:30]), (x[30:], y[30:])])["0"].action == "initialized"
    assert torch.equal(weights(plain), weights(broken))
    assert torch.equal(weights(plain), weights(inside))


def never(graph: object, inputs: object) -> object:
    raise AssertionError("compiled")


def test_a_users_hook_on_attention_sees_its_real_output():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.fc = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 3)
            self.attend.register_forward_hook(lambda module, args, out: seen.append(out[0]) or (out[0] + 5, out[1]))
            self.fc.register_forward_pre_hook(lambda module, args: met.append(args[0]))

        def forward(self, x):
            return self.fc(self.attend(x, x, x)[0].mean(1))

    seen, met = [], []
    x, y = torch.randn(30, 4, 12), torch.arange(30) % 3
    model = Net()
    sylinit.initialize_(model, [(x, y)])
    with torch.no_grad():
        model(x)
    assert torch.allclose(seen[-2], seen[-1], atol=1e-5)  # those before are of the trial run
    assert torch.allclose(met[-2], met[-1], atol=1e-5)


def test_transformer_encoder_layers_are_reached_inside_the_fast_path():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3))
    x, y = torch.randn(40, 5, 16), torch.arange(40) % 3
    report = sylinit.initialize_(model, [(x, y)])
    assert len(report.initialized) == 2 * (4 + 2) + 1
    assert not [layer for layer in report.left_alone if "normalization" not in layer.reason]


MET: list[torch.Tensor] = []
"""What attention gave, where nothing that belongs to a model is put back or watched."""


class Attention(nn.Module):
    """Attention that goes on without a mask where the mask is wrong."""

    def __init__(self, batch_first: bool, mask: torch.Tensor | None = None) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first).double()
        self.head = nn.Linear(8, 3).double()
        self.mask = mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.attention.batch_first else x.transpose(0, 1)
        try:
            y = self.attention(y, y, y, attn_mask=self.mask)[0]
        except RuntimeError:
            y = self.attention(y, y, y)[0]
        y = y if self.attention.batch_first else y.transpose(0, 1)
        MET.append(y)
        return self.head(y.mean(1))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", [None, torch.ones(3, 3)])
def test_attention_is_computed_once_for_its_projection_and_its_output(batch_first, mask, monkeypatch):
    x, y = torch.randn(40, 5, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64), torch.arange(40) % 3
    model = Attention(batch_first, mask)
    whole = copy.deepcopy(model)
    sylinit.initialize_(whole, [(x, y)], code="mixed", config=Config(rows="all"))
    attend, calls = torch.nn.functional.softmax, []
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda *a, **k: calls.append(1) or attend(*a, **k))
    batches = list(zip(x.split(15), y.split(15), strict=True))
    MET.clear()
    sylinit.initialize_(model, batches, code="mixed", config=Config(rows="all"), offload="disk")
    assert len(calls) == 2 + len(batches)  # two of the trial run
    assert torch.allclose(weights(model), weights(whole), atol=1e-8)
    met = torch.cat(MET[2:])
    with torch.no_grad():
        MET.clear()
        model(x)
    assert torch.allclose(met, MET[0]), "what the pass went on with is what the finished layer computes"
    assert torch.allclose(met.flatten(0, 1).mean(0), met.new_zeros(8), atol=1e-6), "the heads' mean was met"


def test_constant_inputs_are_left_alone():
    x, y = vectors()
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 3))
    before = weights(model)
    with pytest.warns(sylinit.SylinitWarning, match="head '1' keeps its weights: its input is constant"):
        report = sylinit.initialize_(model, [(torch.ones_like(x), y)], code="mixed")
    assert "constant" in report["0"].reason
    assert torch.equal(before, weights(model))


def test_fewer_rows_than_dimensions_equal_the_exact_solver(monkeypatch):
    x, y = vectors(count=20, dim=50)
    x = x.double()
    models = [nn.Sequential(nn.Linear(50, 12), nn.ReLU(), nn.Linear(12, 3)).double() for _ in range(2)]
    reports = [sylinit.initialize_(models[0], [(x, y)], code="mixed")]
    monkeypatch.setattr("sylinit.solvers.solve.SOLVERS", [Exact()])
    reports.append(sylinit.initialize_(models[1], [(x, y)], code="mixed"))
    assert [report["0"].solver for report in reports] == ["row-space", "exact"]
    with torch.no_grad():
        one, other = (model[0](x) for model in models)
    assert torch.allclose(one, other, atol=1e-6)


def test_progress_is_reported_for_every_site():
    calls = []
    sylinit.initialize_(small_resnet(), [images()], code="mixed", progress=lambda *event: calls.append(event))
    assert [done for done, _, _ in calls] == list(range(1, 8))
    assert {total for _, total, _ in calls} == {7}


def test_the_report_prints_saves_and_plots(tmp_path):
    report = sylinit.initialize_(small_resnet(), [images()])
    text = str(report)
    assert all(layer.name in text for layer in report.layers)
    assert report.to_json(tmp_path / "report.json").startswith("{")
    assert (tmp_path / "report.json").stat().st_size > 500
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 5000
    assert all(layer.residual < 1e-10 and layer.dead_units == 0 for layer in report.initialized)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("code", "classes"), [("mixed", 4), ("mixed", 600), ("random", 4), ("kmeans", 4)])
def test_the_default_device_of_the_caller_changes_nothing(code, count, classes):
    """As after ``torch.set_default_device("cuda")``, of a model and data on the CPU; "meta" is on every machine.

    One batch runs in the caller's thread; several stay apart and run in threads of their own.
    """
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.Flatten(), nn.LazyLinear(classes))
    x, y = torch.randn(12, 3, 8, 8), torch.arange(12) * (classes - 1) // 11
    batches = list(zip(x.chunk(count), y.chunk(count), strict=True))
    model(x)
    other = copy.deepcopy(model)
    sylinit.initialize_(model, batches, code=code, offload="disk")
    with torch.device("meta"):
        sylinit.initialize_(other, batches, code=code, offload="disk")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))

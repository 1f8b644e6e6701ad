"""Several processes on one machine, over gloo: one result, bit for bit, and one failure, nobody left waiting."""

from __future__ import annotations

import copy
import datetime
import math
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import sylinit
from conftest import images, small_mlp, small_resnet, vectors
from sylinit.config import Config
from sylinit.errors import SylinitError
from sylinit.runtime.processes import ProcessFailedError

pytestmark = pytest.mark.distributed

DEADLINE = 120
"""Seconds after which a process that waits for another gives up."""

Batches = list[tuple[Tensor, Tensor]]


CALLS: list[int] = []
"""Of `Fails`, which may not note them itself: batches that run interleaved leave no state in a model."""


class Fails(nn.Module):
    """Raises in one process, after so many calls: a trial run makes two."""

    def __init__(self, rank: int, error: type[BaseException] = RuntimeError, after: int = 0) -> None:
        super().__init__()
        self.rank, self.error, self.after = rank, error, after
        CALLS.clear()

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(len(x))
        if dist.get_rank() == self.rank and len(CALLS) > self.after:
            raise self.error("broken here")
        return x


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return small_resnet().double()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return small_mlp().double()


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(90, 12), nn.ReLU(), nn.Linear(12, 3)).double()


def halves(x: Tensor, y: Tensor, rank: int, size: int, *, uneven: bool = False) -> Batches:
    """This rank's consecutive share of the data; uneven: rank r gets r + 1 batches."""
    x, y = x.double().tensor_split(size)[rank], y.tensor_split(size)[rank]
    cuts = rank + 1 if uneven else 1
    return list(zip(x.tensor_split(cuts), y.tensor_split(cuts), strict=True))


def absolute(x: Tensor) -> Tensor:
    return x.abs()[:, :6]


def partly_labeled() -> tuple[Tensor, Tensor]:
    """The last half, which is all that some processes have, is without labels."""
    x, y = images()
    return x, torch.where(torch.arange(len(y)) < 28, y, -100)


def rare() -> tuple[Tensor, Tensor]:
    """A third class that only the last process has."""
    x, y = vectors(90)
    return x, torch.where(torch.arange(90) > 85, 2, y % 2)


def whole_batches(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """In the last process, only the batch that is there; a trial run on a few samples passes."""
    x = batch[0]
    last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1
    if last and 5 < len(x) < 90 // (dist.get_world_size() if dist.is_initialized() else 1):
        raise RuntimeError("only whole batches")
    return model(x)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, Tensor], dict[str, Any]]] = {
    "everything": (resnet, images(), {"config": Config(rows="all")}),
    "sampled": (resnet, images(), {"config": Config(rows=100)}),
    "a code of rows": (mlp, vectors(), {"code": absolute, "config": Config(rows="all")}),
    "k-means": (mlp, vectors(), {"code": "kmeans", "config": Config(rows="all")}),
    "few rows": (wide, vectors(40, 90), {"config": Config(rows="all")}),
    "a given code": (mlp, vectors(), {"code": torch.arange(300.0).sin().view(60, 5), "config": Config(rows="all")}),
    "some without labels": (resnet, partly_labeled(), {"config": Config(rows="all")}),
    "auto": (mlp, vectors(90), {"code": "auto", "config": Config(rows="all")}),
    "a rare class": (mlp, rare(), {"code": "auto", "config": Config(rows="all")}),
    "auto untried": (mlp, vectors(90), {"code": "auto", "forward": whole_batches, "config": Config(rows="all")}),
    "without labels": (resnet, images(), {"config": Config(rows="all"), "layers": ["0", "3.conv1"]}),
}


def run_case(
    name: str, rank: int, size: int, group: Any, *, uneven: bool = False, wrap: bool = False, apart: bool = False
) -> Any:
    make, (x, y), arguments = CASES[name]
    arguments = {"code": "mixed", **arguments}
    model = make()
    batches: Any = halves(x, y, rank, size, uneven=uneven)
    if name == "without labels":
        batches = [x for x, _ in batches]
    called = nn.parallel.DistributedDataParallel(model) if wrap else model
    report = sylinit.initialize_(called, batches, group=group, offload="disk" if apart else False, **arguments)
    layers = [(layer.name, layer.action, layer.rows, layer.solver) for layer in report.layers]
    return model.state_dict(), layers, report.before


def interrupting(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but Ctrl-C comes when the others have begun."""

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return collective(*args, **kwargs)

    return interrupted


def run_failure(name: str, rank: int, size: int, group: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One process fails; returns what was raised here, and whether the model is as it was."""
    last = size - 1
    x, y = images()
    batches: Any = halves(x, y, rank, size, uneven=True)
    model = resnet()
    arguments: dict[str, Any] = {}
    if name in ("in the model", "at the end of the model", "in the model of the first", "interrupted"):
        place = {"in the model": 3, "at the end of the model": len(model), "in the model of the first": 0}.get(name, 2)
        who = 0 if name == "in the model of the first" else last
        model.insert(place, Fails(who, KeyboardInterrupt if name == "interrupted" else RuntimeError))
    elif name in ("in the pass", "in a pass of batches that stay apart"):
        model.insert(3, Fails(last, after=2))
        arguments["offload"] = "disk" if name.endswith("apart") else False
    elif name == "bad data" and rank == last:
        batches[-1][0][-1, -1, -1, -1] = math.nan
    elif name == "no data" and rank == last:
        batches = []
    elif name == "broken iterator" and rank == last:
        batches = (1 // 0 for _ in range(3))
    elif name == "other targets" and rank == last:
        batches = [(x, y.double()) for x, y in batches]
    elif name == "bad argument" and rank == last:
        arguments["samples"] = -1
    elif name == "bad layer" and rank == last:
        arguments["layers"] = "nothing"
    elif name == "in a code":

        def code(x: Tensor) -> Tensor:
            return x[:, : 1 // (dist.get_rank() != last)]

        arguments["code"] = {"3.conv2": code}
    elif name == "in progress":

        def progress(done: int, total: int, layer: str) -> None:
            if rank == last and done == 4:
                raise RuntimeError("broken here")

        arguments["progress"] = progress
    elif name == "in the last progress":

        def progress(done: int, total: int, layer: str) -> None:
            if rank == last and done == total:
                raise RuntimeError("broken here")

        arguments["progress"] = progress
    elif name == "interrupted while others wait" and rank == last:
        monkeypatch.setattr(dist, "all_reduce", interrupting(dist.all_reduce))
    before = copy.deepcopy(model.state_dict())
    raised: tuple[str, str] | None = None
    try:
        sylinit.initialize_(model, batches, group=group, **arguments)
    except BaseException as error:
        raised = (type(error).__name__, str(error))
    same = all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    hooks = any(module._forward_pre_hooks for module in model.modules())
    return raised, same and not hooks and all(module.training for module in model.modules())


FAILURES = {
    "in the model": "RuntimeError",
    "in the model of the first": "RuntimeError",
    "at the end of the model": "RuntimeError",
    "in the pass": "RuntimeError",
    "in a pass of batches that stay apart": "RuntimeError",
    "interrupted": "KeyboardInterrupt",
    "interrupted while others wait": "KeyboardInterrupt",
    "bad data": "SylinitError",
    "no data": "SylinitError",
    "broken iterator": "ZeroDivisionError",
    "other targets": "SylinitError",
    "bad argument": "SylinitError",
    "bad layer": "SylinitError",
    "in a code": "ZeroDivisionError",
    "in progress": "RuntimeError",
    "in the last progress": "RuntimeError",
}


def work(rank: int, size: int, folder: str) -> None:
    """Everything that one process does; its results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=DEADLINE),
    )
    group = dist.group.WORLD
    done: dict[str, Any] = {}
    try:
        for name in CASES:
            done[name] = run_case(name, rank, size, group)
        done["uneven"] = run_case("everything", rank, size, group, uneven=True)
        done["apart"] = run_case("everything", rank, size, group, uneven=True, apart=True)
        done["wrapped"] = run_case("everything", rank, size, group, uneven=True, wrap=True)
        for name in FAILURES:
            with pytest.MonkeyPatch.context() as monkeypatch:
                done[name] = run_failure(name, rank, size, group, monkeypatch)
        done["afterwards"] = run_case("everything", rank, size, group)
    except BaseException:
        done["crash"] = traceback.format_exc()
    torch.save(done, f"{folder}/{rank}.pt")
    dist.barrier(group)
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of 2 or 4 processes did."""
    size = request.param
    folder: Path = tmp_path_factory.mktemp(f"processes{size}")
    mp.spawn(work, (size, str(folder)), nprocs=size)
    done = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
    for rank, each in enumerate(done):
        assert "crash" not in each, f"process {rank} after {list(each)}:\n{each['crash']}"
    return done


def equal_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(value.numpy().tobytes() == other[key].numpy().tobytes() for key, value in one.items())


@pytest.mark.parametrize("name", [*CASES, "uneven", "apart", "wrapped", "afterwards"])
def test_every_process_ends_with_the_same_bits(results, name):
    state, *said = results[0][name]
    start = CASES.get(name, CASES["everything"])[0]().state_dict()
    assert not torch.equal(state["0.weight"], start["0.weight"])
    for other, *said_there in (done[name] for done in results[1:]):
        assert equal_bits(state, other)
        assert said_there == said


@pytest.mark.parametrize("name", [*CASES, "uneven", "apart", "wrapped", "afterwards"])
def test_the_split_over_processes_does_not_matter(results, name):
    """To rounding, the result is that of one process with all of the data."""
    alone, layers, before = run_case(name if name in CASES else "everything", 0, 1, None)
    state, records, before_there = results[0][name]
    assert records == layers
    assert before_there.accuracy == before.accuracy
    assert before_there.balanced_accuracy == before.balanced_accuracy
    assert before_there.loss == (before.loss and pytest.approx(before.loss))
    assert before_there.constant_accuracy == before.constant_accuracy
    for key, value in alone.items():
        torch.testing.assert_close(state[key], value, rtol=1e-7, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")


def test_the_solvers_are_those_meant(results):
    assert {name: solver for name, _, _, solver in results[0]["few rows"][1]}["0"] == "row-space"
    assert {name: rows for name, _, rows, _ in results[0]["sampled"][1]}["0"] == 100


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_of_one_is_a_failure_of_all(results, name):
    guilty = 0 if name == "in the model of the first" else len(results) - 1
    for rank, done in enumerate(results):
        raised, restored = done[name]
        assert raised is not None, f"process {rank} went on"
        assert restored, f"process {rank} is not as it was"
        kind, message = raised
        if rank == guilty or name == "other targets":
            assert kind == FAILURES[name]
        else:
            assert kind == ProcessFailedError.__name__
            assert f"process {guilty} of the group failed: {FAILURES[name]}" in message


def test_a_failure_elsewhere_is_a_sylinit_error():
    assert issubclass(ProcessFailedError, SylinitError)

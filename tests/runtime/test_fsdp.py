"""Models cut over two processes by `fully_shard`, over gloo: computed as if they were whole, and cut again."""

from __future__ import annotations

import datetime
import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard, distribute_tensor

import sylinit
from conftest import Residual, images, small_resnet
from sylinit.config import Config
from sylinit.errors import SylinitError
from sylinit.runtime.processes import ProcessFailedError

pytestmark = pytest.mark.distributed

DEADLINE = 120
"""Seconds after which a process that waits for another gives up."""

SIZE = 2


class Tied(nn.Module):
    """Two layers with one weight, a layer that is left alone, a frozen one, and a forward of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 3)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(9)
        self.frozen = nn.Linear(9, 9).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(x.mean((1, 3)).repeat(1, 2)[:, :9])
        return self.head(self.norm(self.second(self.first(x).relu()).relu()))

    def other(self, x: Tensor) -> Tensor:
        return self(x)


def trainable(name: str, module: nn.Module) -> bool:
    return all(parameter.requires_grad for parameter in module.parameters())


def whole(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return (Tied() if kind.startswith("tied") else small_resnet()).double()


def each_block(model: nn.Module, **arguments: Any) -> nn.Module:
    """As users do it: every block on its own, then the rest."""
    for module in model.modules():
        if isinstance(module, (Residual, nn.LayerNorm)):
            fully_shard(module, **arguments)
    return fully_shard(model, **arguments)


def sharded(kind: str) -> nn.Module:
    model = whole(kind)
    if kind == "a group":
        fully_shard([model[0], model[1]])
        return fully_shard(model)
    if kind == "hybrid":
        return each_block(model, mesh=init_device_mesh("cpu", (1, SIZE), mesh_dim_names=("replicate", "shard")))
    if kind == "other dimension":
        return each_block(model, shard_placement_fn=lambda p: Shard(min(p.ndim - 1, 1)))
    if kind == "tied, less precision":  # FSDP computes in float32 what it stores in float64
        return each_block(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    if kind == "offloaded":
        return each_block(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    if kind == "used before":
        with torch.no_grad():
            each_block(model.eval())(images()[0].double())  # FSDP leaves the outermost parameters gathered
        return model.train()
    if kind == "tied, other forward":
        register_fsdp_forward_method(each_block(model), "other")
        return model
    return each_block(model)


KINDS = [
    "blocks",
    "a group",
    "hybrid",
    "other dimension",
    "tied, less precision",
    "offloaded",
    "used before",
    "tied",
    "tied, other forward",
    "batches apart",
]


def compute(model: nn.Module, kind: str, rank: int, size: int, group: Any, **arguments: Any) -> list[str]:
    """Process r has r + 1 batches."""
    x, y = images()
    x, y = x.double().tensor_split(size)[rank], y.tensor_split(size)[rank]
    batches = list(zip(x.tensor_split(rank + 1), y.tensor_split(rank + 1), strict=True))
    if kind == "batches apart":
        arguments["offload"] = "disk"
    if kind == "tied, other forward":
        arguments["forward"] = lambda model, batch: model.other(batch[0])
    report = sylinit.initialize_(model, batches, group=group, config=Config(rows="all"), layers=trainable, **arguments)
    return [f"{layer.name} {layer.kind} {layer.action} {layer.rows}" for layer in report.layers]


def full(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.full_tensor() if hasattr(value, "full_tensor") else value.clone() for key, value in state(model)}


def state(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]


def seen(model: nn.Module) -> list[Any]:
    """What must survive a failure, bit for bit, and what must survive a success."""
    traits = [
        (name, type(module), module.training, repr(module._forward_pre_hooks), repr(module._forward_hooks))
        for name, module in model.named_modules()
    ]
    methods = [(name, key) for name, module in model.named_modules() for key in vars(module)]
    return [*traits, *methods, *((name, id(value), type(value)) for name, value in state(model))]


def local_bits(model: nn.Module) -> list[bytes]:
    tensors = [value.to_local() if hasattr(value, "to_local") else value for _, value in state(model)]
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


def run_kind(kind: str, rank: int, group: Any) -> dict[str, Any]:
    model = sharded(kind)
    if kind == "used before":
        assert not any(hasattr(parameter, "full_tensor") for parameter in model[0].parameters())
        model.reshard()
    before = seen(model)
    if kind == "used before":
        model.unshard()
    layers = compute(model, kind, rank, SIZE, group)
    unchanged = seen(model) == before
    result = full(model)
    # Through FSDP itself, which must know of the new weights, and a training step.
    x, y = images()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    with torch.no_grad():
        outputs = model.eval()(x.double()).clone()
    model.train()
    nn.functional.cross_entropy(model(x.double()).double(), y).backward()
    optimiser.step()
    return {
        "layers": layers,
        "unchanged": unchanged,
        "state": result,
        "outputs": outputs,
        "sharded": sum(isinstance(module, FSDPModule) for module in model.modules()),
        "trained": full(model),
    }


class Fails(nn.Module):
    """Raises in the last process."""

    def forward(self, x: Tensor) -> Tensor:
        if dist.get_rank() == SIZE - 1:
            raise RuntimeError("broken here")
        return x


def run_failure(where: str, rank: int, group: Any) -> dict[str, Any]:
    model = small_resnet().double()
    if where == "model":
        model.insert(4, Fails())
    each_block(model)

    def progress(done: int, total: int, name: str) -> None:
        if rank == SIZE - 1 and where == "progress" and done == total:
            raise RuntimeError("broken here")

    before, bits = seen(model), local_bits(model)
    raised = None
    try:
        compute(model, "blocks", rank, SIZE, group, progress=progress)
    except BaseException as error:
        raised = type(error)
    return {"raised": raised, "restored": seen(model) == before and local_bits(model) == bits}


def refusals(rank: int, group: Any) -> dict[str, str]:
    """Models that cannot be computed so, and what is said of them."""
    mesh = init_device_mesh("cpu", (SIZE,))
    parallel = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)).double()
    parallel[0].weight = nn.Parameter(distribute_tensor(parallel[0].weight.detach(), mesh, [Shard(0)]))
    first = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)).double()
    cases = {
        "no group": (sharded("blocks"), None),
        "tensor parallel": (parallel, group),
        "the first FSDP": (FullyShardedDataParallel(first, device_id=torch.device("cpu")), group),
    }
    said = {}
    for name, (model, its_group) in cases.items():
        bits = local_bits(model)
        with pytest.raises(SylinitError) as caught:
            sylinit.initialize_(model, [(torch.randn(20, 8).double(), torch.arange(20) % 3)], group=its_group)
        said[name] = str(caught.value)
        assert local_bits(model) == bits
    return said


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=SIZE,
        timeout=datetime.timedelta(seconds=DEADLINE),
    )
    group = dist.group.WORLD
    jobs: dict[str, Callable[..., Any]] = {kind: functools.partial(run_kind, kind) for kind in KINDS}
    jobs |= {f"failure in {where}": functools.partial(run_failure, where) for where in ("model", "progress")}
    jobs |= {"refusals": refusals, "afterwards": functools.partial(run_kind, "blocks")}
    done: dict[str, Any] = {}
    try:
        for name, job in jobs.items():
            done[name] = job(rank, group)
    except BaseException:
        done["crash"] = traceback.format_exc()
    torch.save(done, f"{folder}/{rank}.pt")
    dist.barrier(group)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("sharded")
    mp.spawn(work, (str(folder),), nprocs=SIZE)
    done = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(SIZE)]
    for rank, each in enumerate(done):
        assert "crash" not in each, f"process {rank} after {list(each)}:\n{each['crash']}"
    return done


@pytest.fixture(scope="module")
def alone() -> Callable[[str], dict[str, Any]]:
    """The same model, never sharded, in one process."""

    @functools.cache
    def run(kind: str) -> dict[str, Any]:
        model = whole(kind)
        layers = compute(model, kind, 0, 1, None)
        result = full(model)
        with torch.no_grad():
            outputs = model.eval()(images()[0].double())
        return {"layers": layers, "state": result, "outputs": outputs}

    return run


@pytest.mark.parametrize("kind", [*KINDS, "afterwards"])
def test_the_result_is_that_of_one_process_with_the_whole_model(results, alone, kind):
    expected = alone(kind)
    start = dict(state(whole(kind)))
    for done in results:
        got = done[kind]
        assert got["layers"] == expected["layers"]
        assert any(not torch.equal(start[key], value) for key, value in got["state"].items())
        for key, value in expected["state"].items():
            torch.testing.assert_close(got["state"][key], value, rtol=1e-7, atol=1e-8)
            assert torch.equal(got["state"][key], results[0][kind]["state"][key])


@pytest.mark.parametrize("kind", [*KINDS, "afterwards"])
def test_fsdp_goes_on_with_the_new_weights(results, alone, kind):
    """It is in its place, computes what the whole model computes, and trains."""
    tolerance = 1e-4 if kind == "tied, less precision" else 1e-6
    for done in results:
        got = done[kind]
        assert got["unchanged"]
        assert got["sharded"] > 1
        expected = alone(kind)["outputs"]
        torch.testing.assert_close(got["outputs"].double(), expected, rtol=tolerance, atol=tolerance)
        assert all(bool(value.isfinite().all()) for value in got["trained"].values())
        moved = {key for key, value in got["trained"].items() if not torch.equal(value, got["state"][key])}
        assert {"7.weight", "head.weight"} & moved
        assert not any(key.startswith("frozen") for key in moved)


@pytest.mark.parametrize("where", ["model", "progress"])
def test_a_failure_of_one_leaves_every_shard_as_it_was(results, where):
    for rank, done in enumerate(results):
        assert done[f"failure in {where}"]["raised"] is (RuntimeError if rank == SIZE - 1 else ProcessFailedError)
        assert done[f"failure in {where}"]["restored"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no group", ["parameter '0.weight'", "ranks [", "expected group=", "pass group="]),
        (
            "tensor parallel",
            ["parameter '0.weight'", "S(0)|Shard(0)", "expected a plain tensor", "before making it parallel"],
        ),
        ("the first FSDP", ["'(the model itself)'", "FullyShardedDataParallel", "before wrapping", "fully_shard"]),
    ],
)
def test_what_is_refused_and_why(results, case, words):
    for done in results:
        for word in words:
            assert any(form in done["refusals"][case] for form in word.split("|"))

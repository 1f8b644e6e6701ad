"""The Lightning callback: once before the first step, on one device, with DDP and sharded, never on resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

import sylinit
from conftest import small_mlp, vectors

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy  # noqa: E402

from sylinit.integrations.lightning import SylvesterInitialization  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::sylinit.SylinitWarning"),
    pytest.mark.filterwarnings("ignore:.*num_workers.*"),
]


class Module(lightning.LightningModule):
    """The usual kind: forward is the network."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.net, self.rate = small_mlp(), rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch, number):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)


class StepsOnly(Module):
    """One without a forward of its own."""

    forward = lightning.LightningModule.forward


class ByHand(StepsOnly):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def loader(count: int = 60) -> DataLoader:
    return DataLoader(TensorDataset(*vectors(count)), 16, shuffle=True)


def trainer(folder, *callbacks, **options):
    known = {"max_steps": 2, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    known |= {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, **options}
    return lightning.Trainer(default_root_dir=folder, callbacks=list(callbacks), **known)


@pytest.mark.parametrize("kind", [Module, StepsOnly])
def test_the_module_starts_from_the_training_data(kind, tmp_path):
    callback, module = SylvesterInitialization(code="mixed"), kind()
    trainer(tmp_path, callback).fit(module, loader())
    assert [layer.name for layer in callback.report.initialized] == ["net.0", "net.2", "net.4"]
    assert callback.report["net.4"].code == "head"
    expected = small_mlp()
    sylinit.initialize_(expected, [vectors()], code="mixed", train_size=60)
    for mine, theirs in zip(module.net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_order_of_training_data_stays(tmp_path):
    def seen(*callbacks):
        lightning.seed_everything(0)
        module, batches = Module(), []

        def keep(net, args):
            if net.training:
                batches.append(args[0].clone())

        module.net.register_forward_pre_hook(keep)
        trainer(tmp_path, *callbacks).fit(module, loader())
        return batches

    assert all(torch.equal(a, b) for a, b in zip(seen(), seen(SylvesterInitialization()), strict=True))


def test_nothing_is_logged_of_a_run_that_is_no_step(tmp_path):
    module = StepsOnly()
    own = trainer(tmp_path, SylvesterInitialization(), max_steps=0)
    own.fit(module, loader())
    assert "log" not in vars(module)
    assert "loss" not in own.logged_metrics


def test_training_that_is_resumed_is_left_alone(tmp_path):
    own = trainer(tmp_path, SylvesterInitialization())
    own.fit(Module(0.1), loader())
    own.save_checkpoint(tmp_path / "two.ckpt")
    again = SylvesterInitialization()
    trainer(tmp_path, again, max_steps=3).fit(Module(0.1), loader(), ckpt_path=tmp_path / "two.ckpt")
    assert again.report is None


def test_a_second_fit_of_a_trained_module_is_left_alone(tmp_path):
    callback, module = SylvesterInitialization(), Module(0.1)
    own = trainer(tmp_path, callback)
    own.fit(module, loader())
    first = callback.report
    own.fit_loop.epoch_loop.max_steps = 4
    own.fit(module, loader())
    assert callback.report is first


def test_only_the_head_and_batches_of_one_s_own(tmp_path):
    callback = SylvesterInitialization(layers="head", batches=[vectors(40)])
    module = Module()
    before = module.net[0].weight.clone()
    trainer(tmp_path, callback).fit(module, loader())
    assert [layer.name for layer in callback.report.initialized] == ["net.4"]
    assert callback.report.samples == 40
    assert torch.equal(module.net[0].weight, before)


def test_what_cannot_be_served_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(sylinit.SylinitError, match="optimizes by itself"):
        trainer(tmp_path, SylvesterInitialization()).fit(ByHand(), loader())
    both = {"a": loader(), "b": loader()}
    with pytest.raises(sylinit.SylinitError, match="pass batches="):
        trainer(tmp_path, SylvesterInitialization()).fit(Module(), both)
    with pytest.raises(sylinit.SylinitError, match="'cod'"):
        SylvesterInitialization(cod="pca")
    with pytest.raises(sylinit.SylinitError, match="forward must be"):
        SylvesterInitialization(forward="step")


class Sharded(Module):
    """Cut over the processes by `fully_shard`, layer by layer."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in (*(layer for layer in self.net if isinstance(layer, nn.Linear)), self.net):
            fully_shard(layer, mesh=mesh)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)  # Lightning wants a state to restore


def strategy(kind: str) -> Any:
    """That of Lightning by its name here."""
    if kind == "ddp":
        return kind
    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
    return ModelParallelStrategy(**sizes, process_group_backend="gloo", save_distributed_checkpoint=False)


def two_processes(kind: str, folder: Path) -> None:
    """What each of the two processes runs."""
    lightning.seed_everything(int(os.environ.get("LOCAL_RANK", 0)))  # the modules differ until DDP makes them equal
    callback, module = SylvesterInitialization(), {"ddp": Module, "sharded": Sharded}[kind]()
    own = trainer(folder, callback, strategy=strategy(kind), devices=2)
    own.fit(module, loader())
    state = module.net.state_dict()
    state = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    torch.save((state, callback.report.samples), folder / f"{own.global_rank}.pt")
    own.save_checkpoint(folder / "two.ckpt")
    again = SylvesterInitialization()
    own = trainer(folder, again, strategy=strategy(kind), devices=2, max_steps=3)
    own.fit(type(module)(), loader(), ckpt_path=folder / "two.ckpt")
    assert again.report is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "sharded"])
def test_two_processes_read_their_shares_and_end_with_equal_weights(kind, tmp_path):
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, __file__, kind, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (first, count), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert count == other == 60
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    expected = small_mlp()
    x, y = vectors()
    order = torch.cat([torch.arange(0, 60, 2), torch.arange(1, 60, 2)])
    sylinit.initialize_(expected, [(x[order], y[order])], train_size=60)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4)


def test_fsdp_strategy_initializes_before_it_wraps_the_module_and_not_again():
    """The two hooks by hand: Lightning runs this strategy on CUDA only."""
    setting = {"strategy": FSDPStrategy(), "ckpt_path": None, "world_size": 1, "global_step": 0}
    own, module = SimpleNamespace(**setting), Module()
    with pytest.raises(sylinit.SylinitError, match="pass batches="):
        SylvesterInitialization().setup(own, module, "fit")
    callback = SylvesterInitialization(batches=[vectors(40)])
    callback.setup(own, module, "validate")
    assert callback.report is None
    callback.setup(own, module, "fit")
    first = callback.report
    assert first.samples == 40
    callback.on_train_start(own, module)
    assert callback.report is first
    resumed = SylvesterInitialization(batches=[vectors(40)])
    resumed.setup(SimpleNamespace(**{**setting, "ckpt_path": "two.ckpt"}), Module(), "fit")
    assert resumed.report is None


if __name__ == "__main__":
    two_processes(sys.argv[1], Path(sys.argv[2]))

"""The examples, run as a user runs them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import sylinit

pytestmark = pytest.mark.distributed

EXAMPLE = Path(__file__).parents[1] / "examples" / "distributed.py"

RUNS = [("bare", 2), ("fsdp", 2), ("ddp", 4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What torchrun left behind: the weights of every process of every run, all started at once."""
    folder = tmp_path_factory.mktemp("torchrun")
    started = []
    for wrap, size in RUNS:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)]
        command = [*torchrun, str(EXAMPLE), "--wrap", wrap, "--save", str(folder / f"{wrap}-{{rank}}.pt")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    for process in started:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
        assert "accuracy before training" in said
    return folder


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_distributed", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def alone(example: ModuleType) -> dict[str, Tensor]:
    """The weights of one process that has all of the data."""
    model = example.make_model()
    sylinit.initialize_(model, example.share(*example.make_data(600, seed=0), batch=50))
    return model.state_dict()


@pytest.mark.parametrize(("wrap", "size"), RUNS)
def test_torchrun_gives_every_process_the_weights_of_one_process(folder, example, alone, wrap, size):
    runs = [torch.load(folder / f"{wrap}-{rank}.pt") for rank in range(size)]
    runs = [{key.removeprefix("module."): value for key, value in run.items()} for run in runs]
    start = example.make_model().state_dict()
    for key, value in alone.items():
        torch.testing.assert_close(runs[0][key], value, rtol=1e-4, atol=1e-5)
        assert all(run[key].numpy().tobytes() == runs[0][key].numpy().tobytes() for run in runs)
    assert not any(torch.equal(start[key], runs[0][key]) for key in ("0.weight", "3.weight", "8.weight"))

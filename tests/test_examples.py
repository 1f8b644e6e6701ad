"""The examples, run as a user runs them."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

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


NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"


def test_the_notebook_runs_cell_by_cell_and_shows_its_reports():
    pytest.importorskip("matplotlib")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert len(cells) <= 15
    names: dict[str, Any] = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        *statements, last = ast.parse("".join(cell["source"])).body
        exec(compile(ast.Module(statements, []), str(NOTEBOOK), "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names))
        else:
            exec(compile(ast.Module([last], []), str(NOTEBOOK), "exec"), names)
    assert any(shown_one is names["report"] for shown_one in shown)
    page = names["report"]._repr_html_()
    assert page.index("before training: accuracy") < page.index("<details>")
    assert "data:image/png" in names["result"]._repr_html_()
    said = {text.split(":")[0]: float(text.split(":")[1].split("%")[0]) for text in shown if isinstance(text, str)}
    assert said["random weights"] < 30
    assert said["computed, not trained"] > 85
    assert said["even or odd, head computed"] > 85


def test_the_notebook_is_type_checked(tmp_path):
    api = pytest.importorskip("mypy.api")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    program = tmp_path / "quickstart.py"
    program.write_text("\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    said, errors, status = api.run(["--config-file", str(NOTEBOOK.parents[1] / "pyproject.toml"), str(program)])
    assert status == 0, said + errors

"""Ctrl-C, sent to the commands as a terminal sends it: they say what was kept and how to go on, and exit with 130."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SLOW_MODEL = """
import pathlib, time
from torch import nn

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        if len(x) > 500:  # the calibration data, after the trial runs on few samples
            pathlib.Path("running").touch()
            time.sleep(3)
        return self.head(x.flatten(1))
"""


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A command in its own process group, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "sylinit", *arguments],
        cwd=folder, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


def stop(process: subprocess.Popen[str], once: Callable[[], bool]) -> tuple[int, str]:
    """Send the whole group what Ctrl-C sends, once the condition holds; returns exit code and stderr."""
    limit = time.monotonic() + 200
    while not once():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_init_says_that_nothing_was_written(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_MODEL)
    process = start(tmp_path, "init", "slow:Slow", "--data", "digits", "--samples", "1000")
    code, said = stop(process, (tmp_path / "running").exists)
    assert code == 130
    assert "stopped: nothing was written; the same command starts again" in said
    assert "Traceback" not in said
    assert not (tmp_path / "weights.safetensors").exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_compare_says_how_many_runs_are_kept(tmp_path: Path, workers: str) -> None:
    results = tmp_path / "out" / "results.jsonl"
    process = start(
        tmp_path, "compare", "mlp", "--data", "digits", "--shots", "2", "--epochs", "10", "--seeds", "500",
        "--initializations", "he-normal", "--grid", "0.01", "--workers", workers, "--out", "out",
    )  # fmt: skip
    code, said = stop(process, lambda: results.exists() and results.read_text().count("\n") >= 3)
    assert code == 130
    kept = results.read_text().count("\n")
    assert 3 <= kept < 501
    assert f"stopped: {kept} of 501 runs are kept in out/results.jsonl; the same command goes on from there" in said
    assert "Traceback" not in said

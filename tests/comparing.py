"""An experiment small enough to run, and records of it that nobody ran."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from sylinit.comparison.experiment import Experiment
from sylinit.comparison.runner import Task, Tasks
from sylinit.comparison.store import Record

TINY = Experiment("digits", "mlp", "he-normal", shots=2, epochs=2, setting=(("points", 2),))


def record(experiment: Experiment, after: float) -> Record:
    result = {
        "after": after, "before": 0.1, "area": 0.2, "diverged": False, "curve": [[0.0, 0.1], [10.0, after]],
        "init_seconds": 1.0, "total_seconds": 9.0,
    }  # fmt: skip
    return Record(experiment, result, {})


def tasks_of(run: Callable[[Experiment], dict[str, Any]]) -> Tasks:
    """Every task is `run`, and needs nothing beforehand."""
    return {name: Task(run, lambda experiments, report: None) for name in ("train", "finetune", "time")}


def call_as_shell(
    capsys: pytest.CaptureFixture[str], run: Callable[[list[str]], Any], *arguments: object
) -> tuple[int, str, str]:
    """Run an entry point as the shell does; returns exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as stop:
        run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def assert_one_message(called: tuple[int, str, str], message: str) -> None:
    """A command failed, and said why without a traceback."""
    code, _, err = called
    assert code == 1
    assert "error:" in err
    assert message in err
    assert "Traceback" not in err

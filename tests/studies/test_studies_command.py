"""The command ``python -m studies``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from comparing import assert_one_message, call_as_shell, tasks_of
from studies import __main__ as command
from sylinit.comparison import terminal

pytestmark = pytest.mark.studies


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Run the command as the shell does; returns exit code, stdout and stderr."""
    return call_as_shell(capsys, partial(terminal.run_app, command.app), *arguments)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.console, "_width", 160)


def test_help_shows_an_example() -> None:
    result = CliRunner().invoke(command.app, ["--help"])
    assert result.exit_code == 0
    assert "python -m studies fewshot" in result.output


def test_the_figure_of_a_part_shows_what_there_is_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"before": 0.1, "after": 0.5, "area": 0.3, "diverged": False, "curve": [[0, 0.1]], "init_seconds": 1}
    monkeypatch.setattr(command, "TASKS", tasks_of(lambda e: {**result, "total_seconds": 2.0}))
    drawn: dict[str, list[int]] = {}
    monkeypatch.setattr(
        command, "save", lambda figure, path: drawn.setdefault(path.name, []).append(len(figure.axes[0].lines))
    )
    for part in ((), ("--only", "sylinit,lsuv")):
        code, out, _ = call(capsys, "fewshot", "--quick", "--workers", "1", "--out", tmp_path, *part)
        assert code == 0
        assert ("he-normal" in out) == (not part)
    assert drawn
    assert all(first == second for first, second in drawn.values())


def test_more_seeds_than_the_preset_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "learning-rate", "--quick", "--seeds", "7", "--dry-run", "--out", tmp_path)
    assert code == 0
    assert f"{2 * 2 * 4 * 7} to report" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fewshots"], "did you mean 'fewshot'"),
        (["report"], "no results"),
        (["time", "--epochs", "3"], "time trains nothing"),
        (["codes", "--precision", "half"], "--precision half: expected float32 or bfloat16"),
        (["codes", "--quick", "--precision", "float32"], "codes --quick has none to choose"),
    ],
)
def test_errors_are_one_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_message(call(capsys, *arguments), message)


def test_committed_results_are_complete(capsys: pytest.CaptureFixture[str]) -> None:
    """What the tables rest on is found again by the keys of today's presets."""
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "study"
    for preset, done in {
        "fewshot": 2280,
        "finetune": 462,
        "codes": 240,
        "lambda": 112,
        "samples": 176,
        "time": 288,
    }.items():
        code, out, _ = call(capsys, preset, "--dry-run", "--out", results)
        assert code == 0
        assert f"{done} are done" in out

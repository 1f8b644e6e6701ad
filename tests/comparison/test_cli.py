from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import sylinit
from sylinit import cli
from sylinit.comparison import terminal
from sylinit.comparison.data import load
from sylinit.comparison.models import build
from sylinit.comparison.training import accuracy


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the entry point as the shell does; returns exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.console, "_width", 160)


@pytest.mark.parametrize("command", [[], ["demo"], ["init"], ["compare"]])
def test_help_shows_every_command(command: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
    for word in ["xample"] if command else ["demo", "init", "compare"]:
        assert word in result.output


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--version")
    assert code == 0
    assert out.strip() == f"sylinit {sylinit.__version__}"


def test_init_writes_weights_that_already_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, report = tmp_path / "w.safetensors", tmp_path / "r.json"
    code, out, _ = call(capsys, "init", "mlp", "--data", "digits", "--out", weights, "--report", report)
    assert code == 0
    assert str(weights) in out
    data = load("digits")
    model = build("mlp", data.shape, data.classes)
    model.load_state_dict(load_file(weights))
    assert accuracy(model, data.test_x, data.test_y) > 0.7
    assert len(json.loads(report.read_text())["layers"]) == 3


def test_init_is_told_how_many_samples_the_model_will_be_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["init", "resnet20", "--data", "digits", "--samples", "100", "--out", tmp_path / "w"]
    assert "weight 0.5, bias 0.25" in call(capsys, *arguments)[1]  # digits have fewer than 3,000
    assert "weight 0.5, bias 0.25" not in call(capsys, *arguments, "--train-size", "5000")[1]


def test_init_refuses_an_unknown_solver(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "init", "mlp", "--data", "digits", "--out", tmp_path / "w", "--solver", "quick")
    assert code == 1
    assert "solver must be 'auto' or 'exact', got 'quick'" in err


def test_compare_names_the_best_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "compare", "mlp", "--data", "digits", "--shots", "3", "--seeds", "2", "--epochs", "2",
        "--initializations", "he-normal,sylinit", "--grid", "0.01,0.03", "--workers", "1", "--out", tmp_path,
    ]  # fmt: skip
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    assert "Best after training: sylinit" in out
    assert "4 runs to tune, 4 to report; 0 are done" in out
    lines = (tmp_path / "results.jsonl").read_text()
    assert len(lines.splitlines()) == 8
    assert (tmp_path / "mlp-3.png").stat().st_size > 1000
    assert (tmp_path / "mlp-3-curves.svg").stat().st_size > 1000
    code, again, _ = call(capsys, *arguments)
    assert code == 0
    assert "8 are done" in again
    table = "mlp, 3 examples"
    assert again[again.index(table) :] == out[out.index(table) :]
    assert (tmp_path / "results.jsonl").read_text() == lines


def test_compare_takes_no_results_of_other_data_or_another_model_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = Path("networks_of_a_user.py")
    source.write_text("from torch import nn\ndef make(shape, classes): return nn.Linear(shape[0], classes)\n")
    generator = np.random.default_rng(0)
    arguments = [
        "compare", "networks_of_a_user:make", "--data", "data.npz", "--shots", "2", "--seeds", "1", "--epochs", "1",
        "--initializations", "he-normal,he-normal,sylinit", "--grid", "0.01", "--workers", "1", "--out", tmp_path,
    ]  # fmt: skip
    done = []
    for what in ("first", "same", "other data", "other model"):
        if what in ("first", "other data"):
            np.savez("data.npz", x=generator.normal(size=(60, 5)), y=np.arange(60) % 3)
            load.cache_clear()
        if what == "other model":
            source.write_text(source.read_text() + "# changed\n")
        code, out, _ = call(capsys, *arguments)
        assert code == 0
        done.append(re.search(r"(\d+) are done", out).group(1))  # type: ignore[union-attr]
    assert done == ["0", "4", "0", "0"]


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "demo", "--seeds", "1", "--shots", "2", "--workers", "1", "--out", tmp_path)
    assert code == 0
    for name in ("he-uniform", "he-normal", "xavier-uniform", "xavier-normal", "orthogonal", "sylinit"):
        assert name in out
    assert str(tmp_path / "demo.png") in out.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "resnet21", "--data", "digits"], "did you mean 'resnet20'"),
        (["init", "mlp", "--data", "nothing.npz"], "no such file"),
        (["init", "mlp", "--data", "digits", "--code", "pcaa"], "pca"),
        (["init", "mlp", "--data", "digits", "--out", "no/where/w.safetensors"], "does not exist"),
        (["compare", "mlp", "--data", "digits", "--initializations", "he"], "expected one of"),
        (["compare", "mlp", "--data", "digits", "--grid", "a,b"], "expected numbers"),
        (["compare", "mlp", "--data", "digits", "--grid", "-1"], "must be positive"),
        (["compare", "mlp", "--data", "digits", "--optimizer", "lion"], "sgd"),
        (["compare", "mlp", "--data", "digits", "--shots", "5000"], "ask for fewer"),
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
    code, _, err = call(capsys, *arguments)
    assert code == 1
    assert "error:" in err
    assert message in err
    assert "Traceback" not in err


def test_debug_shows_the_exception() -> None:
    with pytest.raises(sylinit.SylinitError):
        cli.main(["--debug", "init", "nothing", "--data", "digits"])


def test_errors_that_nobody_expected_are_short_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("[boom]")

    monkeypatch.setattr("sylinit.comparison.data.load", broken)
    code, _, err = call(capsys, "init", "mlp", "--data", "digits")
    assert code == 1
    assert "RuntimeError: [boom]" in err
    assert "--debug" in err


def test_init_does_not_touch_what_is_there_when_it_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "w.safetensors"
    target.write_bytes(b"precious")
    code, _, _ = call(capsys, "init", "mlp", "--data", "digits", "--code", "none", "--out", target)
    assert code == 1
    assert target.read_bytes() == b"precious"
    assert torch.is_grad_enabled()

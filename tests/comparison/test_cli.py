from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import sylinit
from comparing import assert_one_message, call_as_shell
from sylinit import cli
from sylinit.comparison import terminal
from sylinit.comparison.data import load
from sylinit.comparison.models import build
from sylinit.comparison.training import accuracy


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the entry point as the shell does; returns exit code, stdout and stderr."""
    return call_as_shell(capsys, cli.main, *arguments)


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.console, "_width", 160)


@pytest.mark.parametrize("command", [[], ["demo"], ["init"], ["info"], ["compare"]])
def test_help_shows_every_command(command: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0
    for word in ["xample"] if command else ["demo", "init", "info", "compare"]:
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
    assert "weight 0.5, bias 0.25" not in call(capsys, *arguments, "--train-size", "5000", "--force")[1]


def test_the_first_line_says_what_was_gained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "init", "mlp", "--data", "digits", "--out", tmp_path / "w")
    assert code == 0
    first, second = out.splitlines()[:2]
    assert re.match(r"before training: accuracy \d+\.\d%.*a constant prediction \d+\.\d%", first)
    assert second.startswith("normalization: (x - ")


def test_the_file_says_how_it_was_made_and_its_snippet_loads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, report = tmp_path / "w.safetensors", tmp_path / "r.json"
    call(capsys, "init", "mlp", "--data", "digits", "--out", weights, "--report", report)
    code, out, _ = call(capsys, "info", weights)
    assert code == 0
    for said in ("mlp on digits", "before training: accuracy", "classes: 0, 1, 2", "normalization: (x - "):
        assert said in out
    data = load("digits", normalize="none")
    names: dict[str, Any] = {"x": data.test_x}
    exec(out[out.index("import torch") :], names)
    torch.testing.assert_close(names["x"], load("digits").test_x, atol=1e-4, rtol=1e-4)
    assert accuracy(names["model"], names["x"], data.test_y) > 0.9
    assert json.loads(report.read_text())["description"]["normalization"]["std"] == pytest.approx(names["std"].tolist())


def test_the_snippet_of_a_table_reads_its_normalization_from_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "w.safetensors"
    x = np.random.default_rng(0).normal(3, 2, (40, 6))
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(40) % 2)
    call(capsys, "init", "mlp", "--data", tmp_path / "d.npz", "--out", weights)
    names: dict[str, Any] = {"x": load(str(tmp_path / "d.npz"), normalize="none").test_x}
    exec((out := call(capsys, "info", weights)[1])[out.index("import json") :], names)
    torch.testing.assert_close(names["x"], load(str(tmp_path / "d.npz")).test_x, atol=1e-4, rtol=1e-4)


def test_info_of_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "plain.safetensors")
    code, out, _ = call(capsys, "info", tmp_path / "plain.safetensors")
    assert code == 0
    assert "does not say how it was made" in out
    (tmp_path / "junk").write_text("junk")
    for name, message in (("junk", "not a safetensors file"), ("none", "no such file")):
        code, _, err = call(capsys, "info", tmp_path / name)
        assert code == 1
        assert message in err


CSV_ROWS = [f"{i},{i * 7 % 40},{'red' if i % 3 else 'blue'},{i % 2 == 0},name {i},{i * i / 7}" for i in range(60)]


def test_tables_are_encoded_by_column_and_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["id,age,color,member,remark,price", *CSV_ROWS]))
    arguments = ["init", "mlp", "--data", table, "--out", tmp_path / "w"]
    code, _, err = call(capsys, *arguments)
    assert code == 1
    assert "--label COLUMN" in err
    assert "id, age, color, member, remark, price" in err
    code, out, _ = call(capsys, *arguments, "--label", "color")
    assert code == 0
    assert "columns: age, member, price" in out
    assert "column 'id' is left out: it numbers the samples" in out
    assert "column 'remark' is left out: each of its values occurs once" in out
    code, out, _ = call(capsys, *arguments, "--label", "price", "--force")
    assert code == 0
    assert "columns: age, color=red, member" in out
    assert "before training: R²" in out
    code, _, err = call(capsys, *arguments, "--label", "colour", "--force")
    assert code == 1
    assert "did you mean 'color'" in err


def test_a_table_with_semicolons_is_told_from_one_with_a_single_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "t.csv"
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        table.write_text("\n".join(f"{mark}".join(line.split(",")) for line in ["age,label", "1,0", "2,1"]))
        called = call(capsys, "init", "mlp", "--data", table, "--out", tmp_path / "w")
        assert_one_message(called, f"its columns are separated by {name}; write it with commas")


def test_init_replaces_no_file_unless_told_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--out", "--report"):
        precious = tmp_path / f"precious{option}"
        precious.write_bytes(b"precious")
        arguments = ["init", "mlp", "--data", "digits", "--out", tmp_path / "w", option, precious]
        code, _, err = call(capsys, *arguments)
        assert code == 1
        assert "--force" in err
        assert precious.read_bytes() == b"precious"
        assert call(capsys, *arguments, "--force")[0] == 0
        assert precious.read_bytes() != b"precious"
        assert not list(tmp_path.glob("*.partial"))


def test_init_fails_when_nothing_was_initialized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "constant.npz", x=np.ones((40, 6)), y=np.arange(40) % 2)
    code, _, err = call(capsys, "init", "mlp", "--data", tmp_path / "constant.npz", "--out", tmp_path / "w")
    assert code == 1
    assert "constant" in err
    assert not (tmp_path / "w").exists()


def test_init_computes_what_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    call(capsys, "init", "mlp", "--data", "digits", "--out", first)
    torch.save(load_file(first), tmp_path / "first.pt")
    for start in (first, tmp_path / "first.pt"):
        arguments = ["init", "mlp", "--data", "digits", "--samples", "300", "--out", second, "--force"]
        code, out, _ = call(capsys, *arguments, "--weights", start)
        assert code == 0
        assert "1 of 3 layers computed" in out
        kept, given = load_file(second), load_file(first)
        assert [k for k in given if not torch.equal(given[k], kept[k])] == ["5.bias", "5.weight"]
    code, out, _ = call(capsys, *arguments, "--weights", first, "--layers", "3,5")
    assert code == 0
    assert "2 of 3 layers computed" in out
    assert torch.equal(load_file(second)["1.weight"], load_file(first)["1.weight"])
    code, out, _ = call(capsys, *arguments, "--head", "5")
    assert code == 0
    code, _, err = call(capsys, *arguments, "--head", "fc")
    assert code == 1
    assert "head" in err


def test_scaled_bytes_are_those_of_to_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", x=images, y=np.arange(40) % 2)
    source = str(tmp_path / "d.npz")
    assert str(load(source, normalize="scale").normalization) == "x / 255"
    assert 0.99 < load(source, normalize="scale").train_x.max() <= 1
    code, out, _ = call(capsys, "init", "cnn", "--data", source, "--out", tmp_path / "w", "--normalize", "scale")
    assert code == 0
    assert "normalization: x / 255\n" in out
    standard = load(source).normalization
    assert standard.mean == pytest.approx([0.5] * 3, abs=0.05)


def test_python_m_sylinit_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "sylinit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"sylinit {sylinit.__version__}"


def test_init_says_on_ctrl_c_what_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sylinit.comparison.making.initialize_", interrupted)
    code, _, err = call(capsys, "init", "mlp", "--data", "digits", "--out", tmp_path / "w")
    assert code == 130
    assert "stopped: nothing was written; the same command starts again" in err
    assert not (tmp_path / "w").exists()


def test_warnings_are_one_line_that_points_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = sylinit.initialize_

    def warning(*args: Any, **options: Any) -> Any:
        for _ in range(2):
            warnings.warn("mind the gap", sylinit.SylinitWarning, stacklevel=1)
        return real(*args, **options)

    monkeypatch.setattr("sylinit.comparison.making.initialize_", warning)
    code, _, err = call(capsys, "init", "mlp", "--data", "digits", "--out", tmp_path / "w")
    assert code == 0
    assert err.count("warning: mind the gap") == 1
    assert ".py" not in err


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
    table = "handwritten digits, MLP, 3 examples"
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


def test_compare_serves_mappings_and_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("wrappers_of_a_user.py").write_text(
        "from torch import nn\n"
        "class Wrapped(nn.Module):\n"
        "    def __init__(self, shape, classes):\n"
        "        super().__init__()\n"
        "        self.body = nn.Linear(shape[0], classes)\n"
        "    def forward(self, x): return {'logits': self.body(x)}\n"
    )
    x = np.random.default_rng(0).normal(size=(80, 5))
    np.savetxt("t.csv", np.c_[x, x[:, 0] + 0.1 * x[:, 1]], delimiter=",", header="a,b,c,d,e,price", comments="")
    code, out, _ = call(
        capsys, "compare", "wrappers_of_a_user:Wrapped", "--data", "t.csv", "--label", "price", "--shots", "40",
        "--seeds", "1", "--epochs", "2", "--initializations", "pytorch,sylinit", "--grid", "0.01", "--workers", "1",
        "--out", tmp_path / "o",
    )  # fmt: skip
    assert code == 0
    assert "test explained variance (%)" in out
    assert "Best after training" in out


def test_compare_says_on_ctrl_c_what_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sylinit.comparison import store

    real = store.Store.add

    def interrupted(self: store.Store, *arguments: Any) -> Any:
        real(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr("sylinit.comparison.store.Store.add", interrupted)
    code, _, err = call(
        capsys, "compare", "mlp", "--data", "digits", "--shots", "2", "--seeds", "1", "--epochs", "1",
        "--initializations", "he-normal,sylinit", "--grid", "0.01", "--workers", "1", "--out", tmp_path,
    )  # fmt: skip
    assert code == 130
    assert f"1 of 4 runs are kept in {tmp_path / 'results.jsonl'}; the same command goes on from there" in err


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from sylinit.comparison import demo

    short = demo.Story("digits", "Digits", "reads {score} of them", "digits", "mlp", 2, 2, ("pytorch", "he-normal"))
    monkeypatch.setattr("sylinit.comparison.demo.stories", lambda shots: [short])
    code, out, _ = call(capsys, "demo", "--seeds", "1", "--workers", "1", "--out", tmp_path)
    assert code == 0
    assert (tmp_path / "demo.png").stat().st_size > 1000
    assert str(tmp_path / "demo.png") in out
    last = out.strip().splitlines()[-1]
    assert re.fullmatch(r"Computed in \d\.\d s without a training step, the network reads \d+\.\d% of them; .*\.", last)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["init", "resnet21", "--data", "digits"], "did you mean 'resnet20'"),
        (["init", "mlp", "--data", "nothing.npz"], "no such file"),
        (["init", "mlp", "--data", "nothing.csv"], "no such file"),
        (["init", "mlp", "--data", "./digits"], "no such file or directory"),
        (["init", "mlp", "--data", "digit"], "did you mean 'digits'"),
        (["init", "mlp", "--data", "digits", "--label", "x", "--task", "many"], "expected one of auto, multiclass"),
        (["init", "mlp", "--data", "digits", "--normalize", "much"], "expected one of standard, scale, none"),
        (["init", "mlp", "--data", "digits", "--weights", "none.pt"], "no such file"),
        (["init", "mlp", "--data", "digits", "--out", "."], "is a directory"),
        (["init", "models.py:make", "--data", "digits"], "models:make"),
        (["init", "a b:make", "--data", "digits"], "no name of a module"),
        (["init", "fcn", "--data", "digits"], "expected time series"),
        (["init", "mlp", "--data", "aeon:nothing"], "aeon"),
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
    assert_one_message(call(capsys, *arguments), message)


MODELS_OF_A_USER = """
import torch
from torch import nn

class NoForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

def narrow(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(7, classes))
def wide(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes + 1))
def texts(shape, classes):
    class Texts(NoForward):
        def forward(self, x): return ["text"]
    return Texts()
"""


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("NoForward", "its forward fails on samples of shape (1, 8, 8)"),
        ("narrow", "its forward fails on samples of shape (1, 8, 8)"),
        ("wide", "[samples, 10 classes], got [2, 11]"),
        ("texts", "expected a tensor of predictions"),
    ],
)
@pytest.mark.parametrize("command", ["init", "compare"])
def test_a_model_that_does_not_fit_says_so_at_once(
    factory: str,
    message: str,
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("misfits_of_a_user.py").write_text(MODELS_OF_A_USER)
    code, out, err = call(capsys, command, f"misfits_of_a_user:{factory}", "--data", "digits", "--out", tmp_path / "o")
    assert code == 1
    assert message in err
    assert "runs" not in out
    assert not (tmp_path / "o").exists()


def test_weights_that_do_not_fit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "junk.pt").write_text("junk")
    for name, message in (
        ("other", "no weight in it fits the model; it has fc.weight [3, 3]"),
        ("list", "holds no state dictionary"),
        ("junk", "neither a safetensors file nor a state dictionary"),
    ):
        arguments = ["init", "mlp", "--data", "digits", "--weights", tmp_path / f"{name}.pt", "--out", tmp_path / "w"]
        code, _, err = call(capsys, *arguments)
        assert code == 1
        assert message in err


def test_a_hub_id_is_looked_up_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lookups: list[str] = []

    def offline(host: Any, *_: Any, **__: Any) -> Any:
        lookups.append(str(host))
        raise socket.gaierror("offline")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits between attempts"))
    code, _, err = call(capsys, "init", "mlp", "--data", "nobody/nothing", "--out", tmp_path / "w")
    assert code == 1
    assert "check the name and the connection" in err
    assert len(lookups) <= 2  # two addresses of one host
    code, _, err = call(capsys, "init", "mlp", "--data", "nothing", "--out", tmp_path / "w")
    assert code == 1
    assert "owner/name" in err
    assert len(lookups) <= 2


def test_debug_shows_the_exception() -> None:
    with pytest.raises(sylinit.SylinitError):
        cli.main(["--debug", "init", "nothing", "--data", "digits"])


def test_errors_that_nobody_expected_are_short_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("[boom]")

    monkeypatch.setattr("sylinit.comparison.making.load", broken)
    code, _, err = call(capsys, "init", "mlp", "--data", "digits")
    assert code == 1
    assert "RuntimeError: [boom]" in err
    assert "--debug" in err


def test_init_does_not_touch_what_is_there_when_it_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "w.safetensors"
    target.write_bytes(b"precious")
    code, _, _ = call(capsys, "init", "mlp", "--data", "digits", "--code", "none", "--out", target, "--force")
    assert code == 1
    assert target.read_bytes() == b"precious"
    assert torch.is_grad_enabled()

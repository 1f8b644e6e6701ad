"""`save` and `load`: everything comes back, and nothing changes where the file does not fit."""

from __future__ import annotations

import builtins
import json

import pytest
import torch
from torch import nn

import sylinit
from conftest import small_mlp, small_resnet, vectors

safetensors = pytest.importorskip("safetensors")


@pytest.fixture
def done():
    x, y = vectors()
    model = small_mlp()
    return model, sylinit.initialize_(model, [(x, y)], config=sylinit.Config(label_share=0.25)), x


def test_weights_report_normalization_and_versions_come_back(done, tmp_path):
    model, report, x = done
    mean = {"mean": x.mean(0), "scale": x.std(0).numpy(), "bits": 8}
    sylinit.save(tmp_path / "m.safetensors", model, report, normalization=mean)
    other = small_mlp()
    saved = sylinit.load(tmp_path / "m.safetensors", other)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert saved.report == report
    assert saved.report.config.label_share == 0.25
    assert torch.equal(torch.tensor(saved.normalization["mean"]), x.mean(0))
    assert torch.equal(torch.tensor(saved.normalization["scale"]), x.std(0))
    assert saved.normalization["bits"] == 8
    assert saved.versions["sylinit"] == sylinit.__version__


def test_buffers_and_reports_without_a_score_come_back(tmp_path):
    model = small_resnet()
    report = sylinit.initialize_(model, [torch.randn(40, 2, 8, 8)])
    sylinit.save(tmp_path / "m", model, report)
    other = small_resnet()
    assert sylinit.load(tmp_path / "m", other).report == report
    assert torch.equal(other[1].running_var, model[1].running_var)


def test_the_file_is_plain_safetensors_whose_metadata_is_json(done, tmp_path):
    model, report, _ = done
    sylinit.save(tmp_path / "m", model, report)
    with safetensors.safe_open(tmp_path / "m", framework="pt") as file:
        assert set(file.keys()) == set(model.state_dict())
        metadata = file.metadata()
    assert json.loads(metadata["sylinit.report"])["samples"] == 60


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(6, 6, bias=False)
        self.last.weight = self.first.weight
        self.register_buffer("part", self.first.weight.detach()[:2])


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    x, _ = vectors(dim=12)
    model = Tied()
    report = sylinit.initialize_(nn.Sequential(nn.Linear(12, 6)), [x])
    sylinit.save(tmp_path / "m", model, report)
    with safetensors.safe_open(tmp_path / "m", framework="pt") as file:
        assert set(file.keys()) == {"first.weight", "part"}
    other = Tied()
    sylinit.load(tmp_path / "m", other)
    assert torch.equal(other.first.weight, model.first.weight)
    assert other.last.weight is other.first.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: small_mlp(classes=4), "has shape"),
        (lambda: nn.Sequential(nn.Linear(12, 16)), "is not in the model"),
        (lambda: nn.Sequential(*small_mlp(), nn.Linear(3, 3)), "is missing in the file"),
    ],
)
def test_a_file_of_another_model_changes_nothing(done, tmp_path, change, message):
    model, report, _ = done
    sylinit.save(tmp_path / "m", model, report)
    other = change()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(sylinit.SylinitError, match=message):
        sylinit.load(tmp_path / "m", other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_file_of_another_kind_is_refused(done, tmp_path):
    model, *_ = done
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(sylinit.SylinitError, match=r"not written by sylinit\.save"):
        sylinit.load(tmp_path / "other", model)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(sylinit.SylinitError, match="no safetensors file"):
        sylinit.load(tmp_path / "text", model)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(done, tmp_path, monkeypatch):
    model, report, _ = done
    sylinit.save(tmp_path / "m", model, report)
    old = (tmp_path / "m").read_bytes()

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        sylinit.save(tmp_path / "m", model, report)
    assert (tmp_path / "m").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("model", [nn.LazyLinear(3), nn.Linear(3, 3, device="meta")], ids=["lazy", "meta"])
def test_models_without_numbers_are_refused(done, tmp_path, model):
    _, report, _ = done
    with pytest.raises(sylinit.SylinitError, match=r"save: 'weight'"):
        sylinit.save(tmp_path / "m", model, report)
    assert not list(tmp_path.iterdir())


def test_a_normalization_that_holds_no_numbers_is_refused(done, tmp_path):
    model, report, _ = done
    with pytest.raises(sylinit.SylinitError, match="normalization"):
        sylinit.save(tmp_path / "m", model, report, normalization={"mean": object()})


def test_without_safetensors_the_error_names_package_and_extra(done, tmp_path, monkeypatch):
    model, report, _ = done
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="safetensors")
        return whole(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(sylinit.MissingPackageError, match=r"safetensors.*sylinit\[save\]"):
        sylinit.save(tmp_path / "m", model, report)

"""A model with the report of how it came about, in one safetensors file: `pip install 'sylinit[save]'`."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import sylinit


def make() -> nn.Module:
    """The architecture."""
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))


torch.manual_seed(0)
y = torch.arange(200) % 4
x = 3 + torch.randn(4, 20)[y] + torch.randn(200, 20)
mean, model = x.mean(0), make()
report = sylinit.initialize_(model, [(x - mean, y)])
path = Path(tempfile.mkdtemp()) / "model.safetensors"
sylinit.save(path, model, report, normalization={"mean": mean})

other = make()
saved = sylinit.load(path, other)
print(saved.report)
assert torch.equal(other(x - torch.tensor(saved.normalization["mean"])), model(x - mean))
assert saved.report == report

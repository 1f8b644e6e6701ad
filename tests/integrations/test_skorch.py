"""The skorch callback: once, from the data passed to fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import sylinit
from conftest import vectors

skorch = pytest.importorskip("skorch")

from sylinit.integrations.skorch import SylvesterInitialization  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::sylinit.SylinitWarning")


class Net(nn.Module):
    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(12, 16), nn.Linear(16, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


def data() -> tuple[np.ndarray, np.ndarray]:
    x, y = vectors()
    return x.numpy(), y.numpy()


def net(module=Net, kind=skorch.NeuralNetClassifier, **options):
    known = {"criterion": nn.CrossEntropyLoss, "lr": 0.0, "max_epochs": 1, "verbose": 0, "train_split": None}
    return kind(module, **{**known, **options})


def test_the_module_starts_from_the_data():
    x, y = data()
    own = net(callbacks=[("sylinit", SylvesterInitialization())])
    own.fit(x, y)
    report = dict(own.callbacks_)["sylinit"].report_
    assert [layer.name for layer in report.initialized] == ["body", "head"]
    assert own.score(x, y) == report.before.accuracy > 0.8


def test_training_that_goes_on_is_left_alone():
    x, y = data()
    own = net(callbacks=[("sylinit", SylvesterInitialization(layers="head"))], lr=0.1)
    own.fit(x, y)
    first = dict(own.callbacks_)["sylinit"].report_
    own.partial_fit(x, y)
    assert dict(own.callbacks_)["sylinit"].report_ is first
    assert [layer.name for layer in first.initialized] == ["head"]


def test_inputs_by_name_and_regression():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 8), nn.Linear(7, 8), nn.Linear(16, 1)

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return self.head(torch.cat([self.a(first), self.b(second)], 1).relu())

    x, y = data()
    own = net(Two, skorch.NeuralNetRegressor, criterion=nn.MSELoss, callbacks=[("sylinit", SylvesterInitialization())])
    own.fit({"first": x[:, :5], "second": x[:, 5:]}, y.astype(np.float32)[:, None])
    assert dict(own.callbacks_)["sylinit"].report_.before.r2 > 0.3


def test_unknown_arguments_are_named():
    with pytest.raises(sylinit.SylinitError, match="'cod'"):
        SylvesterInitialization(cod="pca")

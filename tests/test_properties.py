"""What must hold of the whole, whatever the network: symmetries of the data are symmetries of the result."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sylinit
from conftest import images, small_mlp, small_resnet, vectors
from sylinit.config import Config
from sylinit.linalg.orthogonal import orthogonal_rows

ALL = Config(rows="all")


def initialized(model: nn.Module, x: Tensor, y: Tensor, code: str = "mixed", config: Config = ALL) -> nn.Module:
    """A copy of a model, computed from data in float64."""
    model = copy.deepcopy(model).double()
    sylinit.initialize_(model, [(x.double(), y)], code=code, config=config)
    return model.eval()


@torch.no_grad()
def same_function(one: nn.Module, x: Tensor, other: nn.Module, z: Tensor) -> None:
    """Two networks give the same outputs, each for its own inputs."""
    torch.testing.assert_close(one(x.double()), other(z.double()), rtol=1e-6, atol=1e-7)


def same_weights(one: nn.Module, other: nn.Module, besides: tuple[str, ...] = ()) -> None:
    """All numbers are equal, but those named."""
    theirs = other.state_dict()
    for name, value in one.state_dict().items():
        if name not in besides:
            torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("code", ["mixed", "pca", "label", "lda"])
def test_permuted_input_channels_permute_the_first_layers_weights(code):
    x, y = images(channels=5)
    order = torch.tensor([3, 0, 4, 1, 2])
    model = small_resnet(channels=5)
    plain, permuted = initialized(model, x, y, code), initialized(model, x[:, order], y, code)
    torch.testing.assert_close(permuted[0].weight, plain[0].weight[:, order], rtol=1e-6, atol=1e-8)
    same_weights(plain, permuted, besides=("0.weight",))
    same_function(plain, x, permuted, x[:, order])


@pytest.mark.parametrize("code", ["mixed", "pca", "label"])
def test_permuted_features_permute_the_first_layers_weights(code):
    x, y = vectors()
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))
    plain, permuted = initialized(small_mlp(), x, y, code), initialized(small_mlp(), x[:, order], y, code)
    torch.testing.assert_close(permuted[0].weight, plain[0].weight[:, order], rtol=1e-6, atol=1e-8)
    same_function(plain, x, permuted, x[:, order])


@pytest.mark.parametrize("code", ["pca", "lda"])
def test_rotated_inputs_rotate_the_first_layers_weights(code):
    """Up to the sign of a unit, which follows the coordinates."""
    x, y = vectors(300)
    x = x.double()
    turn = orthogonal_rows(12, 12, torch.Generator().manual_seed(0), x)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
    plain, rotated = initialized(model, x, y, code), initialized(model, x @ turn.T, y, code)
    back = rotated[0].weight @ turn
    sign = (back * plain[0].weight).sum(1, keepdim=True).sign()
    torch.testing.assert_close(sign * back, plain[0].weight, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(sign[:, 0] * rotated[0].bias, plain[0].bias, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("make", "data"), [(small_mlp, vectors), (small_resnet, images)])
@pytest.mark.parametrize("code", ["mixed", "pca", "label", "lda", "random_projection"])
def test_the_order_of_the_samples_does_not_matter(make: Callable[[], nn.Module], data, code):
    x, y = data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    model = make()
    same_weights(initialized(model, x, y, code), initialized(model, x[order], y[order], code))


@pytest.mark.parametrize("scale", [1e-3, 100.0])
@pytest.mark.parametrize(("make", "data"), [(small_mlp, vectors), (small_resnet, images)])
@pytest.mark.parametrize("code", ["mixed", "pca", "label"])
def test_scaled_inputs_scale_the_first_layers_weights(make: Callable[[], nn.Module], data, code, scale):
    x, y = data()
    model = make()
    plain, scaled = initialized(model, x, y, code), initialized(model, scale * x.double(), y, code)
    torch.testing.assert_close(scale * scaled[0].weight, plain[0].weight, rtol=1e-6, atol=1e-8)
    same_weights(plain, scaled, besides=("0.weight",))
    same_function(plain, x, scaled, scale * x.double())


def test_shifted_inputs_shift_the_first_layers_bias_alone():
    x, y = vectors()
    shift = torch.linspace(-3, 5, x.shape[1])
    plain, shifted = initialized(small_mlp(), x, y), initialized(small_mlp(), x.double() + shift, y)
    same_weights(plain, shifted, besides=("0.bias",))
    same_function(plain, x, shifted, x.double() + shift)


def test_renamed_classes_permute_the_logits():
    """Where units do not follow the labels, which are told apart at random."""
    x, y = vectors()
    names = torch.tensor([2, 0, 1])
    plain, renamed = initialized(small_mlp(), x, y, "pca"), initialized(small_mlp(), x, names[y], "pca")
    same_weights(plain, renamed, besides=("4.weight", "4.bias"))
    torch.testing.assert_close(renamed[4].weight[names], plain[4].weight, rtol=1e-6, atol=1e-8)


def test_a_sample_that_is_there_twice_counts_twice():
    """Doubling all samples changes no moment; only the head, which counts evidence, may shrink less."""
    x, y = vectors()
    config = Config(rows="all", head_encoding_weight=4.0)
    plain = initialized(small_mlp(), x, y, config=config)
    same_weights(plain, initialized(small_mlp(), x.repeat(2, 1), y.repeat(2), config=config))


class Folding(nn.Module):
    """Sees the windows of a sample as samples of their own, folded in one order or the other."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order
        self.body, self.head = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        samples, windows, dim = x.shape
        if self.order == "unfolded":
            return self.head(self.body(x).relu().mean(1))
        if self.order == "samples first":
            h = self.body(x.reshape(samples * windows, dim)).relu()
            return self.head(h.view(samples, windows, -1).mean(1))
        h = self.body(x.transpose(0, 1).reshape(windows * samples, dim)).relu()
        return self.head(h.view(windows, samples, -1).mean(0))


@pytest.mark.parametrize("order", ["samples first", "windows first"])
@pytest.mark.parametrize("code", ["mixed", "label"])
def test_a_fold_of_samples_changes_nothing(order, code):
    """Labels find their rows whichever way windows are folded into the batch."""
    x, y = vectors(60 * 4)
    x, y = x.view(4, 60, 12).transpose(0, 1), y[:60]
    plain, folded = Folding("unfolded"), Folding(order)
    folded.load_state_dict(plain.state_dict())
    same_weights(initialized(plain, x, y, code), initialized(folded, x, y, code))

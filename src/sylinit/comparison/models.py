"""Networks to compare on: small, plain, and as the papers describe them; and users' own, by name."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from sylinit import SylinitError
from sylinit.comparison.data import Dataset
from sylinit.comparison.training import prediction

Factory = Callable[[tuple[int, ...], int], nn.Module]
"""``(shape of one sample, number of classes) -> model``."""


def mlp(shape: tuple[int, ...], classes: int, widths: Sequence[int] = (256, 128)) -> nn.Module:
    """Fully connected layers with ReLU between them."""
    sizes = [math.prod(shape), *widths]
    hidden = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], classes))


def cnn(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Five 3x3 convolutions with ReLU and no normalization: 32-32-pool-64-64-pool-128-mean to 2x2-linear."""
    channels = _image(shape, "cnn")[0]

    def conv(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]

    stages = [*conv(channels, 32), *conv(32, 32), nn.MaxPool2d(2), *conv(32, 64), *conv(64, 64), nn.MaxPool2d(2)]
    return nn.Sequential(*stages, *conv(64, 128), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, classes))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut (1x1 where the shape changes).

    Source: He, Zhang, Ren and Sun, *Deep Residual Learning for Image Recognition*, CVPR 2016, figure 2 and option B.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and channels == width
            else nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )

    def forward(self, x: Tensor) -> Tensor:
        """``relu(shortcut(x) + f(x))``."""
        out = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(out)) + self.shortcut(x)).relu()


def _residual(stem: list[nn.Module], width: int, blocks: Sequence[int], classes: int) -> nn.Module:
    stages: list[nn.Module] = []
    channels = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            stages.append(BasicBlock(channels, width * 2**stage, 2 if stage and not block else 1))
            channels = width * 2**stage
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def cifar_resnet(depth: int) -> Factory:
    """The residual networks for 32x32 images of He et al. 2016, section 4.2: three stages of 16, 32, 64 channels."""

    def build_resnet(shape: tuple[int, ...], classes: int) -> nn.Module:
        channels = _image(shape, f"resnet{depth}")[0]
        stem = [nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        return _residual(stem, 16, [(depth - 2) // 6] * 3, classes)

    return build_resnet


def resnet18(shape: tuple[int, ...], classes: int) -> nn.Module:
    """ResNet-18 for images of about 224x224 (He et al. 2016, table 1)."""
    channels = _image(shape, "resnet18")[0]
    stem = [nn.Conv2d(channels, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return _residual([*stem, nn.MaxPool2d(3, 2, padding=1)], 64, [2, 2, 2, 2], classes)


def fcn(shape: tuple[int, ...], classes: int, widths: Sequence[int] = (128, 256, 128)) -> nn.Module:
    """A fully convolutional network for time series: three convolutions with BatchNorm, then the mean over time.

    Source: Wang, Yan and Oates, *Time Series Classification from Scratch with Deep Neural Networks*, IJCNN 2017.
    """
    if len(shape) != 2:
        raise SylinitError(f"model fcn: expected time series (channels, length), got samples of shape {shape}")
    layers: list[nn.Module] = []
    for inputs, width, size in zip((shape[0], *widths), widths, (8, 5, 3), strict=False):
        padding = nn.ConstantPad1d(((size - 1) // 2, size // 2), 0.0)
        layers += [padding, nn.Conv1d(inputs, width, size, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


class VisionTransformer(nn.Module):
    """A small pre-norm vision transformer that averages its tokens.

    Source: Dosovitskiy et al., *An Image is Worth 16x16 Words*, ICLR 2021.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, *, width: int = 192, depth: int = 6) -> None:
        super().__init__()
        channels, height, wide = _image(shape, "vit-tiny")
        patch = max(2, min(height, wide) // 8)
        if height % patch or wide % patch:
            raise SylinitError(f"model vit-tiny: cannot cut {height}x{wide} images into {patch}x{patch} patches")
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, height * wide // patch**2, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, width // 64, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, channels, height, width]`` to logits ``[n, classes]``."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


MODELS: dict[str, Factory] = {
    "mlp": mlp,
    "cnn": cnn,
    "fcn": fcn,
    "fcn-small": functools.partial(fcn, widths=(32, 64, 32)),
    "resnet20": cifar_resnet(20),
    "resnet56": cifar_resnet(56),
    "resnet110": cifar_resnet(110),
    "resnet18": resnet18,
    "vit-tiny": VisionTransformer,
}


def build(spec: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Build a model by name.

    Args:
        spec: a name in `MODELS`, or ``"module:factory"``, where ``factory(shape, classes)`` or ``factory()`` returns
            the model; modules are looked up on the path and in the current directory.
        shape: of one sample.
        classes: number of classes.

    Raises:
        SylinitError: naming what was not found, and the nearest names.
    """
    if spec in MODELS:
        return MODELS[spec](shape, classes)
    module_name, separator, attribute = spec.partition(":")
    if module_name.endswith(".py"):
        named = ".".join(Path(module_name).with_suffix("").parts)
        raise SylinitError(f"model {spec!r}: name a file by its module: {named}:{attribute or 'FACTORY'}")
    if not separator:
        near = difflib.get_close_matches(spec, MODELS, n=1)
        raise SylinitError(
            f"model {spec!r}: expected {', '.join(MODELS)} or module:factory"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if not module_name.isidentifier() and not all(part.isidentifier() for part in module_name.split(".")):
        raise SylinitError(f"model {spec!r}: {module_name!r} is no name of a module; expected module:factory")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise SylinitError(
            f"model {spec!r}: cannot import module {module_name!r} ({type(error).__name__}: {error}); it is looked for "
            f"in {os.getcwd()} and on the Python path"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise SylinitError(f"model {spec!r}: module {module_name!r} has no function or class {attribute!r}")
    try:
        model = factory(shape, classes) if takes_two(factory) else factory()
    except Exception as error:
        raise SylinitError(
            f"model {spec!r}: calling {attribute} for samples of shape {shape} and {classes} classes failed "
            f"({type(error).__name__}: {error})"
        ) from error
    if not isinstance(model, nn.Module):
        raise SylinitError(f"model {spec!r}: expected a torch.nn.Module from {attribute}, got {type(model).__name__}")
    return model


def check_model(model: nn.Module, data: Dataset, spec: str) -> None:
    """Run a model on two samples, so that what cannot work says so at once.

    Args:
        model: in any mode, which it keeps.
        data: what it is to read and predict.
        spec: what messages call the model.

    Raises:
        SylinitError: its forward fails, or its output is not ``[n, outputs]``.
    """
    training = model.training
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    x = data.train_x[:2].to(device)
    try:
        with torch.no_grad():
            output = model.eval()(x)
    except Exception as error:
        raise SylinitError(
            f"model {spec!r}: its forward fails on samples of shape {data.shape} "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]}); make the model fit the data: "
            "factory(shape, classes) is told the shape of a sample"
        ) from error
    finally:
        model.train(training)
    found = prediction(output)
    if found.shape != (len(x), data.classes):
        what = "values" if data.task == "regression" else "classes"
        raise SylinitError(
            f"model {spec!r}: expected an output of shape [samples, {data.classes} {what}], got {list(found.shape)} "
            f"for {len(x)} samples"
        )


def construction(spec: str, shape: tuple[int, ...], classes: int) -> str:
    """The Python that makes a model as `build` does: its import, and a line that assigns it to ``model``."""
    if spec in MODELS:
        return f"from sylinit.comparison.models import build\n\nmodel = build({spec!r}, {shape}, {classes})"
    name, _, attribute = spec.partition(":")
    arguments = f"{shape}, {classes}" if takes_two(getattr(importlib.import_module(name), attribute)) else ""
    return f"from {name} import {attribute}\n\nmodel = {attribute}({arguments})"


def fingerprint(spec: str) -> str:
    """Tells a user's model from what it was: a hash of the files that it is named and made in; nothing for our own."""
    if spec in MODELS:
        return ""
    name, _, attribute = spec.partition(":")
    module = importlib.import_module(name)
    files = {getattr(each, "__file__", None) for each in (module, inspect.getmodule(getattr(module, attribute)))}
    digest = hashlib.sha256()
    for file in sorted(filter(None, files)):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]


def takes_two(factory: Callable[..., object]) -> bool:
    """Whether a factory is called with the shape of a sample and the number of classes, or without arguments."""
    try:
        inspect.signature(factory).bind((), 0)
    except (TypeError, ValueError):  # built-in classes may have no signature
        return False
    return True


def _image(shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise SylinitError(f"model {name}: expected images (channels, height, width), got samples of shape {shape}")
    return shape[0], shape[1], shape[2]

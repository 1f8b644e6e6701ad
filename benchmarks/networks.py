"""Networks as people use them, from PyTorch's own layers: for the cost on a GPU, or smaller for a trial on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Branch(nn.Module):
    """``x + f(x)``, or ``shortcut(x) + f(x)``."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The sum."""
        return self.shortcut(x) + self.branch(x)


def convolution(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: nn.Module | None = None
) -> list[nn.Module]:
    """A convolution, its BatchNorm and perhaps an activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), *([] if act is None else [act])]


def head(width: int) -> list[nn.Module]:
    """Mean over positions, and ten logits."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]


def resnet50(width: int = 64, blocks: Sequence[int] = (3, 4, 6, 3)) -> nn.Module:
    """He et al., *Deep residual learning*, 2016, with bottlenecks."""
    layers = [*convolution(3, width, 7, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for stage, count in enumerate(blocks):
        inner, outputs = width * 2**stage, 4 * width * 2**stage
        for block in range(count):
            stride = 2 if stage and not block else 1
            branch = nn.Sequential(
                *convolution(inputs, inner, act=nn.ReLU()),
                *convolution(inner, inner, 3, stride, act=nn.ReLU()),
                *convolution(inner, outputs),
            )
            shortcut = None if block else nn.Sequential(*convolution(inputs, outputs, 1, stride))
            layers += [Branch(branch, shortcut), nn.ReLU()]
            inputs = outputs
    return nn.Sequential(*layers, *head(inputs))


def mobilenet_v2(width: int = 32, blocks: Sequence[int] = (1, 2, 3, 4, 3, 3, 1)) -> nn.Module:
    """Sandler et al., *MobileNetV2*, 2018."""
    layers, inputs = convolution(3, width, 3, 2, act=nn.ReLU6()), width
    for stage, (count, share) in enumerate(zip(blocks, (16, 24, 32, 64, 96, 160, 320), strict=True)):
        outputs = share * width // 32
        for block in range(count):
            stride = 2 if stage in (1, 2, 3, 5) and not block else 1
            inner = inputs * (6 if stage else 1)
            branch = nn.Sequential(
                *(convolution(inputs, inner, act=nn.ReLU6()) if stage else []),
                *convolution(inner, inner, 3, stride, inner, act=nn.ReLU6()),
                *convolution(inner, outputs),
            )
            layers.append(Branch(branch) if block else branch)
            inputs = outputs
    return nn.Sequential(*layers, *convolution(inputs, 40 * width, act=nn.ReLU6()), *head(40 * width))


class ChannelsLast(nn.Module):
    """A module that reads channels in the last dimension, for images that have them in the second."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """There and back."""
        return self.layers(x.movedim(1, -1)).movedim(-1, 1)


def convnext_tiny(width: int = 96, blocks: Sequence[int] = (3, 3, 9, 3)) -> nn.Module:
    """Liu et al., *A ConvNet for the 2020s*, 2022."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 4), ChannelsLast(nn.LayerNorm(width))]
    for stage, count in enumerate(blocks):
        if stage:
            layers += [ChannelsLast(nn.LayerNorm(width)), nn.Conv2d(width, 2 * width, 2, 2)]
            width *= 2
        for _ in range(count):
            inner = [nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
            layers.append(
                Branch(nn.Sequential(nn.Conv2d(width, width, 7, padding=3, groups=width), ChannelsLast(*inner)))
            )
    return nn.Sequential(*layers, *head(width))


class Encoder(nn.Module):
    """A pre-norm transformer over a sequence of vectors; logits from the mean over tokens, or from the last token.

    Args:
        width: of the residual stream.
        depth: layers.
        heads: of attention.
        causal: whether a token sees those before it only; logits are those of the last token then.
    """

    def __init__(self, width: int, depth: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        if not self.causal:
            return self.head(self.encoder(x).mean(1))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        return self.head(self.encoder(x, mask=mask, is_causal=True)[:, -1])


class VisionTransformer(nn.Module):
    """Dosovitskiy et al., *An image is worth 16x16 words*, 2021: patches and an encoder over them."""

    def __init__(self, width: int = 768, depth: int = 12, size: int = 224) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.place = nn.Parameter(0.02 * torch.randn((size // 16) ** 2, width))
        self.encoder = Encoder(width, depth, max(1, width // 64))

    def forward(self, x: Tensor) -> Tensor:
        """Logits from the mean over patches."""
        return self.encoder(self.patches(x).flatten(2).mT + self.place)


def depthwise(width: int = 64, blocks: int = 6) -> nn.Module:
    """Depthwise separable convolutions on small images, as in keyword spotting and on devices."""
    layers = convolution(3, width, 3, act=nn.ReLU())
    for block in range(blocks):
        outputs = 2 * width if block % 3 == 2 else width
        layers += convolution(width, width, 3, groups=width, act=nn.ReLU())
        layers += convolution(width, outputs, stride=outputs // width, act=nn.ReLU())
        width = outputs
    return nn.Sequential(*layers, *head(width))

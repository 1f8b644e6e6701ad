"""Initializations to compare: what each does to a freshly built model, seeded and timed."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from sylinit import Config, SylinitError, initialize_

Initialization = Callable[..., None]
"""``(model, x, y, seed, **options)``; writes the weights in place."""

CALIBRATION = 2000
"""At most so many training samples go into an initialization that reads data."""

BATCH = 500
"""Samples of a forward pass; LSUV, which takes one batch, and PCA whitening read no more than these."""

DRAWS = 16
"""Random losses that rates of change are averaged over."""


def pytorch(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> None:
    """Every module's own ``reset_parameters``: PyTorch's default."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()


def drawn(model: nn.Module, x: Tensor, y: Tensor, seed: int, *, draw: Callable[[Tensor], Any]) -> None:
    """Every weight drawn the same way, biases zero, normalizations at 1 and 0."""
    pytorch(model, x, y, seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, _ConvNd)):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            for third in module.in_proj_weight.chunk(3):
                draw(third)


def lsuv(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> None:
    """Orthogonal weights scaled to unit variance layer by layer, by the ``lsuv`` package on one batch of 500.

    Source: Mishkin and Matas, *All you need is a good init*, ICLR 2016.
    """
    from lsuv import lsuv_with_singlebatch

    pytorch(model, x, y, seed)
    lsuv_with_singlebatch(model, x[:BATCH], verbose=False, device=x.device)


def pca_whitening(model: nn.Module, x: Tensor, y: Tensor, seed: int, *, rescale: bool = False) -> None:
    """Each layer's units are whitened principal components of its input, centered by the bias.

    Units beyond the dimension of the input, and the last layer, are Gaussian; all have unit output variance on the
    calibration data. With `rescale` the layers of a network without normalization are then rescaled against each
    other, as in the paper (`equal_rates`). Attention projections keep PyTorch's default.

    Source: Krähenbühl, Doersch, Donahue and Darrell, *Data-dependent Initializations of Convolutional Neural Networks*,
    ICLR 2016, sections 3.1 (with their PCA) and 3.2.
    """
    pytorch(model, x, y, seed)
    # an attention module calls its output projection as a function: a hook on it would never fire
    inside = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and id(m) not in inside]
    met: list[nn.Linear | nn.Conv2d] = []

    def write(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if any(layer is other for other in met):
            return
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        met.append(layer)
        groups = getattr(layer, "groups", 1)
        rows = _patches(layer, inputs[0])  # [n, groups, d]
        weights = layer.weight.view(groups, -1, rows.shape[-1])
        biases = layer.bias.view(groups, -1) if layer.bias is not None else None
        for group in range(groups):
            mean = rows[:, group].mean(0)
            weights[group] = _whitened(rows[:, group] - mean, weights.shape[1], pca=layer is not layers[-1])
            if biases is not None:
                biases[group] = -weights[group] @ mean

    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    hooks = [layer.register_forward_pre_hook(write) for layer in layers]
    hooks += [norm.register_forward_pre_hook(_adopt_statistics) for norm in norms]
    training = model.training
    try:
        model.eval()(x[:BATCH])
        for hook in hooks:
            hook.remove()
        if rescale and not norms:
            equal_rates(model, met, x[:100])
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def equal_rates(model: nn.Module, layers: Sequence[nn.Linear | nn.Conv2d], x: Tensor) -> None:
    """Scale each layer by a number, so that a gradient step changes all layers by the same share of their size.

    The rate of layer l is ``c_l = rms(gradient) / rms(weight)``, of a linear loss with Gaussian coefficients drawn
    for each sample. A factor ``s_l`` on a layer divides its rate by its square if the output stays what it is; so
    ``s_l = sqrt(c_l / c)`` makes all rates c, and if c is their geometric mean, the product of the factors is 1, which
    keeps the output of a chain of positively homogeneous layers (ReLU, pooling) as it is. A bias takes the factors of
    all layers up to its own. The paper iterates a damped form of this. Where the output does not stay what it is
    (shortcuts, sigmoids), nothing is changed; the authors' program does not serve such networks either.

    Args:
        model: in eval mode; changed in place.
        layers: in the order in which the data meets them.
        x: calibration samples.
    """
    weights = [layer.weight for layer in layers]
    squares = torch.zeros(len(layers))
    with torch.enable_grad():
        output = model(x)
        for _ in range(DRAWS):
            gradients = torch.autograd.grad(output, weights, torch.randn_like(output), retain_graph=True)
            squares += torch.stack([g.square().sum() for g in gradients]).cpu()
    logs = squares.log() / 2 - torch.stack([w.norm() for w in weights]).cpu().log()
    factors = ((logs - logs.mean()) / 2).exp()
    kept = [{name: p.clone() for name, p in layer.named_parameters()} for layer in layers]
    for layer, factor, above in zip(layers, factors, factors.cumprod(0), strict=True):
        layer.weight.mul_(factor)
        if layer.bias is not None:
            layer.bias.mul_(above)
    if not torch.allclose(model(x), output, rtol=1e-2, atol=1e-2 * output.detach().std().item()):
        for layer, values in zip(layers, kept, strict=True):
            layer.load_state_dict(values)


def sylinit(model: nn.Module, x: Tensor, y: Tensor, seed: int, *, samples: int = CALIBRATION, **options: Any) -> None:
    """`sylinit.initialize_` on up to `samples` of the training samples; `options`: also fields of `Config`."""
    pytorch(model, x, y, seed)
    constants = {name: options.pop(name) for name in [field.name for field in fields(Config)] if name in options}
    if constants:  # an ablation is of one recipe
        options.setdefault("code", "mixed")
    if "encoding_weight" in constants:  # of all layers
        constants["head_encoding_weight"] = constants["encoding_weight"]
    config = replace(options.pop("config", Config()), **constants)
    initialize_(
        model,
        [(x[:samples], y[:samples])],
        samples=max(2, samples),
        train_size=len(x),
        config=config,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


INITIALIZATIONS: dict[str, Initialization] = {
    "pytorch": pytorch,
    "he-uniform": partial(drawn, draw=partial(nn.init.kaiming_uniform_, nonlinearity="relu")),
    "he-normal": partial(drawn, draw=partial(nn.init.kaiming_normal_, nonlinearity="relu")),
    "xavier-uniform": partial(drawn, draw=nn.init.xavier_uniform_),
    "xavier-normal": partial(drawn, draw=nn.init.xavier_normal_),
    "orthogonal": partial(drawn, draw=nn.init.orthogonal_),
    "lsuv": lsuv,
    "pca-whitening": pca_whitening,
    "pca-whitening-rescaled": partial(pca_whitening, rescale=True),
    "sylinit": sylinit,
}


def apply_initialization(
    name: str, model: nn.Module, x: Tensor, y: Tensor, seed: int, options: Mapping[str, Any] | None = None
) -> float:
    """Initialize a model; equal seeds give equal weights.

    Args:
        name: a name in `INITIALIZATIONS`.
        model: changed in place.
        x: training samples, every leading part of them fit for calibration.
        y: int64 ``[n]``, their labels.
        seed: of everything random; the global random state is left as it was.
        options: of the initialization.

    Returns:
        Seconds it took.

    Raises:
        SylinitError: for an unknown name.
    """
    check_initialization(name)
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        began = time.perf_counter()
        with torch.no_grad():
            INITIALIZATIONS[name](model, x, y, seed, **(options or {}))
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began


def check_initialization(name: str) -> None:
    """Raise `SylinitError` unless `name` is a registered initialization."""
    if name not in INITIALIZATIONS:
        near = difflib.get_close_matches(name, INITIALIZATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SylinitError(f"initialization {name!r}: expected one of {', '.join(INITIALIZATIONS)}{hint}")


def _patches(layer: nn.Linear | nn.Conv2d, x: Tensor, budget: int = 20_000) -> Tensor:
    """Rows of input of a layer, ``[n, groups, d]``, at most about `budget` of them."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, 1, x.shape[-1])[:budget]
    half = tuple(size // 2 for size in layer.kernel_size)
    padding = layer.padding if isinstance(layer.padding, tuple) else half if layer.padding == "same" else (0, 0)
    rows = []
    for images in x.split(50):
        unfolded = F.unfold(images, layer.kernel_size, layer.dilation, padding, layer.stride)
        keep = torch.randperm(unfolded.shape[-1])[: max(1, budget // len(x))].to(x.device)
        rows.append(unfolded[:, :, keep].transpose(1, 2).flatten(0, 1))
    return torch.cat(rows).unflatten(1, (layer.groups, -1))


def _whitened(rows: Tensor, units: int, *, pca: bool) -> Tensor:
    """``[units, d]``: directions scaled to unit variance on centered `rows` ``[n, d]``."""
    covariance = rows.T @ rows / len(rows)
    directions = torch.randn(units, rows.shape[1]).to(rows)
    if pca:
        vectors = torch.linalg.eigh(covariance.double()).eigenvectors.flip(1).T.to(rows)
        directions[: len(vectors)] = vectors[:units]
    variance = ((directions @ covariance) * directions).sum(1)
    # directions in which the data hardly varies are not blown up
    floor = 1e-4 * variance.max().clamp(min=1e-30)
    return directions / variance.clamp(min=floor).sqrt().unsqueeze(1)


def _adopt_statistics(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Running mean and variance of a normalization are those of the input at hand."""
    assert isinstance(norm, _NormBase)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    axes = [axis for axis in range(inputs[0].dim()) if axis != 1]
    variance, mean = torch.var_mean(inputs[0], dim=axes)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)

"""Codes that are fitted on a sample of rows, and what is done with what they return."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sylinit.codes.registry import Code, register_code
from sylinit.config import Config
from sylinit.errors import SylinitError
from sylinit.linalg.eigh import robust_eigh
from sylinit.linalg.orthogonal import orthogonal_rows
from sylinit.linalg.subspace import row_space


def fitted_code(
    code: Code,
    layer: str,
    x: Tensor,
    target: Tensor | None,
    units: int,
    generator: torch.Generator,
    config: Config,
) -> Tensor:
    """Run the function of a code on rows and check what it returns.

    Args:
        code: one with ``needs="rows"``.
        layer: the layer's name, for the message.
        x: ``[n, d]`` centered rows.
        target: ``[n, c]`` or None.
        units: how many numbers the code is to have.
        generator: for what is random in it.
        config: the constants of the method.

    Returns:
        The code ``[n, units]``, float64; where the function gives fewer columns than ``units``, the rest are random
        mixtures of the whitened ones.

    Raises:
        SylinitError: the result has another number of rows, too many columns, or is not finite.
    """
    try:
        result = code.call(layer, x, target=target, units=units, generator=generator, config=config)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "sklearn":  # a user's own function may miss anything
            raise
        raise SylinitError(
            f"layer {layer!r}: the code {code.name!r} needs scikit-learn, which is not installed; "
            "install it, or sylinit with its extra [codes]"
        ) from error
    try:
        s = torch.as_tensor(result).to(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SylinitError(
            f"layer {layer!r}: the code {code.name!r} must return [{x.shape[0]} rows, at most {units} units], "
            f"it returned a {type(result).__name__}"
        ) from error
    if s.ndim == 1:
        s = s.unsqueeze(1)
    if s.ndim != 2 or s.shape[0] != x.shape[0] or s.shape[1] > units:
        raise SylinitError(
            f"layer {layer!r}: the code {code.name!r} must return [{x.shape[0]} rows, at most {units} units], "
            f"it returned {list(s.shape)}; let it use its argument `units`"
        )
    if not bool(s.isfinite().all()):
        raise SylinitError(f"layer {layer!r}: the code {code.name!r} returned NaN or infinite numbers")
    return fill(s, units, generator, config)


def fill(s: Tensor, units: int, generator: torch.Generator, config: Config) -> Tensor:
    """Bring a code ``[n, m]`` to ``units`` columns by random mixtures of its whitened columns.

    Columns that are constant, or say what an earlier one says, make room for such mixtures too.
    """
    centered = s - s.mean(0)
    length = centered.norm(dim=0)
    unit = centered / length.clamp(min=torch.finfo(s.dtype).tiny)
    repeated = ((unit.T @ unit).triu(1).abs() > config.repeated_correlation).any(0) | (
        length <= config.null_variance * length.max()
    )
    missing = units - int((~repeated).sum())
    if not missing:
        return s
    values, vectors = robust_eigh(centered.T @ centered / max(1, len(s)))
    keep = values > values[-1].clamp(min=0) * config.null_variance
    white = centered @ (vectors[:, keep] * values[keep].rsqrt())
    mixture = white @ orthogonal_rows(missing, int(keep.sum()), generator, s).T
    return torch.cat([s[:, ~repeated], mixture * s.var(0).mean().sqrt()], 1)


@register_code("random")
def random(x: Tensor, units: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise that knows nothing of the row: the control for every other code."""
    return torch.randn(len(x), units, dtype=torch.float64, generator=generator)


@register_code("kmeans")
def kmeans(x: Tensor, units: int, generator: torch.Generator, config: Config) -> Tensor:
    """The "triangle" code of k-means on whitened rows: how much nearer than average a row is to each center.

    Source: Coates, Lee and Ng, *An analysis of single-layer networks in unsupervised feature learning*, 2011.
    """
    from sklearn.cluster import MiniBatchKMeans

    white = _white_rows(x, config.null_variance)
    count = min(units, len(x))
    model = MiniBatchKMeans(count, n_init=1, max_iter=30, random_state=seed_of(generator))
    distance = torch.as_tensor(model.fit_transform(white.cpu().numpy()))
    return (distance.mean(1, keepdim=True) - distance).clamp(min=0)


@register_code("ica")
def ica(x: Tensor, units: int, generator: torch.Generator, config: Config) -> Tensor:
    """Independent components (FastICA).

    Source: Hyvärinen and Oja, *Independent component analysis: algorithms and applications*, 2000.
    """
    from sklearn.decomposition import FastICA

    white = _white_rows(x, config.null_variance)
    count = min(units, white.shape[1])
    model = FastICA(count, whiten="unit-variance", max_iter=200, tol=1e-3, random_state=seed_of(generator))
    return torch.as_tensor(_quietly(model, white[:, :count]))


@register_code("nmf")
def nmf(x: Tensor, units: int, generator: torch.Generator) -> Tensor:
    """Non-negative factors of the rows, each coordinate shifted to start at zero.

    Source: Lee and Seung, *Learning the parts of objects by non-negative matrix factorization*, 1999.
    """
    from sklearn.decomposition import NMF

    count = min(units, *x.shape)
    model = NMF(count, init="nndsvda", max_iter=100, tol=1e-3, random_state=seed_of(generator))
    return torch.as_tensor(_quietly(model, x - x.amin(0)))


def _white_rows(x: Tensor, null_variance: float) -> Tensor:
    """Centered rows in their principal axes, largest variance first, each but the faintest of variance one."""
    if len(x) < x.shape[1]:
        _, coordinates = row_space(x, null_variance)
        values = coordinates.square().mean(0)
    else:
        values, vectors = robust_eigh(x.T @ x / len(x))
        keep = values > values[-1] * null_variance
        values, coordinates = values[keep].flip(0), (x @ vectors[:, keep]).flip(1)
    return coordinates * (values + 1e-3 * values[:1]).rsqrt()


def _quietly(model: Any, x: Tensor) -> Any:
    """Fit a scikit-learn model without its warning that it stopped early: a code need not have converged."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit_transform(x.cpu().numpy())


def seed_of(generator: torch.Generator) -> int:
    """A seed for what has a random state of its own."""
    return int(torch.randint(2**31 - 1, (), generator=generator))

"""Latent codes: what a layer's units are asked to say about its input, and the registry of them.

A code is one of two kinds.

* Linear in the row and its target, ``S = on_x x + on_t t`` (`LinearCode`): it needs second moments only. Its function
  takes `Axes` and is registered with ``needs="moments"``.
* Anything else: its function takes a sample of rows ``x [n, d]`` and returns the code ``s [n, k]``; it is registered
  with ``needs="rows"``.

To add one: write the function, decorate it with `register_code`, add its name to the list in ``tests/test_codes.py``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sylinit.errors import SylinitError
from sylinit.linalg.eigh import robust_eigh
from sylinit.linalg.subspace import row_space

NULL = 1e-10
"""A principal axis whose variance is below this share of the largest carries rounding, not data."""


@dataclass(frozen=True)
class Axes:
    """A layer's statistics in the coordinates of its principal axes: ``x' = basis^T (x - mean)``.

    Attributes:
        basis: ``[g, d, r]``, orthonormal columns.
        variances: ``[g, r]``, the variance along each axis, descending, exactly zero on null axes.
        xt: ``[g, r, c]``, the covariance of ``x'`` with the target.
        tt: ``[c, c]``, the covariance of the target.
    """

    basis: Tensor
    variances: Tensor
    xt: Tensor
    tt: Tensor


@dataclass(frozen=True)
class LinearCode:
    """The code ``S = on_x x' + on_t t``: ``on_x [g, k, r]`` in principal axes, ``on_t [g, k, c]``."""

    on_x: Tensor
    on_t: Tensor


@dataclass(frozen=True)
class Code:
    """A latent code: its function and what it needs.

    Attributes:
        name: as shown in the report.
        function: ``(axes, units, generator) -> LinearCode`` for ``needs="moments"``;
            any of ``(x, target, units, generator) -> s [n, k]`` for ``needs="rows"``.
        needs: ``"moments"`` or ``"rows"``.
        labels: whether it is meaningless without targets.
        fallback: the name of the code that takes its place without targets, if any.
        leading: how many principal components of the rows it reads, as a share of the units, if those are the leading
            ones; None where it may read any. It decides whether a large layer can do without the others.
        values: a code given as numbers, ``[samples, m]``: it takes the place of the targets.
        normalised: the code that takes its place in layers that feed a normalisation where training samples are few.
    """

    name: str
    function: Callable[..., Any]
    needs: Literal["moments", "rows"] = "rows"
    labels: bool = False
    fallback: str | None = None
    leading: float | None = None
    values: Tensor | None = None
    normalised: Code | None = None

    def without_labels(self, layer: str, reason: str, remedy: str) -> Code:
        """What takes its place in a layer where its labels tell nothing.

        Args:
            layer: the layer's name, for the message.
            reason: why they tell nothing.
            remedy: what the user can do.

        Raises:
            SylinitError: it has no fallback.
        """
        if self.fallback is None:
            raise SylinitError(f"layer {layer!r}: the code {self.name!r} needs labels, and {reason}; {remedy}")
        return CODES[self.fallback]


CODES: dict[str, Code] = {}
"""Every registered code by name."""


def register_code(
    name: str,
    *,
    needs: Literal["moments", "rows"] = "rows",
    labels: bool = False,
    fallback: str | None = None,
    leading: float | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function a latent code under ``name``; use as a decorator.

    Args:
        name: what ``code=`` will call it.
        needs: ``"rows"`` for ``f(x, target, units, generator) -> s``, with ``x [n, d]`` centred rows, ``target [n, c]``
            or None, and ``s [n, units]`` (of the last three arguments, name only those that you use);
            ``"moments"`` for ``f(axes, units, generator) -> LinearCode``.
        labels: whether it needs targets.
        fallback: the registered code to use instead where there are no targets.
        leading: for ``needs="moments"``, the share of the units that are leading principal components (or mixtures of
            them), where the code reads no others.

    Raises:
        SylinitError: the name is taken.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in CODES:
            raise SylinitError(
                f"register_code: the name {name!r} is taken; choose another, or delete CODES[{name!r}] first"
            )
        CODES[name] = Code(name, function, needs, labels, fallback, leading)
        return function

    return register


def as_code(code: Any) -> Code:
    """Read what a user passes as ``code=``: a name, a `Code`, a scikit-learn transformer, a tensor or a callable.

    ``"mixed:0.5"`` is `mixed` with that share of label units.

    Raises:
        SylinitError: an unknown name (with the nearest ones), or something that is none of these.
    """
    if isinstance(code, Code):
        return code
    if isinstance(code, str):
        if code in CODES:
            return CODES[code]
        name, _, share = code.partition(":")
        if name == "mixed":
            try:
                return mixed(float(share))
            except ValueError:
                raise SylinitError(f"code={code!r}: after 'mixed:' comes the share of label units, 0 to 1") from None
        near = difflib.get_close_matches(code.lower(), CODES, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see sylinit.CODES."
        raise SylinitError(f"code={code!r} is no registered latent code; {hint} Registered: {', '.join(CODES)}.")
    if isinstance(code, Tensor):
        return given(code)
    if hasattr(code, "fit_transform") or (hasattr(code, "fit") and hasattr(code, "transform")):
        return transformer(code)
    if callable(code):
        return Code(getattr(code, "__name__", type(code).__name__), code)
    raise SylinitError(
        f"code= takes a name, a sylinit.Code, a callable, a scikit-learn transformer or a tensor; "
        f"got {type(code).__name__}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Codes from moments


def orthogonal_rows(count: int, dim: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """``count`` random unit vectors ``[count, dim]``, orthonormal within each block of ``dim``."""
    if not dim:
        return like.new_zeros(count, 0)
    blocks = []
    for start in range(0, count, dim):
        q, r = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))
        blocks.append((q * r.diagonal().sign())[: count - start])
    return torch.cat(blocks).to(like) if blocks else like.new_zeros(0, dim)


def whitening(variances: Tensor) -> Tensor:
    """``1 / sqrt(variance)`` on each axis, zero on null axes."""
    return torch.where(variances > 0, variances.clamp(min=torch.finfo(variances.dtype).tiny).rsqrt(), 0)


def mixtures(axes: Axes, count: int, generator: torch.Generator) -> Tensor:
    """``count`` random mixtures of the whitened axes that carry data, ``[g, count, r]``, each of variance one.

    The draw depends on the data's rank only, so it is the same whether null axes were dropped or not.
    """
    alive = axes.variances > 0
    rows = orthogonal_rows(count, int(alive.sum(1).max()), generator, axes.variances)
    rows = torch.nn.functional.pad(rows, (0, alive.shape[1] - rows.shape[1])) * alive.unsqueeze(1)
    return torch.nn.functional.normalize(rows, dim=2) * whitening(axes.variances).unsqueeze(1)


def principal_units(axes: Axes, rank: Tensor, generator: torch.Generator, *, white: bool = False) -> Tensor:
    """Rows ``[g, k, r]``: unit ``rank[g, k]`` is that principal axis, past the last one a random mixture of white axes.

    Args:
        axes: the layer's statistics.
        rank: which component each unit is to be.
        generator: for the mixtures.
        white: scale every unit to variance one; else an axis keeps its variance, and a mixture gets the largest.
    """
    dim = axes.variances.shape[1]
    alive = (axes.variances > 0).sum(1, keepdim=True)
    whiten = whitening(axes.variances).unsqueeze(1)
    component = torch.nn.functional.one_hot(rank.clamp(max=dim - 1), dim).to(axes.variances)
    if white:
        component = component * whiten
    last = int(rank.max())
    if last < int(alive.min()):
        return component
    mixture = mixtures(axes, last + 1, generator).take_along_dim(rank.unsqueeze(2), 1)
    if not white:
        mixture = mixture * axes.variances[:, :1, None].sqrt()
    return torch.where((rank < alive).unsqueeze(2), component, mixture)


@register_code("pca", needs="moments", leading=1.0)
def pca(axes: Axes, units: int, generator: torch.Generator) -> LinearCode:
    """The leading principal components; beyond the rank of the data, random mixtures of whitened ones."""
    groups = axes.variances.shape[0]
    rank = torch.arange(units, device=axes.variances.device).expand(groups, units)
    on_x = principal_units(axes, rank, generator)
    return LinearCode(on_x, on_x.new_zeros(groups, units, axes.tt.shape[0]))


FEW_DIRECTIONS = 5
"""In a whitened target of fewer dimensions than this, many random directions nearly repeat each other."""


def target_units(axes: Axes, count: int, generator: torch.Generator) -> Tensor:
    """``count`` random directions of the whitened target, ``[count, c]``: orthonormal in blocks of its rank.

    Balanced classes have equal variances in every direction, and which eigenvectors such a target has is a matter of
    rounding. So these are used only in sums that do not depend on it: a projector and a symmetric square root.
    """
    values, vectors = robust_eigh(axes.tt)
    keep = values > values[-1].clamp(min=0) * NULL
    kept, dim, rank = vectors[:, keep], len(values), int(keep.sum())
    if not rank:
        return axes.tt.new_zeros(count, dim)
    blocks = []
    for start in range(0, count, rank):
        draw = torch.randn(dim, rank, dtype=torch.float64, generator=generator).to(kept)
        q, r = torch.linalg.qr(kept @ (kept.T @ draw))
        blocks.append((q * r.diagonal().sign()).T[: count - start])
    whiten = (kept * values[keep].rsqrt()) @ kept.T
    return torch.cat(blocks) @ whiten if blocks else axes.tt.new_zeros(0, dim)


def told_apart(axes: Axes, is_label: Tensor, generator: torch.Generator) -> Tensor:
    """What keeps label units from repeating where the classes are few, ``[g, k, r]``.

    The units beyond the rank of such a target also get a random mixture of white principal axes, of variance one.

    Args:
        axes: the layer's statistics.
        is_label: ``[g, k]``, which units are label units.
        generator: for the mixtures.
    """
    rank = int(torch.linalg.matrix_rank(axes.tt, hermitian=True, rtol=NULL))
    repeats = is_label & (is_label.flatten().cumsum(0).view_as(is_label) > rank)
    if rank >= FEW_DIRECTIONS or not bool(repeats.any()):
        return axes.variances.new_zeros(*is_label.shape, axes.variances.shape[1])
    return mixtures(axes, is_label.shape[1], generator).masked_fill(~repeats.unsqueeze(2), 0)


@register_code("label", needs="moments", labels=True, leading=1.0)
def label(axes: Axes, units: int, generator: torch.Generator) -> LinearCode:
    """Every unit a different random direction of the whitened targets (for classes: of the one-hot code)."""
    groups = axes.variances.shape[0]
    on_t = target_units(axes, groups * units, generator).view(groups, units, -1)
    return LinearCode(told_apart(axes, torch.ones_like(on_t[..., 0], dtype=torch.bool), generator), on_t)


LABEL_SHARE = 0.125
"""Of the units of the default code: how many are label units."""

NORMALISED_LABEL_SHARE = 0.25
"""The same in layers that feed a normalisation, where training samples are few.

Label units lie along few, strong directions of the rows. Without a normalisation that makes the loss more curved, and
training less stable, the more there are of them.
"""


def mixed(label_share: float | None = None) -> Code:
    """The default code: whitened principal components, with label units evenly in between.

    Args:
        label_share: the share of label units, 0 to 1. None means `LABEL_SHARE`, and `NORMALISED_LABEL_SHARE` in layers
            that feed a normalisation where training samples are few.
    """
    if label_share is None:
        normalised = replace(mixed(NORMALISED_LABEL_SHARE), name="mixed")
        return replace(mixed(LABEL_SHARE), name="mixed", normalised=normalised)
    if not 0 <= label_share <= 1:
        raise SylinitError(f"mixed: label_share must lie between 0 and 1, got {label_share}")

    def function(axes: Axes, units: int, generator: torch.Generator) -> LinearCode:
        groups = axes.variances.shape[0]
        # Unit u of all groups together is a label unit where the running share of label units passes an integer;
        # so grouped and depthwise layers get their share too, and it is spread evenly over heads and channels.
        running = (torch.arange(groups * units + 1, dtype=torch.float64) * label_share + 1e-9).floor()
        is_label = (running[1:] > running[:-1]).view(groups, units).to(axes.variances.device)
        rank = (~is_label).long().cumsum(1).sub(1).clamp(min=0)
        directions = target_units(axes, int(running[-1]), generator)
        on_x = principal_units(axes, rank, generator, white=True)
        on_x = on_x.masked_fill(is_label.unsqueeze(2), 0) + told_apart(axes, is_label, generator)
        on_t = on_x.new_zeros(groups, units, axes.tt.shape[0])
        on_t[is_label] = directions
        return LinearCode(on_x, on_t)

    return Code(f"mixed({label_share:g})", function, "moments", labels=True, fallback="pca", leading=1 - label_share)


CODES["mixed"] = mixed()


@register_code("lda", needs="moments", labels=True)
def lda(axes: Axes, units: int, generator: torch.Generator) -> LinearCode:
    """Fisher's discriminants ``inv(within) between``, then principal components of what they leave.

    Source: Fisher, *The use of multiple measurements in taxonomic problems*, 1936.
    """
    white = whitening(axes.variances)
    # In white axes within + between = I, so the discriminants are the left singular vectors of the cross-covariance.
    values, vectors = robust_eigh(axes.tt)
    keep = values > values[-1].clamp(min=0) * NULL
    cross = white.unsqueeze(2) * axes.xt @ (vectors[:, keep] * values[keep].rsqrt())
    left, strength, _ = torch.linalg.svd(cross, full_matrices=False)
    count = min(units, int((strength > strength.amax() * 1e-6).sum(1).min()))
    left = left[:, :, :count]
    fisher = left.mT * white.unsqueeze(1)
    rest = pca(axes, units - count, generator).on_x * white.unsqueeze(1)
    projector = left @ left.mT
    rest = rest - (rest * axes.variances.sqrt().unsqueeze(1)) @ projector * white.unsqueeze(1)
    on_x = torch.cat([fisher, rest], 1)
    return LinearCode(on_x, on_x.new_zeros(*on_x.shape[:2], axes.tt.shape[0]))


@register_code("random_projection", needs="moments")
def random_projection(axes: Axes, units: int, generator: torch.Generator) -> LinearCode:
    """Random orthonormal projections of the row itself."""
    groups, dim = axes.variances.shape
    on_x = orthogonal_rows(groups * units, dim, generator, axes.variances).view(groups, units, dim)
    return LinearCode(on_x, on_x.new_zeros(groups, units, axes.tt.shape[0]))


def select_target(axes: Axes, units: int, generator: torch.Generator) -> LinearCode:
    """The target itself, one unit for each of its numbers: the code of a head, and of codes made from rows."""
    del generator
    groups, dim = axes.variances.shape
    eye = torch.eye(units, dtype=axes.tt.dtype, device=axes.tt.device)
    return LinearCode(axes.variances.new_zeros(groups, units, dim), eye.expand(groups, units, units))


# ---------------------------------------------------------------------------------------------------------------------
# Codes from rows


def call(code: Code, layer: str, x: Tensor, target: Tensor | None, units: int, generator: torch.Generator) -> Tensor:
    """Run the function of a code on rows and check what it returns.

    Args:
        code: one with ``needs="rows"``.
        layer: the layer's name, for the message.
        x: ``[n, d]`` centred rows.
        target: ``[n, c]`` or None.
        units: how many numbers the code is to have.
        generator: for what is random in it.

    Returns:
        The code ``[n, units]``, float64; where the function gives fewer columns than ``units``, the rest are random
        mixtures of the whitened ones.

    Raises:
        SylinitError: the result has another number of rows, too many columns, or is not finite.
    """
    offered = {"target": target, "units": units, "generator": generator}
    arguments = {key: offered[key] for key in _asked(code, layer, offered)}
    try:
        result = code.function(x, **arguments)
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
    return fill(s, units, generator)


def _asked(code: Code, layer: str, offered: Collection[str]) -> list[str]:
    """Which of the offered arguments the function of a code takes."""
    try:
        parameters = inspect.signature(code.function).parameters
    except ValueError:  # some built-in functions have no signature
        return []
    _, *others = parameters.values()
    unknown = [
        p.name
        for p in others
        if p.name not in offered and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if unknown:
        raise SylinitError(
            f"layer {layer!r}: the code {code.name!r} asks for {', '.join(map(repr, unknown))}; "
            f"after the rows it may name any of {', '.join(map(repr, offered))}"
        )
    return [p.name for p in others if p.name in offered]


REPEATED = 0.99
"""Two columns of a code whose correlation is at least this say the same."""


def fill(s: Tensor, units: int, generator: torch.Generator) -> Tensor:
    """Bring a code ``[n, m]`` to ``units`` columns by random mixtures of its whitened columns.

    Columns that are constant, or say what an earlier one says, make room for such mixtures too.
    """
    centred = s - s.mean(0)
    length = centred.norm(dim=0)
    unit = centred / length.clamp(min=torch.finfo(s.dtype).tiny)
    repeated = ((unit.T @ unit).triu(1).abs() > REPEATED).any(0) | (length <= NULL * length.max())
    missing = units - int((~repeated).sum())
    if not missing:
        return s
    values, vectors = robust_eigh(centred.T @ centred / max(1, len(s)))
    keep = values > values[-1].clamp(min=0) * NULL
    white = centred @ (vectors[:, keep] * values[keep].rsqrt())
    mixture = white @ orthogonal_rows(missing, int(keep.sum()), generator, s).T
    return torch.cat([s[:, ~repeated], mixture * s.var(0).mean().sqrt()], 1)


@register_code("random")
def random(x: Tensor, units: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise that knows nothing of the row: the control for every other code."""
    return torch.randn(len(x), units, dtype=torch.float64, generator=generator)


@register_code("kmeans")
def kmeans(x: Tensor, units: int, generator: torch.Generator) -> Tensor:
    """The "triangle" code of k-means on whitened rows: how much nearer than average a row is to each centre.

    Source: Coates, Lee and Ng, *An analysis of single-layer networks in unsupervised feature learning*, 2011.
    """
    from sklearn.cluster import MiniBatchKMeans

    white = _white_rows(x)
    count = min(units, len(x))
    model = MiniBatchKMeans(count, n_init=1, max_iter=30, random_state=_seed(generator))
    distance = torch.as_tensor(model.fit_transform(white.cpu().numpy()))
    return (distance.mean(1, keepdim=True) - distance).clamp(min=0)


@register_code("ica")
def ica(x: Tensor, units: int, generator: torch.Generator) -> Tensor:
    """Independent components (FastICA).

    Source: Hyvärinen and Oja, *Independent component analysis: algorithms and applications*, 2000.
    """
    from sklearn.decomposition import FastICA

    white = _white_rows(x)
    count = min(units, white.shape[1])
    model = FastICA(count, whiten="unit-variance", max_iter=200, tol=1e-3, random_state=_seed(generator))
    return torch.as_tensor(_quietly(model, white[:, :count]))


@register_code("nmf")
def nmf(x: Tensor, units: int, generator: torch.Generator) -> Tensor:
    """Non-negative factors of the rows, each coordinate shifted to start at zero.

    Source: Lee and Seung, *Learning the parts of objects by non-negative matrix factorization*, 1999.
    """
    from sklearn.decomposition import NMF

    count = min(units, *x.shape)
    model = NMF(count, init="nndsvda", max_iter=100, tol=1e-3, random_state=_seed(generator))
    return torch.as_tensor(_quietly(model, x - x.amin(0)))


def transformer(estimator: Any) -> Code:
    """A scikit-learn transformer as a code: a clone, given its size and a seed, is fitted on each layer's rows."""

    def function(x: Tensor, target: Tensor | None, units: int, generator: torch.Generator) -> Tensor:
        from sklearn.base import clone

        model = clone(estimator)
        known = model.get_params()
        for size in ("n_components", "n_clusters"):
            if size in known:
                model.set_params(**{size: min(units, *x.shape)})
        if "random_state" in known:
            model.set_params(random_state=_seed(generator))
        y = None if target is None else target.cpu().numpy()
        if y is not None and y.shape[1] > 1:
            y = y.argmax(1)
        out = model.fit_transform(x.cpu().numpy(), y) if hasattr(model, "fit_transform") else None
        if out is None:
            out = model.fit(x.cpu().numpy(), y).transform(x.cpu().numpy())
        return torch.as_tensor(out)[:, :units]

    return Code(type(estimator).__name__, function)


def given(s: Tensor) -> Code:
    """A given tensor ``[samples, m]``, one row for each calibration sample in the order of the batches, as the code."""
    if s.ndim != 2 or not bool(s.isfinite().all()):
        raise SylinitError(f"code= as a tensor must be a finite [samples, units] matrix, got shape {list(s.shape)}")

    def function(x: Tensor, target: Tensor, units: int, generator: torch.Generator) -> Tensor:
        return target[:, :units]

    return Code("given", function, labels=True, values=s)


def _white_rows(x: Tensor) -> Tensor:
    """Centred rows in their principal axes, largest variance first, each but the faintest of variance one."""
    if len(x) < x.shape[1]:
        _, coordinates = row_space(x)
        values = coordinates.square().mean(0)
    else:
        values, vectors = robust_eigh(x.T @ x / len(x))
        keep = values > values[-1] * NULL
        values, coordinates = values[keep].flip(0), (x @ vectors[:, keep]).flip(1)
    return coordinates * (values + 1e-3 * values[:1]).rsqrt()


def _quietly(model: Any, x: Tensor) -> Any:
    """Fit a scikit-learn model without its warning that it stopped early: a code need not have converged."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit_transform(x.cpu().numpy())


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31 - 1, (), generator=generator))

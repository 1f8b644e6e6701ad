"""Codes that are linear in a row and its target, ``S = on_x x' + on_t t``: second moments are all that they need."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from sylinit.codes.registry import CODES, Code, register_code
from sylinit.config import Config
from sylinit.errors import SylinitError
from sylinit.linalg.eigh import robust_eigh
from sylinit.linalg.orthogonal import orthogonal_rows, orthonormal
from sylinit.statistics.axes import Axes


@dataclass(frozen=True)
class LinearCode:
    """The code ``S = on_x x' + on_t t``.

    Attributes:
        on_x: ``[g, k, r]``, in principal axes.
        on_t: ``[g, k, c]``.
        border: places ``[m]``, on the CPU, of units; all others have the same variance and do not correlate. None where
            that is not known.
    """

    on_x: Tensor
    on_t: Tensor
    border: Tensor | None = None


def linear_code(
    code: Code, layer: str, axes: Axes, units: int, generator: torch.Generator, config: Config
) -> LinearCode:
    """Run the function of a code with ``needs="moments"`` and check what it returns.

    Args:
        code: one whose share of label units is settled.
        layer: the layer's name, for the message.
        axes: the layer's statistics.
        units: k, of each group.
        generator: for what is random in it.
        config: the constants of the method.

    Raises:
        SylinitError: the result is no `LinearCode` of the right shapes.
    """
    result = code.call(layer, axes, units=units, generator=generator, label_share=code.label_share, config=config)
    groups, width = len(axes.variances), axes.tt.shape[-1]
    shapes = (groups, units, axes.variances.shape[1]), (groups, units, width)
    if not isinstance(result, LinearCode) or (result.on_x.shape, result.on_t.shape) != shapes:
        got = [list(result.on_x.shape), list(result.on_t.shape)] if isinstance(result, LinearCode) else type(result)
        raise SylinitError(
            f"layer {layer!r}: the code {code.name!r} must return a LinearCode with on_x of shape {list(shapes[0])} "
            f"and on_t of shape {list(shapes[1])}, it returned {got}"
        )
    return result


def mixtures(axes: Axes, count: int, generator: torch.Generator) -> Tensor:
    """``count`` random mixtures of the whitened axes that carry data, ``[g, count, r]``, each of variance one.

    The draw depends on the data's rank only, so it is the same whether null axes were dropped or not.
    """
    rank, dim = max(axes.ranks), axes.variances.shape[1]
    rows = orthogonal_rows(count, rank, generator, axes.variances)
    if rank < dim:
        rows = torch.nn.functional.pad(rows, (0, dim - rank))
    if min(axes.ranks) < rank:
        rows = torch.nn.functional.normalize(rows * (axes.variances > 0).unsqueeze(1), dim=2)
    return rows * axes.whitening.unsqueeze(1)


def principal_units(axes: Axes, rank: Tensor, last: int, generator: torch.Generator, *, white: bool = False) -> Tensor:
    """Rows ``[g, k, r]``: unit ``rank[g, k]`` is that principal axis, past the last one a random mixture of white axes.

    Args:
        axes: the layer's statistics.
        rank: which component each unit is to be.
        last: the largest of these.
        generator: for the mixtures.
        white: scale every unit to variance one; else an axis keeps its variance, and a mixture gets the largest.
    """
    groups, dim = axes.variances.shape
    place = rank if last < dim else rank.clamp(max=dim - 1)
    component = axes.variances.new_zeros(groups, rank.shape[1], dim)
    if white:
        component.scatter_(2, place.unsqueeze(2), axes.whitening.gather(1, place).unsqueeze(2))
    else:
        component.scatter_(2, place.unsqueeze(2), 1.0)
    if last < min(axes.ranks):
        return component
    mixture = mixtures(axes, last + 1, generator).take_along_dim(rank.unsqueeze(2), 1)
    if not white:
        mixture = mixture * axes.variances[:, :1, None].sqrt()
    alive = (axes.variances > 0).sum(1, keepdim=True)
    return torch.where((rank < alive).unsqueeze(2), component, mixture)


@dataclass(frozen=True)
class TargetSpace:
    """The directions in which a target varies.

    Attributes:
        directions: orthonormal columns ``[c, rank]``.
        deviations: ``[rank]``, of the target along each.
    """

    directions: Tensor
    deviations: Tensor

    @property
    def rank(self) -> int:
        """Their number."""
        return len(self.deviations)


def target_space(covariance: Tensor, null_variance: float) -> TargetSpace:
    """Read the directions of a target off its covariance ``[c, c]``, without those of at most this share of variance.

    Balanced classes have equal variances in every direction, and which eigenvectors such a target has is a matter of
    rounding. So use these only in sums that do not depend on it: a projector and a symmetric square root.
    """
    variances, vectors = robust_eigh(covariance)
    known = variances.tolist()  # ascending
    rank = sum(variance > max(0.0, known[-1]) * null_variance for variance in known)
    first = len(known) - rank
    return TargetSpace(vectors[:, first:], variances[first:].sqrt())


def target_units(space: TargetSpace, count: int, generator: torch.Generator) -> Tensor:
    """``count`` random directions of the whitened target, ``[count, c]``: orthonormal in blocks of its rank."""
    kept, rank = space.directions, space.rank
    if not rank or not count:
        return kept.new_zeros(count, len(kept))
    size = min(count, rank)
    blocks = math.ceil(count / size)
    draw = torch.randn(blocks, len(kept), size, dtype=torch.float64, generator=generator).to(kept)
    across = kept.T
    projector, inverse_root = kept @ across, (kept / space.deviations) @ across
    directions = orthonormal(torch.bmm(projector.expand(blocks, -1, -1), draw))
    return directions.mT.flatten(0, 1)[:count] @ inverse_root


def few_directions(
    axes: Axes, units: int, label_share: float, space: TargetSpace, generator: torch.Generator, config: Config
) -> Tensor:
    """What keeps label units from repeating where the classes are few, ``[g, k, r]``, or a zero.

    The units beyond the rank of such a target also get a random mixture of white principal axes, of variance one.

    Args:
        axes: the layer's statistics.
        units: k.
        label_share: of them, how many are label units.
        space: of the target.
        generator: for the mixtures.
        config: the constants of the method.
    """
    groups, repeat = len(axes.variances), None
    if space.rank < config.few_directions:
        repeat = repeats(groups, units, label_share, space.rank)
    if repeat is None:
        return axes.variances.new_zeros(())
    return mixtures(axes, units, generator) * repeat.to(axes.variances.device)


@register_code("pca", needs="moments", leading=1.0)
def pca(axes: Axes, units: int, generator: torch.Generator) -> LinearCode:
    """The leading principal components; beyond the rank of the data, random mixtures of whitened ones."""
    groups = axes.variances.shape[0]
    rank = torch.arange(units, device=axes.variances.device).expand(groups, units)
    on_x = principal_units(axes, rank, units - 1, generator)
    return LinearCode(on_x, on_x.new_zeros(groups, units, axes.tt.shape[-1]))


@register_code("label", needs="moments", labels=True, leading=1.0)
def label(axes: Axes, units: int, generator: torch.Generator, config: Config) -> LinearCode:
    """Every unit a different random direction of the whitened targets (for classes: of the one-hot code)."""
    groups, dim = axes.variances.shape
    space = target_space(axes.tt, config.null_variance)
    on_t = target_units(space, groups * units, generator).view(groups, units, -1)
    on_x = few_directions(axes, units, 1.0, space, generator, config)
    return LinearCode(on_x.expand(groups, units, dim), on_t)


@dataclass(frozen=True)
class Mixture:
    """Which units of a mixed code are label units; tensors on the CPU.

    Attributes:
        is_label: ``[g, k, 1]``.
        labels: ``[m]``, the places of the label units among all units.
        rank: ``[g, k]``, which principal component each of the others is.
        last: the largest of these.
    """

    is_label: Tensor
    labels: Tensor
    rank: Tensor
    last: int


@lru_cache(maxsize=256)
def mixture_of(groups: int, units: int, label_share: float) -> Mixture:
    """Spread a share of label units evenly.

    Unit u of all groups together is a label unit where the running share of label units passes an integer; so grouped
    and depthwise layers get their share too, and it is spread evenly over heads and channels.
    """
    with torch.device("cpu"):
        running = (torch.arange(groups * units + 1, dtype=torch.float64) * label_share + 1e-9).floor()
        passes = running.diff() > 0
        is_label = passes.view(groups, units)
        rank = (~is_label).long().cumsum(1).sub(1).clamp(min=0)
        return Mixture(
            is_label.unsqueeze(2), passes.nonzero().squeeze(1), rank, int(rank.max()) if rank.numel() else -1
        )


@lru_cache(maxsize=256)
def repeats(groups: int, units: int, label_share: float, rank: int) -> Tensor | None:
    """Which units are label units beyond the first ``rank`` of them, ``[g, k, 1]`` of ones and zeros; None if none."""
    with torch.device("cpu"):
        is_label = mixture_of(groups, units, label_share).is_label
        found = is_label & (is_label.flatten().cumsum(0).view_as(is_label) > rank)
        return found.double() if bool(found.any()) else None


@register_code("mixed", needs="moments", labels=True, fallback="pca", leading=lambda label_share: 1 - label_share)
def principal_and_label_units(
    axes: Axes, units: int, generator: torch.Generator, label_share: float, config: Config
) -> LinearCode:
    """The default code: whitened principal components, with label units evenly in between."""
    groups, device = len(axes.variances), axes.variances.device
    mixture, space = mixture_of(groups, units, label_share), target_space(axes.tt, config.null_variance)
    is_label, labels = mixture.is_label.to(device), mixture.labels.to(device)
    directions = target_units(space, len(labels), generator)
    on_x = principal_units(axes, mixture.rank.to(device), mixture.last, generator, white=True)
    on_x = torch.where(is_label, few_directions(axes, units, label_share, space, generator, config), on_x)
    on_t = on_x.new_zeros(groups * units, axes.tt.shape[-1]).index_copy_(0, labels, directions)
    border = mixture.labels if groups == 1 and mixture.last < axes.ranks[0] else None
    return LinearCode(on_x, on_t.view(groups, units, -1), border)


def mixed(label_share: float | None = None) -> Code:
    """The default code: whitened principal components, with label units evenly in between.

    Args:
        label_share: the share of label units, 0 to 1. None means `Config.label_share`, and
            `Config.normalized_label_share` in layers that feed a normalization where training samples are few.

    Raises:
        SylinitError: the share is not between 0 and 1.
    """
    if label_share is None:
        return CODES["mixed"]
    if not 0 <= label_share <= 1:
        raise SylinitError(f"mixed: label_share must lie between 0 and 1, got {label_share}")
    return replace(CODES["mixed"], name=f"mixed({label_share:g})", label_share=label_share)


@register_code("lda", needs="moments", labels=True)
def lda(axes: Axes, units: int, generator: torch.Generator, config: Config) -> LinearCode:
    """Fisher's discriminants ``inv(within) between``, then principal components of what they leave.

    Source: Fisher, *The use of multiple measurements in taxonomic problems*, 1936.
    """
    white = axes.whitening
    # In white axes within + between = I, so the discriminants are the left singular vectors of the cross-covariance.
    space = target_space(axes.tt, config.null_variance)
    cross = white.unsqueeze(2) * axes.xt @ (space.directions / space.deviations)
    left, strength, _ = torch.linalg.svd(cross, full_matrices=False)
    count = min(units, int((strength > strength.amax() * 1e-6).sum(1).min()))
    left = left[:, :, :count]
    fisher = left.mT * white.unsqueeze(1)
    rest = pca(axes, units - count, generator).on_x * white.unsqueeze(1)
    projector = left @ left.mT
    rest = rest - (rest * axes.variances.sqrt().unsqueeze(1)) @ projector * white.unsqueeze(1)
    on_x = torch.cat([fisher, rest], 1)
    return LinearCode(on_x, on_x.new_zeros(*on_x.shape[:2], axes.tt.shape[-1]))


@register_code("random_projection", needs="moments")
def random_projection(axes: Axes, units: int, generator: torch.Generator) -> LinearCode:
    """Random orthonormal projections of the row itself."""
    groups, dim = axes.variances.shape
    on_x = orthogonal_rows(groups * units, dim, generator, axes.variances).view(groups, units, dim)
    return LinearCode(on_x, on_x.new_zeros(groups, units, axes.tt.shape[-1]))


def target_itself(axes: Axes, units: int) -> LinearCode:
    """The target itself, one unit for each of its numbers: the code of a head, and of codes made from rows."""
    groups, dim = axes.variances.shape
    eye = torch.eye(units, dtype=axes.tt.dtype, device=axes.tt.device)
    return LinearCode(axes.variances.new_zeros(groups, units, dim), eye.expand(groups, units, units))


HEAD = Code("head", target_itself, "moments", labels=True, leading=1.0)
"""The code of a head: the targets themselves."""

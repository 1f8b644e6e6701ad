"""Every constant of the method in one frozen, validated record."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

from sylinit.errors import SylinitError


@dataclass(frozen=True, kw_only=True)
class Config:
    """The constants of the method. An ablation is ``dataclasses.replace(config, label_share=0.25)``.

    Shares are between 0 and 1. Variances and lengths are of a unit's output or weight on the calibration data.

    Attributes:
        label_share: of the units of the code "mixed", how many follow the labels; the others are principal components.
        normalized_label_share: the same in layers that feed a normalization where training samples are few. Label units
            lie along few, strong directions of the rows. Without a normalization that makes the loss more curved, and
            training less stable, the more there are of them.
        few_directions: in a whitened target of fewer dimensions than this, many random directions nearly repeat each
            other; label units beyond its rank then get a random mixture of principal axes as well.
        encoding_weight: lambda, the weight of encoding against decoding, of every layer before the head.
        head_encoding_weight: lambda of the head; None for the weight of least generalized cross-validation error.
        value_standard_errors: a head of values, before training, takes the smallest lambda whose cross-validation error
            is within so many standard errors of the least one. What it fits of the noise, training cannot take back.
            Not of heads that are computed alone, by `initialize_head_`: these are to predict as they are.
        variance: of each unit's output.
        variance_floor: the variance along a unit's direction is taken to be at least this share of the mean over all
            directions, which keeps a direction of noise from being blown up.
        logit_deviation: root mean square of a classifier's centered logits.
        prior: what share of the frequencies of classes or labels the bias of a head with logits carries. 1 is the
            decision of a least-squares fit, which favors frequent classes; 0 leaves them out, which favors rare ones.
            One half lies midway between the classes' mean logits on new samples, where a fit is about half as high.
            Where features tell next to nothing, less is carried (`sylinit.solvers.scaling.carried`).
        scale_ratio: a layer that reads the data itself is solved in standardized inputs if their deviations differ by
            more than this; see `sylinit.solvers.standardize`.
        offset_ratio: the same if a mean is more than so many deviations from zero.
        filter_length: Euclidean length of filters that feed a normalization where training samples are few; He's start
            gives them sqrt(2). The normalization undoes their scale, but the longer a filter, the smaller its step in
            training. None for `variance`, as elsewhere.
        norm_scale: weight of a fresh normalization where training samples are few. Layers behind it are rescaled, so
            this changes no function between them; it shrinks what residual branches add up to.
        norm_offset: mean output of a fresh normalization where training samples are few, in its standard deviations. A
            rectifier behind it then passes 69 % of a Gaussian signal instead of a half.
        few_samples: fewer training samples than this are few.
        rows: rows of input read for a layer: an upper bound, "all", or None for ``max(min_rows, rows_per_input * d)``.
        min_rows: see `rows`.
        rows_per_input: see `rows`.
        max_fitted_rows: upper bound on the rows that a code is fitted on, whatever `rows` is.
        one_hot_classes: up to this many classes a target is one-hot, beyond it a random vector of so many signs.
        solver: "auto" takes for each layer the first solver that serves; "exact" allows exact solvers only.
        residual_tolerance: relative residual at which an approximate solution is as good as the exact one for a start
            of training; where it is not reached, the layer is solved exactly.
        null_variance: a principal axis whose variance is below this share of the largest carries rounding, not data.
        repeated_correlation: two columns of a fitted code whose correlation is above this say the same.
        constant_variance: rows or targets whose variance is below this share of their squared mean are constant.
        float32_variance: float32 tells a principal axis from rounding if its variance is at least this share of the
            largest second moment.
        min_projected_inputs: below this d an eigendecomposition takes milliseconds, and no layer is projected.
        exact_operation_cost: seconds of an operation of a float64 eigendecomposition over those of a float32 product.
        projected_gain: how many times faster than the exact solver the projected one must be to be taken.
        subspace_steps: of the iteration that finds the leading principal components in the projected solver.
        max_steps: of conjugate gradients in the projected solver.
        shared_factor_inputs: one Cholesky factor is cheaper than conjugate gradients for more than d over this many
            units that share a system.
        chunk: numbers that are converted to another dtype at once, whatever the number of rows.

    Raises:
        SylinitError: a value out of its range, naming the field, what was expected and what came.
    """

    label_share: float = 0.125
    normalized_label_share: float = 0.25
    few_directions: int = 5
    encoding_weight: float = 4.0
    head_encoding_weight: float | None = None
    value_standard_errors: float = 1.0
    variance: float = 1.0
    variance_floor: float = 0.1
    logit_deviation: float = 0.1
    prior: float = 0.5
    scale_ratio: float = 100.0
    offset_ratio: float = 1000.0
    filter_length: float | None = 2**0.5
    norm_scale: float = 0.5
    norm_offset: float = 0.5
    few_samples: int = 3000
    rows: int | Literal["all"] | None = None
    min_rows: int = 4096
    rows_per_input: int = 8
    max_fitted_rows: int = 20_000
    one_hot_classes: int = 512
    solver: Literal["auto", "exact"] = "auto"
    residual_tolerance: float = 1e-3
    null_variance: float = 1e-10
    repeated_correlation: float = 0.99
    constant_variance: float = 1e-12
    float32_variance: float = 1e-5
    min_projected_inputs: int = 256
    exact_operation_cost: float = 2.5
    projected_gain: float = 2.0
    subspace_steps: int = 2
    max_steps: int = 30
    shared_factor_inputs: int = 24
    chunk: int = 1 << 22

    def __post_init__(self) -> None:
        for field in fields(self):
            expected, holds = RANGES[field.name]
            value = getattr(self, field.name)
            if not holds(value):
                raise SylinitError(f"Config: {field.name} must be {expected}, got {value!r}")


Range = tuple[str, Callable[[Any], bool]]
"""What a value must be, in words, and whether it is."""


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _or_none(expected: Range) -> Range:
    words, holds = expected
    return f"{words} or None", lambda value: value is None or holds(value)


def _at_least(least: int) -> Range:
    return f"an integer of at least {least}", lambda value: _integer(value) and value >= least


POSITIVE: Range = ("a positive finite number", lambda value: _number(value) and value > 0)
NOT_NEGATIVE: Range = ("a finite number of at least 0", lambda value: _number(value) and value >= 0)
SHARE: Range = ("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)

RANGES: dict[str, Range] = {
    "label_share": SHARE,
    "normalized_label_share": SHARE,
    "few_directions": _at_least(0),
    "encoding_weight": POSITIVE,
    "head_encoding_weight": _or_none(POSITIVE),
    "value_standard_errors": NOT_NEGATIVE,
    "variance": POSITIVE,
    "variance_floor": NOT_NEGATIVE,
    "logit_deviation": POSITIVE,
    "prior": ("a number from 0 to 1, or True or False", lambda value: isinstance(value, bool) or SHARE[1](value)),
    "scale_ratio": POSITIVE,
    "offset_ratio": POSITIVE,
    "filter_length": _or_none(POSITIVE),
    "norm_scale": POSITIVE,
    "norm_offset": ("a finite number", _number),
    "few_samples": _at_least(0),
    "rows": (
        "an integer of at least 2, 'all' or None",
        lambda value: value is None or value == "all" or (_integer(value) and value >= 2),
    ),
    "min_rows": _at_least(2),
    "rows_per_input": _at_least(0),
    "max_fitted_rows": _at_least(2),
    "one_hot_classes": _at_least(2),
    "solver": ("'auto' or 'exact'", lambda value: value in ("auto", "exact")),
    "residual_tolerance": POSITIVE,
    "null_variance": SHARE,
    "repeated_correlation": SHARE,
    "constant_variance": SHARE,
    "float32_variance": SHARE,
    "min_projected_inputs": _at_least(0),
    "exact_operation_cost": POSITIVE,
    "projected_gain": POSITIVE,
    "subspace_steps": _at_least(1),
    "max_steps": _at_least(1),
    "shared_factor_inputs": _at_least(0),
    "chunk": _at_least(1),
}
"""The range of each field of `Config`."""

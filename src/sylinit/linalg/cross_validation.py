"""How much a head is to encode and how much to decode: the weight of least cross-validation error, in closed form.

For a fixed code the Sylvester equation is ridge regression of the code on the rows: in the eigenvectors of
``A = U diag(a) U^T`` and the principal axes of the rows, of variances v, it predicts code i by the smoother

    f_i = sum_j  lambda v_j / (a_i + lambda v_j) * (slope of code i on axis j) * x_j

so small weights shrink more. What such a smoother would lose on rows it has not seen is estimated from the moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHTS = torch.logspace(-4, 4, 65, dtype=torch.float64)
"""Encoding weights that are compared: eight a decade."""

FARTHER = torch.logspace(4, 10, 25, dtype=torch.float64)[1:]
"""Those that are compared, too, where rows are more than their axes: what tells the targets apart may be a
ten-thousandth of the rows' deviation, beside directions that all rows share."""

WORTH_IT = 0.9
"""They shrink so little that rounding tells in the solution; so they are to leave at most this share of the error,"""

EXPLAINED = 0.01
"""and are not looked at where the others leave less than this share of the code's variance."""


def least_error_weight(
    a: Tensor,
    variances: Tensor,
    cross: Tensor,
    count: Tensor,
    chunk: int = 1 << 22,
    standard_errors: float = 0.0,
    inflation: float = 1.0,
) -> float:
    """The encoding weight lambda of least generalized cross-validation error.

        GCV(lambda) = sum_i  RSS_i / n / (1 - f tr(H_i) / n)^2

    with ``RSS_i`` the squared residual of code i and ``H_i`` its hat matrix, the mean's column included.

    Args:
        a: eigenvalues of ``A``, ``[g, k]``: the variances of the code's own principal axes.
        variances: of the rows' principal axes, ``[g, r]``.
        cross: covariance of the one with the other, ``[g, k, r]``.
        count: n, the number of rows.
        chunk: numbers that are formed at once.
        standard_errors: the smallest weight is taken whose error is within so many standard errors of the least one.
            The standard error of a mean of n squared Gaussian residuals is ``sqrt(2 / n)`` of it.
        inflation: f, above 1 where rows may be fewer than what they are explained by: without, the error may be least
            where all is explained.

    Returns:
        One weight for all units: the smallest where several are best.

    Source: Golub, Heath and Wahba, *Generalized cross-validation as a method for choosing a good ridge parameter*,
    Technometrics 1979; for f, Kim and Gu, *Smoothing spline Gaussian regression: more scalable computation via
    efficient approximation*, JRSS B 2004; for the standard errors, Breiman, Friedman, Olshen and Stone,
    *Classification and Regression Trees*, 1984.
    """
    a, v = a.clamp(min=0), variances.clamp(min=0).unsqueeze(1)
    tiny = torch.finfo(v.dtype).tiny
    explained = torch.where(v > 0, cross.square() / v.clamp(min=tiny), 0)  # of code i by axis j, without shrinkage

    plenty = bool((count > v.shape[2] + 1).all())  # few rows are explained altogether as the weight grows
    weights, errors = (torch.cat([WEIGHTS, FARTHER]) if plenty else WEIGHTS).to(v), []
    for some in weights.split(max(1, chunk // explained.numel())):
        sizes = some.view(-1, 1, 1, 1) * v
        kept = sizes / (sizes + a.unsqueeze(2)).clamp_(min=tiny)  # lambda v / (a + lambda v), [w, g, k, r]
        unseen = (1 - inflation * (kept.sum(3) + 1) / count).clamp_(min=1e-6)
        rss = a - (kept * (2 - kept) * explained).sum(3)
        errors.append((rss.clamp_(min=0) / unseen.square()).sum((1, 2)))
    slack = 1 + standard_errors * float(2 / count.amin()) ** 0.5
    near, far = torch.cat(errors).split([len(WEIGHTS), len(weights) - len(WEIGHTS)])
    if len(far) and bool(near.min() > EXPLAINED * a.sum()) and bool(far.min() < WORTH_IT * near.min()):
        return _smallest(FARTHER, far, slack)
    return _smallest(WEIGHTS, near, slack)


def _smallest(weights: Tensor, errors: Tensor, slack: float) -> float:
    """The first weight whose error is at most so many times the least."""
    return float(weights[int((errors <= slack * errors.min()).int().argmax())])

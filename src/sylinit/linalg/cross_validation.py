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


def least_error_weight(a: Tensor, variances: Tensor, cross: Tensor, count: Tensor) -> float:
    """The encoding weight lambda of least generalised cross-validation error.

        GCV(lambda) = sum_i  RSS_i / n / (1 - tr(H_i) / n)^2

    with ``RSS_i`` the squared residual of code i and ``H_i`` its hat matrix, the mean's column included.

    Args:
        a: eigenvalues of ``A``, ``[g, k]``: the variances of the code's own principal axes.
        variances: of the rows' principal axes, ``[g, r]``.
        cross: covariance of the one with the other, ``[g, k, r]``.
        count: n, the number of rows.

    Returns:
        One weight for all units: the smallest of `WEIGHTS` where several are best.

    Source: Golub, Heath and Wahba, *Generalized cross-validation as a method for choosing a good ridge parameter*,
    Technometrics 1979.
    """
    v = variances.clamp(min=0).unsqueeze(1)
    size = a.clamp(min=0).unsqueeze(2)
    errors = []
    for weight in WEIGHTS.tolist():
        total = size + weight * v
        inverse = torch.where(total > 0, 1 / torch.where(total > 0, total, 1), 0)
        fit = weight * cross * inverse  # of code i on axis j
        rss = a.clamp(min=0) - (2 * fit * cross - fit.square() * v).sum(2)
        freedom = (weight * v * inverse).sum(2) + 1
        unseen = (1 - freedom / count).clamp(min=1e-6)
        errors.append((rss.clamp(min=0) / unseen.square()).sum())
    return float(WEIGHTS[int(torch.stack(errors).argmin())])

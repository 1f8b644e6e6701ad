"""Ridge regression with each row left out once, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def leave_one_out(
    x: Tensor, t: Tensor, penalty: Tensor | float, *, intercept: bool = True, slope: bool = False
) -> Tensor:
    """What ridge regression on all other rows predicts for each row.

    With the hat matrix ``H = X (X^T X + n penalty I)^-1 X^T + 1 / n`` of centered rows and an intercept, the prediction
    for row i without it is ``((H t)_i - H_ii t_i) / (1 - H_ii)``.

    Args:
        x: rows ``[n, d]``.
        t: targets ``[n, c]``.
        penalty: added to each variance of ``x``; positive.
        intercept: whether there is one; without, nothing is centered, and there is no 1 / n.
        slope: whether each target's predictions are stretched by their least-squares slope on it, that of all rows.

    Returns:
        Predictions ``[n, c]``, float64.

    Source: Allen, *The relationship between variable selection and data augmentation and a method for prediction*,
    Technometrics 1974.
    """
    x, t = x.double(), t.double()
    count, dim = x.shape
    mean = t.mean(0) * intercept
    x, t = x - x.mean(0) * intercept, t - mean
    ridge = torch.as_tensor(penalty, dtype=torch.float64, device=x.device).clamp(min=torch.finfo(x.dtype).tiny) * count
    if dim <= count:
        gram = x.T @ x
        gram.diagonal().add_(ridge + 1e-12 * gram.diagonal().mean())
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), x.T, upper=False)
        leverage, fitted = half.square().sum(0), half.T @ (half @ t)
    else:
        gram = x @ x.T
        gram.diagonal().add_(ridge + 1e-12 * gram.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        leverage, fitted = 1 - ridge * inverse.diagonal(), t - ridge * (inverse @ t)
    tiny = torch.finfo(t.dtype).tiny
    stretch = (fitted * t).sum(0) / fitted.square().sum(0).clamp(min=tiny) if slope else 1.0
    leverage = (leverage + intercept / count).clamp(max=1 - 1e-9).unsqueeze(1)
    of_others = -intercept * t / max(1, count - 1)  # the mean of all other rows
    return mean + of_others + stretch * ((fitted - leverage * t) / (1 - leverage) - of_others)

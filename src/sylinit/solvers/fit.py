"""What a solver finds for one layer, from its equation to its report."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sylinit.statistics.moments import Covariance


@dataclass(frozen=True)
class Fit:
    """The solution ``W`` of ``A W + W B = C`` for one layer: as a solver returns it, and then as `rescale` leaves it.

    ``A = S S^T / n``, ``B = lambda X X^T / n``, ``C = (1 + lambda) S X^T / n``, with the code ``S`` scaled to the root
    mean square of ``X``. Residual and errors are those of the solver's ``W``, whatever its units are scaled to later.

    Attributes:
        weight: ``[g, k, d]``; of a solver, in the coordinates of `statistics`.
        encoding_weight: lambda.
        residual: ``||A W + W B - C|| / ||C||`` over all groups.
        encoding_error: ``||W X - S||^2 / ||S||^2``.
        decoding_error: ``||X - W^T S||^2 / ||X||^2``.
        solver: the name of the solver.
        alive: ``[g]``, groups whose input varies; the others have no meaningful weight here.
        note: what a user should know.
        statistics: of a solver: the covariance that it solved with; None once the weight is rescaled.
        scale: of a solver: the factor of the code ``S``, ``[g, 1, 1]``.
        output_variance: of a solver: of each unit, ``diag(W Cov W^T)``, ``[g, k]``; None once the weight is rescaled.
        bias: ``[g, k]``; None until the weight is rescaled.
        dead: ``[g, k]``, units that are zero; None until the weight is rescaled.
        prior: of a head with logits: what part of the frequencies its bias carries, ``[g, 1]`` or ``[g, k]``.
        rank: numerical rank of the weight, summed over groups, a float64 scalar; None until the weight is rescaled.
    """

    weight: Tensor
    encoding_weight: float
    residual: float
    encoding_error: float
    decoding_error: float
    solver: str
    alive: Tensor
    note: str = ""
    statistics: Covariance | None = field(default=None, repr=False)
    scale: Tensor | None = field(default=None, repr=False)
    output_variance: Tensor | None = field(default=None, repr=False)
    bias: Tensor | None = None
    dead: Tensor | None = None
    prior: Tensor | None = None
    rank: Tensor | None = None

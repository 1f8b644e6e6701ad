"""What is to be solved for one layer, where its data comes from, and what a solver is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from sylinit.codes.registry import Code
from sylinit.config import Config
from sylinit.solvers.fit import Fit
from sylinit.statistics.moments import Covariance

T = TypeVar("T")

Role = Literal["units", "directions", "logits", "values"]
"""What a layer's outputs are: units; "directions", units whose scale a normalization will undo and which training is to
move little; the logits of a classifier; the values that are to be predicted."""


def above_chance(share: Tensor, exclusive: bool) -> Tensor:
    """What the shares of classes ``[..., c]`` are above ``1/c``, or, if they do not exclude each other, above 1/2."""
    return share - (1 / share.shape[-1] if exclusive else 0.5)


@dataclass(frozen=True)
class Problem:
    """What is to be solved for one layer, beside its data.

    Attributes:
        name: the layer's name, for messages.
        code: the latent code.
        units: k, the units of each group.
        seed: of everything random.
        role: what its outputs are.
        intercept: whether a bias can center them; a head without one is fitted through the origin.
        exclusive: of logits, whether they are of classes that exclude each other rather than of labels.
        encoding: lambda of a layer before the head, over `Config.encoding_weight`.
    """

    name: str
    code: Code
    units: int
    seed: int
    role: Role = "units"
    intercept: bool = True
    exclusive: bool = True
    encoding: float = 1.0

    @property
    def is_head(self) -> bool:
        """Whether its outputs are predictions."""
        return self.role in ("logits", "values")

    def encoding_weight(self, config: Config) -> float | None:
        """Lambda; None for the one of least cross-validation error, which exact solvers find."""
        return config.head_encoding_weight if self.is_head else self.encoding * config.encoding_weight

    def kept_mean(self, mean: Tensor, config: Config) -> Tensor:
        """What the targets keep of their mean ``[..., c]``, for the weights to carry where there is no bias.

        All of it for values. For logits `Config.prior` times what the frequencies are above those of a uniform guess.
        """
        if self.intercept or not self.is_head:
            return torch.zeros_like(mean)
        if self.role == "values":
            return mean
        return config.prior * above_chance(mean, self.exclusive)

    def generator(self) -> torch.Generator:
        """A fresh generator: the same draws whichever process or solver solves the layer."""
        return torch.Generator().manual_seed(self.seed)


class Source(Protocol):
    """The rows of input of one layer, in all processes; a solver asks for the statistics that it needs.

    Attributes:
        groups: g.
        dim: d, the inputs of each group.
        count: n, the rows in all processes.
        width: c, the length of the targets; 0 for none.
    """

    @property
    def groups(self) -> int: ...  # noqa: D102
    @property
    def dim(self) -> int: ...  # noqa: D102
    @property
    def count(self) -> int: ...  # noqa: D102
    @property
    def width(self) -> int: ...  # noqa: D102

    def covariance(self, dtype: torch.dtype) -> Covariance:
        """Of all rows, with products formed in ``dtype``."""

    def rows(self) -> tuple[Tensor, Tensor]:
        """All rows ``[g, n, d]`` and their targets ``[n, c]``, or ``[g, n, c]`` where each group has its own."""

    def together(self, work: Callable[[], T]) -> T:
        """Do local work; if it fails in one process, raise in all."""

    def agree(self, held: bool) -> bool:
        """Whether it holds in all processes."""


@dataclass(frozen=True)
class Declined:
    """A solver did not serve after all; `reason` is for the report, "" for none."""

    reason: str = ""


class Solver(Protocol):
    """One way to solve a layer's equation.

    Attributes:
        name: as shown in the report.
    """

    name: str

    def applies(self, problem: Problem, source: Source, config: Config) -> bool:
        """Whether the solver serves a layer, and is worth its while; from sizes alone, so alike in all processes."""

    def solve(self, problem: Problem, source: Source, config: Config) -> Fit | Declined:
        """Ask the source for statistics and solve the equation, before its units are rescaled."""

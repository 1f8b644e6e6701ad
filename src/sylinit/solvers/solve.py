"""One layer's equation before its units are rescaled, by the first solver that serves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from sylinit.codes.fitted import fitted_code
from sylinit.codes.linear import HEAD
from sylinit.config import Config
from sylinit.errors import SylinitError
from sylinit.solvers.exact import Exact
from sylinit.solvers.fit import Fit
from sylinit.solvers.problem import Problem, Solver, Source
from sylinit.solvers.projected import Projected
from sylinit.solvers.row_space import RowSpace
from sylinit.statistics.moments import Covariance, row_covariance

T = TypeVar("T")

SOLVERS: list[Solver] = [RowSpace(), Projected(), Exact()]
"""The first of these that applies to a layer, and does not decline it then, solves it."""


def solve(source: Source, problem: Problem, config: Config) -> Fit:
    """Solve one layer's equation: statistics -> latent code -> Sylvester equation.

    Args:
        source: the layer's rows.
        problem: what to solve.
        config: the constants of the method.

    Returns:
        The solution, whose units `rescale` is to scale; in a process group, by the same solver in all processes.

    Raises:
        SylinitError: for a code that fails, naming the layer, or where no solver applies.
    """
    code = problem.code.with_label_share(config, normalized=problem.role == "directions")
    problem = replace(problem, code=code)
    if code.needs == "rows":
        source = source_with_code(source, problem, config)
        problem = replace(problem, code=replace(HEAD, name=code.name, labels=False, leading=None))
    notes: list[str] = []
    for solver in SOLVERS:
        if not solver.applies(problem, source, config):
            continue
        found = solver.solve(problem, source, config)
        if source.agree(isinstance(found, Fit)):
            assert isinstance(found, Fit)
            return replace(found, note="; ".join(filter(None, (found.note, *notes))))
        if not isinstance(found, Fit):
            notes.append(found.reason)
    raise SylinitError(f"layer {problem.name!r}: no solver applies to it; see sylinit.solve.SOLVERS")


@dataclass(frozen=True)
class CodedRows:
    """The rows of one layer with a code that was fitted on them in the place of their targets.

    Attributes:
        source: where the rows come from.
        x: ``[g, n, d]``.
        code: ``[g, n, k]``.
    """

    source: Source
    x: Tensor
    code: Tensor

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.x.shape[0]

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.x.shape[1]

    @property
    def dim(self) -> int:
        """Inputs of each group."""
        return self.x.shape[2]

    @property
    def width(self) -> int:
        """Units of each group."""
        return self.code.shape[2]

    def covariance(self, dtype: torch.dtype) -> Covariance:
        """Of rows and code; always in float64."""
        return row_covariance(self.x, self.code)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Rows and code."""
        return self.x, self.code

    def together(self, work: Callable[[], T]) -> T:
        """As the source does."""
        return self.source.together(work)

    def agree(self, held: bool) -> bool:
        """As the source does."""
        return self.source.agree(held)


def source_with_code(source: Source, problem: Problem, config: Config) -> CodedRows:
    """Fit the code of a layer on its centered rows, group by group."""
    rows, targets = source.rows()

    def code_of(x: Tensor) -> Tensor:
        centered = (x - x.mean(0, dtype=torch.float64).to(x)).double()
        known = targets if targets.shape[1] else None
        return fitted_code(problem.code, problem.name, centered, known, problem.units, problem.generator(), config)

    return CodedRows(source, rows, source.together(lambda: torch.stack([code_of(x) for x in rows])))

"""Layer sites: what is computed when the data reaches a module, a matrix or the statistics of a normalization.

A site computes itself: ``rows = collect(...)``, ``fit = solve(...)``, ``fit = rescale(...)``, ``write(fit)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sylinit.codes import Code
from sylinit.config import Config
from sylinit.data.calibration import CalibrationSet
from sylinit.errors import SylinitError, UnsupportedLayerError
from sylinit.fit import Fit
from sylinit.layers.attention import AttentionOutputView
from sylinit.layers.inputs import plain, require_plain_rows
from sylinit.layers.normalization import check_channels, norm_sums, start_fresh, write_statistics
from sylinit.layers.registry import is_stock
from sylinit.layers.view import LayerView
from sylinit.report import LayerReport
from sylinit.runtime.processes import Processes
from sylinit.runtime.transaction import Transaction
from sylinit.scaling import rescale
from sylinit.solve import solve
from sylinit.solvers.problem import Problem, Role
from sylinit.statistics.alignment import Layout
from sylinit.statistics.rows import Known, Rows, collect, not_finite, require_finite


@dataclass(frozen=True)
class Context:
    """What every site of one pass works with.

    Attributes:
        data: the calibration set.
        config: the constants of the method.
        processes: the group.
        transaction: told of what is to stay.
        layouts: where samples were seen to lie, by the name of the view.
    """

    data: CalibrationSet
    config: Config
    processes: Processes
    transaction: Transaction
    layouts: dict[str, Layout]


@dataclass(frozen=True)
class MatrixSite:
    """A weight, seen as one matrix for each group.

    Attributes:
        view: the weight.
        code: the latent code of its units.
        role: what its outputs are.
    """

    view: LayerView
    code: Code
    role: Role

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.view.name

    @property
    def module(self) -> nn.Module:
        """The module at which its input is met."""
        return self.view.module

    @property
    def kind(self) -> str:
        """The type of the module."""
        return self.view.kind

    @property
    def is_head(self) -> bool:
        """Whether its outputs are the predictions."""
        return self.role in ("logits", "values")

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        return self.view.parameters[0].device

    @property
    def behind(self) -> bool:
        """Whether its input is met behind the module's forward rather than before it."""
        return isinstance(self.view, AttentionOutputView)

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the weight multiplies, if the module itself could read it.

        Raises:
            SylinitError: the input does not fit, or the module runs with other parameters than its own.
        """
        self._require_own_parameters()
        require_plain_rows(self.name, (args, kwargs))
        x = plain(self.view.input(args, kwargs))
        self.view.check(x)
        return x

    def misfit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Why a module that was not seen in the trial run is no matrix after all; empty if it is one."""
        if is_stock(self.module) or self.view.agrees(args, kwargs, plain(self.module.forward(*args, **kwargs))):
            return ""
        return f"{self.kind} computes something else than rows(x) @ weight.mT + bias"

    def compute(self, waiting: dict[int, Any], number: int, context: Context) -> LayerReport:
        """Compute the weight from everything that waits: collect, solve, rescale, write.

        Args:
            waiting: the input by batch.
            number: of the site, from which its random draws are seeded.
            context: of the pass.
        """
        seed = (context.data.seed + 7919 * number) % 2**63
        rows = self._collect(waiting, seed, context)
        if rows is None:
            met = sum(len(x) for x in waiting.values() if isinstance(x, Tensor))
            few = "no row" if not met else "1 row"
            return self.left_alone(f"it has met {few} of input; a layer is computed from at least 2")
        code, note = self._code(rows)
        problem = Problem(self.name, code, self.view.units, seed + 1, self.role)
        fit = solve(rows, problem, context.config)
        fit = context.processes.together(lambda: rescale(fit, self.role, context.config))
        record = LayerReport(self.name, self.kind, "initialized", note, code=code.name, rows=rows.count)
        return self._write(fit, record, context)

    def left_alone(self, reason: str) -> LayerReport:
        """A record that says why nothing was done."""
        return LayerReport(self.name, self.kind, "left alone", reason)

    def _collect(self, waiting: dict[int, Any], seed: int, context: Context) -> Rows | None:
        data = context.data
        targets = data.targets
        if self.code.values is not None:
            targets = data.given(self.code.values)
        elif self.is_head and data.kind.classes:
            targets = data.one_hot(max(2, self.view.units))
        masks = tuple(batch.mask for batch in data.batches)
        sizes = tuple(batch.samples for batch in data.batches)
        known = Known(masks=masks, sizes=sizes)
        if targets is not None:
            known = replace(known, vectors=targets.vectors, mean=targets.mean)
        return collect(
            self.name,
            self.view,
            waiting,
            known,
            context.layouts.get(self.name),
            lambda total, share: _row_budget(self.view.dim, self.code.needs, total, share, context.config),
            torch.Generator().manual_seed(seed),
            context.processes,
            self.device,
        )

    def _code(self, rows: Rows) -> tuple[Code, str]:
        """The layer's code, or what it falls back to where its rows cannot be matched to samples."""
        if rows.width or not self.code.labels:
            return self.code, ""
        reason = "its rows cannot be matched to samples"
        remedy = "choose another for this layer, as in code={'pattern': 'pca'}"
        return self.code.without_labels(self.name, reason, remedy), f"{reason}, so no labels were used"

    def _write(self, fit: Fit, record: LayerReport, context: Context) -> LayerReport:
        """Write a fit into the module; every process writes the numbers of the first."""
        view, alive = self.view, fit.alive
        assert fit.bias is not None
        assert fit.dead is not None
        if not bool(alive.any()):
            return self.left_alone("its input is constant on the calibration data")
        weight, bias = fit.weight, fit.bias
        if not bool(alive.all()):
            kept = f"{int((~alive).sum())} of {view.groups} groups have a constant input and keep their weights"
            record = replace(record, reason=kept)
            old = view.bias()
            weight = torch.where(alive.view(-1, 1, 1), weight, view.weight().to(weight))
            bias = bias if old is None else torch.where(alive.view(-1, 1), bias, old.to(bias))
        context.processes.broadcast_(weight := weight.contiguous())
        context.processes.broadcast_(bias := bias.contiguous())
        _require_representable(self.name, view, weight, bias)
        context.transaction.keep(*view.parameters)
        try:
            view.write(weight, bias if view.has_bias else None)
        except UnsupportedLayerError as error:
            return self.left_alone(str(error))
        return replace(
            record,
            shape=(view.groups, view.units, view.dim),
            reason="; ".join(filter(None, (record.reason, fit.note))),
            solver=fit.solver,
            encoding_weight=fit.encoding_weight,
            rank=fit.rank,
            residual=fit.residual,
            encoding_error=fit.encoding_error,
            decoding_error=fit.decoding_error,
            dead_units=float(fit.dead.double().mean()),
        )

    def _require_own_parameters(self) -> None:
        """Refuse a forward that runs with other tensors in the place of the parameters, as `functional_call` does."""
        now = {id(p) for p in self.view.owner.parameters()}
        if any(id(parameter) not in now for parameter in self.view.parameters):
            raise SylinitError(
                f"layer {self.name!r}: the forward runs with other tensors in the place of the layer's parameters "
                "(torch.func.functional_call does so), which would be overwritten instead of them; let forward= call "
                "the model itself"
            )


@dataclass(frozen=True)
class NormalizationSite:
    """The running statistics of a normalization layer.

    Attributes:
        name: of the layer.
        module: the layer.
        selected: whether the user's ``layers=`` names it.
        held: whether it is selected and to stay near its start because training samples are few.
    """

    name: str
    module: nn.Module
    selected: bool = True
    held: bool = False

    is_head = False
    behind = False

    @property
    def kind(self) -> str:
        """The type of the module."""
        return type(self.module).__name__

    @property
    def device(self) -> torch.device:
        """Where the statistics are."""
        return self.module.running_mean.device  # type: ignore[return-value]

    def input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The input, if the module itself could read it."""
        require_plain_rows(self.name, (args, kwargs))
        x = plain(args[0] if args else kwargs["input"])
        check_channels(self.name, self.module, x)
        return x

    def sums(self, waiting: dict[int, Tensor], context: Context) -> Tensor:
        """``[3, channels]``: count, sum and sum of squares of each channel, over all batches and processes."""
        norm: Any = self.module

        def local() -> Tensor:
            none = torch.zeros(3, norm.num_features, dtype=torch.float64, device=self.device)
            return sum((norm_sums(self.module, x) for x in waiting.values()), none)

        sums = context.processes.sum_(context.processes.together(local))
        if not bool(sums.isfinite().all()):
            raise SylinitError(not_finite(self.name))
        return sums

    def write(self, sums: Tensor, context: Context) -> LayerReport:
        """Give the layer the statistics of its input so far."""
        norm: Any = self.module
        context.transaction.keep(norm.running_mean, norm.running_var)
        write_statistics(norm, sums)
        reason = "running statistics"
        if self.held and start_fresh(norm, context.config.norm_scale, context.config.norm_offset):
            context.transaction.keep(norm.weight, norm.bias)
            reason += f", weight {norm.weight[0]:g}, bias {norm.bias[0]:g}"
        return LayerReport(self.name, self.kind, "recalibrated", reason, rows=int(sums[0, 0]))

    def left_alone(self, reason: str) -> LayerReport:
        """A record that says why nothing was done."""
        return LayerReport(self.name, self.kind, "left alone", reason)


Site = MatrixSite | NormalizationSite


def check_entry(site: Site, x: Any) -> None:
    """Look at all of the data: at a batch's first site, and at the head, where what came in later has joined it.

    In between, layers are checked by the rows read.
    """
    require_finite(site.name, x)


def _row_budget(dim: int, needs: str, total: int, share_for_all: float | None, config: Config) -> int | None:
    """How many of ``total`` rows to read for a layer; None for all.

    Args:
        dim: d.
        needs: "moments" or "rows", of its code.
        total: the rows that there are.
        share_for_all: the share of them that costs as much as all do, where there is such a way to all.
        config: the constants of the method.
    """
    budget = max(config.min_rows, config.rows_per_input * dim) if config.rows is None else config.rows
    if needs == "rows":
        return config.max_fitted_rows if budget == "all" else min(config.max_fitted_rows, budget)
    if budget == "all" or (config.rows is None and share_for_all is not None and budget >= share_for_all * total):
        return None
    return budget


def _require_representable(name: str, view: LayerView, weight: Tensor, bias: Tensor) -> None:
    """Refuse numbers that the parameters' dtype cannot hold."""
    largest = torch.finfo(view.parameters[0].dtype).max
    size = torch.stack([weight.abs().amax(), bias.abs().amax()]).amax()
    if not bool(size <= largest):
        kind = str(view.parameters[0].dtype).removeprefix("torch.")
        raise SylinitError(
            f"layer {name!r}: its new weights reach {float(size):.1e}, more than {kind} holds ({largest:.1e}); its "
            "inputs are very small: scale the data, or initialize in float32 and convert the model afterwards"
        )

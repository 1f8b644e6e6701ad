"""Layer sites: what is computed when the data reaches a module, a matrix or the statistics of a normalization.

A site computes itself: ``rows = collect(...)``, ``fit = solve(...)``, ``fit = rescale(...)``, ``write(fit)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sylinit.codes import Code
from sylinit.config import Config
from sylinit.data.calibration import CalibrationSet
from sylinit.data.goals import Goal, constant_logits
from sylinit.data.score import Score, fitted_score
from sylinit.errors import SylinitError, UnsupportedLayerError, warn
from sylinit.layers.attention import AttentionOutputView
from sylinit.layers.inputs import plain, require_plain_rows
from sylinit.layers.normalization import check_channels, norm_sums, start_fresh, write_statistics
from sylinit.layers.registry import is_stock
from sylinit.layers.view import LayerView
from sylinit.linalg.leave_one_out import leave_one_out
from sylinit.report import LayerReport
from sylinit.runtime.processes import Processes
from sylinit.runtime.transaction import Transaction
from sylinit.solvers.fit import Fit
from sylinit.solvers.problem import Problem, Role, above_chance
from sylinit.solvers.scaling import rescale
from sylinit.solvers.solve import solve
from sylinit.solvers.standardize import standardized
from sylinit.statistics.alignment import Layout
from sylinit.statistics.rows import ALL, Known, Rows, collect, not_finite, require_finite


@dataclass(frozen=True)
class Context:
    """What every site of one pass works with.

    Attributes:
        data: the calibration set.
        config: the constants of the method.
        processes: the group.
        transaction: told of what is to stay.
        layouts: where samples were seen to lie, by the name of the view.
        positions: of heads of which one position a sample reaches the model's output, by the name of the view and by
            batch: bool ``[samples, length]``, or ``[samples, ...]`` where one of several streams does; None where that
            was not seen.
        promises: filled with what each head's solution promises, by the name of the view.
    """

    data: CalibrationSet
    config: Config
    processes: Processes
    transaction: Transaction
    layouts: dict[str, Layout]
    positions: dict[str, tuple[Tensor | None, ...]] = field(default_factory=dict)
    promises: dict[str, Promise] = field(default_factory=dict)


@dataclass(frozen=True)
class Promise:
    """What the solution of a head says of its predictions on the rows that it was computed from.

    Attributes:
        value: accuracy or R².
        cross_validated: the score with each sample predicted by the head of all others; None where rows are no samples.
        weight_ratio: root mean square of its weights over that of PyTorch's own initialization, ``1 / sqrt(3 d)``.
    """

    value: float | None = None
    cross_validated: Score | None = None
    weight_ratio: float = 0.0


PROMISED_ROWS = 8192
"""Heads of more rows than this promise nothing: looking would take as long as solving."""


@dataclass(frozen=True)
class MatrixSite:
    """A weight, seen as one matrix for each group.

    Attributes:
        view: the weight.
        code: the latent code of its units.
        role: what its outputs are.
        goal: what is known of the samples: of a head, what it is to predict.
        entry: whether it reads the user's data before any layer has changed it.
        deviation: of its units' outputs, over that of all other units.
        encoding: its lambda, over `Config.encoding_weight`.
    """

    view: LayerView
    code: Code
    role: Role
    goal: Goal | None = None
    entry: bool = False
    deviation: float = 1.0
    encoding: float = 1.0

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
    def _exclusive(self) -> bool:
        """Whether its outputs are logits of classes that exclude each other."""
        return self.goal is None or self.goal.task.exclusive

    @property
    def intercept(self) -> bool:
        """Whether its outputs can be centered: other layers than heads leave that to those behind them."""
        return self.view.has_bias or not self.is_head

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
        known, outputs = self._known(context)
        rows = self._collect(waiting, known, seed, context)
        if rows is None:
            reason = "it has met fewer than two rows of input, from which no layer can be computed"
            if self.is_head:
                warn(f"head {self.name!r} keeps its weights: {reason.replace('input', 'input with a target')}")
            return self.left_alone(reason)
        if self.is_head and not rows.width:
            reason = "its rows cannot be matched to samples and positions, so its targets cannot be told"
            warn(f"head {self.name!r}: {reason}; let forward= give it rows in the order of the samples")
            return self.left_alone(reason)
        code, note = self._code(rows)
        units = self.view.units if outputs is None else len(outputs)
        scaled = standardized(rows, context.config) if self.entry and self.intercept else None
        source = scaled or rows
        problem = Problem(self.name, code, units, seed + 1, self.role, self.intercept, self._exclusive, self.encoding)
        fit = solve(source, problem, context.config)
        fit = context.processes.together(
            lambda: rescale(fit, self.role, context.config, self.deviation, self._exclusive)
        )
        promise = None
        if self.is_head:
            fit = self._with_constant_outputs(fit, outputs, context)
            promise = self._promise(source, problem, fit, context)
        if scaled is not None:
            fit = scaled.in_original_units(fit)
            note = "; ".join(filter(None, (note, "its inputs differ much in scale and were standardized for it")))
        if promise is not None:
            ratio = float(fit.weight.square().mean().sqrt()) * (3 * self.view.dim) ** 0.5
            context.promises[self.name] = replace(promise, weight_ratio=ratio)
            fit = fit if outputs is None else self._of_all_outputs(fit, outputs, context)
        record = LayerReport(self.name, self.kind, "initialized", note, code=code.name, rows=rows.count)
        written = self._write(fit, record, context)
        if self.is_head and written.action == "left alone":
            del context.promises[self.name]
            warn(f"head {self.name!r} keeps its weights: {written.reason}")
        return written

    def left_alone(self, reason: str) -> LayerReport:
        """A record that says why nothing was done."""
        return LayerReport(self.name, self.kind, "left alone", reason)

    def _known(self, context: Context) -> tuple[Known, Tensor | None]:
        """What is known of the samples, and which of a wide head's outputs are fitted (None: all)."""
        data, outputs = context.data, None
        known = Known(masks=context.positions.get(self.name, data.masks), sizes=data.sizes)
        share, gaps = ALL, True
        if self.code.values is not None:
            vectors, mean = data.given(self.code.values)
        elif self.goal is None:
            return known, None
        elif self.is_head:
            vectors, mean, outputs = self.goal.of_head(self.view.units, data.processes)
            share, gaps = ALL if self.goal.task.classes else self.goal.share, self.goal.gaps
        else:
            vectors, mean, gaps = self.goal.vectors, self.goal.mean, self.goal.gaps
        return replace(known, vectors=vectors, mean=mean, share=share, labeled_only=self.is_head, gaps=gaps), outputs

    def _collect(self, waiting: dict[int, Any], known: Known, seed: int, context: Context) -> Rows | None:
        """The rows to read."""
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

    def _promise(self, source: Rows, problem: Problem, fit: Fit, context: Context) -> Promise:
        """What the fitted outputs say of the rows that were read."""
        assert self.goal is not None
        assert fit.bias is not None
        assert fit.dead is not None
        if not source.agree(len(source.parts) <= 1):  # several wait for each other, perhaps away from the device
            return Promise()
        complete = self.goal.task.classes or bool((self.goal.share == 1).all())
        if not source.width or source.count > PROMISED_ROWS or not complete:
            return Promise()
        rows, t = source.rows()
        x = rows[0].double()
        y = torch.addmm(fit.bias, x, fit.weight[0].T)
        value = fitted_score(self.goal, y, t).value
        if source.count != context.data.samples or self.goal.task.positions:
            return Promise(value)
        penalty = _ridge(x, t, self.goal, y.shape[1], fit.encoding_weight, intercept=self.intercept)
        wanted = t - t.mean(0) + problem.kept_mean(t.mean(0), context.config) if self.role == "logits" else t
        left_out = leave_one_out(x, wanted, penalty, intercept=self.intercept, slope=self.role == "values")
        if self.role == "logits":
            if self.intercept:  # it says a part of how frequent its classes are: of all rows, or noise is below chance
                assert fit.prior is not None
                told, share = fit.prior[0], above_chance(t.mean(0), self._exclusive)
                left_out = left_out + told * share + wanted / (len(wanted) - 1)
            left_out = left_out[:, 1:] - left_out[:, :1] if y.shape[1] < t.shape[1] else left_out
            left_out = torch.where(fit.dead, fit.bias, left_out)
        return Promise(value, fitted_score(self.goal, left_out, t))

    def _with_constant_outputs(self, fit: Fit, outputs: Tensor | None, context: Context) -> Fit:
        """Where a logit's target never changes, no feature tells it: its bias alone does."""
        assert self.goal is not None
        assert fit.bias is not None
        assert fit.dead is not None
        if not self.goal.task.has_logits:
            return fit
        if not self.intercept:  # nothing is added to its outputs
            return replace(fit, bias=torch.zeros_like(fit.bias))
        logits = constant_logits(self.goal, self.view.units, outputs).to(fit.bias)
        return replace(fit, bias=torch.where(fit.dead, context.config.logit_deviation * logits, fit.bias))

    def _of_all_outputs(self, fit: Fit, outputs: Tensor, context: Context) -> Fit:
        """All outputs of a head, of which these were fitted."""
        assert fit.bias is not None
        assert fit.dead is not None
        units, bias = self.view.units, fit.bias
        weight = fit.weight.new_zeros(1, units, self.view.dim).index_copy(1, outputs, fit.weight)
        absent = float(bias.amin()) - 2 * context.config.logit_deviation  # no sample speaks for these classes
        bias = bias.new_full((1, units), absent).index_copy(1, outputs, bias)
        dead = fit.dead.new_zeros(1, units).index_copy(1, outputs, fit.dead)
        return replace(fit, weight=weight, bias=bias, dead=dead)

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
        assert fit.rank is not None
        weight, bias = fit.weight, fit.bias
        counts = [alive.sum(dtype=torch.float64), fit.dead.sum(dtype=torch.float64), fit.rank]
        groups, dead, rank, *sizes = torch.stack([*counts, *_largest(weight, bias)]).tolist()
        if not groups:
            return self.left_alone("its input is constant on the calibration data")
        if groups < view.groups:
            kept = f"{view.groups - int(groups)} of {view.groups} groups have a constant input and keep their weights"
            record = replace(record, reason=kept)
            old = view.bias()
            weight = torch.where(alive.view(-1, 1, 1), weight, view.weight().to(weight))
            bias = bias if old is None else torch.where(alive.view(-1, 1), bias, old.to(bias))
            sizes = torch.stack(_largest(weight, bias)).tolist()
        context.processes.broadcast_(weight := weight.contiguous())
        context.processes.broadcast_(bias := bias.contiguous())
        _require_representable(self.name, view, sizes)
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
            rank=int(rank),
            residual=fit.residual,
            encoding_error=fit.encoding_error,
            decoding_error=fit.decoding_error,
            dead_units=dead / fit.dead.numel(),
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
    def is_fresh(self) -> bool:
        """Whether it has seen no data yet."""
        norm: Any = self.module
        seen = norm.num_batches_tracked is not None and bool(norm.num_batches_tracked > 0)
        return not seen and not bool(norm.running_mean.any()) and bool((norm.running_var == 1).all())

    @property
    def kind(self) -> str:
        """The type of the module."""
        return type(self.module).__name__

    @property
    def device(self) -> torch.device:
        """Where the statistics are."""
        norm: Any = self.module
        return norm.running_mean.device

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
            if not waiting:
                return torch.zeros(3, norm.num_features, dtype=torch.float64, device=self.device)
            first, *others = (norm_sums(norm, x) for x in waiting.values())
            return sum(others, first)

        sums = context.processes.sum_(context.processes.together(local))
        if not math.isfinite(sum(map(sum, sums.tolist()))):
            raise SylinitError(not_finite(self.name))
        return sums

    def write(self, sums: Tensor, context: Context) -> LayerReport:
        """Give the layer the statistics of its input so far."""
        norm: Any = self.module
        context.transaction.keep(norm.running_mean, norm.running_var)
        write_statistics(norm, sums)
        reason = "running statistics"
        scale, offset = context.config.norm_scale, context.config.norm_offset
        if self.held and start_fresh(norm, scale, offset):
            context.transaction.keep(norm.weight, norm.bias)
            reason += f", weight {scale:g}, bias {offset * scale if norm.bias.requires_grad else 0:g}"
        return LayerReport(self.name, self.kind, "recalibrated", reason, rows=int(sums[0].tolist()[0]))

    def left_alone(self, reason: str) -> LayerReport:
        """A record that says why nothing was done."""
        return LayerReport(self.name, self.kind, "left alone", reason)


Site = MatrixSite | NormalizationSite


def check_entry(site: Site, x: Any) -> None:
    """Look at all of the data: at a batch's first site, and at the head, where what came in later has joined it.

    In between, layers are checked by the rows read.
    """
    require_finite(site.name, x)


def _ridge(x: Tensor, t: Tensor, goal: Goal, units: int, encoding_weight: float, *, intercept: bool) -> Tensor:
    """The ridge penalty that a head's Sylvester equation stands for, as a variance.

    The code is the target, scaled to the variance v of the rows; a one-hot target of c classes spreads it over c - 1
    directions. So each has ``v c / (c - 1)``, and the encoding weight lambda divides it. One logit is one direction.
    """
    classes = t.shape[1] if goal.task.classes and units > 1 else 0
    share = classes / (classes - 1) if classes > 1 else 1.0
    centered = x - x.mean(0) if intercept else x
    return centered.square().mean() * share / max(encoding_weight, 1e-12)


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


def _largest(*tensors: Tensor) -> list[Tensor]:
    """The largest absolute number of each; NaN or infinite where any is."""
    return [torch.linalg.vector_norm(tensor, math.inf) for tensor in tensors]


def _require_representable(name: str, view: LayerView, sizes: list[float]) -> None:
    """Refuse numbers that the parameters' dtype cannot hold; ``sizes``: the largest of weight and bias."""
    largest = torch.finfo(view.parameters[0].dtype).max
    if not all(size <= largest for size in sizes):
        size = max(sizes)
        kind = str(view.parameters[0].dtype).removeprefix("torch.")
        raise SylinitError(
            f"layer {name!r}: its new weights reach {size:.1e}, more than {kind} holds ({largest:.1e}); its "
            "inputs are very small: scale the data, or initialize in float32 and convert the model afterwards"
        )

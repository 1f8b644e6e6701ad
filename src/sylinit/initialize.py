"""`initialize_`: one forward pass over the calibration data that computes each layer when the data reaches it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sylinit.codes.registry import Code
from sylinit.data.calibration import Data, call_model, read_data
from sylinit.data.targets import Targets
from sylinit.errors import SylinitError, UnsupportedLayerError, warn
from sylinit.layer import Solution, approximate_layer, solve_layer, solve_layer_from_rows
from sylinit.layers.views import AttentionOutputView, View
from sylinit.plan import Door, Plan, make_plan
from sylinit.report import LayerReport, Report
from sylinit.runtime.fsdp import Shards
from sylinit.runtime.interrupts import held_interrupts
from sylinit.runtime.offload import Offload
from sylinit.runtime.processes import Processes
from sylinit.runtime.transaction import Snapshot
from sylinit.runtime.workers import Lanes
from sylinit.scaling import check_channels, norm_sums, start_fresh, write_statistics
from sylinit.solve import Problem, projected_pays
from sylinit.statistics.rows import Gathered, gather, not_finite, require_finite

Rows = int | Literal["all"] | None

ENCODING_WEIGHT = 4.0
"""Lambda of a layer before the head, chosen on held-back images: see ``docs/method.md``."""

SAMPLE = 20_000
"""At most this many rows for codes that are fitted on rows."""


def initialize_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    code: Any = "mixed",
    encoding_weight: float | None = None,
    layers: Any = None,
    head: str | None = "auto",
    rows: Rows = None,
    variance: float = 1.0,
    train_size: int | None = None,
    solver: str = "auto",
    generator: torch.Generator | None = None,
    group: Any = None,
    offload: bool | Literal["disk"] = False,
    progress: Callable[[int, int, str], None] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Report:
    """Compute a model's weights from data, layer by layer in execution order, without a gradient step.

    Each layer's weight W (k x d) solves, on the rows X (d x n) that reach it and a latent code S (k x n) of them,

        minimise  ||X - W^T S||^2 + lambda ||W X - S||^2,   that is   (S S^T) W + W (lambda X X^T) = (1 + lambda) S X^T

    and is then scaled to unit output variance and centred. Normalisations with running statistics get those of their
    input. Where training samples are few (fewer than `plan.FEW`, 3,000) they, and the layers that feed them, also start
    so that training moves them little: one that is as PyTorch makes it gets half its weight and a positive offset, and
    filters before it He's length instead of unit variance (`sylinit.scaling`).
    Without labels there is no head: the last layer is computed like the others.
    All or nothing: after any exception the model is bit for bit what it was. (Frozen parameters are never written and
    not copied: what the model's own forward writes into them stays.)
    Source: Das, Bhalgat and Porikli, arXiv 2105.10335.

    Args:
        model: any module, of any floating-point dtype; it is run in eval mode, and its modes are put back.
        batches: calibration data: an iterable of ``x``, ``(x, y)`` or mappings (``labels`` is the target). ``y`` holds
            class indices ``[n]`` (or ``[n, positions]`` for tokens and pixels; -100 is ignored), soft labels or real
            values ``[n, c]``. Each sample once: copies of one, mirrored or shifted, count as independent evidence when
            the head's encoding weight is chosen.
        code: the latent code: a name in `sylinit.CODES`, ``"mixed:0.5"`` for a share of label units, a `Code`, a
            callable ``(x, target, units, generator) -> s``, a scikit-learn transformer, a tensor ``[samples, units]``,
            or a mapping from name pattern to any of these. Without labels the default falls back to "pca".
        encoding_weight: lambda, the weight of encoding against decoding in all layers; positive. None means 4, and for
            the head the weight of least generalised cross-validation error on the calibration data.
        layers: which layers: a name pattern (of the layer or of a module that holds it), a module type, a predicate
            ``(name, module) -> bool``, or a list of these. Everything else keeps its weights.
        head: the name of the layer whose outputs are the logits or predictions; "auto" takes the last layer, as the
            model registers them, whose width fits the targets, and warns if another that fits comes later in the pass;
            None where there is none.
        rows: rows of input read per layer: an upper bound, "all", or None for a budget derived from the layer's width.
            Codes that are fitted on rows read at most 20,000.
        variance: of each unit's output on the calibration data. Heads, and, where training samples are few,
            convolutions without a bias, which are taken to feed a normalisation, have a scale of their own.
        train_size: how many samples the model will be trained on; None means as many as `batches` hold. Only networks
            with normalisations depend on it.
        solver: "auto" takes for each layer the cheapest route to a relative residual of at most 1e-3: all principal
            axes (exact), the space of its rows where those are few (exact too), or the leading principal axes and
            conjugate gradients (projected), for wide layers and codes made of leading components; "exact" never
            projects. The report names the route and its residual.
        generator: source of what is random (sampled rows, random codes); None means a fixed seed.
        group: a ``torch.distributed`` process group over which the data is split; all ranks end with equal weights.
        offload: where the activations of batches that wait for the others go: True moves those of a model on a CUDA
            device to the CPU, "disk" those of any model to temporary files, so that the device holds the activations
            of one batch only, however many there are. The weights are the same; the report says what was moved.
        progress: called with (layers done, layers in all, name of the layer done).
        forward: ``(model, batch) -> anything``, for models that are not called as ``model(x)`` or ``model(**mapping)``.

    Returns:
        What was done to each layer, and why where nothing was.

    Raises:
        SylinitError: for bad input, naming the layer or argument, what was expected, what came and the remedy.
    """
    started = time.perf_counter()
    processes = Processes(group)
    processes.together(
        lambda: _check_arguments(
            model, encoding_weight, variance, head, rows, train_size, solver, generator, offload, progress, forward
        )
    )
    model = _unwrapped(model)
    shards = processes.together(lambda: Shards(model, processes.ranks))
    snapshot = Snapshot(model, generator)
    succeeded = False
    run: _Pass | None = None
    parked: Offload | None = None
    with processes.interrupted_together():
        try:
            with shards.gathered(snapshot):
                source = generator or torch.Generator().manual_seed(0)
                seed = int(torch.randint(2**62, (), generator=source, device=source.device))
                data = read_data(model, batches, processes, seed, custom=forward is not None)
                plan = processes.together(
                    lambda: make_plan(model, layers, code, head, data.kind, data.samples, train_size)
                )
                parked = _offload(offload, plan, len(data.batches))
                settings = _Settings(encoding_weight, variance, rows, solver, progress)
                run = _Pass(plan, data, processes, snapshot, settings, parked)
                run.through(model, forward)
                notes = (*plan.notes, *run.doubts())
            succeeded = True
        except BaseException as error:
            processes.announce(error)
            raise
        finally:
            with held_interrupts():
                if run is not None:
                    run.remove_hooks()
                if parked is not None:
                    parked.end()
                snapshot.restore(succeeded=succeeded)
    return Report(
        layers=(*run.records, *run.never_met(), *plan.left_alone),
        samples=data.samples,
        seconds=time.perf_counter() - started,
        solve_seconds=sum(record.seconds for record in run.records),
        notes=notes,
        offloaded_peak=parked.peak if parked else 0,
        offloaded_total=parked.moved if parked else 0,
    )


@dataclass(frozen=True)
class _Settings:
    """What the user asked for."""

    encoding_weight: float | None
    variance: float
    rows: Rows
    solver: str
    progress: Callable[[int, int, str], None] | None

    def weight_of(self, door: Door) -> float | None:
        """Lambda of a layer; None where it is to be chosen."""
        if self.encoding_weight is None and not door.head:
            return ENCODING_WEIGHT
        return self.encoding_weight

    def budget(self, view: View, needs: str, total: int, short_way: float | None) -> int | None:
        """How many of ``total`` rows to read for a layer; None for all.

        Args:
            view: the layer.
            needs: "moments" or "rows", of its code.
            total: the rows that there are.
            short_way: the share of them that costs as much as all do, where there is such a way to all.
        """
        budget = default_rows(view.dim) if self.rows is None else self.rows
        if needs == "rows":
            return SAMPLE if budget == "all" else min(SAMPLE, budget)
        if budget == "all" or (self.rows is None and short_way is not None and budget >= short_way * total):
            return None
        return budget


class _Pass:
    """One run of the model over all batches; each layer is computed at its door."""

    def __init__(
        self,
        plan: Plan,
        data: Data,
        processes: Processes,
        snapshot: Snapshot,
        settings: _Settings,
        offload: Offload | None,
    ) -> None:
        self.records: list[LayerReport] = []
        self._plan = plan
        self._data = data
        self._processes = processes
        self._snapshot = snapshot
        self._settings = settings
        self._offload = offload
        parking = offload.parking if offload else nullcontext
        self._lanes = Lanes(len(data.batches), self._settle, self._choose, parking)
        self._settled: set[int] = set()
        self._entered: set[int] = set()
        self._hooks: list[Any] = []

    def through(self, model: nn.Module, forward: Callable[[nn.Module, Any], Any] | None) -> None:
        """Hang a hook on every module with a door and send every lane through the model."""
        doors: dict[nn.Module, list[int]] = {}
        for number, door in enumerate(self._plan.doors):
            doors.setdefault(door.module, []).append(number)
        for module, numbers in doors.items():
            self._hooks.append(module.register_forward_pre_hook(self._hook(numbers), with_kwargs=True))
            for number in numbers:
                view = self._plan.doors[number].view
                if isinstance(view, AttentionOutputView):
                    behind = self._hook_behind(number, view)  # before the user's hooks, which expect the real output
                    self._hooks.append(module.register_forward_hook(behind, prepend=True, always_call=True))
        torch.backends.mha.set_fastpath_enabled(False)  # it computes without calling the modules inside
        model.eval()

        def lane(number: int) -> None:
            batch = self._data.batches[number]
            with self._offload.lane(number) if self._offload else nullcontext():
                if forward is not None:
                    forward(model, batch.raw)
                else:
                    call_model(model, batch)

        with torch.no_grad(), _uncompiled():
            self._lanes.run(lane)

    def remove_hooks(self) -> None:
        """Leave no trace on the modules."""
        for hook in self._hooks:
            hook.remove()

    def never_met(self) -> list[LayerReport]:
        """Records of the doors that no lane came to."""
        return [
            _left_alone(door, "the data never reached it")
            for number, door in enumerate(self._plan.doors)
            if number not in self._settled
        ]

    def doubts(self) -> tuple[str, ...]:
        """Warn, and note, that another layer than the one taken may be the head: it fits, too, and came later."""
        place = {record.name: number for number, record in enumerate(self.records)}
        head = next((door.name for door in self._plan.doors if door.head and door.name in place), None)
        later = [name for name in self._plan.rivals if head and place.get(name, -1) > place[head]]
        if not later:
            return ()
        last = max(later, key=lambda name: place[name])
        note = (
            f"{head!r} was taken for the head, but {last!r} has as many outputs and came after it; "
            f"if that is the head, pass head={last!r}, otherwise head={head!r}"
        )
        warn(note)
        return (note,)

    def _hook(self, numbers: list[int]) -> Callable[..., None]:
        def meet(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for number in numbers:
                if number in self._settled:  # by an earlier call of a shared module
                    continue
                view = self._plan.doors[number].view
                if isinstance(view, AttentionOutputView):
                    view.strip()  # last, and met behind the module: no lane waits in between
                else:
                    self._lanes.meet(number, _input(self._plan.doors[number], args, kwargs))

        return meet

    def _hook_behind(self, number: int, view: AttentionOutputView) -> Callable[..., Any]:
        def meet(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not view.dress() or output is None:  # settled before, or the forward has failed
                return None
            self._lanes.meet(number, view.heads(output))
            return view.project(output)

        return meet

    def _choose(self, own: int | None) -> int | None:
        """The first door, in the model's order, at which a lane of any process waits."""
        doors = [door for door in self._processes.agree(lambda: own) if door is not None]
        return min(doors, default=None)

    def _settle(self, number: int, waiting: dict[int, Any]) -> None:
        """Compute what is behind a door from everything that waits there."""
        started = time.perf_counter()
        door = self._plan.doors[number]
        reading = self._offload.reading() if self._offload else nullcontext()
        # What is random is drawn on the CPU, whatever the caller's default device: the weights do not depend on it.
        with reading, torch.device("cpu"), torch.autocast(door.device.type, enabled=False):
            self._processes.together(lambda: self._check_entry(door, waiting))
            record = self._matrix(door, number, waiting) if door.view else self._statistics(door, waiting)
        torch.clear_autocast_cache()  # it may hold casts of the layer's former weights
        self.records.append(replace(record, seconds=time.perf_counter() - started))
        self._settled.add(number)
        if self._settings.progress is not None:
            self._settings.progress(len(self._settled), len(self._plan.doors), door.name)

    def _check_entry(self, door: Door, waiting: dict[int, Any]) -> None:
        """Look at all of the data at a lane's first door, and at the head, where what came in later has joined it.

        In between, layers are checked by the rows read.
        """
        for lane, x in waiting.items():
            if door.head or lane not in self._entered:
                self._entered.add(lane)
                require_finite(door.name, x)

    def _statistics(self, door: Door, waiting: dict[int, Tensor]) -> LayerReport:
        """Give a normalisation layer the pooled statistics of its input, if that input is new."""
        norm: Any = door.module
        if not (door.selected or any(record.action == "initialised" for record in self.records)):
            return _left_alone(door, "its input did not change")

        def local() -> Tensor:
            none = torch.zeros(3, norm.num_features, dtype=torch.float64, device=door.device)
            return sum((norm_sums(norm, x) for x in waiting.values()), none)

        sums = self._processes.sum_(self._processes.together(local))
        if not bool(sums.isfinite().all()):
            raise SylinitError(not_finite(door.name))
        self._snapshot.keep(norm.running_mean, norm.running_var)
        write_statistics(norm, sums)
        reason = "running statistics"
        if door.held and start_fresh(norm):
            self._snapshot.keep(norm.weight, norm.bias)
            reason += f", weight {norm.weight[0]:g}, bias {norm.bias[0]:g}"
        return LayerReport(door.name, door.kind, "recalibrated", reason, rows=int(sums[0, 0]))

    def _matrix(self, door: Door, number: int, waiting: dict[int, Any]) -> LayerReport:
        """Compute one matrix: choose and code its rows, solve, write back."""
        view = door.view
        assert view is not None
        assert door.code is not None
        needs = door.code.needs
        seed = (self._data.seed + 7919 * number) % 2**63
        gathered = gather(
            door.name,
            view,
            waiting,
            self._targets(door),
            lambda total, short_way: self._settings.budget(view, needs, total, short_way),
            torch.Generator().manual_seed(seed),
            self._processes,
            door.device,
        )
        code, note = _code_for(door, gathered)
        problem = Problem(
            door.name,
            code,
            view.units,
            self._settings.weight_of(door),
            self._settings.variance,
            seed + 1,
            self._role(door),
        )
        if use_rows(code, gathered.used, view.dim):
            rows, targets = gathered.rows(self._processes)
            solution = self._processes.together(lambda: solve_layer_from_rows(rows, targets, problem))
        else:
            solution = self._from_moments(gathered, problem)
        return self._write(
            door,
            solution,
            LayerReport(door.name, door.kind, "initialised", note, code=code.name, rows=gathered.used),
        )

    def _from_moments(self, gathered: Gathered, problem: Problem) -> Solution:
        """By the projected route, which needs float32 moments only, where that pays and serves; exactly elsewhere."""
        note = ""
        chosen = problem.encoding_weight is None  # which takes all axes
        pays = projected_pays(problem.code, problem.units, gathered.view.dim)
        if self._settings.solver == "auto" and pays and not chosen:
            rough = gathered.covariance(self._processes, torch.float32)
            solution, note = self._processes.together(lambda: approximate_layer(rough, problem))
            if all(self._processes.agree(lambda: solution is not None)):
                assert solution is not None
                return solution
            del rough
        cov = gathered.covariance(self._processes)
        exact = self._processes.together(lambda: solve_layer(cov, problem))
        return replace(exact, note="; ".join(filter(None, (exact.note, note))))

    def _targets(self, door: Door) -> Targets | None:
        """What the layer's code is to be told about each sample."""
        if door.code is not None and door.code.values is not None:
            return self._data.given(door.code.values)
        if door.head and self._data.kind.classes:
            return self._data.one_hot(max(2, door.view.units if door.view else 0))
        return self._data.targets

    def _role(self, door: Door) -> str:
        """What the layer's outputs are."""
        if door.head:
            return "logits" if self._data.kind.categorical else "values"
        return "directions" if door.held else "units"

    def _write(self, door: Door, solution: Solution, record: LayerReport) -> LayerReport:
        """Write a solution into the module; every process writes the numbers of the first."""
        view = door.view
        assert view is not None
        alive = solution.alive
        if not bool(alive.any()):
            return replace(record, action="left alone", reason="its input is constant on the calibration data", code="")
        weight, bias = solution.weight, solution.bias
        if not bool(alive.all()):
            kept = f"{int((~alive).sum())} of {view.groups} groups have a constant input and keep their weights"
            record = replace(record, reason=kept)
            old = view.bias()
            weight = torch.where(alive.view(-1, 1, 1), weight, view.weight().to(weight))
            bias = bias if old is None else torch.where(alive.view(-1, 1), bias, old.to(bias))
        self._processes.broadcast_(weight := weight.contiguous())
        self._processes.broadcast_(bias := bias.contiguous())
        self._snapshot.keep(*view.parameters)
        try:
            view.write(weight, bias if view.has_bias else None)
        except UnsupportedLayerError as error:
            return replace(record, action="left alone", reason=str(error), code="")
        return replace(
            record,
            shape=(view.groups, view.units, view.dim),
            reason="; ".join(filter(None, (record.reason, solution.note))),
            solver=solution.route,
            encoding_weight=solution.encoding_weight,
            rank=solution.rank,
            residual=float(solution.residual),
            encoding_error=float(solution.encoding_error),
            decoding_error=float(solution.decoding_error),
            dead_units=float(solution.dead.double().mean()),
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside the wrappers that only run it."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrapped(model.module)
    own = getattr(model, "_orig_mod", None)  # of torch.compile
    return _unwrapped(own) if isinstance(own, nn.Module) and "torch._dynamo" in sys.modules else model


def _uncompiled() -> AbstractContextManager[Any]:
    """Compiled modules run as they were written: each layer runs once, and compiling the hooks takes minutes."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; importing it takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _offload(asked: bool | str, plan: Plan, lanes: int) -> Offload | None:
    """What moves activations away, where there is something to move and somewhere else to put it."""
    device = plan.doors[0].device
    if not asked or lanes == 1 or (asked is True and device.type == "cpu"):
        return None
    return Offload(device, "disk" if asked == "disk" else "cpu")


def default_rows(dim: int) -> int:
    """Rows of input to read for a layer of ``dim`` inputs, where the user does not say."""
    return max(4096, 8 * dim)


def use_rows(code: Code, count: int, dim: int) -> bool:
    """Whether a layer is solved from its rows: few rows in many dimensions, or a code that is fitted on rows."""
    return code.needs == "rows" or count < dim


def _code_for(door: Door, gathered: Gathered) -> tuple[Code, str]:
    """The layer's code, or what it falls back to where its rows cannot be matched to samples."""
    code = door.code
    assert code is not None
    if gathered.width or not code.labels:
        return code, ""
    reason = "its rows cannot be matched to samples"
    remedy = "choose another for this layer, as in code={'pattern': 'pca'}"
    return code.without_labels(door.name, reason, remedy), f"{reason}, so no labels were used"


def _input(door: Door, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a door reads from the arguments of its module, if the module itself could read it."""
    if door.view is not None:
        x = door.view.input(args, kwargs)
        door.view.check(x)
        return x
    x = args[0] if args else kwargs["input"]
    check_channels(door.name, door.module, x)
    return x


def _left_alone(door: Door, reason: str) -> LayerReport:
    return LayerReport(door.name, door.kind, "left alone", reason)


def _check_arguments(
    model: Any,
    encoding_weight: Any,
    variance: Any,
    head: Any,
    rows: Any,
    train_size: Any,
    solver: Any,
    generator: Any,
    offload: Any,
    progress: Any,
    forward: Any,
) -> None:
    if not isinstance(model, nn.Module):
        raise SylinitError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value in (("encoding_weight", encoding_weight), ("variance", variance)):
        if value is None and name == "encoding_weight":
            continue
        if not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise SylinitError(f"{name} must be a positive finite number, got {value!r}")
    if not (head is None or isinstance(head, str)):
        raise SylinitError(f"head must be the name of a layer, 'auto' or None, got {head!r}")
    if not (rows is None or rows == "all" or (isinstance(rows, int) and not isinstance(rows, bool) and rows >= 2)):
        raise SylinitError(f"rows must be an integer of at least 2, 'all' or None, got {rows!r}")
    if not (
        train_size is None or (isinstance(train_size, int) and not isinstance(train_size, bool) and train_size > 0)
    ):
        raise SylinitError(f"train_size must be a positive integer or None, got {train_size!r}")
    if solver not in ("auto", "exact"):
        raise SylinitError(f"solver must be 'auto' or 'exact', got {solver!r}")
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise SylinitError(f"generator must be a torch.Generator or None, got {generator!r}")
    if not (isinstance(offload, bool) or offload == "disk"):
        raise SylinitError(f"offload must be True, False or 'disk', got {offload!r}")
    for name, value, form in (("progress", progress, "(done, total, name)"), ("forward", forward, "(model, batch)")):
        if not (value is None or callable(value)):
            raise SylinitError(f"{name} must be a function {form} or None, got {value!r}")

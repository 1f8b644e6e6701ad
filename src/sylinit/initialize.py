"""`initialize_`: the calibration data flows through the model once, and each layer is computed when it arrives.

What the user brings -> calibration set -> trial run -> plan -> one forward pass -> statistics, code, equation, scaled
weight at every site -> report.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sylinit.codes import HEAD
from sylinit.config import Config
from sylinit.data.batches import Batch, Reader, call_model, some_samples
from sylinit.data.calibration import calibration_set
from sylinit.errors import SylinitError
from sylinit.inventory import Inventory, take_inventory
from sylinit.layers.attention import AttentionOutputView
from sylinit.layers.inputs import readable_inputs
from sylinit.layers.registry import is_stock
from sylinit.plan import Plan, Wish, make_plan
from sylinit.report import ROOT, LayerReport, Report
from sylinit.runtime.fsdp import Shards
from sylinit.runtime.offload import Offload
from sylinit.runtime.processes import Processes
from sylinit.runtime.transaction import Transaction
from sylinit.runtime.workers import Interleaved, OnePass
from sylinit.sites import Context, MatrixSite, NormalizationSite, Site, check_entry
from sylinit.trace import SAMPLES, Trace, trace

Forward = Callable[[nn.Module, Any], Any]


def initialize_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target: str | Callable[[Any], Any] | None = None,
    mask: str | Callable[[Any], Any] | None = "auto",
    samples: int = 2048,
    code: Any = "mixed",
    layers: Any = None,
    head: Any = "auto",
    train_size: int | None = None,
    config: Config = Config(),  # noqa: B008 - frozen
    generator: torch.Generator | None = None,
    group: Any = None,
    offload: bool | Literal["disk"] = False,
    progress: Callable[[int, int, str], None] | None = None,
    forward: Forward | None = None,
) -> Report:
    """Compute a model's weights from data, layer by layer in execution order, without a gradient step.

    Each layer's weight W (k x d) solves, on the rows X (d x n) that reach it and a latent code S (k x n) of them,

        minimize  ||X - W^T S||^2 + lambda ||W X - S||^2,   that is   (S S^T) W + W (lambda X X^T) = (1 + lambda) S X^T

    and is then scaled to unit output variance and centered. Normalizations with running statistics get those of their
    input. Where training samples are few (fewer than ``config.few_samples``) they, and the layers that feed them, also
    start so that training moves them little: one that is as PyTorch makes it gets half its weight and a positive
    offset, and filters before it He's length instead of unit variance.
    Without labels there is no head: the last layer is computed like the others.

    The calibration set is one batch wherever its parts can be concatenated; the model then runs once, in the caller's
    thread, after a trial run on a few samples that shows what each module computes. All or nothing: after any exception
    the model is bit for bit what it was, plain attributes of its modules included. (Frozen parameters are never
    written and not copied: what the model's own forward writes into them stays.)
    Source: Das, Bhalgat and Porikli, arXiv 2105.10335.

    Args:
        model: any module, of any floating-point dtype; it is run in eval mode, and its modes are put back.
        batches: calibration data: an iterable of ``x``, ``(x, y)``, ``((x1, x2), y)`` or mappings, such as a
            DataLoader. ``y`` holds class indices ``[n]`` (or ``[n, positions]`` for tokens and pixels; -100 is
            ignored), soft labels or real values ``[n, c]``. Each sample once: copies of one, mirrored or shifted, count
            as independent evidence when the head's encoding weight is chosen.
        target: the key of the target in a mapping, or a function of the batch. By default the last part of a tuple, or
            what a mapping holds under ``labels``, ``label``, ``target``, ``targets`` or ``y``.
        mask: which places of a sequence hold data: a key of a mapping, or a function of the batch that returns a tensor
            ``[n, length]``; "auto" takes ``attention_mask`` and ``src_key_padding_mask``. Padding counts nowhere.
        samples: at most so many are read: of lists spread evenly over all, of loaders the first, also of endless ones.
        code: the latent code: a name in `sylinit.CODES`, ``"mixed:0.5"`` for a share of label units, a `Code`, a
            callable ``(x, target, units, generator) -> s``, a scikit-learn transformer, a tensor ``[samples, units]``,
            or a mapping from name pattern to any of these. Without labels the default falls back to "pca".
        layers: which layers: a name pattern (of the layer or of a module that holds it), a module type, a predicate
            ``(name, module) -> bool``, or a list of these. Everything else keeps its weights.
        head: the name of the layer whose outputs are the logits or predictions, or a list of names; "auto" takes the
            layers that the trial run saw make the model's output, if their width fits the targets; None for none.
        train_size: how many samples the model will be trained on; None means ``len(loader.dataset)`` or, of a list, as
            many as it holds. Only networks with normalizations depend on it.
        config: the constants of the method; ``dataclasses.replace(sylinit.Config(), ...)`` changes some.
        generator: source of what is random (sampled rows, random codes); None means a fixed seed.
        group: a ``torch.distributed`` process group over which the data is split; all ranks end with equal weights.
        offload: where the activations of batches that wait for the others go: True moves those of a model on a CUDA
            device to the CPU, "disk" those of any model to temporary files, so that the device holds the activations
            of one batch only, however many there are. The batches then stay as they are cut, and run interleaved.
        progress: called with (layers done, layers in all, name of the layer done).
        forward: ``(model, batch) -> output``, for models that are not called as ``model(x)`` or ``model(**mapping)``.
            The batch is as the user made it, types included.

    Returns:
        What was done to each layer, and why where nothing was.

    Raises:
        SylinitError: for bad input, naming the layer or argument, what was expected, what came and the remedy.
    """
    started = time.perf_counter()
    processes = Processes(group)
    wish = Wish(layers, code, head, train_size)
    reader = Reader(model, samples, target, mask, custom=forward is not None, apart=bool(offload))
    processes.together(lambda: _check_arguments(model, reader, wish, config, generator, offload, progress, forward))
    model = _unwrapped(model)
    reader = replace(reader, model=model)
    shards = processes.together(lambda: Shards(model, processes.ranks))
    transaction = Transaction(model, generator)
    run: _Pass | None = None
    succeeded = False
    with processes.held_interrupts() as held:
        try:
            with shards.gathered(transaction), torch.no_grad(), _as_written():
                seed = _seed(generator)
                read = processes.together(lambda: reader.read(batches))
                data = calibration_set(read, processes, seed)
                inventory = processes.together(lambda: take_inventory(model))
                model.eval()
                torch.backends.mha.set_fastpath_enabled(False)  # it computes without calling the modules inside
                with readable_inputs(model, {candidate.module for candidate in inventory.candidates}):
                    seen = _trial(model, inventory, data.batches[0], reader, transaction, processes, forward)
                    plan = processes.together(lambda: make_plan(model, inventory, seen, wish, data, config))
                    context = Context(data, config, processes, transaction, seen.layouts)
                    run = _Pass(plan, context, model, set(seen.seen), offload, progress)
                    run.through(lambda batch: _call(model, batch, forward))
            succeeded = True
        except BaseException as error:
            processes.announce(error)
            raise
        finally:
            if run is not None:
                run.end()
            transaction.restore(succeeded=succeeded)
            try:
                held.deliver()  # which came after the last layer
            except BaseException:
                transaction.restore(succeeded=False)
                raise
    return Report(
        layers=(*run.records, *run.never_met(), *plan.left_alone),
        samples=data.samples,
        seconds=time.perf_counter() - started,
        solve_seconds=sum(record.seconds for record in run.records),
        notes=(*data.notes, *plan.notes),
        offloaded_peak=run.offload.peak if run.offload else 0,
        offloaded_total=run.offload.moved if run.offload else 0,
    )


def _trial(
    model: nn.Module,
    inventory: Inventory,
    batch: Batch,
    reader: Reader,
    transaction: Transaction,
    processes: Processes,
    forward: Forward | None,
) -> Trace:
    """Run the model on a few samples, or on a whole batch where it takes no few; what the first process saw holds."""
    candidates = {candidate.module: candidate for candidate in inventory.candidates}
    follow = batch.target is not None or batch.mask is not None

    def on(part: Batch) -> Trace:
        def call(raw: Any) -> Any:
            return _call(model, reader.parse(raw), forward)

        with _checked_inputs(inventory):
            return trace(model, candidates, call, part.raw, part.samples, transaction.rewind, follow_samples=follow)

    def local() -> Trace:
        few = some_samples(batch, reader, SAMPLES)
        if few is None or few.samples == batch.samples:
            return on(batch)
        try:
            return on(few)
        except Exception:  # a model may take batches of one size only; what else is wrong shows again
            transaction.rewind()
            return on(batch)

    return processes.agree(local)[0]


@contextmanager
def _checked_inputs(inventory: Inventory) -> Iterator[None]:
    """Refuse, by the layer's name, what the forward of a layer of PyTorch's own would refuse."""
    sites: list[Site] = [NormalizationSite(name or ROOT, norm) for name, norm in inventory.norms.items()]
    for candidate in inventory.candidates:
        if is_stock(candidate.module):  # what another computes, and from what, is to be seen
            sites += [MatrixSite(view, HEAD, "units") for view in candidate.hypotheses[0]]

    def looking(site: Site) -> Callable[..., None]:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            site.input(args, kwargs)

        return look

    ahead = [site for site in sites if not site.behind]
    hooks = [site.module.register_forward_pre_hook(looking(site), with_kwargs=True) for site in ahead]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Pass:
    """One run of the model over all batches; each layer is computed at its site."""

    def __init__(
        self,
        plan: Plan,
        context: Context,
        model: nn.Module,
        seen: set[str],
        offload: bool | str,
        progress: Callable[[int, int, str], None] | None,
    ) -> None:
        self.records: list[LayerReport] = []
        self._plan = plan
        self._context = context
        self._seen = seen
        self._progress = progress
        self._done: set[int] = set()
        self._entered: set[int] = set()
        self._sums: dict[int, Tensor] = {}
        self._changed = False
        self._hooks: list[Any] = []
        count = len(context.data.batches)
        self.offload = _offload(offload, plan, count)
        self._runner: OnePass | Interleaved
        if count == 1:
            self._runner = OnePass(self._compute, self._agree)
        else:
            waiting = self.offload.parking if self.offload else nullcontext
            self._runner = Interleaved(count, self._compute, self._agree, model, waiting)

    def through(self, call: Callable[[Batch], Any]) -> None:
        """Hang a hook on every module with a site and run the model on every batch."""
        sites: dict[nn.Module, list[int]] = {}
        for number, site in enumerate(self._plan.sites):
            sites.setdefault(site.module, []).append(number)
        for module, numbers in sites.items():
            self._hooks.append(module.register_forward_pre_hook(self._ahead(numbers), with_kwargs=True))
            for number in numbers:
                view = getattr(self._plan.sites[number], "view", None)
                if isinstance(view, AttentionOutputView):
                    behind = self._behind(number, view)  # before the user's hooks, which expect the real output
                    self._hooks.append(module.register_forward_hook(behind, prepend=True, always_call=True))

        def run(number: int) -> None:
            with self.offload.worker(number) if self.offload else nullcontext():
                call(self._context.data.batches[number])

        self._runner.run(run)

    def end(self) -> None:
        """Leave no trace on the modules."""
        for hook in self._hooks:
            hook.remove()
        if self.offload is not None:
            self.offload.end()

    def never_met(self) -> list[LayerReport]:
        """Records of the sites that no batch came to."""
        return [
            site.left_alone("the data never reached it")
            for number, site in enumerate(self._plan.sites)
            if number not in self._done
        ]

    def _ahead(self, numbers: list[int]) -> Callable[..., None]:
        def ahead(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for number in numbers:
                site = self._plan.sites[number]
                if isinstance(site, MatrixSite):
                    if number in self._done:  # by an earlier call of a shared module
                        continue
                    if site.behind:
                        site.view.strip()  # type: ignore[attr-defined] # met behind the module: no wait in between
                        continue
                    self._verify(number, site, args, kwargs)
                self._runner.meet(number, site.name, site.input(args, kwargs))

        return ahead

    def _behind(self, number: int, view: AttentionOutputView) -> Callable[..., Any]:
        def behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not view.dress() or output is None:  # computed before, or the forward has failed
                return None
            self._runner.meet(number, view.name, view.heads(output))
            return view.project(output)

        return behind

    def _verify(self, number: int, site: MatrixSite, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at what a module computes that the trial run did not reach."""
        if self._names(site) & self._seen:
            return
        if reason := site.misfit(args, kwargs):
            self._done.add(number)
            self.records.append(site.left_alone(reason))

    def _names(self, site: MatrixSite) -> set[str]:
        parts = site.name.split(".")
        return {".".join(parts[:end]) for end in range(len(parts) + 1)}

    def _agree(self, own: int | None) -> int | None:
        """The first site, in the model's order, that any process has met."""
        met = [site for site in self._context.processes.agree(lambda: own) if site is not None]
        return min(met, default=None)

    def _compute(self, number: int, waiting: dict[int, Any]) -> None:
        """Compute what is at a site from everything that waits there."""
        started = time.perf_counter()
        site = self._plan.sites[number]
        reading = self.offload.reading() if self.offload else nullcontext()
        with reading, _undisturbed(site.device):
            self._context.processes.together(lambda: self._check(site, waiting))
            if isinstance(site, NormalizationSite):
                record = self._normalize(number, site, waiting)
            else:
                record = site.compute(waiting, number, self._context)
        self._changed |= record.action == "initialized"
        torch.clear_autocast_cache()  # it may hold casts of the layer's former weights
        record = replace(record, seconds=time.perf_counter() - started)
        self.records = [each for each in self.records if each.name != site.name or number not in self._done]
        self.records.append(record)
        self._done.add(number)
        if self._progress is not None:
            self._progress(len(self._done), len(self._plan.sites), site.name)

    def _check(self, site: Site, waiting: dict[int, Any]) -> None:
        for batch, x in waiting.items():
            if site.is_head or batch not in self._entered:
                self._entered.add(batch)
                check_entry(site, x)

    def _normalize(self, number: int, site: NormalizationSite, waiting: dict[int, Any]) -> LayerReport:
        """Give a normalization the statistics of all its calls so far, if its input may be new."""
        if not (site.selected or self._changed):
            return site.left_alone("its input did not change")
        sums = site.sums(waiting, self._context)
        self._sums[number] = self._sums[number] + sums if number in self._sums else sums
        return site.write(self._sums[number], self._context)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Compute as in a fresh process, whatever the model's forward has switched on around the layer.

    What is random is drawn on the CPU, whatever the caller's default device: the weights do not depend on it.
    """
    dtype = torch.get_default_dtype()
    with torch.no_grad(), torch.device("cpu"), torch.autocast(device.type, enabled=False):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _call(model: nn.Module, batch: Batch, forward: Forward | None) -> Any:
    return call_model(model, batch) if forward is None else forward(model, batch.raw)


def _seed(generator: torch.Generator | None) -> int:
    source = generator or torch.Generator().manual_seed(0)
    return int(torch.randint(2**62, (), generator=source, device=source.device))


def _unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside the wrappers that only run it."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return _unwrapped(model.module)
    own = getattr(model, "_orig_mod", None)  # of torch.compile
    return _unwrapped(own) if isinstance(own, nn.Module) and "torch._dynamo" in sys.modules else model


def _as_written() -> AbstractContextManager[Any]:
    """Compiled modules run as they were written: each layer runs once, and compiling the hooks takes minutes."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; importing it takes a second
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _offload(asked: bool | str, plan: Plan, batches: int) -> Offload | None:
    """What moves activations away, where there is something to move and somewhere else to put it."""
    device = plan.sites[0].device
    if not asked or batches == 1 or (asked is True and device.type == "cpu"):
        return None
    return Offload(device, "disk" if asked == "disk" else "cpu")


def _check_arguments(
    model: Any,
    reader: Reader,
    wish: Wish,
    config: Any,
    generator: Any,
    offload: Any,
    progress: Any,
    forward: Any,
) -> None:
    """Refuse arguments of the wrong kind before anything runs."""
    if not isinstance(model, nn.Module):
        raise SylinitError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, Config):
        raise SylinitError(f"config must be a sylinit.Config, got {config!r}")
    head, size, count = wish.head, wish.train_size, reader.samples
    names = isinstance(head, (list, tuple)) and all(isinstance(name, str) for name in head)
    if not (head is None or isinstance(head, str) or names):
        raise SylinitError(f"head must be the name of a layer, a list of names, 'auto' or None, got {head!r}")
    if not (isinstance(count, int) and not isinstance(count, bool) and count >= 2):
        raise SylinitError(f"samples must be an integer of at least 2, got {count!r}")
    if not (size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0)):
        raise SylinitError(f"train_size must be a positive integer or None, got {size!r}")
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise SylinitError(f"generator must be a torch.Generator or None, got {generator!r}")
    if not (isinstance(offload, bool) or offload == "disk"):
        raise SylinitError(f"offload must be True, False or 'disk', got {offload!r}")
    for name, value in (("target", reader.target), ("mask", reader.mask)):
        if not (value is None or isinstance(value, str) or callable(value)):
            raise SylinitError(f"{name} must be a key of the batches, a function of a batch or None, got {value!r}")
    for name, value, form in (("progress", progress, "(done, total, name)"), ("forward", forward, "(model, batch)")):
        if not (value is None or callable(value)):
            raise SylinitError(f"{name} must be a function {form} or None, got {value!r}")

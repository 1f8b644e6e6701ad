"""`initialize_`: the calibration data flows through the model once, and each layer is computed when it arrives.

What the user brings -> calibration set -> trial run -> plan -> one forward pass -> statistics, code, equation, scaled
weight at every site -> report.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sylinit.codes import HEAD
from sylinit.config import Config
from sylinit.data.batches import Batch, Reader, call_model, some_samples
from sylinit.data.calibration import CalibrationSet, calibration_set
from sylinit.data.tasks import TASKS
from sylinit.errors import ROOT, SylinitError
from sylinit.layers.inputs import readable_inputs
from sylinit.layers.registry import is_stock
from sylinit.layers.view import LayerView
from sylinit.plan.choice import Choice, choose
from sylinit.plan.gain import judge
from sylinit.plan.heads import module_name
from sylinit.plan.inventory import Inventory, take_inventory
from sylinit.plan.one_pass import Pass
from sylinit.plan.plan import Plan, Wish, make_plan
from sylinit.plan.sites import Context, MatrixSite, NormalizationSite, Site
from sylinit.plan.trace import SAMPLES, Trace, picked_positions, trace
from sylinit.report import Report
from sylinit.runtime.fsdp import Shards
from sylinit.runtime.processes import Processes
from sylinit.runtime.transaction import Transaction

Forward = Callable[[nn.Module, Any], Any]


def initialize_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    task: str = "auto",
    classes: int | None = None,
    target: str | Callable[[Any], Any] | None = None,
    ignore_index: int = -100,
    mask: str | Callable[[Any], Any] | None = "auto",
    samples: int = 2048,
    code: Any = "auto",
    layers: Any = None,
    head: Any = "auto",
    train_size: int | None = None,
    overwrite: bool = False,
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
    offset, and filters before it He's length instead of unit variance. The layers before the head keep the weights that
    they came with where held-out samples speak for it (``code="auto"``).
    Without labels there is no head: the last layer is computed like the others.

    The calibration set is one batch wherever its parts can be concatenated; the model then runs once, in the caller's
    thread, after a trial run on a few samples that shows what each module computes, and the trials of ``code="auto"``.
    All or nothing: after any exception the model is bit for bit what it was, plain attributes of its modules included.
    (Frozen parameters are never written and not copied: what the model's own forward writes into them stays.)
    Source: Das, Bhalgat and Porikli, arXiv 2105.10335.

    Args:
        model: any module, of any floating-point dtype; it is run in eval mode, and its modes are put back.
        batches: calibration data: an iterable of ``x``, ``(x, y)``, ``((x1, x2), y)`` or mappings, such as a
            DataLoader. ``y`` holds class indices ``[n]`` (or ``[n, positions]`` for tokens and pixels; -100 is
            ignored), soft labels or real values ``[n, c]``. Each sample once: copies of one, mirrored or shifted, count
            as independent evidence when the head's encoding weight is chosen.
        task: what the head is asked for: "multiclass", "binary" (one or two logits), "multilabel", "regression",
            "next-token" (the labels are the input ids, shifted inside), "reconstruction" (the input is the target) or
            "none"; "auto" reads it off the targets, the head and the inputs, and the report says what it took and why.
        classes: how many classes there are; the head's width must agree.
        target: the key of the target in a mapping, or a function of the batch. By default the last part of a tuple, or
            what a mapping holds under ``labels``, ``label``, ``target``, ``targets`` or ``y``.
        ignore_index: the class index that means "no label here". In real-valued targets NaN does.
        mask: which places of a sequence hold data: a key of a mapping, or a function of the batch that returns a tensor
            ``[n, length]``; "auto" takes ``attention_mask`` and ``src_key_padding_mask``. Padding counts nowhere.
        samples: at most so many are read: of lists spread evenly over all, of loaders the first, also of endless ones.
        code: "auto" tries two recipes, "mixed" and "half", and the model's own body below a computed head: each is
            computed from a part of the samples and scored on the others; the best is taken, and a note of the report
            has the scores. That takes two to three times as long as one recipe where samples are many, and some six
            times where they are few. Layers that ``layers=`` names are computed by "mixed" without a choice, as are
            all with ``overwrite=True``; without labels "auto" is "pca". Otherwise one recipe of
            `sylinit.plan.recipes` by name ("mixed", "half", "own", ...), or one latent code: a name in
            `sylinit.CODES`, ``"mixed:0.5"`` for a share of label units, a `Code`, a callable
            ``(x, target, units, generator) -> s``, a scikit-learn transformer, a tensor ``[samples, units]``, or a
            mapping from name pattern to any of these.
        layers: which layers: a name pattern (of the layer or of a module that holds it), a module type, a predicate
            ``(name, module) -> bool``, or a list of these. Where no module is so called, ``"head"`` stands for the head
            alone, ``"last:2"`` for the last two layers that the data meets, and ``"new"`` for those that Transformers'
            ``from_pretrained`` found no weights for. Everything else keeps its weights.
        head: the name of the layer whose outputs are the logits or predictions, a list of names, or a mapping from
            names to targets (keys of the batch, indices among several targets, functions of the batch, tensors of all
            samples); "auto" takes the layers that the trial run saw make the model's output, if their width fits the
            targets; None for none.
        train_size: how many samples the model will be trained on; None means ``len(loader.dataset)`` or, of a list, as
            many as it holds. Only networks with normalizations depend on it.
        overwrite: whether a model whose normalizations have been trained is to be re-made, and the body of one whose
            head is tied to its embedding; `initialize_head_` keeps the body in any case.
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
    wish = Wish(layers, code, head, task, classes, overwrite, train_size=train_size)
    source = _Source(batches, target, mask, samples, ignore_index, forward)
    return _initialize(model, source, wish, config, generator, group, offload, progress)


def initialize_head_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    task: str = "auto",
    classes: int | None = None,
    target: str | Callable[[Any], Any] | None = None,
    ignore_index: int = -100,
    mask: str | Callable[[Any], Any] | None = "auto",
    samples: int = 2048,
    head: Any = "auto",
    config: Config = Config(),  # noqa: B008 - frozen
    generator: torch.Generator | None = None,
    group: Any = None,
    offload: bool | Literal["disk"] = False,
    progress: Callable[[int, int, str], None] | None = None,
    forward: Forward | None = None,
) -> Report:
    """Compute the head of a model alone, on the features that its body gives: for pretrained backbones.

    The weight solves the Sylvester equation of `initialize_` with the targets as the code, which is ridge regression of
    the targets on the features, with the penalty of least generalized cross-validation error. Frozen bodies are no
    hindrance. Normalizations that have seen no data yet get the statistics of theirs; nothing else is changed.
    Source: Das, Bhalgat and Porikli, arXiv 2105.10335.

    Args:
        model: see `initialize_`, as for all other arguments.
        batches: calibration data.
        task: what the head is asked for.
        classes: how many classes there are.
        target: where the target lies.
        ignore_index: the class index that means "no label here".
        mask: which places of a sequence hold data.
        samples: at most so many are read.
        head: the name of the head, names, or a mapping from names to targets.
        config: the constants of the method.
        generator: source of what is random.
        group: a ``torch.distributed`` process group over which the data is split.
        offload: where the activations of waiting batches go.
        progress: called with (layers done, layers in all, name of the layer done).
        forward: ``(model, batch) -> output``.

    Returns:
        What was done to each layer, and why where nothing was.

    Raises:
        SylinitError: for bad input, or where no head is found.
    """
    wish = Wish(head=head, task=task, classes=classes, heads_only=True)
    source = _Source(batches, target, mask, samples, ignore_index, forward)
    return _initialize(model, source, wish, config, generator, group, offload, progress)


@dataclass(frozen=True)
class _Source:
    """What the user brings: batches, and how they are read and run."""

    batches: Any
    target: Any
    mask: Any
    samples: Any
    ignore_index: Any
    forward: Forward | None

    def reader(self, model: nn.Module, wish: Wish, *, apart: bool) -> Reader:
        """What reads the batches of a model."""
        targets = wish.head if isinstance(wish.head, Mapping) else {"": self.target}
        return Reader(model, self.samples, targets, self.mask, custom=self.forward is not None, apart=apart)


def _initialize(
    model: nn.Module,
    source: _Source,
    wish: Wish,
    config: Config,
    generator: torch.Generator | None,
    group: Any,
    offload: bool | Literal["disk"],
    progress: Callable[[int, int, str], None] | None,
) -> Report:
    """The flow: calibration set, trial run, plan, one pass, report; all or nothing."""
    started = time.perf_counter()
    processes = Processes(group)
    processes.together(lambda: _check_arguments(model, source, wish, config, generator, offload, progress))
    model = _unwrapped(model)
    reader = source.reader(model, wish, apart=bool(offload))
    shards = processes.together(lambda: Shards(model, processes.ranks))
    transaction = Transaction(model, generator)
    run: Pass | None = None
    notes: tuple[str, ...] = ()
    succeeded = False

    def call(batch: Batch) -> Any:
        return _call(model, batch, source.forward)

    with processes.held_interrupts() as held:
        try:
            with shards.gathered(transaction), torch.no_grad(), _as_written():
                seed = _seed(generator)
                read = processes.together(lambda: reader.read(source.batches))
                data = calibration_set(read, processes, seed, source.ignore_index)
                inventory = processes.together(lambda: take_inventory(model))
                model.eval()
                torch.backends.mha.set_fastpath_enabled(False)  # it computes without calling the modules inside
                with readable_inputs(model, {candidate.module for candidate in inventory.candidates}):
                    seen = _trial(model, inventory, data.batches[0], reader, transaction, processes, source.forward)

                    def plan_of(code: Any) -> Plan:
                        return make_plan(model, inventory, seen, replace(wish, code=code), data, config)

                    plan = plan_of(wish.code)
                    positions = _picked(plan, seen, data, transaction, processes, call)
                    context = Context(
                        data, _constants(config, wish, plan), processes, transaction, seen.layouts, positions
                    )
                    choice = Choice(plan)
                    if wish.code == "auto" and wish.layers is None and not wish.overwrite:
                        choice = choose(plan, plan_of, model, seen, context, reader, call, offload)
                        plan, notes = choice.plan, choice.notes
                    run = Pass(plan, context, model, seen, offload, progress)
                    run.through(call)
                before, doubts = judge(plan.heads, seen, run.outputs, context.promises, processes, choice.held_out)
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
        task=plan.heads.task.name,
        task_reason=plan.heads.task.reason,
        before=before,
        notes=(*notes, *data.notes, *plan.notes, *doubts),
        config=config,
        offloaded_peak=run.offload.peak if run.offload else 0,
        offloaded_total=run.offload.moved if run.offload else 0,
    )


def _constants(config: Config, wish: Wish, plan: Plan) -> Config:
    """The constants, of which a head that is asked for alone takes the least error: it is to predict as it is."""
    computed = [site for site in plan.sites if isinstance(site, MatrixSite)]
    alone = wish.heads_only or (wish.layers is not None and all(site.is_head for site in computed))
    return replace(config, value_standard_errors=0.0) if alone else config


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

    def on(part: Batch) -> Trace:
        def call(raw: Any) -> Any:
            return _call(model, reader.parse(raw), forward)

        with _checked_inputs(inventory):
            return trace(model, candidates, call, part.raw, part.samples, transaction.rewind)

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


def _picked(
    plan: Plan,
    seen: Trace,
    data: CalibrationSet,
    transaction: Transaction,
    processes: Processes,
    call: Callable[[Batch], Any],
) -> dict[str, tuple[Tensor | None, ...]]:
    """Of heads of which one position a sample reaches the output, which; the model runs once more for each of them."""

    def positions(view: LayerView, batch: Batch) -> Tensor | None:
        found = picked_positions(view.module, lambda: call(batch))
        transaction.rewind()
        return found if found is not None else batch.mask

    def of_all_batches(view: LayerView) -> tuple[Tensor | None, ...]:
        return tuple(positions(view, batch) for batch in data.batches)

    picked = [view for view in plan.heads.goals if module_name(view) in seen.picked]
    return {view.name: processes.together(partial(of_all_batches, view)) for view in picked}


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


def _check_arguments(
    model: Any, source: _Source, wish: Wish, config: Any, generator: Any, offload: Any, progress: Any
) -> None:
    """Refuse arguments of the wrong kind before anything runs."""
    if not isinstance(model, nn.Module):
        raise SylinitError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(_unwrapped(model), torch.jit.ScriptModule):
        raise SylinitError(
            f"model: {type(model).__name__} is scripted, so its layers cannot be met; initialize the model that it was "
            "scripted from, and script it then"
        )
    if type(_unwrapped(model)).forward is nn.modules.module._forward_unimplemented and source.forward is None:
        raise SylinitError(
            f"model: {type(model).__name__} has no forward; pass forward=lambda model, batch: ... that runs it"
        )
    if not isinstance(config, Config):
        raise SylinitError(f"config must be a sylinit.Config, got {config!r}")
    if wish.task not in ("auto", *TASKS):
        raise SylinitError(f"task must be 'auto' or one of {', '.join(map(repr, TASKS))}, got {wish.task!r}")
    head, size, count = wish.head, wish.train_size, source.samples
    names = isinstance(head, (list, tuple, Mapping)) and head and all(isinstance(name, str) for name in head)
    if not (head is None or isinstance(head, str) or names):
        raise SylinitError(
            "head must be the name of a layer, a list of names, a mapping from names to targets, 'auto' or None, got "
            f"{head!r}"
        )
    if not (isinstance(count, int) and not isinstance(count, bool) and count >= 2):
        raise SylinitError(f"samples must be an integer of at least 2, got {count!r}")
    if not (size is None or (isinstance(size, int) and not isinstance(size, bool) and size > 0)):
        raise SylinitError(f"train_size must be a positive integer or None, got {size!r}")
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise SylinitError(f"generator must be a torch.Generator or None, got {generator!r}")
    if not (isinstance(offload, bool) or offload == "disk"):
        raise SylinitError(f"offload must be True, False or 'disk', got {offload!r}")
    for name, number in (("classes", wish.classes), ("ignore_index", source.ignore_index)):
        whole = isinstance(number, int) and not isinstance(number, bool)
        if not (whole and (name == "ignore_index" or int(number or 0) > 0)) and not (
            number is None and name == "classes"
        ):
            raise SylinitError(f"{name} must be an integer, got {number!r}")
    for name, value in (("target", source.target), ("mask", source.mask)):
        if not (value is None or isinstance(value, str) or callable(value)):
            raise SylinitError(f"{name} must be a key of the batches, a function of a batch or None, got {value!r}")
    for name, value, form in (
        ("progress", progress, "(done, total, name)"),
        ("forward", source.forward, "(model, batch)"),
    ):
        if not (value is None or callable(value)):
            raise SylinitError(f"{name} must be a function {form} or None, got {value!r}")

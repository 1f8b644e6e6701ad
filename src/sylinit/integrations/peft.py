"""LoRA adapters that start from data: each ``A`` from the Sylvester equation of its own layer's inputs.

An adapter adds ``B A x`` to what a frozen layer computes of ``x``. With ``B`` zero the model's function is what it was,
and ``A`` (r x d) decides what the first steps of training can read of the input. Here it is the solution of
`sylinit.initialize_`'s equation for a latent code of r units, each row scaled to length one.

Since the adapters add nothing yet, no layer's input depends on another's ``A``. So batches run through the model one by
one, padded sequences in batches of like length, and only second moments are kept: of as many layers at once as `memory`
allows.
Source: Das, Bhalgat and Porikli, arXiv 2105.10335. With ``code="pca"`` the rows span what those of EVA do: Paischer and
others, *Parameter Efficient Fine-tuning via Explained Variance Adaptation*, arXiv 2410.07170.
"""

from __future__ import annotations

import copy
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sylinit.codes import CODES, Code, as_code
from sylinit.config import Config
from sylinit.data.batches import Batch, Read, Reader, call_model, some_samples
from sylinit.data.calibration import CalibrationSet, calibration_set
from sylinit.data.goals import make_goal
from sylinit.data.tasks import HeadShape, Task
from sylinit.data.tree import CannotConcatenate, concatenate, map_leaves, select
from sylinit.errors import SylinitError, require
from sylinit.initialize import initialize_head_
from sylinit.layers.inputs import plain, tensors
from sylinit.layers.registry import hypotheses
from sylinit.layers.view import LayerView
from sylinit.linalg.eigh import robust_eigh
from sylinit.plan.selection import selector
from sylinit.report import LayerReport, Report
from sylinit.runtime.processes import Processes
from sylinit.runtime.transaction import Transaction
from sylinit.solvers.fit import Fit
from sylinit.solvers.problem import Problem
from sylinit.solvers.scaling import rescale
from sylinit.solvers.solve import solve
from sylinit.statistics.moments import CHUNK, Covariance, Moments
from sylinit.statistics.rows import Known, collect, not_finite

require("peft", "peft", "sylinit.integrations.peft")

from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.tuners.lora import layer as lora_layers  # noqa: E402
from peft.utils import ModulesToSaveWrapper  # noqa: E402

AUTO = replace(CODES["label"], fallback="pca")
"""Label units, which led wherever adapters were compared; without targets, principal components."""

T = TypeVar("T")
Forward = Callable[[nn.Module, Any], Any]

EMBEDDED = 64
"""Of the next token's embedding, so many principal components are the target."""

SUBSPACE_STEPS = 24
"""Of the iteration for an adapter's few components, beyond which variances may hardly fall. Each shrinks the error by
the ratio of a variance beyond the subspace to the last one that is wanted: to 1e-5 in all where that is 0.6."""

PADDED = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
"""Keys of a batch whose second dimension is that of the padding mask."""

SHIFT_ROWS = 256
"""So many rows tell about where the mean of all is."""


def initialize_adapters_(
    peft_model: nn.Module,
    batches: Iterable[Any],
    *,
    code: Any = "auto",
    adapter: str = "default",
    layers: Any = None,
    rho: float = 1.0,
    head: bool = True,
    target: str | Callable[[Any], Any] | None = None,
    ignore_index: int = -100,
    mask: str | Callable[[Any], Any] | None = "auto",
    samples: int = 2048,
    memory: int = 1 << 28,
    config: Config = Config(),  # noqa: B008 - frozen
    generator: torch.Generator | None = None,
    group: Any = None,
    forward: Forward | None = None,
) -> Report:
    """Compute every LoRA ``A`` of a PEFT model from its own layer's inputs, and the head in ``modules_to_save``.

    With the rows X (d x n) that reach an adapted layer and a latent code S (r x n) of them, A (r x d) solves

        (S S^T) A + A (lambda X X^T) = (1 + lambda) S X^T,

    and its rows are scaled to length one. ``B`` is zero already, so the model's function is what it was, to the last
    bit. Linear layers, ``Conv1D`` and convolutions are served, DoRA and rank-stabilized LoRA included; quantized base
    layers too, for only their inputs are read. Adapters of embeddings, whose input is an index, keep their start.
    All or nothing: after an exception the model is what it was.

    Args:
        peft_model: what ``peft.get_peft_model`` returned.
        batches: calibration data as in `sylinit.initialize_`. They run through the model as they are cut, but those of
            sequences with an ``attention_mask`` by length, so that padding costs no time.
        code: the latent code of the r units. "label" takes random directions of the targets; "pca" spans the leading
            principal components, as EVA does; "mixed" has units of both kinds. "auto" is "label" where there are
            targets, else "pca". For causal language models the target of a token is the embedding of the next one.
        adapter: which adapter, by name.
        layers: which adapted layers, as in `sylinit.initialize_`, by the names of the adapted modules.
        rho: ranks are redistributed if it is above 1: a layer may get up to ``rho r`` units where its further principal
            components carry a larger share of its variance than those of other layers, and lose all of them, its
            adapter included, where they carry less; the sum of the ranks stays. ``alpha`` is changed so that each
            adapter's scale stays.
        head: whether to compute the head as well, where ``modules_to_save`` holds one that meets the targets.
        target: where the target lies, as in `sylinit.initialize_`.
        ignore_index: the class index that means "no label here".
        mask: which places of a sequence hold data.
        samples: at most so many are read. Of their rows (tokens, patches) an adapter, which has few units, reads
            ``config.min_rows``, evenly from all of them, unless ``config.rows`` says otherwise.
        memory: bytes of second moments that are held at once; layers beyond it take a pass of their own. One layer's
            are held in any case: ``4 d^2`` bytes.
        config: the constants of the method.
        generator: source of what is random; None means a fixed seed.
        group: a ``torch.distributed`` process group over which the data is split.
        forward: ``(model, batch) -> output``, for models that are not called as ``model(**batch)``.

    Returns:
        What was done to each adapted layer, and to the head.

    Raises:
        MissingPackageError: PEFT is not installed.
        SylinitError: bad input, or an adapter whose ``B`` is not zero because it has been trained, or because of its
            ``init_lora_weights=``.
    """
    started = time.perf_counter()
    if head and not isinstance(batches, (list, tuple)):
        batches = _read_once(batches, samples)
    source = _Source(batches, target, ignore_index, mask, samples, forward)
    found = _compute(peft_model, source, code, adapter, layers, rho, memory, config, generator, group)
    report: Report | None = None
    if head and (name := _head(peft_model, adapter)) is not None and found.has_goal:
        options: dict[str, Any] = {"ignore_index": ignore_index, "mask": mask, "samples": samples, "config": config}
        options |= {"target": target, "generator": generator, "group": group, "forward": forward}
        report = initialize_head_(peft_model, batches, head=name, **options)
    _write(peft_model, found)
    solving = sum(record.seconds for record in found.records)
    if report is None:
        report = Report((), found.samples, 0, 0, config=config)
    return replace(
        report,
        layers=(*found.records, *report.initialized),
        seconds=time.perf_counter() - started,
        solve_seconds=solving + report.solve_seconds,
        notes=tuple(dict.fromkeys((*found.notes, *report.notes))),
    )


def adapter_state_dict(
    peft_model: nn.Module,
    batches: Iterable[Any],
    *,
    code: Any = "auto",
    adapter: str = "default",
    layers: Any = None,
    rho: float = 1.0,
    target: str | Callable[[Any], Any] | None = None,
    ignore_index: int = -100,
    mask: str | Callable[[Any], Any] | None = "auto",
    samples: int = 2048,
    memory: int = 1 << 28,
    config: Config = Config(),  # noqa: B008 - frozen
    generator: torch.Generator | None = None,
    group: Any = None,
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """What `initialize_adapters_` would write into every ``A``, without writing it.

    PEFT takes it as its own: ``peft.initialize_lora_eva_weights(peft_model, eva_state_dict=...)``, for a configuration
    with ``init_lora_weights="eva"``.

    Args:
        peft_model: see `initialize_adapters_`, as for all other arguments.
        batches: calibration data.
        code: the latent code of the r units.
        adapter: which adapter, by name.
        layers: which adapted layers.
        rho: above 1, ranks are redistributed.
        target: where the target lies.
        ignore_index: the class index that means "no label here".
        mask: which places of a sequence hold data.
        samples: at most so many are read.
        memory: bytes of second moments that are held at once.
        config: the constants of the method.
        generator: source of what is random.
        group: a ``torch.distributed`` process group over which the data is split.
        forward: ``(model, batch) -> output``.

    Returns:
        By the name of the adapted module, in float32: ``[r, d]``, of convolutions ``[r, channels, *kernel]``.

    Raises:
        SylinitError: as `initialize_adapters_`.
    """
    source = _Source(batches, target, ignore_index, mask, samples, forward)
    found = _compute(peft_model, source, code, adapter, layers, rho, memory, config, generator, group)
    return {name: weight.float() for name, weight in found.weights.items()}


@dataclass(frozen=True)
class _Source:
    """What the user brings, and how it is read."""

    batches: Any
    target: Any
    ignore_index: int
    mask: Any
    samples: int
    forward: Forward | None


@dataclass(frozen=True)
class _Site:
    """One adapted layer.

    Attributes:
        name: of the adapted module.
        module: the adapted module, at which the input is met.
        view: of its ``A``, whose rows are those of the input.
        rank: r.
    """

    name: str
    module: Any
    view: LayerView
    rank: int


@dataclass
class _Found:
    """What was computed, before any of it is written.

    Attributes:
        adapter: which one.
        weights: ``A`` in the shape of its parameter, by the name of the adapted module; no rows where it lost them.
        records: what is to be reported.
        notes: what a user should know.
        samples: how many were read.
        has_goal: whether they had targets.
    """

    adapter: str
    weights: dict[str, Tensor] = field(default_factory=dict)
    records: list[LayerReport] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    samples: int = 0
    has_goal: bool = False


@dataclass(frozen=True)
class _Statistics:
    """The centered second moments of one layer's rows, in the form that solvers ask for."""

    cov: Covariance
    rows_read: int
    processes: Processes

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.cov.xx)

    @property
    def dim(self) -> int:
        """Inputs of each group."""
        return self.cov.dim

    @property
    def count(self) -> int:
        """More rows than inputs, so that no solver asks for the rows themselves, which are gone."""
        return max(self.rows_read, self.cov.dim)

    @property
    def width(self) -> int:
        """Length of the targets."""
        return len(self.cov.mean_t)

    def covariance(self, dtype: torch.dtype) -> Covariance:
        """In the dtype that is asked for."""
        return replace(self.cov, xx=self.cov.xx.to(dtype))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Not to be had."""
        raise SylinitError("adapters: codes that are fitted on rows are not served; choose 'pca', 'label' or 'mixed'")

    def together(self, work: Callable[[], T]) -> T:
        """As the group does."""
        return self.processes.together(work)

    def agree(self, held: bool) -> bool:
        """As the group does."""
        return all(self.processes.agree(lambda: held))


def _compute(
    model: Any,
    source: _Source,
    code: Any,
    adapter: str,
    layers: Any,
    rho: float,
    memory: int,
    config: Config,
    generator: torch.Generator | None,
    group: Any,
) -> _Found:
    """Every ``A``; the model is left as it was."""
    sites, records = _sites(model, adapter, layers)
    chosen = AUTO if isinstance(code, str) and code == "auto" else as_code(code, ("auto",))
    if chosen.needs != "moments":
        raise SylinitError(
            f"code={chosen.name!r} is fitted on rows, and adapters keep second moments only: choose 'pca', 'label', "
            "'mixed' or 'lda'"
        )
    if not (isinstance(rho, (int, float)) and math.isfinite(rho) and rho >= 1):
        raise SylinitError(f"rho must be a finite number of at least 1, got {rho!r}")
    processes = Processes(group)
    seed = int(torch.randint(2**62, (), generator=generator or torch.Generator().manual_seed(0)))
    transaction = Transaction(model, None)
    try:
        with torch.no_grad():
            custom = source.forward is not None
            reader = Reader(model, source.samples, {"": _target(source, model)}, source.mask, custom=custom, apart=True)
            read = processes.together(lambda: _by_length(reader.read(source.batches), reader, source, model))
            data = calibration_set(read, processes, seed, source.ignore_index)
            model.eval()
            for site in sites.values():  # with B zero it adds nothing, and takes its time; the transaction undoes this
                if site.module.active_adapters == [adapter] and not site.module.merged:
                    site.module._disable_adapters = True
            told = _Told.of(data, model)
            run = _Run(model, data, told if chosen.labels else None, source.forward, config)
            found = _Found(adapter, records=records, notes=data.notes, samples=data.samples, has_goal=told is not None)
            inputs = processes.agree(lambda: run.inputs(sites, reader))[0]
            met = {name for each in inputs for name in each.names}
            for name in sites.keys() - met:
                kind = type(sites[name].module).__name__
                found.records.append(LayerReport(name, kind, "left alone", "the data never reached it"))
            solved = _solve_all(run, inputs, sites, chosen, rho, found, memory)
    finally:
        transaction.restore(succeeded=False)
    _settle(sites, solved, rho, found)
    return found


def _by_length(read: Read, reader: Reader, source: _Source, model: Any) -> Read:
    """The same samples in batches of like length, without the places that are padding in all of a batch.

    What is not surely a set of sequences that are padded at their end stays as it is cut.
    """
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if decodes or reader.custom or not all(_is_padded_at_its_end(batch, source.ignore_index) for batch in read.batches):
        return read
    sizes = [batch.samples for batch in read.batches]
    try:
        whole = concatenate([batch.raw for batch in read.batches], sizes, strict=False)
    except CannotConcatenate:
        return read
    mask = whole["attention_mask"] != 0
    lengths = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1).cpu()
    batches = []
    for index in lengths.argsort(stable=True).split(max(sizes)):
        cut = partial(_cut, length=int(lengths[index].max()), mask=mask)
        batches.append(reader.parse(map_leaves(select(whole, index, sum(sizes)), cut)))
    return replace(read, batches=tuple(batches))


def _is_padded_at_its_end(batch: Batch, ignore_index: int) -> bool:
    """Whether a batch is a mapping of tensors, and all that is as long as its mask holds nothing where that is zero."""
    mask = batch.raw.get("attention_mask") if isinstance(batch.raw, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not all(isinstance(x, Tensor) for x in batch.raw.values()):
        return False
    nothing = mask == 0
    others = [x for key, x in batch.raw.items() if key not in PADDED and _is_as_long(x, mask)]
    empty = (x.shape == mask.shape and bool((x[nothing] == ignore_index).all()) for x in others)
    return not bool(nothing[:, 0].any()) and all(empty)


def _is_as_long(x: Tensor, mask: Tensor) -> bool:
    return x.ndim > 1 and x.shape[1] == mask.shape[1]


def _cut(x: Tensor, length: int, mask: Tensor) -> Tensor:
    return x[:, :length] if _is_as_long(x, mask) else x


def _target(source: _Source, model: Any) -> Any:
    """Where the target lies: of causal language models without labels, in the input itself."""
    if source.target is not None or not _is_causal(model):
        return source.target

    def labels(batch: Any) -> Any:
        if "labels" in batch:
            return batch["labels"]
        ids = batch["input_ids"]
        padding = batch.get("attention_mask")
        return ids if padding is None else ids.masked_fill(padding == 0, source.ignore_index)

    return labels


def _is_causal(model: Any) -> bool:
    kinds = {getattr(config.task_type, "value", config.task_type) for config in model.peft_config.values()}
    return "CAUSAL_LM" in kinds


def _sites(model: Any, adapter: str, layers: Any) -> tuple[dict[str, _Site], list[LayerReport]]:
    """The adapted layers, and records of those left alone.

    Raises:
        SylinitError: there are none, or they are not at their start.
    """
    known = getattr(model, "peft_config", None)
    if known is None:
        kind = type(model).__name__
        raise SylinitError(f"adapters: expected a PEFT model, got {kind}; peft.get_peft_model makes one")
    if adapter not in known:
        raise SylinitError(f"adapter={adapter!r}: the model has {', '.join(map(repr, known))}")
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    wanted = selector(layers, list(adapted))
    sites: dict[str, _Site] = {}
    records = []
    for name, module in adapted.items():
        if not wanted(name, cast(nn.Module, module)):
            continue
        if reason := _reason_to_leave(module, adapter):
            records.append(LayerReport(name, type(module).__name__, "left alone", reason))
            continue
        weight = module.lora_B[adapter].weight
        if hasattr(weight, "__tensor_flatten__") or weight.is_meta:
            raise SylinitError(f"adapters: {name!r} holds no plain tensor of numbers; initialize before it is sharded")
        if bool(weight.any()):
            raise SylinitError(
                f"adapters: the B of {name!r} is not zero, so another A would change the model's function; initialize "
                "adapters before training, and with init_lora_weights=True, 'gaussian' or 'eva'"
            )
        view = hypotheses(module.lora_A[adapter], name)[0][0]
        sites[name] = _Site(name, module, view, module.r[adapter])
    if not sites:
        reasons = "; ".join(f"{record.name}: {record.reason}" for record in records[:3])
        more = f": {reasons}" if reasons else ""
        raise SylinitError(f"adapters: the adapter {adapter!r} has no layer to initialize{more}")
    return sites, records


def _reason_to_leave(module: Any, adapter: str) -> str:
    """Why an adapted layer is not computed; empty if it is."""
    if adapter in getattr(module, "lora_embedding_A", {}):
        return "a lookup table: its input is an index, not a row of numbers"
    if adapter not in module.lora_A:
        return f"it has no adapter {adapter!r}"
    if isinstance(module, (lora_layers.MultiheadAttention, lora_layers.ParamWrapper)):
        return "its adapter meets its input inside of the layer"
    return ""


@dataclass(frozen=True)
class _Told:
    """What layers are told of the samples.

    Attributes:
        vectors: of one batch by its number, ``[n, *positions, c]``, NaN where missing.
        mean: ``[c]``.
    """

    vectors: Callable[[int], Tensor]
    mean: Tensor

    @staticmethod
    def of(data: CalibrationSet, model: Any) -> _Told | None:
        """From the targets of the data; None without any."""
        facts = data.facts()
        if facts is None:
            return None
        raw = [batch.targets[""] for batch in data.batches]
        if facts.next_token or _is_causal(model):
            return _Told._next_tokens(data, model, raw)
        width = int(facts.largest) + 1 if not facts.real else facts.shape[-1] if facts.shape else 1
        shape = HeadShape("", max(width, 1), () if facts.real else facts.shape)
        goal = data.goal(shape, "", facts, "auto", None)
        return _Told(lambda number: goal.vectors[number], goal.mean)

    @staticmethod
    def _next_tokens(data: CalibrationSet, model: Any, raw: Sequence[Tensor]) -> _Told:
        """Of each token the leading principal components of the next one's embedding."""
        table = (model.get_output_embeddings() or model.get_input_embeddings()).weight.detach()
        task = Task("next-token", "a causal language model", len(table), positions=1)
        goal = make_goal(task, raw, data.masks, data.ignore_index, data.processes)
        count = torch.zeros(len(table), dtype=torch.float64, device=goal.present.device)
        for target in goal.targets:
            count += torch.bincount(target[target >= 0], minlength=len(table))
        share = data.processes.sum_(count)[goal.present].unsqueeze(1)
        share = share / share.sum()
        embedded = table[goal.present.to(table.device)].to(share)
        embedded = embedded - (share * embedded).sum(0)
        _, axes = robust_eigh(embedded.T @ (share * embedded))
        coordinates = embedded @ axes[:, -min(EMBEDDED, len(axes)) :]

        def vectors(number: int) -> Tensor:
            target = goal.targets[number]
            place = torch.searchsorted(goal.present, target.clamp(min=0)).clamp(max=len(coordinates) - 1)
            return coordinates[place].masked_fill((target < 0).unsqueeze(-1), math.nan)

        return _Told(vectors, torch.zeros_like(coordinates[0]))


class _Enough(Exception):
    """Stops a forward pass behind the last layer whose input was wanted."""


@dataclass(frozen=True)
class _Input:
    """One input that adapted layers read.

    Attributes:
        names: of the layers, in the order in which the data meets them; statistics are collected at the first.
        shift: ``[g, 1, d]``, about the mean of its rows, so that float32 sums of products lose nothing to it.
    """

    names: tuple[str, ...]
    shift: Tensor


@dataclass
class _Sums:
    """Moments of the shifted rows of one input, and whether all of them had targets."""

    moments: Moments
    told: bool = True


@dataclass(frozen=True)
class _Run:
    """Runs the model and collects second moments."""

    model: Any
    data: CalibrationSet
    told: _Told | None
    forward: Forward | None
    config: Config

    @property
    def width(self) -> int:
        """Length of the targets."""
        return 0 if self.told is None else len(self.told.mean)

    def call(self, batch: Batch) -> None:
        """Run one batch, perhaps not to its end."""
        with suppress(_Enough):
            if self.forward is None:
                call_model(self.model, batch)
            else:
                self.forward(self.model, batch.raw)

    def inputs(self, sites: dict[str, _Site], reader: Reader) -> list[_Input]:
        """What a few samples show: who shares an input with whom (query, key and value do), and in which order."""
        found: list[_Input] = []
        seen: list[tuple[weakref.ref[Tensor], int]] = []

        def meet(name: str, x: Tensor) -> None:
            if any(name in each.names for each in found):
                return
            for place, (tensor, version) in enumerate(seen):
                first = sites[found[place].names[0]].view
                if tensor() is x and x._version == version and type(first) is type(sites[name].view) is LayerView:
                    found[place] = replace(found[place], names=(*found[place].names, name))
                    return
            view = sites[name].view
            rows = min(SHIFT_ROWS, math.prod((view.positions(x)[0], *view.positions(x)[1])))
            shift = view.rows(x, torch.arange(rows, device=x.device)).double().mean(1, keepdim=True)
            found.append(_Input((name,), shift.cpu()))
            seen.append((weakref.ref(x), x._version))

        batch = self.data.batches[0]
        with _met(list(sites.values()), meet):
            self.call(some_samples(batch, reader, 2) or batch)
        return found

    def statistics(self, inputs: Sequence[_Input], sites: dict[str, _Site]) -> Iterator[_Statistics | None]:
        """From one pass over all batches, each made when it is asked for; None where too few rows came."""
        leaders = {each.names[0]: each for each in inputs}
        sums = {
            name: _Sums(Moments.zeros(view.groups, view.dim, self.width, view.parameters[0].device, torch.float32))
            for name, view in ((name, sites[name].view) for name in leaders)
        }
        last = inputs[-1].names[0]
        now: dict[str, Any] = {}

        def meet(name: str, x: Tensor) -> None:
            self._add(sites[name].view, x, now["number"], now["known"], leaders[name].shift, sums[name])
            if name == last:
                raise _Enough

        def local() -> None:
            with _met([sites[name] for name in leaders], meet):
                for number, batch in enumerate(self.data.batches):
                    known = Known(masks=(batch.mask,), sizes=(batch.samples,))
                    if self.told is not None:
                        known = replace(known, vectors=(self.told.vectors(number),), mean=self.told.mean)
                    now.update(number=number, known=known)
                    self.call(batch)

        self.data.processes.together(local)
        for name in leaders:
            yield self._reduced(name, sums.pop(name))

    def _add(self, view: LayerView, x: Tensor, number: int, known: Known, shift: Tensor, sums: _Sums) -> None:
        """Add the rows of one batch to the moments of an input."""
        config = self.config
        budget = config.min_rows if config.rows is None else config.rows
        share = self.data.batches[number].samples / sum(self.data.sizes)
        wanted = None if budget == "all" else max(2, math.ceil(budget * share))
        draw = torch.Generator().manual_seed((self.data.seed + number) % 2**63)
        rows = collect(
            view.name, view, {0: x}, known, None, lambda total, _: wanted, draw, Processes(), x.device, least=1
        )
        if rows is None:
            return
        sums.told &= rows.width == self.width
        for part in rows.parts:
            given = part.row_targets(view) if rows.width else known.mean.expand(part.count, -1)
            step = max(1, CHUNK // (view.groups * view.dim))
            for start in range(0, part.count, step):
                end = min(start + step, part.count)
                index = torch.arange(start, end, device=x.device) if part.index is None else part.index[start:end]
                piece = view.rows(x, index)
                sums.moments.update(piece - shift.to(piece), given[start:end])

    def _reduced(self, name: str, own: _Sums) -> _Statistics | None:
        """The moments of all processes, centered."""
        processes = self.data.processes
        told = all(processes.agree(lambda: own.told))
        cov = own.moments.reduce(processes.sum_).covariance()
        if not bool(cov.xx.isfinite().all()):
            raise SylinitError(not_finite(name))
        if float(cov.count) < 2:
            return None
        if not told:
            cov = replace(cov, xt=cov.xt[:, :, :0], tt=cov.tt[:0, :0], mean_t=cov.mean_t[:0])
        return _Statistics(cov, int(cov.count), processes)


@contextmanager
def _met(sites: Sequence[_Site], meet: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``meet(name, input)`` whenever an adapted layer is called."""

    def ahead(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            meet(name, plain(args[0] if args else next(iter(kwargs.values()))))

        return hook

    hooks = [site.module.register_forward_pre_hook(ahead(site.name), with_kwargs=True) for site in sites]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _passes(inputs: Sequence[_Input], sites: dict[str, _Site], memory: int) -> Iterator[list[_Input]]:
    """As many inputs at once as their second moments fit into memory; one at least."""
    part: list[_Input] = []
    held = 0
    for each in inputs:
        view = sites[each.names[0]].view
        size = 4 * view.groups * view.dim**2
        if part and held + size > memory:
            yield part
            part, held = [], 0
        part.append(each)
        held += size
    if part:
        yield part


@dataclass(frozen=True)
class _Solved:
    """The solution for one layer: a fit of perhaps more rows than the adapter has, and what each might explain.

    Attributes:
        fit: of ``rho r`` units.
        explained: the shares of the variance of the layer's input that its leading principal components carry.
        code: the name of the code that was used.
        rows: how many rows were read.
        seconds: spent on it.
    """

    fit: Fit
    explained: Tensor
    code: str
    rows: int
    seconds: float


def _solve_all(
    run: _Run, inputs: list[_Input], sites: dict[str, _Site], code: Code, rho: float, found: _Found, memory: int
) -> dict[str, _Solved]:
    """Pass by pass: statistics of some inputs, then the equations of the layers that read them."""
    solved: dict[str, _Solved] = {}
    place = {name: number for number, name in enumerate(sites)}
    for part in _passes(inputs, sites, memory):
        for each, statistics in zip(part, run.statistics(part, sites), strict=True):
            alike: dict[int, _Solved | str] = {}
            for name in each.names:
                rank, seed = sites[name].rank, (run.data.seed + 7919 * place[name]) % 2**63
                one = alike.get(rank) or _solve(sites[name], statistics, code, rho, seed, run)
                if not code.labels:  # label units are random directions, others than those of its neighbors
                    alike[rank] = one
                if isinstance(one, _Solved):
                    solved[name] = one
                else:
                    kind = type(sites[name].module).__name__
                    found.records.append(LayerReport(name, kind, "left alone", one))
    return solved


def _solve(site: _Site, statistics: _Statistics | None, code: Code, rho: float, seed: int, run: _Run) -> _Solved | str:
    """Solve the equation of one layer; a text says why there is none."""
    if statistics is None:
        return "it has met fewer than two rows of input"
    started = time.perf_counter()
    if code.labels and not statistics.width:
        reason = "there are no targets" if run.told is None else "its rows cannot be matched to samples"
        code = code.without_labels(site.name, reason, "pass labels, or code='pca'")
    most = min(round(rho * site.rank), site.view.dim)
    problem = Problem(site.name, code, max(most, site.rank), seed, "directions")
    config = replace(run.config, filter_length=1.0, subspace_steps=max(SUBSPACE_STEPS, run.config.subspace_steps))
    fit = rescale(solve(statistics, problem, config), "directions", config)
    if not bool(fit.alive.all()):
        return "its input is constant on the calibration data"
    explained = _explained(statistics.cov, most) if rho > 1 else torch.zeros(0)
    return _Solved(fit, explained, code.name, statistics.rows_read, time.perf_counter() - started)


def _explained(cov: Covariance, count: int) -> Tensor:
    """The shares of the total variance of the ``count`` leading principal components."""
    values = robust_eigh(cov.xx[0].double())[0].flip(0).clamp(min=0)
    return (values[:count] / values.sum()).cpu()


def _ranks(sites: dict[str, _Site], solved: dict[str, _Solved], rho: float) -> dict[str, int]:
    """The rank of each adapter: as it is, or by explained variance, the sum being the same."""
    ranks = {name: sites[name].rank for name in solved}
    if rho == 1:
        return ranks
    budget = sum(ranks.values())
    names = [name for name in solved for _ in solved[name].explained]
    shares = torch.cat([solved[name].explained for name in solved])
    best = shares.sort(descending=True, stable=True).indices[:budget].tolist()
    chosen = [names[place] for place in best]
    return {name: chosen.count(name) for name in solved}


def _settle(sites: dict[str, _Site], solved: dict[str, _Solved], rho: float, found: _Found) -> None:
    """Cut every solution to the rank of its adapter, and report it."""
    for name, rank in _ranks(sites, solved, rho).items():
        site, own = sites[name], solved[name]
        shape = site.module.lora_A[found.adapter].weight.shape
        found.weights[name] = own.fit.weight[:, :rank].reshape(rank, *shape[1:])
        kind, fit = type(site.module).__name__, own.fit
        reason = "" if rank == site.rank else f"rank {rank} instead of {site.rank}"
        if not rank:
            reason = "its adapter was removed: its units went to layers whose inputs have more variance to explain"
            found.records.append(LayerReport(name, kind, "left alone", reason))
            continue
        assert fit.dead is not None
        found.records.append(
            LayerReport(
                name=name,
                kind=kind,
                action="initialized",
                reason="; ".join(filter(None, (reason, fit.note))),
                shape=(1, rank, site.view.dim),
                code=own.code,
                rows=own.rows,
                solver=fit.solver,
                rank=int(torch.linalg.matrix_rank(fit.weight[0, :rank])),
                encoding_weight=fit.encoding_weight,
                residual=fit.residual,
                encoding_error=fit.encoding_error,
                decoding_error=fit.decoding_error,
                dead_units=float(fit.dead[:, :rank].double().mean()),
                seconds=own.seconds,
            )
        )


@torch.no_grad()
def _write(model: Any, found: _Found) -> None:
    """Write every ``A``; where ranks changed, adapter and configuration follow, so that saving and loading agree."""
    adapter, resized = found.adapter, False
    with torch.random.fork_rng(devices=[]):
        for name, weight in found.weights.items():
            module = model.get_submodule(name)
            if len(weight) != module.r[adapter]:
                resized = True
                _resize(model, name, module, adapter, len(weight))
            if len(weight):
                module.lora_A[adapter].weight.copy_(weight)
    if resized:
        _describe_ranks(model, adapter)


def _resize(model: Any, name: str, module: Any, adapter: str, rank: int) -> None:
    """Give an adapter another rank and the same scale, or take it off its layer."""
    if not rank:
        parent, _, child = name.rpartition(".")
        if list(module.lora_A) == [adapter]:
            setattr(model.get_submodule(parent), child, module.get_base_layer())
        else:
            module.delete_adapter(adapter)
        return
    config = copy.copy(model.peft_config[adapter])
    config.init_lora_weights = True
    scale, former = module.scaling[adapter], module.r[adapter]
    grow = (rank / former) ** (0.5 if config.use_rslora else 1.0)
    trained = {key: parameter.requires_grad for key, parameter in module.named_parameters()}
    old = module.lora_A[adapter].weight
    module.update_layer(adapter, rank, lora_alpha=module.lora_alpha[adapter] * grow, config=config)
    module.scaling[adapter] = scale
    for part in (module.lora_A[adapter], module.lora_B[adapter]):
        part.to(old.device, old.dtype)
    for key, parameter in module.named_parameters():
        parameter.requires_grad_(trained[key])


def _describe_ranks(model: Any, adapter: str) -> None:
    """Write ranks, scales and layers of an adapter into its configuration."""
    config = model.peft_config[adapter]
    held = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.r
    }
    config.target_modules = set(held)
    config.rank_pattern = {name: module.r[adapter] for name, module in held.items() if module.r[adapter] != config.r}
    alphas = {name: module.lora_alpha[adapter] for name, module in held.items()}
    config.alpha_pattern = {name: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}


def _head(model: Any, adapter: str) -> str | None:
    """The name of the head in ``modules_to_save``, if there is one; a causal language model keeps its own."""
    if _is_causal(model):
        return None
    saved = [
        f"{name}.modules_to_save.{adapter}"
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
    ]
    matrices = (nn.Linear, nn.Conv1d, nn.Conv2d)
    held = [name for name in saved if any(isinstance(m, matrices) for m in model.get_submodule(name).modules())]
    return held[-1] if held else None


def _read_once(batches: Iterable[Any], samples: int) -> list[Any]:
    """The batches of a loader up to the number of samples wanted, to be run more than once."""
    read: list[Any] = []
    count = 0
    for batch in batches:
        read.append(batch)
        first = next((t for t in tensors(batch) if t.ndim), None)
        count += 0 if first is None else len(first)
        if count >= samples:
            break
    return read

"""One run of a model over all batches, in which each layer is computed when the data reaches it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sylinit.data.batches import Batch
from sylinit.layers.attention import AttentionOutputView
from sylinit.plan.plan import Plan
from sylinit.plan.sites import Context, MatrixSite, NormalizationSite, Site, check_entry
from sylinit.plan.trace import Trace, output_tensors
from sylinit.report import LayerReport
from sylinit.runtime.memory import reused_memory
from sylinit.runtime.offload import Offload
from sylinit.runtime.workers import Interleaved, OnePass

OUTPUTS_ALIVE = 8
"""So many outputs of the largest layer are alive at once in most models."""


class Pass:
    """One run of the model over all batches; each layer is computed at its site.

    Args:
        plan: the sites.
        context: of the pass.
        model: in eval mode.
        trace: what the trial run showed.
        offload: where the activations of waiting batches go.
        progress: called with (layers done, layers in all, name of the layer done).

    Attributes:
        records: what was done, in the order in which the data met the layers.
        outputs: the tensors of the model's output, by batch.
        offload: what moves activations, if anything does.
    """

    def __init__(
        self,
        plan: Plan,
        context: Context,
        model: nn.Module,
        trace: Trace,
        offload: bool | str,
        progress: Callable[[int, int, str], None] | None,
    ) -> None:
        self.records: list[LayerReport] = []
        self.outputs: dict[int, list[Tensor]] = {}
        self._plan = plan
        self._context = context
        self._trace = trace
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
                output = call(self._context.data.batches[number])
            self.outputs[number] = [tensor.detach().clone() for tensor in output_tensors(output)]

        with reused_memory(OUTPUTS_ALIVE * self._trace.sample_bytes * max(self._context.data.sizes)):
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
        if not self._names(site).isdisjoint(self._trace.seen):
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
        if not (site.selected or self._changed or site.is_fresh):
            return site.left_alone("its input did not change")
        sums = site.sums(waiting, self._context)
        self._sums[number] = self._sums[number] + sums if number in self._sums else sums
        return site.write(self._sums[number], self._context)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Compute as in a fresh process, whatever the model's forward has switched on around the layer.

    What is random is drawn on the CPU, whatever the caller's default device: the weights do not depend on it.
    """
    dtype, cpu = torch.get_default_dtype(), torch.device("cpu")
    on_cpu = nullcontext() if torch.empty(0).device == cpu else cpu  # it makes each call of torch slower
    with torch.no_grad(), on_cpu, torch.autocast(device.type, enabled=False):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _offload(asked: bool | str, plan: Plan, batches: int) -> Offload | None:
    """What moves activations away, where there is something to move and somewhere else to put it."""
    if not asked or batches == 1 or not plan.sites:
        return None
    device = plan.sites[0].device
    if asked is True and device.type == "cpu":
        return None
    return Offload(device, "disk" if asked == "disk" else "cpu")

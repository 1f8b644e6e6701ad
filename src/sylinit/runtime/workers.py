"""Running a model so that each layer meets all of its input before it is computed.

The calibration set is one batch wherever its parts allow it. Then the model runs once, in the caller's thread
(`OnePass`). Parts that cannot be concatenated run *interleaved* (`Interleaved`): each in a worker thread that does
nothing but run the model and stops at every layer site. A loop in the caller's thread lets one worker at a time run
until it stops, picks the site that comes first in the model, computes it from all that waits there, and lets those
workers go on. With a process group the processes agree on the site, so each process is like more workers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import nn

from sylinit.errors import SylinitError
from sylinit.runtime.flags import changed_flags, read_flags
from sylinit.runtime.interrupts import held_interrupts
from sylinit.runtime.state import State

Compute = Callable[[int, dict[int, Any]], None]
"""Called with the number of a site and what waits there, by part; it computes the layer."""

Agree = Callable[[int | None], int | None]
"""Called with the site that this process would compute next (None: it has ended); returns the site that all compute."""

IDLE_SECONDS = 20.0
"""A worker that uses no processor for so long while it should run the model waits for something that never comes."""

REMEDY = (
    "pass batches that can be concatenated (inputs of equal shape, or padded with a mask) or a single batch, "
    "without offload="
)


class Stopped(BaseException):
    """Ends a forward pass after a failure elsewhere. Not an `Exception`: a model's own handlers must not catch it."""


class OnePass:
    """One batch: the model runs once, in the caller's thread.

    Args:
        compute: computes the layer at a site.
        agree: agrees with the other processes on the next site.
    """

    def __init__(self, compute: Compute, agree: Agree) -> None:
        self._compute = compute
        self._agree = agree
        self._failure: BaseException | None = None
        self._thread = threading.get_ident()

    def run(self, forward: Callable[[int], Any]) -> None:
        """Run ``forward(0)``; raise what it, or the computing of any site, raised."""
        try:
            forward(0)
        except BaseException as error:
            raise self._failure or error from None
        if self._failure is not None:  # which the model has caught
            raise self._failure
        while (site := self._agree(None)) is not None:
            self._compute(site, {})

    def meet(self, site: int, name: str, payload: Any) -> None:
        """Compute a site, from inside the forward pass; before it, those that only other processes have met."""
        try:
            if threading.get_ident() != self._thread:
                raise _foreign_thread(name)
            chosen = None
            while chosen != site:
                chosen = self._agree(site)
                assert chosen is not None
                self._compute(chosen, {0: payload} if chosen == site else {})
        except BaseException as error:  # not left to fly through the model, which might catch it
            self._failure = self._failure or error
            raise Stopped from error


class Interleaved:
    """Several parts, each in a worker thread of its own; they run in turn and meet at every site.

    Args:
        count: number of parts.
        compute: computes the layer at a site.
        agree: agrees with the other processes on the next site.
        model: watched for state that one forward pass would leave to another.
        waiting: what becomes of a part's activations while it waits.
    """

    def __init__(
        self,
        count: int,
        compute: Compute,
        agree: Agree,
        model: nn.Module,
        waiting: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._compute = compute
        self._agree = agree
        self._model = model
        self._waiting = waiting
        self._workers = [_Worker(part) for part in range(count)]
        self._by_thread: dict[int, _Worker] = {}

    def run(self, forward: Callable[[int], Any]) -> None:
        """Run ``forward(part)`` for every part; raise what any of them, or the computing of any site, raised."""
        context = _ThreadContext()
        state, flags = State(self._model), read_flags()
        try:
            while True:
                for worker in self._workers:
                    if worker.ready:
                        self._turn(worker, forward, context, state, flags)
                site = self._agree(min((w.site for w in self._workers if w.site is not None), default=None))
                if site is None:
                    return
                here = [worker for worker in self._workers if worker.site == site]
                self._compute(site, {worker.part: worker.payload for worker in here})
                for worker in here:
                    worker.leave()
        finally:
            with held_interrupts():  # a second Ctrl-C must not leave threads behind
                for worker in self._workers:
                    worker.stop()

    def meet(self, site: int, name: str, payload: Any) -> None:
        """Wait at a site, from inside a part's forward pass, until its layer is computed."""
        worker = self._by_thread.get(threading.get_ident())
        if worker is None:
            error = _foreign_thread(name)
            for each in self._workers:
                each.fail(error)
            raise Stopped from error
        with self._waiting(worker.part):
            worker.wait(site, name, payload)

    def _turn(
        self,
        worker: _Worker,
        forward: Callable[[int], Any],
        context: _ThreadContext,
        state: State,
        flags: dict[str, Any],
    ) -> None:
        """Let one worker run until it stops at a site or ends, and see that it left nothing for others to find."""
        watched = worker.part == 0  # what one part's forward writes, all write
        if watched:
            state.read()
        worker.resume(forward, context, self._by_thread)
        if watched and worker.site is not None:
            where = f"while one batch waits at layer {worker.name!r}, "
            if locks := state.held_locks():
                held = f"the model holds a lock ({locks[0]}), for which the next batch would wait"
                raise SylinitError(f"{where}{held}; {REMEDY}")
        if watched and (changed := state.changed()):
            raise SylinitError(
                f"batches run interleaved, and the model's forward leaves state in {changed[0]}, which another batch's "
                f"forward would find; {REMEDY}"
            )
        if worker.site is not None and (names := changed_flags(flags)):
            raise SylinitError(
                f"the model's forward changes {names[0]} for the whole process, which would mislead the batches that "
                f"run interleaved with it; {REMEDY}"
            )


class _Worker:
    """A thread that runs the model on one part.

    Attributes:
        part: its number.
        site: where it waits, or None.
        name: of that site.
        payload: what it brought there.
        ready: whether it can go on.
    """

    def __init__(self, part: int) -> None:
        self.part = part
        self.site: int | None = None
        self.name = ""
        self.payload: Any = None
        self.ready = True
        self._thread: threading.Thread | None = None
        self._go: SimpleQueue[bool] = SimpleQueue()
        self._stopped: SimpleQueue[BaseException | None] = SimpleQueue()
        self._ending = False

    def resume(self, forward: Callable[[int], Any], context: _ThreadContext, by_thread: dict[int, _Worker]) -> None:
        """Let the thread run, and wait until it stops at a site or ends; called in the caller's thread."""
        self.ready = False
        if self._thread is None:
            run = (forward, context, by_thread)
            with held_interrupts():  # a thread that was made but not started cannot be waited for
                self._thread = threading.Thread(target=self._run, args=run, name=f"sylinit-{self.part}", daemon=True)
                self._thread.start()
        else:
            self._go.put(True)
        error = self._arrival()
        if error is not None:
            raise error

    def leave(self) -> None:
        """Note that the site is computed."""
        self.site, self.payload, self.ready = None, None, True

    def wait(self, site: int, name: str, payload: Any) -> None:
        """Stop here; called in the worker's own thread."""
        self.site, self.name, self.payload = site, name, payload
        self._pause()

    def fail(self, error: BaseException) -> None:
        """Hand an error to the caller's thread, as if this worker had met it."""
        self._stopped.put(error)

    def stop(self) -> None:
        """End the thread, wherever it waits, and wait for its end."""
        self._ending = True
        self._go.put(False)
        if self._thread is not None:
            self._thread.join()

    def _run(self, forward: Callable[[int], Any], context: _ThreadContext, by_thread: dict[int, _Worker]) -> None:
        by_thread[threading.get_ident()] = self
        error: BaseException | None = None
        try:
            with context.restored():
                forward(self.part)
        except BaseException as caught:
            error = caught
        del by_thread[threading.get_ident()]
        self._stopped.put(error)

    def _pause(self) -> None:
        if self._ending:
            raise Stopped
        self._stopped.put(None)
        if not self._go.get() or self._ending:
            raise Stopped

    def _arrival(self) -> BaseException | None:
        """What the thread says when it stops; an error if it waits for something that cannot come."""
        used, since = time.process_time(), time.monotonic()
        while True:
            try:
                return self._stopped.get(timeout=1.0)
            except Empty:
                if time.process_time() - used > 0.01:
                    used, since = time.process_time(), time.monotonic()
                elif time.monotonic() - since > IDLE_SECONDS:
                    return SylinitError(
                        f"batches run interleaved, and the model's forward on batch {self.part} waits for something "
                        f"that another batch holds, such as a lock; {REMEDY}"
                    )


def _foreign_thread(name: str) -> SylinitError:
    return SylinitError(
        f"layer {name!r} is called in a thread that the model's forward has made; layers are computed in the order of "
        "one thread: pass forward= that runs the model without its pool of threads, or initialize before adding it"
    )


class _ThreadContext:
    """What PyTorch keeps for each thread, read in the caller's thread and set in a worker's."""

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()
        self.device = torch.empty(0).device  # older PyTorch does not tell of ``with torch.device(...)`` otherwise
        kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled())
            for kind in kinds
            if torch.is_autocast_enabled(kind)
        ]
        self.stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextmanager
    def restored(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.device != torch.device("cpu"):
                stack.enter_context(self.device)
            for kind, dtype, cache in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cache))
            if self.stream is not None:
                stack.enter_context(torch.cuda.stream(self.stream))
            yield

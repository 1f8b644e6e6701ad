"""Running a model once over several batches so that each layer meets all of its input before it is computed.

Every batch is a *lane*: a forward pass of its own. One baton goes round, so only one lane runs at a time and the order
is always the same. A lane that comes to a layer's door parks there. When every lane is parked or has ended, the
layer whose door is first in the model is settled with everything that waits at it, and those lanes go on.
With a process group the processes agree on the door, so that each process is like more lanes.

Lane 0 runs in the caller's thread: with one batch there is no thread at all. The other lanes are threads that see the
caller's gradient mode, autocast, default device and CUDA device and stream.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch

from sylinit.runtime.interrupts import told_interrupts

T = TypeVar("T")

Settle = Callable[[int, dict[int, Any]], None]
"""Called with a door and what waits at it, by lane; it initialises the layer."""

Choose = Callable[[int | None], int | None]
"""Called with the door that this process would settle next (None: it has ended), it returns the
door that all settle."""

Parking = Callable[[int], AbstractContextManager[Any]]
"""Called with a lane; the lane waits inside."""


class Stopped(BaseException):
    """Ends a parked lane after another one has failed. Not an `Exception`: a model's own handlers must not catch it."""


class Lanes:
    """The lanes of one pass.

    Args:
        count: number of lanes.
        settle: initialises the layer behind a door, given what waits at it.
        choose: agrees with the other processes on the next door.
        parking: what becomes of a lane's activations while it waits.
    """

    def __init__(
        self,
        count: int,
        settle: Settle,
        choose: Choose = lambda door: door,
        parking: Parking = nullcontext,
    ) -> None:
        self._count = count
        self._settle = settle
        self._choose = choose
        self._parking = parking
        self._baton = threading.Condition()
        self._turn: int | None = None  # until all threads have started
        self._parked: dict[int, tuple[int, Any]] = {}
        self._ended: set[int] = set()
        self._failure: BaseException | None = None
        self._here = threading.local()

    def run(self, forward: Callable[[int], Any]) -> None:
        """Run ``forward(lane)`` for every lane; raise what any lane, or the settling of any door, raised."""
        state = _ThreadState()
        threads = [
            threading.Thread(target=self._thread, args=(forward, lane, state), name=f"sylinit-lane-{lane}", daemon=True)
            for lane in range(1, self._count)
        ]
        with told_interrupts(self._interrupt):
            try:
                for thread in threads:
                    thread.start()
                self._turn = 0
                self._lane(forward, 0)
            except BaseException as error:
                self._fail(error)
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        if self._failure is not None:
            raise self._failure

    def meet(self, door: int, payload: Any) -> None:
        """Wait at a door, from inside a lane's forward pass, until its layer is settled."""
        lane = self._here.lane
        with self._baton, self._parking(lane):
            self._parked[lane] = (door, payload)
            self._pass_on()
            self._wait_for_turn(lane)

    def _thread(self, forward: Callable[[int], Any], lane: int, state: _ThreadState) -> None:
        try:
            with state.restored():
                self._lane(forward, lane)
        except BaseException as error:
            self._fail(error)

    def _lane(self, forward: Callable[[int], Any], lane: int) -> None:
        self._here.lane = lane
        with self._baton:
            self._wait_for_turn(lane)
        forward(lane)
        with self._baton:
            self._ended.add(lane)
            self._pass_on()

    def _pass_on(self) -> None:
        """Give the baton to the next lane that can run; settle doors until there is one, or all have ended."""
        while self._failure is None:
            ready = [lane for lane in range(self._count) if lane not in self._parked and lane not in self._ended]
            if ready:
                self._turn = ready[0]
                break
            try:
                door = self._choose(min((door for door, _ in self._parked.values()), default=None))
                if door is None:
                    break
                waiting = {lane: what for lane, (where, what) in sorted(self._parked.items()) if where == door}
                self._settle(door, waiting)
            except BaseException as error:
                # Not left to fly through the model, which might catch it.
                self._failure = error
                raise Stopped from error
            for lane in waiting:
                del self._parked[lane]
        self._baton.notify_all()

    def _wait_for_turn(self, lane: int) -> None:
        while self._turn != lane or lane in self._parked:
            if self._failure is not None:
                raise Stopped
            self._baton.wait()
        if self._failure is not None:
            raise Stopped

    def _fail(self, error: BaseException) -> None:
        with self._baton:
            if self._failure is None and not isinstance(error, Stopped):
                self._failure = error
            self._baton.notify_all()

    def _interrupt(self, error: BaseException) -> None:
        """Ctrl-C: raised at once in lane 0's own code; where that waits or has ended, all lanes stop at their doors.

        Only the first one: from then on everything is ending.
        """
        first, self._failure = self._failure is None, self._failure or error
        if first and self._turn == 0 and 0 not in self._parked and 0 not in self._ended:
            raise error
        with self._baton:
            self._baton.notify_all()


class _ThreadState:
    """What PyTorch keeps for each thread, read in the caller's thread and set in a lane's."""

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()
        self.device = torch.get_default_device()
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

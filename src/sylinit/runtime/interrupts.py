"""Ctrl-C at a moment that suits: never between two halves of something that must be done whole.

Outside the main thread, which alone is interrupted, and where Ctrl-C has no Python handler, nothing here does anything.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

Handler = Callable[[int, Any], Any]


PATIENCE_SECONDS = 1.0
"""A Ctrl-C that comes so long after one that is held back insists; what is done whole takes milliseconds."""


class Held:
    """An interrupt that waits to be delivered, if there is one."""

    def __init__(self) -> None:
        self.waiting: Callable[[], object] | None = None
        self.since = 0.0

    def deliver(self) -> None:
        """Do now what the signal would have done when it came: by default, raise `KeyboardInterrupt`."""
        if self.waiting is not None:
            waiting, self.waiting = self.waiting, None
            waiting()


@contextmanager
def held_interrupts() -> Iterator[Held]:
    """Hold Ctrl-C back until it is delivered, at the latest at the end; one that insists comes through at once."""
    held = Held()

    def hold(usual: Handler, number: int, frame: object) -> None:
        if held.waiting is None:
            held.since = time.monotonic()
        held.waiting = lambda: usual(number, None)
        if time.monotonic() - held.since > PATIENCE_SECONDS:
            held.deliver()

    try:
        with _handled(hold):
            yield held
    finally:
        held.deliver()


@contextmanager
def _handled(handler: Callable[[Handler, int, object], None]) -> Iterator[None]:
    """Call ``handler(usual, number, frame)`` instead of the usual handler of Ctrl-C."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    signal.signal(signal.SIGINT, partial(handler, usual))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)

"""Ctrl-C at a moment that suits: never between two halves of something that must be done whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Held:
    """An interrupt that waits to be delivered, if there is one."""

    def __init__(self) -> None:
        self.waiting: Callable[[], object] | None = None

    def deliver(self) -> None:
        """Do now what the signal would have done when it came: by default, raise `KeyboardInterrupt`."""
        if self.waiting is not None:
            waiting, self.waiting = self.waiting, None
            waiting()


@contextmanager
def held_interrupts() -> Iterator[Held]:
    """Hold back the first Ctrl-C until it is delivered, at the latest at the end; a second one comes through at once.

    Outside the main thread, which alone is interrupted, and where Ctrl-C has no Python handler, nothing is held.
    """
    held = Held()
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield held
        return

    def hold(number: int, frame: object) -> None:
        again, held.waiting = held.waiting is not None, lambda: usual(number, None)
        if again:
            held.deliver()

    signal.signal(signal.SIGINT, hold)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, usual)
        held.deliver()

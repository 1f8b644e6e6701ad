"""Work in processes of one thread each, which end when the process that started them does, however that ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from sylinit import SylinitError

Each = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[tuple[Any, Any]]]
"""``each(work, items)`` yields ``(item, result or exception)``."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def pool(workers: int, start_worker: Callable[[], None] | None = None) -> Iterator[Each]:
    """Start processes as they are needed and end them, with what they are at, when the block is left by an exception.

    Sixteen steps of ResNet-20 on two cores took 1.6 to 2.3 s in two processes of one thread against 2.0 s in one
    process of two threads; with other programs beside them the two threads, which wait for each other at every
    operation, took over 35 s, the processes 12 s.

    Args:
        workers: processes; one means this process.
        start_worker: called once in each process that is started; a function of a module.

    Yields:
        A function of ``(work, items)``, `work` a function of a module, so that other processes can import it. It
        yields each item with its result, or with the exception that it raised, as they end.
    """
    if workers == 1:
        yield one_by_one
        return
    context = multiprocessing.get_context("spawn")
    lifeline, held = context.Pipe(duplex=False)
    with lifeline, held, ProcessPoolExecutor(workers, context, _start_worker, (lifeline, start_worker)) as executor:
        try:
            yield partial(_side_by_side, executor)
        except BaseException:
            held.close()  # or leaving would wait for the runs under way
            executor.shutdown(wait=False, cancel_futures=True)
            raise


def one_by_one(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Work in this process; yields as the function of `pool` does."""
    for item in items:
        try:
            yield item, work(item)
        except Exception as error:
            yield item, error


def _side_by_side(
    executor: ProcessPoolExecutor, work: Callable[[Any], Any], items: Iterable[Any]
) -> Iterator[tuple[Any, Any]]:
    with _without_interrupts():  # which the processes that are started here inherit
        running = {executor.submit(work, item): item for item in items}
    for future in as_completed(running):
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            raise SylinitError(
                "a worker process died, often for want of memory; run the same command again with --workers 1: "
                "the runs that ended are kept"
            ) from error
        yield running[future], error or future.result()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back: it reaches all processes of a terminal, and the first one decides."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(lifeline: Connection, start_worker: Callable[[], None] | None) -> None:
    torch.set_num_threads(1)
    if start_worker is not None:
        start_worker()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it could not be held back
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    """End this process when the other end of the pipe closes, which the system does for a process that is killed."""
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv_bytes()  # nothing is ever sent
    os._exit(1)

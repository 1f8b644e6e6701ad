"""What the commands say: consoles, progress bars, durations, and errors that are one message."""

from __future__ import annotations

import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from sylinit import SylinitError, SylinitWarning

PATIENCE = 2.0
"""Seconds after which a progress bar appears."""

console = Console()
errors = Console(stderr=True)


class _TimeLeft(ProgressColumn):
    """Time left, as the work at hand says, or else as the pace so far says."""

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        left = task.time_remaining if ends is None else max(0.0, ends - time.monotonic())
        return Text("" if left is None else f"{duration(left)} left")


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar that shows itself only once the work has taken `PATIENCE` seconds.

    Yields:
        A function of ``(done, total, name)``, and of the seconds left where the work knows them.
    """
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        _TimeLeft(),
        console=errors,
        transient=True,
    )
    task = bar.add_task("", total=None, ends=None)
    # by a clock, not by an update: the first run of a plan may take minutes
    timer = threading.Timer(PATIENCE, bar.start)
    timer.daemon = True
    timer.start()

    def update(done: int, total: int, name: str, left: float | None = None) -> None:
        ends = None if left is None else time.monotonic() + left
        bar.update(task, completed=done, total=total, description=escape(name), ends=ends)

    try:
        yield update
    finally:
        timer.cancel()
        timer.join()
        if bar.live.is_started:  # it would end with an empty line
            bar.stop()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is going on until it has ended, where somebody sees it."""
    with errors.status(what) if errors.is_terminal else nullcontext():
        yield


@contextmanager
def stoppable(kept: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C say what was kept and how to go on, and exit with 130.

    Args:
        kept: gives that text when it is needed.
    """
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"stopped: {escape(kept())}", highlight=False, soft_wrap=True)
        raise SystemExit(130) from None


def quiet() -> None:
    """Ignore warnings of sylinit, in a process whose results say what they would."""
    warnings.simplefilter("ignore", SylinitWarning)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings of sylinit as one line each, once; there is no line of the user's that they could point at."""
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, SylinitWarning) and str(message) not in said:
            said.add(str(message))
            errors.print(f"[yellow]warning:[/yellow] {escape(str(message))}", highlight=False, soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", SylinitWarning)
        warnings.showwarning = show
        yield


def duration(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``3 h 20 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def words(text: str) -> list[str]:
    """What stands between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def run_app(app: Callable[[list[str]], object], arguments: Sequence[str] | None = None) -> None:
    """Run a command: errors that a user can fix are one message and exit code 1, without a traceback.

    Args:
        app: takes the arguments.
        arguments: by default those of this process; ``--debug`` among them shows tracebacks.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends as Ctrl-C does
    try:
        with plain_warnings():
            app(given)
    except SylinitError as error:
        if debug:
            raise
        errors.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        errors.print("stopped: nothing was written; the same command starts again")
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        errors.print(
            f"[bold red]error:[/bold red] {escape(f'{type(error).__name__}: {error}')} "
            "(run again with --debug for the traceback)",
            highlight=False,
            soft_wrap=True,
        )
        raise SystemExit(1) from None

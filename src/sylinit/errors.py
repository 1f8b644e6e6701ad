"""The exceptions and the warning that sylinit raises."""

from __future__ import annotations

import sys
import warnings

ROOT = "(the model itself)"
"""The name of a module that is the whole model, in messages and reports."""


class SylinitError(ValueError):
    """Bad input to a sylinit function.

    The message names the layer or argument, what was expected, what came, and the remedy.
    """


class UnsupportedLayerError(SylinitError):
    """A layer that sylinit cannot see as matrices; the message is the reason shown in the report."""


class SylinitWarning(UserWarning):
    """Something that was done differently from what was asked for, and why."""


def warn(message: str) -> None:
    """Warn of the user's own line: the nearest one outside the library."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "sylinit":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, SylinitWarning, stacklevel=level)

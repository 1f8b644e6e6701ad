"""The exceptions and the warning that sylinit raises."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType

ROOT = "(the model itself)"
"""The name of a module that is the whole model, in messages and reports."""


class SylinitError(ValueError):
    """Bad input to a sylinit function.

    The message names the layer or argument, what was expected, what came, and the remedy.
    """


class UnsupportedLayerError(SylinitError):
    """A layer that sylinit cannot see as matrices; the message is the reason shown in the report."""


class MissingPackageError(SylinitError, ImportError):
    """A package that only some functions need is not installed; the message names the extra that brings it."""


class SylinitWarning(UserWarning):
    """Something that was done differently from what was asked for, and why."""


def warn(message: str) -> None:
    """Warn of the user's own line: the nearest one outside the library."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "sylinit":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, SylinitWarning, stacklevel=level)


def require(package: str, extra: str, what: str) -> ModuleType:
    """Import a package that only some functions need.

    Args:
        package: the name that it is imported by.
        extra: the extra of sylinit that installs it.
        what: what needs it, for the message.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:  # the package is there, and misses one of its own
            raise
        raise MissingPackageError(
            f"{what} needs the package {error.name!r}, which is not installed: pip install 'sylinit[{extra}]'"
        ) from error

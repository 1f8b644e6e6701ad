"""The exceptions and the warning that sylinit raises."""

from __future__ import annotations


class SylinitError(ValueError):
    """Bad input to a sylinit function.

    The message names the layer or argument, what was expected, what came, and the remedy.
    """


class UnsupportedLayerError(SylinitError):
    """A layer that sylinit cannot see as matrices; the message is the reason shown in the report."""


class SylinitWarning(UserWarning):
    """Something that was done differently from what was asked for, and why."""

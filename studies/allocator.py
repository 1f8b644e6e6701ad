"""What the C library does with freed memory, where it can be asked: glibc's is, others go their own way."""

from __future__ import annotations

import contextlib
import ctypes
import gc

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def keep_freed_memory() -> None:
    """Have the allocator keep what this process frees, instead of giving it back.

    Otherwise the activations of each step are new pages, which the system clears one by one.
    """
    _ask("mallopt", M_MMAP_MAX, 0)  # no mapping of its own for a large block
    _ask("mallopt", M_TRIM_THRESHOLD, 2**31 - 1)  # 2 GB may stay unused


def return_freed_memory() -> None:
    """Have the allocator give back what is free now: what it kept would hide what is used anew."""
    gc.collect()
    _ask("malloc_trim", 0)


def _ask(function: str, *arguments: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), function)(*arguments)

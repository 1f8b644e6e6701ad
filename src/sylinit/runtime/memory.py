"""Memory that one layer frees serves the next, instead of going back to the system between them."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

BLOCK_BYTES = 24 * 2**20
"""Below 32 MiB, above which glibc asks the system for each tensor."""


@contextmanager
def reused_memory(size: int) -> Iterator[None]:
    """Let the tensors inside take turns in the same ``size`` bytes of CPU memory, and give them back at the end.

    glibc maps a tensor of more than 32 MiB anew each time, and the system clears its pages one by one, which takes as
    long as a convolution; but it looks among its free blocks first. So a free stretch of memory is made: blocks below
    that size, of which all but the uppermost are freed. Pages of it cost nothing until they are used, and no setting of
    the process is changed. With other C libraries nothing is gained or lost.

    Args:
        size: in bytes; nothing is done for less than one block.
    """
    if size < BLOCK_BYTES:
        yield
        return
    torch.empty(BLOCK_BYTES + BLOCK_BYTES // 4, dtype=torch.uint8)  # freed at once: from now on blocks are no mappings
    blocks: list[torch.Tensor] = []
    with contextlib.suppress(RuntimeError):  # as much as may be had
        blocks.extend(torch.empty(BLOCK_BYTES, dtype=torch.uint8) for _ in range(1 + size // BLOCK_BYTES))
    del blocks[:-1]  # the last one lies on top of the rest
    try:
        yield
    finally:
        blocks.clear()
        with contextlib.suppress(AttributeError):  # not every C library has it
            ctypes.CDLL(None).malloc_trim(0)

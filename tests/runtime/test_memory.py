"""Memory that is used again: counted in pages that the system had to clear."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from sylinit.runtime.memory import BLOCK_BYTES, reused_memory

SIZE = 96 * 2**20
"""Bytes of a tensor that glibc maps anew each time."""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks of glibc's allocator")


def pages(times: int) -> int:
    """How many pages are cleared while a large tensor comes and goes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.zeros(SIZE // 4).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@glibc
def test_pages_are_cleared_once() -> None:
    once = SIZE // resource.getpagesize()
    assert pages(5) > 4 * once
    with reused_memory(2 * SIZE):
        assert pages(5) < 2 * once


@glibc
def test_they_are_given_back() -> None:
    with reused_memory(2 * SIZE):
        pages(2)
    before = resident()
    with reused_memory(2 * SIZE):
        kept = torch.ones(1000)
        pages(2)
        assert resident() > before + SIZE // 2
    assert resident() < before + SIZE // 4
    assert bool((kept == 1).all())


def test_a_failure_passes_through() -> None:
    with pytest.raises(ZeroDivisionError), reused_memory(2 * BLOCK_BYTES):
        raise ZeroDivisionError


def test_more_than_there_is_is_no_error() -> None:
    limit = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * BLOCK_BYTES, limit[1]))
    try:
        with reused_memory(2**40):
            reached = True
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert reached

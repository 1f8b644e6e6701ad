"""Memory that is used again: counted in pages that the system had to clear, each time in a process of its own."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sylinit.runtime.memory import BLOCK_BYTES, reused_memory

SIZE = 96 * 2**20
"""Bytes of a tensor that glibc maps anew each time."""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks of glibc's allocator")

PROLOGUE = f"""
import json, resource, torch
from sylinit.runtime.memory import BLOCK_BYTES, reused_memory
torch.set_num_threads(1)
SIZE, PAGE = {SIZE}, resource.getpagesize()

def pages(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.zeros(SIZE // 4).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def of_process(column):
    with open("/proc/self/statm") as file:
        return int(file.read().split()[column]) * PAGE
"""


def in_a_fresh_process(program: str) -> Any:
    """What a program prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + program],
        env={"PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@glibc
def test_pages_are_cleared_once() -> None:
    found = in_a_fresh_process(
        "plain = pages(5)\nwith reused_memory(2 * SIZE):\n    again = pages(5)\nprint(json.dumps([plain, again, PAGE]))"
    )
    plain, again, page = found
    assert plain > 4 * SIZE / page
    assert again < 2 * SIZE / page


@glibc
def test_they_are_given_back() -> None:
    before, inside, after = in_a_fresh_process(
        """
with reused_memory(2 * SIZE):
    pages(2)
before = of_process(1)
with reused_memory(2 * SIZE):
    kept = torch.ones(1000)
    pages(2)
    inside = of_process(1)
assert bool((kept == 1).all())
print(json.dumps([before, inside, of_process(1)]))
"""
    )
    assert inside > before + SIZE // 2
    assert after < before + SIZE // 4


def test_more_than_there_is_is_no_error() -> None:
    reached = in_a_fresh_process(
        """
resource.setrlimit(resource.RLIMIT_AS, (of_process(0) + 4 * BLOCK_BYTES, resource.RLIM_INFINITY))
with reused_memory(2**40):
    reached = float(torch.ones(1000).sum())
print(json.dumps(reached))
"""
    )
    assert reached == 1000


def test_a_failure_passes_through() -> None:
    with pytest.raises(ZeroDivisionError), reused_memory(2 * BLOCK_BYTES):
        raise ZeroDivisionError

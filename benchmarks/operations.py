"""How many operations the ways to one result dispatch, and how long they take.

    python benchmarks/operations.py [--threads 1]

All patches of a 3x3 convolution, correlated or formed; one layer, projected or exact. Prints; stores nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness import seconds
from sylinit.codes import CODES
from sylinit.config import Config
from sylinit.layers.registry import hypotheses
from sylinit.solvers.exact import fit_exact
from sylinit.solvers.problem import Problem
from sylinit.solvers.projected import fit_projected
from sylinit.statistics.moments import Moments
from sylinit.statistics.patch_moments import correlate, stream

REPEATS = 7


class Counted(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operation and run it."""
        self.count += 1
        return func(*args, **(kwargs or {}))


def show(name: str, work: Callable[[], Any]) -> None:
    """Print the operations of some work and the shortest of its times."""
    work()
    with Counted() as counted:
        work()
    shortest = min(seconds(work) for _ in range(REPEATS))
    print(f"{name:46} {counted.count:5} operations {1000 * shortest:8.1f} ms", flush=True)


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    for samples in (40, 500):
        for channels, size in ((16, 16), (32, 8), (64, 4)):
            view: Any = hypotheses(nn.Conv2d(channels, channels, 3, padding=1), "layer")[0][0]
            x, t = torch.randn(samples, channels, size, size), torch.randn(samples, 3)
            shape = f"{samples} x {channels} x {size} x {size}"
            show(f"{shape}, correlated", partial(correlate, view, [(x, t)]))
            sums = Moments.zeros(1, view.dim, 3)
            show(f"{shape}, all patches formed", partial(stream, sums, view, x, t))
    config = Config()
    code = CODES["mixed"].with_label_share(config, normalized=True)
    for dim, units in ((288, 32), (576, 64)):
        rows = torch.randn(1, 4000, dim) * torch.logspace(0, -2, dim)
        targets = torch.eye(3)[torch.arange(4000) % 3].double()
        problem = Problem("layer", code, units, 0, "directions")
        single = Moments.zeros(1, dim, 3, dtype=torch.float32).update(rows, targets).covariance()
        double = Moments.zeros(1, dim, 3).update(rows, targets).covariance()
        show(f"{dim} inputs, {units} units, projected", partial(fit_projected, single, problem, config))
        show(f"{dim} inputs, {units} units, exact", partial(fit_exact, double, problem, config))


if __name__ == "__main__":
    main()

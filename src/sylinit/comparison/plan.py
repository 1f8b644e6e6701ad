"""What a comparison runs: learning rates tuned on held-back data, then every seed with the best of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from sylinit.comparison.experiment import Experiment
from sylinit.comparison.store import Record, Store

GRIDS = {"sgd": (0.003, 0.01, 0.03, 0.1, 0.3), "adamw": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
"""Learning rates that every initialization is tuned over, one shared grid for an optimizer."""

TUNING_SEED = 1000
"""Seeds for tuning begin here, so that no subset that is tuned on is the one that is reported."""


@dataclass(frozen=True)
class Plan:
    """Which initializations to compare, what each is tuned over, and how often the winner of the tuning is run.

    Attributes:
        arms: one experiment for each method; learning rate and seed are filled in.
        grid: learning rates; empty means that each arm keeps its own.
        seeds: of the final runs.
        tuning_seeds: number of seeds that each learning rate is tried with.
        split: where the final runs are measured. Plans that choose the library's defaults must not see the test set.
        workers: processes; None is one a core.
    """

    arms: tuple[Experiment, ...]
    grid: tuple[float, ...] = GRIDS["sgd"]
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: int = 1
    split: str = "test"
    workers: int | None = None

    def tuning(self) -> list[Experiment]:
        """All runs that choose learning rates."""
        return [
            replace(arm, lr=lr, seed=TUNING_SEED + seed, split="validation")
            for arm in self.arms
            for lr in self.grid
            for seed in range(self.tuning_seeds)
        ]

    def final(self, chosen: dict[Experiment, float]) -> list[Experiment]:
        """All runs that are reported, of the methods whose learning rate is known."""
        return [
            replace(arm, lr=chosen.get(arm.method, arm.lr), seed=seed, split=self.split)  # type: ignore[arg-type]
            for arm in self.arms
            if not self.grid or arm.method in chosen
            for seed in self.seeds
        ]

    def __len__(self) -> int:
        """Number of runs."""
        return len(self.arms) * (len(self.grid) * self.tuning_seeds + len(self.seeds))


@dataclass(frozen=True)
class Comparison:
    """A plan that has been run.

    Attributes:
        plan: what was run.
        records: of the final runs.
        chosen: the learning rate of each method.
        at_edge: methods whose best learning rate is the grid's first or last: a wider grid might serve them better.
    """

    plan: Plan
    records: tuple[Record, ...]
    chosen: dict[Experiment, float]
    at_edge: tuple[Experiment, ...] = field(default=())


def choose(plan: Plan, records: Iterable[Record]) -> dict[Experiment, float]:
    """The learning rate of best mean validation accuracy of each method; of equals, the lower."""
    scores: dict[Experiment, dict[float, list[float]]] = {}
    for record in records:
        by_rate = scores.setdefault(record.experiment.method, {})
        by_rate.setdefault(record.experiment.lr, []).append(record.result["after"])
    means = {m: {lr: math.fsum(v) / len(v) for lr, v in rates.items()} for m, rates in scores.items()}
    return {
        method: min(rates, key=lambda lr: (-rates[lr], lr))
        for method, rates in means.items()
        if sum(map(len, scores[method].values())) == len(plan.grid) * plan.tuning_seeds
    }


def chosen_rates(plan: Plan, store: Store) -> dict[Experiment, float]:
    """The learning rate of each method whose tuning the store holds in full."""
    return choose(plan, [store[e] for e in plan.tuning() if e in store])


def missing(plan: Plan, store: Store) -> list[Experiment]:
    """Runs that the store lacks. Those whose learning rate is not tuned yet stand there with that of their arm."""
    chosen = chosen_rates(plan, store)
    untuned = [arm for arm in plan.arms if plan.grid and arm.method not in chosen]
    return [
        *(e for e in plan.tuning() if e not in store),
        *(arm for arm in untuned for _ in plan.seeds),
        *(e for e in plan.final(chosen) if e not in store),
    ]


def read(plan: Plan, store: Store) -> Comparison:
    """The comparison as far as the store has it; tuning that is incomplete leaves its method out."""
    chosen = chosen_rates(plan, store)
    records = [store[e] for e in plan.final(chosen) if e in store]
    edges = {plan.grid[0], plan.grid[-1]} if len(plan.grid) > 1 else set()
    return Comparison(plan, tuple(records), chosen, tuple(m for m, lr in chosen.items() if lr in edges))

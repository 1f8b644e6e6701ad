"""Plans in the precision and on the schedule that results were made with, and parts of plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sylinit import SylinitError
from sylinit.comparison.experiment import Experiment
from sylinit.comparison.plan import Plan
from sylinit.comparison.store import Store


def as_run(plan: Plan, store: Store) -> Plan:
    """The plan as far as the store has it: each task in one precision and on one schedule, for all initializations.

    Of several precisions the one of most runs; of several numbers of epochs the one that most methods were run with, of
    equals the plan's, or else the most.
    """
    plan = as_begun(plan, store)
    known: dict[Experiment, dict[int, set[str]]] = {}
    for record in store.records.values():
        e = record.experiment
        known.setdefault(_task(e), {}).setdefault(e.epochs, set()).add(e.label)

    def epochs(arm: Experiment) -> int:
        found = known.get(_task(arm), {})
        return max(found, key=lambda each: (len(found[each]), each == arm.epochs, each), default=arm.epochs)

    return replace(plan, arms=tuple(replace(arm, epochs=epochs(arm)) for arm in plan.arms))


def as_begun(plan: Plan, store: Store) -> Plan:
    """The plan with each task in the precision that the store has most of its runs in, for all initializations.

    So initializations that are compared never differ in it. Tasks that the store has no run of stay as they are.
    """
    known: dict[Experiment, Counter[str]] = {}
    for record in store.records.values():
        task = _in_precision(_task(record.experiment), "")
        known.setdefault(task, Counter())[record.experiment.get("precision")] += 1
    found = {task: counts.most_common(1)[0][0] for task, counts in known.items()}
    arms = [_in_precision(e, found.get(_in_precision(_task(e), ""), e.get("precision"))) for e in plan.arms]
    return replace(plan, arms=tuple(arms))


def in_precision(plan: Plan, precision: str) -> Plan:
    """The plan with all arms that set a precision in this one."""
    return replace(plan, arms=tuple(_in_precision(arm, precision) for arm in plan.arms))


def part(plan: Plan, wanted: Mapping[str, tuple[str, Sequence[str]]]) -> Plan:
    """The arms of a plan that have given values.

    Args:
        plan: of a preset.
        wanted: for each option of the command, a field of `Experiment` and the values wanted, as text.

    Raises:
        SylinitError: for a value that no arm has.
    """
    arms = plan.arms
    for option, (name, values) in wanted.items():
        there = list(dict.fromkeys(str(arm.get(name)) for arm in plan.arms))
        for value in values:
            if value not in there:
                raise SylinitError(f"{option} {value}: this study has {', '.join(there)}")
        arms = tuple(arm for arm in arms if str(arm.get(name)) in values)
    if not arms:
        raise SylinitError(f"{' '.join(wanted)}: nothing in this study has all of these at once")
    return replace(plan, arms=arms)


def _in_precision(experiment: Experiment, precision: str) -> Experiment:
    setting = tuple((key, precision if key == "precision" else value) for key, value in experiment.setting)
    return replace(experiment, setting=setting)


def _task(experiment: Experiment) -> Experiment:
    """What initializations are compared on: all of an experiment but initialization and schedule."""
    dataset = Path(experiment.dataset).name
    return replace(experiment.method, initialization="", options=(), epochs=0, dataset=dataset)

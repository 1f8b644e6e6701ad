"""The command line: ``python -m studies.suite run|report|list``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from studies.suite.data import directory_of
from studies.suite.methods import METHODS, REFERENCES, method_named
from studies.suite.report import Results, page, read
from studies.suite.run import STEPS, Plan, Store, run_suite
from studies.suite.tasks import TASKS, matching


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = argparse.ArgumentParser(prog="python -m studies.suite", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)

    listing = commands.add_parser("list", help="print tasks, methods and references")
    listing.add_argument("--tasks", nargs="*", default=["*"], help="patterns, as in 'cifar10-*' '*/vit'")

    run = commands.add_parser("run", help="run what the file lacks")
    run.add_argument("--out", type=Path, required=True, help="file of JSON lines to go on with")
    run.add_argument("--tasks", nargs="*", default=["*"], help="patterns, as in 'cifar10-*' '*/vit'")
    run.add_argument("--methods", nargs="*", default=list(METHODS), help="names, or arguments: code=mixed:0.5")
    run.add_argument("--references", nargs="*", default=list(REFERENCES), choices=list(REFERENCES))
    run.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    run.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of the reported runs; none to tune only")
    run.add_argument("--tuning-seeds", type=int, default=1, help="how many seeds each learning rate is tried with")
    run.add_argument("--rates", nargs="*", type=float, default=[], help="learning rates to try instead of the grid's")
    run.add_argument("--steps", type=int, default=STEPS, help="0 measures initializations as they stand")
    run.add_argument("--data", type=Path, help="directory of cifar10, fashion_mnist, banking77; or SYLINIT_DATA")
    run.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    run.add_argument("--only-validation", action="store_true", help="never read a test set")

    report = commands.add_parser("report", help="print the figures and tables in Markdown")
    report.add_argument("files", nargs="+", type=Path)
    report.add_argument("--candidate", default="default", help="the method that is judged")
    report.add_argument("--optimizer", choices=["adamw", "sgd"], default="adamw")
    report.add_argument("--steps", type=int, default=STEPS)
    report.add_argument("--only-validation", action="store_true", help="report values of the validation subsets")
    return top


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; the exit status is 1 if runs failed."""
    args = parser().parse_args(arguments)
    if args.command == "list":
        for task in matching(args.tasks):
            print(task.name)
        print(f"{len(TASKS)} tasks; methods: {' '.join(METHODS)}; references: {' '.join(REFERENCES)}")
    elif args.command == "report":
        results = Results(read(args.files), test=not args.only_validation, steps=args.steps)
        print(page(results, args.candidate, args.optimizer), end="")
    else:
        for name in args.methods:
            method_named(name)  # before anything is run
        torch.set_num_threads(1)
        plan = Plan(
            tasks=tuple(matching(args.tasks)),
            methods=tuple(args.methods),
            references=tuple(args.references),
            optimizer=args.optimizer,
            seeds=tuple(args.seeds),
            tuning_seeds=args.tuning_seeds,
            steps=args.steps,
            test=not args.only_validation,
            rates=tuple(args.rates),
        )
        failed = run_suite(plan, Store(args.out), directory=directory_of(args.data), workers=args.workers)
        if failed:
            sys.exit(f"{len(failed)} runs failed; the others are kept, and running again tries these anew")

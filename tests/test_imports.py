"""Imports run one way: from what a user calls down to the linear algebra, without a circle. Read off the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src" / "sylinit"

LEVELS = (
    ("errors",),
    ("config", "linalg", "layers", "runtime"),
    ("statistics", "data"),
    ("codes", "report"),
    ("solvers",),
    ("plan",),
    ("flow",),
    ("integrations",),
    ("comparison",),
    ("cli",),
)
"""Packages, and modules of the root, from the lowest on; "flow" is the rest of the root, with `initialize`."""


@cache
def modules() -> dict[str, Path]:
    """Source files by dotted name."""
    names = {".".join(("sylinit", *f.relative_to(SOURCES).with_suffix("").parts)): f for f in SOURCES.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def imported(name: str) -> set[str]:
    """The modules of the library that one imports, wherever in its file."""
    known = modules()
    found: set[str] = set()
    for node in ast.walk(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else str(node.module))
    return (found & known.keys()) - {name}


def place(name: str) -> str:
    """The package of a module, or its own name where it has a level of its own."""
    _, *parts = name.split(".")
    top = "cli" if parts == ["__main__"] else parts[0] if parts else "flow"
    return top if any(top in level for level in LEVELS) else "flow"


def level(name: str) -> int:
    return next(number for number, level in enumerate(LEVELS) if place(name) in level)


def test_every_package_has_its_level():
    packages = {file.parent.name for file in SOURCES.glob("*/__init__.py")}
    assert packages < {name for level in LEVELS for name in level}
    assert {place(name) for name in modules()} == {name for level in LEVELS for name in level}


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_from_below_or_from_its_own_package(name):
    upward = [
        other
        for other in imported(name)
        if place(other) != place(name)
        and level(other) >= level(name)
        and not (other == "sylinit" and place(name) in ("comparison", "cli"))  # the public names
    ]
    assert upward == []


def test_there_is_no_circle():
    arrows = {name: imported(name) for name in modules()}
    try:
        order = list(TopologicalSorter(arrows).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None
    assert len(order) == len(modules())


def test_the_public_names_are_all_that_comparison_and_command_know():
    outside = {"sylinit", "sylinit.cli"} | {name for name in modules() if place(name) == "comparison"}
    for name in outside - {"sylinit"}:
        assert imported(name) <= outside, name


CALL = """
import sys, torch, sylinit
model = torch.nn.Sequential(torch.nn.Conv2d(2, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(216, 3))
batches = [(torch.randn(15, 2, 8, 8), torch.arange(15) % 3)] * 2
sylinit.initialize_(model, batches)
sylinit.initialize_(model, batches, offload="disk")
print(*sys.modules)
"""


def test_a_call_loads_neither_pytorchs_compiler_nor_scientific_packages():
    """The compiler alone takes seconds."""
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "sylinit.initialize" in loaded
    assert loaded.isdisjoint({"torch._dynamo", "sympy", "scipy", "sklearn", "matplotlib", "pandas"})


def test_the_library_imports_nothing_beside_torch_and_the_standard_library() -> None:
    """Nor any part of torch that `import torch` has not brought: what costs time is imported where it is used."""
    program = (
        "import sys, torch; before = set(sys.modules); import sylinit; "
        "print(*{m if m.startswith('torch.') else m.split('.')[0] for m in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "sylinit" in done.stdout.split()
    assert set(done.stdout.split()) - {"sylinit"} <= set(sys.stdlib_module_names)

"""Comparison, commands and studies know the library by its public names alone, and it does not know them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import sylinit

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "src" / "sylinit"
ABOVE = [LIBRARY / "cli.py", LIBRARY / "__main__.py", *sorted((LIBRARY / "comparison").glob("*.py"))]
STUDIES = sorted((ROOT / "studies").glob("*.py"))
PUBLIC = {f"sylinit.{name}" for name in (*sylinit.__all__, "__version__")}


def imported(path: Path) -> Iterator[str]:
    """The dotted name of everything that a file imports or takes from sylinit as an attribute."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sylinit":
            yield f"sylinit.{node.attr}"


def own(path: Path) -> set[str]:
    """What a file uses of this project."""
    return {name for name in imported(path) if name.partition(".")[0] in ("sylinit", "studies")}


@pytest.mark.parametrize("path", ABOVE, ids=lambda path: path.name)
def test_comparison_and_commands_use_public_names_only(path: Path) -> None:
    used = {name for name in own(path) if not name.startswith(("sylinit.comparison", "sylinit.cli"))}
    assert used <= PUBLIC | {"sylinit"}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_studies_use_public_names_and_the_comparison_only(path: Path) -> None:
    used = {name for name in own(path) if not name.startswith(("studies.", "sylinit.comparison"))}
    assert used <= PUBLIC | {"sylinit", "studies"}


def test_the_check_sees_what_it_should() -> None:
    everything = set().union(*map(own, [*ABOVE, *STUDIES]))
    assert {"sylinit.initialize_", "sylinit.SylinitError", "sylinit.comparison.plan.Plan"} <= everything


def test_the_library_knows_neither_comparison_nor_studies() -> None:
    below = [path for path in LIBRARY.rglob("*.py") if path not in ABOVE]
    assert len(below) > 10
    for path in below:
        known = [name for name in own(path) if name.startswith(("studies", "sylinit.comparison", "sylinit.cli"))]
        assert known == []


def test_imports_of_comparison_and_studies_run_one_way() -> None:
    modules = {".".join(p.relative_to(LIBRARY.parent).with_suffix("").parts): own(p) for p in ABOVE}
    modules |= {".".join(p.relative_to(ROOT).with_suffix("").parts): own(p) for p in STUDIES}
    arrows = {
        module: {part for name in used for part in (name, name.rpartition(".")[0])} & set(modules) - {module}
        for module, used in modules.items()
    }
    while arrows:
        lowest = {module for module, below in arrows.items() if not below & set(arrows)}
        assert lowest, f"these import each other: {sorted(arrows)}"
        arrows = {module: below for module, below in arrows.items() if module not in lowest}


def test_importing_sylinit_loads_nothing_of_the_comparison() -> None:
    listed = subprocess.run(
        [sys.executable, "-c", "import sys, sylinit; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    loaded = set(listed.stdout.split())
    assert "sylinit" in loaded
    heavy = {
        "sylinit.comparison",
        "sylinit.cli",
        "studies",
        "typer",
        "rich",
        "matplotlib",
        "scipy",
        "sklearn",
        "datasets",
    }
    assert not loaded & heavy


def test_the_wheel_contains_the_comparison_and_no_studies() -> None:
    paths = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {"sylinit/__init__.py", "sylinit/comparison/runner.py", "sylinit/py.typed"} <= paths
    assert all(path.startswith("sylinit/") for path in paths)

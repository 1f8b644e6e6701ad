"""The documentation: its Python runs, its commands exist, its pages are in the contents, its links lead somewhere.

`make docs` builds it, in an environment of its own; here the pages are read as they are written.
"""

from __future__ import annotations

import re
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import sylinit
from sylinit.layers.registry import LAYERS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.parent.name != "tables")
"""Without the tables, which the build writes."""

SETTINGS = {"0.1", "0.5"}
"""Numbers with a point that results pages may type: a learning rate and the deviations of logits."""

NAMES = [path.relative_to(DOCS).as_posix() for path in PAGES]


def fenced(text: str, language: str) -> list[str]:
    """The blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


PYTHON = [name for name in NAMES if fenced((DOCS / name).read_text(encoding="utf-8"), "python")]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torchrun tells the only process of a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("name", PYTHON)
@pytest.mark.usefixtures("alone", "fresh_registries")
@pytest.mark.filterwarnings("default::sylinit.errors.SylinitWarning")
def test_the_python_of_a_page_runs_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in {"peft", "transformers", "sklearn"} & set(re.findall(r"from (\w+)", (DOCS / name).read_text())):
        pytest.importorskip(package)
    if "sylinit.compare(" in (DOCS / name).read_text():
        pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    for number, block in enumerate(fenced((DOCS / name).read_text(encoding="utf-8"), "python"), 1):
        exec(compile(block, f"{name}, block {number}", "exec"), names)


@pytest.fixture
def fresh_registries() -> Iterator[None]:
    """A page may register codes and layers; other tests must not see them."""
    registries: tuple[dict[Any, Any], ...] = (LAYERS, sylinit.CODES)
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


def test_most_pages_that_tell_how_have_python_that_runs() -> None:
    assert len(PYTHON) >= 8


def commands() -> list[tuple[str, str]]:
    """Every command of `sylinit` on a console of the pages."""
    found = []
    for name, path in zip(NAMES, PAGES, strict=True):
        for block in fenced(path.read_text(encoding="utf-8"), "console"):
            found += [(name, line[2:]) for line in block.splitlines() if line.startswith("$ sylinit ")]
    return found


@pytest.mark.parametrize(("name", "line"), commands())
def test_commands_take_the_arguments_that_pages_show(name: str, line: str) -> None:
    typer = pytest.importorskip("typer")
    from sylinit.cli import app

    _, command, *arguments = shlex.split(line, comments=True)
    found = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    found.make_context(command, arguments)  # an unknown option or a missing argument raises


def masked(text: str) -> list[str]:
    """The lines of an output without what differs from machine to machine: numbers, times left, spaces, rules."""
    text = re.sub(r"About .*? left", "About N left", text)
    text = re.sub(r"[+-]?\d[\d,.]*(?:e[+-]?\d+)?%?", "N", text)
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines() if line.strip("- ")]


def test_outputs_of_commands_are_what_pages_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("typer")
    from comparing import call_as_shell
    from sylinit import cli
    from sylinit.comparison import terminal

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(terminal.console, "_width", 200)
    text = (DOCS / "api" / "command-line.md").read_text(encoding="utf-8")
    for block in fenced(text, "python"):
        exec(compile(block, "the table", "exec"), {})
    shown = re.findall(r"^\$ sylinit (.*)\n((?:(?!\$ ).*\n)*)", "".join(fenced(text, "console")), re.MULTILINE)
    assert len(shown) >= 6
    for line, output in shown:
        _, out, err = call_as_shell(capsys, cli.main, *shlex.split(line))
        found, expected = masked(out + err), masked(output)
        if line.startswith("compare"):  # which of two ends higher, after a few steps, no machine promises
            found, expected = sorted(found)[:3], sorted(expected)[:3]
        assert found == expected, line


@pytest.mark.parametrize("name", ["init", "info", "compare", "demo"])
def test_the_reference_has_every_argument_and_option_of_a_command(name: str, tables: tuple[Path, Any]) -> None:
    typer = pytest.importorskip("typer")
    from sylinit.cli import app

    page = (tables[0] / f"command-{name}.md").read_text(encoding="utf-8")
    command: Any = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    for parameter in command.params:
        spelled = parameter.metavar if parameter.param_type_name == "argument" else max(parameter.opts, key=len)
        assert (f"| `{spelled}" in page) != (spelled == "--help"), spelled
        assert parameter.help.replace("`", "") in page.replace("`", ""), spelled


def test_every_page_is_in_the_table_of_contents_once() -> None:
    contents = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(encoding="utf-8"), re.DOTALL)
    listed = [line for block in contents for line in block.splitlines() if line and not line.startswith(":")]
    assert sorted(f"{page}.md" for page in listed) == [name for name in NAMES if name != "index.md"]


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```python.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        made = target.parent == DOCS / "tables"  # by the build
        foreign = DOCS in path.parents and target.suffix == ".md" and DOCS not in target.parents  # no page of the site
        if (
            foreign
            or not (target.exists() or made)
            or (anchor and target.suffix == ".md" and anchor not in anchors(target))
        ):
            wrong.append(link)
    assert not wrong


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The tables and numbers that the build makes."""
    for package in ("matplotlib", "pandas"):
        pytest.importorskip(package)
    sys.path.insert(0, str(DOCS))
    try:
        import tables

        folder = tmp_path_factory.mktemp("docs") / "tables"
        return folder, tables.write(folder)
    finally:
        sys.path.remove(str(DOCS))


def test_tables_and_numbers_of_the_results_pages_come_from_the_results(tables: tuple[Path, dict[str, str]]) -> None:
    folder, numbers = tables
    for page in (DOCS / "results").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        shown = re.findall(r"tables/([\w.-]+)", text)
        assert shown, page
        assert all((folder / name).is_file() for name in shown), page
        assert set(re.findall(r"\{\{ (\w+) \}\}", text)) <= set(numbers), page
        typed = set(re.findall(r"(?<![\d.])\d+\.\d+(?![\d.])(?: ± \d+\.\d)?", text)) - SETTINGS
        assert not typed, f"{page.name}: {typed} are typed by hand"
    assert numbers["cifar10_counted"] == "above in 12 of 12"
    assert "| 48.8 ± 1.3 |" in (folder / "after-cifar10-cnn.md").read_text().replace("*", "")


def test_the_check_of_the_built_site_finds_what_is_broken(tmp_path: Path) -> None:
    sys.path.insert(0, str(DOCS))
    try:
        from check_site import check
    finally:
        sys.path.remove(str(DOCS))
    (tmp_path / "other.html").write_text('<h1 id="there">Other</h1>')
    page = tmp_path / "index.html"
    page.write_text('<a href="other.html#there"></a><a href="https://example.org"></a><a href="#top" id="top"></a>')
    assert check(tmp_path) == []
    page.write_text('<a href="gone.html"></a><a href="other.html#gone"></a><script src="https://example.org/x.js">')
    (tmp_path / "site.css").write_text("@import url(https://example.org/font.css);")
    found = "\n".join(check(tmp_path))
    for wrong in ("gone.html does not exist", "other.html#gone has no such anchor", "loads https://example.org/x.js"):
        assert wrong in found
    assert "site.css: loads https://example.org/font.css" in found

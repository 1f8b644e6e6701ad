"""The reference of the `sylinit` command, read off its functions whenever the site is built."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from typer.models import ArgumentInfo

from sylinit.cli import app

COMMANDS = ("init", "info", "compare", "demo")
PLACEHOLDERS = {int: "NUMBER", float: "NUMBER", str: "TEXT", Path: "PATH"}
"""What stands for a value of a type, where the command names nothing better."""


def reference() -> dict[str, str]:
    """For each command its usage and a table of its arguments and options, by the name of the file."""
    functions = {command.callback.__name__: command.callback for command in app.registered_commands if command.callback}
    return {f"command-{name}": describe(name, functions[name]) for name in COMMANDS}


def describe(name: str, function: Callable[..., Any]) -> str:
    """Usage, arguments and options of one command, as Markdown."""
    hints = get_type_hints(function, include_extras=True)
    usage, body = [f"sylinit {name}"], []
    for parameter in inspect.signature(function).parameters.values():
        shown, meaning = spelled(parameter.name, hints[parameter.name])
        default = parameter.default
        required = default is parameter.empty
        usage += [shown] if required else []
        shown_default = "" if default is None or default == "" or default is False else f"`{default}`"
        value = "required" if required else shown_default
        body.append(f"| `{shown}` | {cell(meaning)} | {value} |")
    usage += [] if len(usage) == len(body) + 1 else ["[OPTIONS]"]
    table = "\n".join(["| argument or option | meaning | default |", "| --- | --- | --- |", *body])
    return f"```text\n{' '.join(usage)}\n```\n\n{table}\n"


def spelled(name: str, hint: Any) -> tuple[str, str]:
    """How a parameter is written, such as ``--label COLUMN``, ``--force`` or ``MODEL``, and what `--help` says of it.

    Args:
        name: of the function's parameter.
        hint: its annotation, with what Typer is told of it.
    """
    kind, info = get_args(hint)[:2]
    if get_origin(kind) is UnionType:
        kind = get_args(kind)[0]  # `None` says that there is no default
    placeholder = info.metavar or PLACEHOLDERS.get(kind, "")
    if isinstance(info, ArgumentInfo):
        return placeholder, info.help
    option = "--" + name.replace("_", "-")
    return f"{option} {placeholder}".strip(), info.help


def cell(text: str) -> str:
    """As part of a table, with names of options as code."""
    return re.sub(r"(?<![\w`])(--[a-z-]+|sylinit\.[A-Z]+|\w+:[a-zA-Z]+(?:\([a-z, ]*\))?)", r"`\1`", text)

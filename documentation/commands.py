"""The reference of the command line: every command and option, from the program itself."""

import re
from pathlib import Path
from typing import Any

import typer

from sphereify.cli import app

WORDS = {int: "INTEGER", float: "FLOAT", Path: "PATH"}
OWN = "Options"
"""The group of the options that name none, as `--help` calls it."""


def page() -> str:
    """The page of all commands, in Markdown."""
    program: Any = typer.main.get_command(app)
    lines = ["# Command line", "", plain(program.help), "", *_table(program.params)]
    for name, command in program.commands.items():
        arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        names = " ".join(_argument(argument) for argument in arguments)
        lines += ["", f"## sphereify {name}", "", plain(command.help), "", "```text"]
        lines += [f"sphereify {name} [OPTIONS] {names}", "```", ""]
        lines += [f"`{a.name.upper()}`\n: {plain(a.help)}\n" for a in arguments]
        panels: dict[str, list[Any]] = {}
        for parameter in command.params:
            if parameter.param_type_name == "option":
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or OWN, []).append(parameter)
        for panel, options in panels.items():
            lines += [f"**{panel}**", "", *_table(options), ""]
    return "\n".join(lines) + "\n"


def plain(text: str | None) -> str:
    """A help text for a cell of a table: on one line, without the escapes that Rich and Markdown would read."""
    return re.sub(r"\s+", " ", (text or "").replace(r"\[", "[")).replace("|", r"\|").replace("*", r"\*").strip()


def _argument(argument: Any) -> str:
    name = argument.name.upper()
    name = f"{name}…" if argument.nargs != 1 else name
    return name if argument.required else f"[{name}]"


def _table(options: list[Any]) -> list[str]:
    rows = [f"| {_flags(o)} | {_value(o)} | {_default(o)} | {plain(getattr(o, 'help', ''))} |" for o in options]
    return ["| option | value | default | |", "|---|---|---|---|", *rows]


def _flags(option: Any) -> str:
    return ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))


def _value(option: Any) -> str:
    if option.is_flag:
        return ""
    if option.metavar:
        return str(option.metavar)
    if hasattr(option, "type"):
        return str(option.type.name.upper())
    return WORDS.get(option.type_descriptor.annotation, "TEXT")  # Typer's own parser, since 0.26


def _default(option: Any) -> str:
    default = option.default
    if default is None or default is False or callable(default) or option.name in ("help", "version"):
        return ""
    return f"`{option.opts[0]}`" if default is True else f"`{default}`"

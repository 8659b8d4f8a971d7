"""The option --report of several commands, and what they hand to the report."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from sphereify.cli.output import OUTPUT
from sphereify.cli.spelling import command_line
from sphereify.errors import PlanMismatchError, UsageError, invalid, option, refused, spelled
from sphereify.options import options_of

SUFFIXES = (".html", ".htm")

Report = Annotated[
    Path | None,
    typer.Option(
        help="Write a report to look at: one HTML file with the layers, what was converted and what resists.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]


def check_report(file: Path | None, force: bool) -> None:
    """Refuse a file of another kind, and one that exists, unless `force` gives it up."""
    if file is None:
        return
    if file.suffix.lower() not in SUFFIXES:
        raise invalid("report", str(file), f"a file that ends in {' or '.join(SUFFIXES)}", "For example: report.html")
    if file.is_dir():
        raise refused("report", f"{file} is a folder, expected a file to write")
    if file.exists() and not force:
        raise UsageError(
            f"{file}: exists already; {option('force')} replaces it, {option('report')} names another file"
        )


def write(file: Path, model_or_plan: Any, *, quiet: bool = False, **about: Any) -> None:
    """Write the report, and say where it lies unless this is to be quiet."""
    from sphereify.report import write_report

    write_report(model_or_plan, file, **about)
    if not quiet:
        print(f"report written to {file}")


def counterpart(original: Any, model: Any) -> Any:
    """The original, if it is of the architecture that the model was made of; else None."""
    from sphereify.convert.rewrite import check_fit

    if original is None:
        return None
    try:
        check_fit(original, model.conversion_plan)
    except PlanMismatchError:
        return None
    return original


def given(*groups: Any) -> list[str]:
    """The options in some dataclasses that are not at their defaults, as they are typed."""
    words: dict[str, str] = {}
    for values in groups:
        usual = {field.name: field.default for field in dataclasses.fields(values)}
        for name in options_of(type(values)):
            value = getattr(values, name)
            if value is not None and value != usual[name]:
                plain = value if isinstance(value, (bool, int, float, str, tuple, list, dict)) else str(value)
                words[name] = spelled(option(name, plain), command_line)
    return list(words.values())

"""The folder that a command writes to: the option --force, the default name, and a check of what lies in it."""

from pathlib import Path
from typing import Annotated

import typer

from sphereify.errors import UsageError, option

OUTPUT = "Output"

Force = Annotated[bool, typer.Option("--force", help="Replace what the output folder holds.", rich_help_panel=OUTPUT)]


def name_of(model: str) -> str:
    """The name of a model without its path, package or library, for the names of folders."""
    return Path(model if Path(model).exists() else model.rpartition(":")[2]).name


def check_folder(folder: Path | None, force: bool = True) -> None:
    """Refuse a folder that cannot be written to, or holds something that `force` does not give up."""
    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder}: is a file; {option('output')} names a folder")
    if not force and any(folder.iterdir()):
        raise UsageError(
            f"{folder}: exists already; {option('force')} replaces the artifact in it, "
            f"{option('output')} names another folder"
        )

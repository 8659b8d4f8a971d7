"""The terminal: how wide it is, which of several processes may write to it, and text that is printed as it is.

Names of layers, classes, files and networks may hold brackets and colons, which Rich reads as markup and as emoji.
Whatever is printed goes through `console`, `say` and `text_table`, which take all text as it is.
"""

import os
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; where there is none, wide enough that layer names are not cut."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 140
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def say(out: Console, text: str, style: str = "", *, soft_wrap: bool = False) -> None:
    """Print a line of text as it is; with `soft_wrap` the terminal breaks it, not Rich."""
    out.print(Text(text), style=style or None, soft_wrap=soft_wrap, highlight=False)


def text_table(*headers: str, title: str = "", caption: str = "") -> Table:
    """A table with these headers, or without any, whose text is printed as it is."""
    return Table(
        *(Column(Text(header)) for header in headers),
        title=Text(title, "table.title") if title else None,
        caption=Text(caption, "table.caption") if caption else None,
        header_style="bold",
        show_header=bool(headers),
    )


def add_row(table: Table, *cells: str | Text) -> None:
    """Add a row to a table, with strings printed as they are."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def progress_bar(out: Console) -> Progress:
    """A bar with a description and the time that remains, shown in a terminal only and gone at the end."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=out, disable=not out.is_terminal, transient=True)


def is_first_process() -> bool:
    """True in the only process, and in the first of those that torchrun started: the one that writes."""
    return os.environ.get("RANK", "0") == "0"

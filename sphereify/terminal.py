"""The terminal: how wide it is, which of several processes may write to it, and text that is printed as it is.

Names of layers, classes, files and networks may hold brackets and colons, which Rich reads as markup and as emoji.
Whatever is printed goes through `console`, `say` and `text_table`, which take all text as it is.
"""

import codecs
import json
import os
import sys
from collections.abc import Iterable, Iterator

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from sphereify.wording import shortened_name

COLUMNS = 80
"""Width of a table that goes to a file or to another program, unless the environment says COLUMNS."""


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; where there is none, as wide as COLUMNS says, or 80 columns."""
    stream = sys.stderr if stderr else sys.stdout
    columns = os.environ.get("COLUMNS", "")
    width = None if stream.isatty() else int(columns) if columns.isdigit() and int(columns) else COLUMNS
    return Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)


def say(out: Console, text: str, style: str = "", *, soft_wrap: bool = False) -> None:
    """Print a line of text as it is, broken between words where the terminal ends.

    With `soft_wrap`, and where the output is no terminal, the line stays whole, so that programs find what it says.
    """
    out.print(Text(text), style=style or None, soft_wrap=soft_wrap or not out.is_terminal, highlight=False)


def escape_what_cannot_be_written() -> None:
    """Let the output of this process escape characters that its encoding does not have, in place of failing on them.

    It is so where output goes through a pipe on Windows, and with names of files that are no valid text. The escapes
    are those of JSON, so that JSON stays JSON.
    """
    codecs.register_error(_ESCAPES, _as_json_escapes)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ESCAPES)


_ESCAPES = "sphereify.json-escapes"
"""Name of the way to treat characters that an encoding does not have."""


def _as_json_escapes(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


class Name:
    """The name of a layer, a class or a network in a cell, whose middle is cut out where the column has little room."""

    SHORTEST = 12

    def __init__(self, text: str):
        self.text = text

    def __rich_measure__(self, out: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(cell_len(self.text), self.SHORTEST), cell_len(self.text))

    def __rich_console__(self, out: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(shortened_name(self.text, options.max_width), no_wrap=True, overflow="ellipsis")


def text_table(*headers: str, title: str = "", caption: str = "", whole: Iterable[str] = ()) -> Table:
    """A table with these headers, whose text is printed as it is; without a head where all of them are empty.

    Where the table is wider than the console, cells are broken into lines; those under the headers `whole` come last.
    """
    return Table(
        *(Column(Text(header), overflow="fold", no_wrap=header in whole) for header in headers),
        title=Text(title, "table.title") if title else None,
        caption=Text(caption, "table.caption") if caption else None,
        header_style="bold",
        show_header=any(headers),
    )


def add_row(table: Table, *cells: "str | Text | Name") -> None:
    """Add a row to a table, with strings printed as they are."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def width_of(table: Table) -> int:
    """Number of columns that a table takes where no cell is broken into lines."""
    unbounded = Console(width=10_000)
    return Measurement.get(unbounded, unbounded.options, table).maximum


def progress_bar(out: Console) -> Progress:
    """A bar with a description and the time that remains, shown in a terminal only and gone at the end."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=out, disable=not out.is_terminal, transient=True)

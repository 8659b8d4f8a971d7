"""The terminal: how wide it is, and which of several processes may write to it."""

import os
import sys

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; where there is none, wide enough that layer names are not cut."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 140, highlight=False)


def is_first_process() -> bool:
    """True in the only process, and in the first of those that torchrun started: the one that writes."""
    return os.environ.get("RANK", "0") == "0"

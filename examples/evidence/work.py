"""Pieces of work of a program: each is done once, several at a time on request, and its result is kept in a file."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.papers.cells import in_processes, place_of, run_name
from examples.papers.report import told_errors
from sphereify.errors import TrainingError
from sphereify.files import write_text

Found = dict[str, Any]
"""The result of a piece of work as plain JSON values; of a training that failed, {"failure": why}."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A piece of work, usually a training and a test. It can be pickled."""

    name: str
    do: Callable[..., Found]
    """A function of a module; it takes the data set's name, the folder of the piece and the values in `given`."""
    given: dict[str, Any] = field(default_factory=dict)
    """What the result depends on besides the data and the weights."""
    weights: Path | None = None
    """File of the weights with which it begins; None: there is none."""

    def folder(self, output: Path) -> Path:
        return output / "runs" / run_name(self.name, self.weights)

    @property
    def asked(self) -> str:
        return repr(sorted(self.given.items()))


def complete(pieces: Sequence[Piece], args: Any) -> dict[str, Found]:
    """Do what has not been done before, in the order of the pieces; with --report nothing is done.

    Returns:
        The results by the name of the piece, in the order of the pieces, of those that are finished.
    """
    data = place_of(args.data)
    waiting = [piece for piece in pieces if _read(piece, args.output, data) is None]
    if waiting and not args.report:
        work = [(piece, args.data, args.output) for piece in waiting]
        with told_errors():
            if args.jobs > 1:
                in_processes(work, args.jobs, _do)
            else:
                for one in work:
                    _do(*one)
    results = {piece.name: _read(piece, args.output, data) for piece in pieces}
    return {name: result for name, result in results.items() if result is not None}


def _do(piece: Piece, data: str, output: Path) -> None:
    folder = piece.folder(output)
    began = time.process_time()
    try:
        found = piece.do(data, folder, **piece.given)
    except TrainingError as error:
        found = {"failure": str(error)}
    seconds = time.process_time() - began
    outcome = {"asked": piece.asked, "data": place_of(data), "cpu_seconds": seconds, "found": found}
    write_text(folder / "outcome.json", json.dumps(outcome, indent=1) + "\n")
    told = ", ".join(f"{name} {_short(value)}" for name, value in found.items() if not isinstance(value, (list, dict)))
    print(f"{piece.name}: {told} ({seconds:.0f} s)", file=sys.stderr, flush=True)


def _read(piece: Piece, output: Path, data: str) -> Found | None:
    """The result of a piece that was asked for in the same way before, with the same data."""
    file = piece.folder(output) / "outcome.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    return before["found"] if (before.get("asked"), before.get("data")) == (piece.asked, data) else None


def cpu_minutes(output: Path) -> float:
    """Processor time of all pieces that have finished in a folder, of the last attempt where one was interrupted."""
    files = (output / "runs").glob("*/outcome.json")
    return sum(json.loads(file.read_text())["cpu_seconds"] for file in files) / 60


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

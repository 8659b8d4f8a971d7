"""The consoles of README.md and docs/: run, compared with what is printed there, and refreshed.

    python -m documentation.consoles            # run all of them; say where the output differs
    python -m documentation.consoles --update   # and write the output that they have now
    python -m documentation.consoles docs/keeping.md

A block of the language `console` is run: its lines that begin with `$ ` are commands, the others are what the one above
printed. The blocks of a page run one after the other in one empty folder, which has the repository's examples/. A block
of the language `sh` is not run: it needs a GPU, pretrained weights, pictures that the reader has, or much time. Its
output is a block of the language `text`, which is not compared.

A line `…` stands for any number of lines. Spaces, and the lines that tables are drawn with, may differ in length. A
number with a decimal point depends on the machine and the versions of the libraries, since networks are trained here:
it may differ by 6 in a line that counts per cent and in tables, where it is above 1, and else by 15 % of its value (of
two processors, the accuracies of one command on corrupted images were up to 4 points apart); images per second, and
numbers such as 4.7e-07, which are rounding, by anything. So rows of a table that are sorted by such numbers may come in
another order. Everything else must be as it is printed. A command without an output is run, and may print anything.
"""

import argparse
import difflib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = "…"
"""A line that stands for any number of lines."""
_NUMBER = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?")
_SPEED = re.compile(r"\d+(?= images/s)")
_DRAWN = re.compile(r"[\s─━┄═]+")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    start: int
    """Number of the first line inside, from 0."""
    lines: tuple[str, ...]

    @property
    def place(self) -> str:
        """Where it is, for a person: path:line."""
        return f"{self.page.relative_to(ROOT)}:{self.start + 1}"


@dataclass(frozen=True)
class Command:
    """A command of a console, and the output that the page prints."""

    typed: tuple[str, ...]
    """Its lines as typed, the first one after `$ `."""
    printed: tuple[str, ...]

    @property
    def script(self) -> str:
        """What the shell is given."""
        return "\n".join(self.typed)


def pages() -> list[Path]:
    """README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[Block]:
    """The fenced blocks of one language on a page."""
    found, opened, start = [], None, 0
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if opened is None:
            opened, start = line[3:].strip(), number + 1
        else:
            if opened == language:
                found.append(Block(page, opened, start, tuple(lines[start:number])))
            opened = None
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a console with their outputs."""
    found: list[tuple[list[str], list[str]]] = []
    goes_on = False
    for line in block.lines:
        if goes_on:
            found[-1][0].append(line)
        elif line.startswith("$ "):
            found.append(([line[2:]], []))
        elif found:
            found[-1][1].append(line)
        else:
            raise ValueError(f"{block.place}: a console begins with `$ ` and a command")
        goes_on = line.endswith("\\") and (goes_on or line.startswith("$ "))
    return [Command(tuple(typed), tuple(printed)) for typed, printed in found]


# ------------------------------------------------------------------------------------------------------------- running


def run(script: str, folder: Path) -> list[str]:
    """The lines that a command prints, run in a folder; a command that fails raises a ValueError with them."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{_programs(folder)}:{os.environ['PATH']}",
        "SPHEREIFY_CACHE": os.environ.get("SPHEREIFY_CACHE", str(Path.home() / ".cache" / "sphereify")),
        "TERM": "dumb",
        "COLUMNS": "",
    }
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    if done.returncode:
        raise ValueError(f"$ {script}\nended with {done.returncode}:\n" + "\n".join(lines[-20:]))
    return lines


def _programs(folder: Path) -> Path:
    """A folder with `sphereify` and `python`, which run this interpreter and this checkout."""
    programs = folder.parent / f"{folder.name}-programs"
    if not programs.is_dir():
        programs.mkdir()
        for name, words in (("sphereify", " -m sphereify"), ("python", "")):
            (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{words} "$@"\n')
            (programs / name).chmod(0o755)
    return programs


def outputs(page: Path, folder: Path) -> Iterator[tuple[Block, list[tuple[Command, list[str]]]]]:
    """Each console of a page with its commands and what they print now, run in a folder."""
    consoles = blocks(page, "console")
    if consoles and not (folder / "examples").exists():
        (folder / "examples").symlink_to(ROOT / "examples")
    for block in consoles:
        yield block, [(command, run(command.script, folder)) for command in commands(block)]


# ----------------------------------------------------------------------------------------------------------- comparing


def difference(printed: Iterable[str], now: Iterable[str]) -> str:
    """How an output differs from what is printed; empty if it does not."""
    printed, now = _trimmed(printed), _trimmed(now)
    if not printed or _matches(printed, now) or _matches(_with_sorted_rows(printed), _with_sorted_rows(now)):
        return ""
    return "\n".join(difflib.unified_diff(printed, now, "printed", "now", lineterm="", n=1))


def _trimmed(lines: Iterable[str]) -> list[str]:
    lines = list(lines)
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


def _with_sorted_rows(lines: list[str]) -> list[str]:
    """The lines with the rows of each table in order of their text."""
    runs = [(is_table, list(run)) for is_table, run in itertools.groupby(lines, lambda line: line.startswith("│"))]
    return [line for is_table, run in runs for line in (sorted(run) if is_table else run)]


def _matches(printed: list[str], now: list[str]) -> bool:
    """True if `now` has the lines of `printed` in order, with any others only where one is left out."""
    places = {0}  # how much of `now` may be used up
    for line in printed:
        if line.strip() == LEFT_OUT:
            places = set(range(min(places), len(now) + 1)) if places else places
        else:
            places = {place + 1 for place in places if place < len(now) and same(line, now[place])}
    return len(now) in places


def same(printed: str, now: str) -> bool:
    """True if a line says the same as another, by the rules of this module.

    >>> same("accuracy 98.3 %, saved to run/", "accuracy  97.2 %, saved to run/")
    True
    >>> same("17 convolutions, R² 0.99", "18 convolutions, R² 0.99"), same("R² 0.99", "R² 0.79")
    (False, False)
    """
    words = [_DRAWN.sub(" ", _NUMBER.sub("#", _SPEED.sub("#", line))).strip() for line in (printed, now)]
    numbers = [[float(number) for number in _NUMBER.findall(line) if "e" not in number] for line in (printed, now)]
    per_cent = "%" in printed or "│" in printed
    return words[0] == words[1] and all(
        abs(a - b) <= (6 if per_cent and max(a, b) > 1 else 0.15 * max(a, b)) for a, b in zip(*numbers, strict=True)
    )


# ---------------------------------------------------------------------------------------------------------- refreshing


def refreshed(printed: tuple[str, ...], now: list[str]) -> list[str]:
    """The output of now, with as much left out as before."""
    if not printed:
        return []
    parts: list[list[str]] = [[]]
    marks = []
    for line in printed:
        if line.strip() == LEFT_OUT:
            marks.append(line)
            parts.append([])
        else:
            parts[-1].append(line)
    if not marks:
        return now
    lines, end = now[: len(parts[0])], len(now) - len(parts[-1])
    place = len(parts[0])
    for mark, part in zip(marks, parts[1:], strict=True):
        if part is parts[-1]:
            place = max(place, end)
        else:
            place = max(range(place, max(end, place) + 1), key=lambda start: _likeness(part, now[start:]))
        lines += [mark, *now[place : place + len(part)]]
        place += len(part)
    return lines


def _likeness(lines: list[str], others: list[str]) -> float:
    return sum(difflib.SequenceMatcher(None, a, b).ratio() for a, b in zip(lines, others, strict=False))


def write(page: Path, ran: list[tuple[Block, list[tuple[Command, list[str]]]]]) -> None:
    """Write the outputs of now into a page, where those that are printed there are no longer right."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block, outcomes in reversed(ran):
        body: list[str] = []
        for command, now in outcomes:
            shown = refreshed(command.printed, _trimmed(now)) if difference(command.printed, now) else command.printed
            body += [f"$ {command.typed[0]}", *command.typed[1:], *shown]
        lines[block.start : block.start + len(block.lines)] = body
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> int:
    """Run the consoles; 1 if one printed something else than its page does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("pages", nargs="*", type=Path, help="Pages; default: README.md and docs/.")
    parser.add_argument("--update", action="store_true", help="Write the outputs into the pages.")
    options = parser.parse_args()
    failed = False
    for page in [path.resolve() for path in options.pages] or pages():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "work"
            folder.mkdir()
            ran = list(outputs(page, folder))
        for block, outcomes in ran:
            for command, now in outcomes:
                if differs := difference(command.printed, now):
                    failed = True
                    print(f"{block.place}: {command.typed[0]}\n{differs}\n")
        if options.update and ran:
            write(page, ran)
    return int(failed and not options.update)


if __name__ == "__main__":
    sys.exit(main())

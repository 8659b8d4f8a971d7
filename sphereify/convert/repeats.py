"""Layers that repeat in a network, for a table that a person reads: numbered blocks that are alike share their rows.

Two rules make the rows, from the inside of the tree of names to its root:

1. A numbered block (`layer1.2`, `blocks.7`) whose layers, two or more, are all alike is one row.
2. Numbered siblings that follow one another and have the same rows share them: `layer1.1–2`, `blocks.0–11.attn.qkv`.

Whatever is alike to no neighbour keeps a row of its own.
"""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

RANGE = "–"
"""Sign between the first and the last number of siblings that share a row."""


@dataclass(frozen=True)
class Repeat:
    """A row for one layer, or for several that are alike."""

    name: str
    """Name of the layer or the block, in which `0–3` stands for the numbers from 0 to 3 that have layers."""
    places: tuple[int, ...]
    """Places of these layers in the sequence that was given."""
    pattern: Hashable
    """Pattern that they share."""


def repeats(names: Sequence[str], patterns: Sequence[Hashable]) -> list[Repeat]:
    """The rows for layers of these names, of which two are alike if their patterns are equal.

    Each layer is in one row. The rows are in the order in which the first layer of each module comes.

    >>> for row in repeats(["stem", "layer.0.a", "layer.0.b", "layer.1.a", "layer.1.b", "fc"], "-+++++"):
    ...     print(row.name, len(row.places))
    stem 1
    layer.0–1 4
    fc 1
    """
    root = _Module()
    for place, (name, pattern) in enumerate(zip(names, patterns, strict=True)):
        module = root
        for part in name.split("."):
            module = module.children.setdefault(part, _Module())
        module.own.append(Repeat("", (place,), pattern))
    return _rows_below(root)


@dataclass
class _Module:
    """A module in the tree of names, with the layers of its very name (a module may make several calls)."""

    own: list[Repeat] = field(default_factory=list)
    children: dict[str, "_Module"] = field(default_factory=dict)


def _rows_below(module: _Module) -> list[Repeat]:
    """The rows of a module, with names relative to it."""
    rows = list(module.own)
    for parts in _siblings(list(module.children)):
        # Siblings that follow one another by number; those of them that have equal rows are folded.
        run: list[tuple[str, list[Repeat]]] = []
        for part in parts:
            below = _rows_of_child(part, module.children[part])
            if run and _shape(run[-1][1]) != _shape(below):
                rows += _folded(run)
                run = []
            run.append((part, below))
        rows += _folded(run)
    return rows


def _siblings(parts: list[str]) -> list[list[str]]:
    """Names of children, split where one is not followed by the next higher number of its kind."""
    numbers: dict[str, list[int]] = {}
    for stem, number in filter(None, map(_numbered, parts)):
        numbers.setdefault(stem, []).append(number)
    following = {
        (stem, low): (stem, high)
        for stem, found in numbers.items()
        for low, high in zip(sorted(found), sorted(found)[1:], strict=False)
    }
    runs: list[list[str]] = []
    for part in parts:
        last = _numbered(runs[-1][-1]) if runs else None
        if last in following and following[last] == _numbered(part):
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def _numbered(part: str) -> tuple[str, int] | None:
    """A name without its last number, and that number: ("layer", 3) for layer3."""
    match = re.fullmatch(r"(.*?)(0|[1-9][0-9]*)", part)
    return (match[1], int(match[2])) if match else None


def _rows_of_child(part: str, child: _Module) -> list[Repeat]:
    """The rows of a child: one if it is numbered and its layers are all alike."""
    rows = _rows_below(child)
    places = tuple(sorted(place for row in rows for place in row.places))
    if _numbered(part) and len(places) > 1 and len({row.pattern for row in rows}) == 1:
        return [Repeat("", places, rows[0].pattern)]
    return rows


def _shape(rows: list[Repeat]) -> list[tuple[str, Hashable]]:
    return [(row.name, row.pattern) for row in rows]


def _folded(run: list[tuple[str, list[Repeat]]]) -> list[Repeat]:
    """The rows that siblings share, or those of a single child."""
    (first, rows), (last, _) = run[0], run[-1]
    numbered = _numbered(last)
    name = first if len(run) == 1 or numbered is None else f"{first}{RANGE}{numbered[1]}"
    return [
        Repeat(
            f"{name}.{row.name}" if row.name else name,
            tuple(sorted(place for _, below in run for place in below[number].places)),
            row.pattern,
        )
        for number, row in enumerate(rows)
    ]

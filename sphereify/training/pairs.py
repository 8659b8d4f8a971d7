"""Pairs of images, of one identity or of two: all pairs of labelled images, a random choice of them, or a list."""

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sphereify.errors import DataError, first_line, option
from sphereify.images.folders import is_image

SAME, DIFFERENT = ("1", "same", "true", "yes"), ("0", "-1", "different", "false", "no")
"""Words, in any case, for pairs of one identity and of two in a list of pairs."""
SHOWN = 3
"""Number of missing files that an error names."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of images by their numbers."""

    first: Tensor
    """Number of the first image of each pair, (pairs,), int64."""
    second: Tensor
    """Number of the second image of each pair."""
    same: Tensor
    """True for a pair of one identity, (pairs,)."""
    total: int
    """Number of pairs among which these were chosen."""

    def __len__(self) -> int:
        return len(self.same)

    def among(self, rows: Tensor, images: int) -> "Pairs":
        """The pairs of which both images are among `rows`, with the places in `rows` as numbers.

        Args:
            rows: numbers of images, (rows,).
            images: number of all images.
        """
        places = torch.full((images,), -1)
        places[rows] = torch.arange(len(rows))
        first, second = places[self.first], places[self.second]
        there = (first >= 0) & (second >= 0)
        return Pairs(first[there], second[there], self.same[there], self.total)


def pairs_of(identities: Tensor, limit: int, seed: int = 0) -> Pairs:
    """All pairs of images, or a fixed random choice of them without repetitions.

    A fifth of a choice are pairs of one identity, since small false accept rates need many pairs of two. Where one kind
    is rarer, the other one fills the place. Neither memory nor time grows with the number of all pairs.

    Args:
        identities: the identity of each image, (images,), whole numbers.
        limit: largest number of pairs, ≥ 2.
        seed: random seed of the choice.
    """
    order = identities.argsort(stable=True)
    sizes = torch.unique_consecutive(identities[order], return_counts=True)[1]
    ends = sizes.cumsum(0).repeat_interleave(sizes)  # of the identity of each image, among the images in order
    places = torch.arange(len(order))
    alike, others = ends - places - 1, len(order) - ends  # later images of the same identity, and of other ones
    same, different = int(alike.sum()), int(others.sum())
    draw = torch.Generator().manual_seed(seed)
    from_same = min(same, max(limit // 5, 1, limit - different))
    from_different = min(different, limit - from_same)
    parts = []
    for counts, begin, total, number in (
        (alike, places + 1, same, from_same),
        (others, ends, different, from_different),
    ):
        # Pair number p belongs to the image at which the running total of later partners passes p.
        numbers = torch.arange(total) if number == total else _drawn(draw, total, number)
        passed = counts.cumsum(0)
        first = torch.searchsorted(passed, numbers, right=True)
        second = begin[first] + numbers - (passed - counts)[first]
        parts.append((order[first], order[second]))
    flags = torch.cat([torch.full((len(first),), flag) for (first, _), flag in zip(parts, (True, False), strict=True)])
    return Pairs(
        torch.cat([first for first, _ in parts]), torch.cat([second for _, second in parts]), flags, same + different
    )


def _drawn(draw: torch.Generator, total: int, number: int) -> Tensor:
    """`number` of the numbers below `total`, each once, all choices alike, in order; in memory for `number` of them."""
    candidates = torch.arange(total) if total <= 2 * number else torch.empty(0, dtype=torch.int64)
    while len(candidates) < number:  # twice as many with repetitions are enough, but for bad luck
        candidates = torch.cat([candidates, torch.randint(total, (2 * number,), generator=draw)]).unique()
    return candidates[torch.randperm(len(candidates), generator=draw)[:number]].sort().values


def read_pairs(file: Path, folder: Path) -> tuple[list[Path], Pairs]:
    """The images that a list of pairs names, each once, and the pairs of their numbers.

    A line holds two paths, relative to `folder`, and a flag: 1, same, true or yes for one identity, 0, different, false
    or no for two. Commas, semicolons, tabs or blanks separate them. A first line without names of images is a heading;
    empty lines and lines that begin with # are passed over.

    Raises:
        DataError: a list that cannot be read, that has no pairs, or pairs of one kind only; a line of another form; or
            images that do not exist.
    """
    rows = _rows(file)
    if rows and _is_heading(rows[0][1], folder):
        rows = rows[1:]
    if not rows:
        raise DataError(f"{option('pairs')}: {file} holds no pairs, expected lines such as a/1.png,b/2.png,0")
    numbers: dict[str, int] = {}
    pairs = []
    for line, cells in rows:
        same = _flag(cells[2]) if len(cells) == 3 else None
        if same is None:
            raise DataError(
                f"{option('pairs')}: {file}, line {line}: got {' | '.join(cells)}, expected two paths and a flag (1 or "
                f"same, 0 or different)"
            )
        first, second = (numbers.setdefault(cell, len(numbers)) for cell in cells[:2])
        pairs.append((first, second, same))
    files = [folder / name for name in numbers]
    missing = [name for name, path in zip(numbers, files, strict=True) if not path.is_file()]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise DataError(
            f"{option('pairs')}: {file} names images that are not in {folder}: {', '.join(missing[:SHOWN])}{more}"
        )
    table = torch.tensor(pairs, dtype=torch.int64)
    return files, Pairs(table[:, 0], table[:, 1], table[:, 2].bool(), len(pairs))


def _rows(file: Path) -> list[tuple[int, list[str]]]:
    """The cells of each line, with its number."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{option('pairs')}: {file} cannot be read ({first_line(error)})") from error
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")]
    separator = next((mark for mark in ",;\t" if numbered and mark in numbered[0][1]), None)
    if separator is None:
        return [(number, line.split()) for number, line in numbered]
    cells = ((number, next(csv.reader([line], delimiter=separator))) for number, line in numbered)
    return [(number, [cell.strip() for cell in row]) for number, row in cells]


def _is_heading(cells: list[str], folder: Path) -> bool:
    return not any(is_image(Path(cell)) or (folder / cell).is_file() for cell in cells[:2])


def _flag(word: str) -> bool | None:
    """True for one identity, False for two, None for another word."""
    word = word.lower()
    return True if word in SAME else False if word in DIFFERENT else None

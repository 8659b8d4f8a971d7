"""Small pieces of English that messages and summaries share."""

import re
from collections.abc import Iterable

NUMBER = re.compile(r"[0-9]+(–[0-9]+)?$")
"""The number, or the range of numbers, at the end of a part of a name."""


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it needs one.

    >>> count(1, "layer"), count(3, "layer")
    ('1 layer', '3 layers')
    """
    return f"{number} {noun}" + ("" if number == 1 else "s")


def in_one_line(text: str) -> str:
    """A text of someone else's without line breaks, which would begin a heading or a list in Markdown.

    >>> in_one_line("mit\\n# a heading ")
    'mit # a heading'
    """
    return " ".join(text.split())


def shortened(text: str, most: int = 100) -> str:
    """A text for a line that has little room: its end is cut off where it is longer than `most` characters.

    >>> shortened("a tensor of five dimensions", 10)
    'a tensor …'
    """
    return text if len(text) <= most else f"{text[: most - 2].rstrip()} …"


def shortened_name(name: str, most: int) -> str:
    """A dotted name for a column that has little room: its longest words lose letters before the dot or the number.

    The numbers stay, which tell one layer from another, as long as there is room for them.

    >>> shortened_name("features.denseblock3.denselayer12.conv2", 26)
    'feat….dens…3.dens…12.conv2'
    """
    words = [NUMBER.sub("", part) for part in name.split(".")]
    numbers = [part[len(word) :] for part, word in zip(name.split("."), words, strict=True)]
    rooms = [len(word) for word in words]
    while len(short := ".".join(map(_cut, words, rooms, numbers))) > most and max(rooms) > 2:
        rooms[rooms.index(max(rooms))] -= 1
    if len(short) <= most:
        return short
    start = (most - 1) // 2
    return f"{short[:start]}…{short[len(short) - (most - 1 - start) :]}"


def _cut(word: str, room: int, number: str) -> str:
    """A word, which has room for so many characters, with its number."""
    return f"{word if len(word) <= room else word[: room - 1] + '…'}{number}"


def listed(words: Iterable[str]) -> str:
    """Words with commas between them."""
    return ", ".join(words)


def enumerated(words: Iterable[str]) -> str:
    """Words with commas between them, and "and" before the last.

    >>> enumerated(["mhe"]), enumerated(["mhe", "compressive", "separation"])
    ('mhe', 'mhe, compressive and separation')
    """
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last

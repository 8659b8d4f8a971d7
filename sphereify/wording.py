"""Small pieces of English that messages and summaries share."""

from collections.abc import Iterable


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it needs one.

    >>> count(1, "layer"), count(3, "layer")
    ('1 layer', '3 layers')
    """
    return f"{number} {noun}" + ("" if number == 1 else "s")


def shortened(text: str, most: int = 100) -> str:
    """A text for a line that has little room: its end is cut off where it is longer than `most` characters.

    >>> shortened("a tensor of five dimensions", 10)
    'a tensor …'
    """
    return text if len(text) <= most else f"{text[: most - 2].rstrip()} …"


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

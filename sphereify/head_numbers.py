"""The numbers that some kinds of angular head take, with the default and the range of each kind. Imports no torch."""

from typing import NamedTuple

from sphereify.errors import invalid
from sphereify.options import Option


class HeadNumber(NamedTuple):
    """A number of one kind of head."""

    default: float
    range: Option


_FACTOR = Option("", at_least=1)
_FROM_0_TO_1 = Option("", at_least=0, at_most=1)
_POSITIVE = Option("", above=0)

HEAD_NUMBERS: dict[str, dict[str, HeadNumber]] = {
    "margin": {
        "ga-softmax": HeadNumber(4.0, _FACTOR),
        "a-softmax": HeadNumber(4.0, _FACTOR),
        "arcface": HeadNumber(0.5, Option("", at_least=0, at_most=1.5)),
        "cosface": HeadNumber(0.35, _FROM_0_TO_1),
        "sphereface2": HeadNumber(0.4, _FROM_0_TO_1),
    },
    "scale": {
        "s-softmax": HeadNumber(30.0, _POSITIVE),
        "arcface": HeadNumber(64.0, _POSITIVE),
        "cosface": HeadNumber(64.0, _POSITIVE),
        "sphereface2": HeadNumber(40.0, _POSITIVE),
    },
    "similarity_power": {"sphereface2": HeadNumber(3.0, _FACTOR)},
    "positive_weight": {"sphereface2": HeadNumber(0.7, Option("", above=0, below=1))},
}
"""Numbers of angular heads, each with the kinds that take it."""


def number_of(name: str, kind: str) -> HeadNumber:
    """A number of a kind of head; where it does not take it, that of the first kind that does."""
    kinds = HEAD_NUMBERS[name]
    return kinds.get(kind, next(iter(kinds.values())))


def head_number(name: str, kind: str, value: float | None) -> float:
    """The value of a number for a kind of head; None stands for the default.

    Raises:
        UsageError: it is out of range.

    >>> head_number("margin", "cosface", None)
    0.35
    """
    default, about = number_of(name, kind)
    if value is None:
        return default
    if not about.allows(value):
        expected = "a positive number" if about == _POSITIVE else about.expected
        raise invalid(name, value, expected, default=default)
    return float(value)

"""Errors that a user can cause, classed by what can be done about them.

Every message names the place, what arrived, what was expected and what to try.
"""

import difflib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

_REFERENCE = re.compile("\ue000([^\ue001\ue002]*)(?:\ue001([^\ue002]*))?\ue002")
"""A reference as `option` writes it, with characters of Unicode's private use, which no message contains by chance."""


def option(name: str, value: object = None) -> str:
    """A reference to an option inside a message, which each interface spells its own way.

    `option("lr")` reads `lr` in Python and `--lr` on the command line; `option("head", "keep")` reads `head='keep'` and
    `--head keep`.
    """
    shown = "" if value is None else f"\ue001{value!r}"
    return f"\ue000{name}{shown}\ue002"


def in_python(name: str, value: str | None) -> str:
    """An option as a keyword argument."""
    return name if value is None else f"{name}={value}"


def spelled(message: str, spell: Callable[[str, str | None], str] = in_python) -> str:
    """A message with its references to options (`option`) written out."""
    return _REFERENCE.sub(lambda match: spell(match[1], match[2]), message)


class SphereifyError(Exception):
    """Base of every error that this package raises on purpose. Shown on the command line without a traceback."""

    exit_code = 1

    def __str__(self) -> str:
        return self.spelled(in_python)

    def spelled(self, spell: Callable[[str, str | None], str]) -> str:
        """The message with each option as `spell(name, value)` writes it; `value` is a repr, or None where only the
        option is meant."""
        return spelled(super().__str__(), spell)


class SphereifyWarning(UserWarning):
    """A warning whose message may refer to options, as those of the errors do."""

    def __str__(self) -> str:
        return self.spelled(in_python)

    def spelled(self, spell: Callable[[str, str | None], str]) -> str:
        """The message with each option as `spell(name, value)` writes it."""
        return spelled(super().__str__(), spell)


class UsageError(SphereifyError, ValueError):
    """The request itself is wrong: an option, a name, a pattern. Change the call.

    An error about an option knows it; the functions below (`invalid`, `choose`, `no_effect`, …) word such errors.

    Attributes:
        option: name of the option, as Python spells it; None if the error is about something else.
        value: what arrived, if it is known.
        expected: what the option takes, as a noun phrase: "a number above 0"; other options as in Python.
        remedy: what to try, as a sentence without its full stop.
    """

    exit_code = 2

    def __init__(
        self,
        message: str = "",
        *,
        option: str | None = None,
        value: object = None,
        expected: str = "",
        remedy: str = "",
    ):
        super().__init__(message)
        self.option, self.value, self.expected, self.remedy = option, value, spelled(expected), spelled(remedy)

    def __reduce__(self) -> tuple[Any, ...]:
        """Arguments for pickling; a value that is no number or text, such as a lambda, is kept as its repr."""
        value = self.value if isinstance(self.value, (str, int, float, Path, type(None))) else repr(self.value)
        return type(self), self.args, {**vars(self), "value": value}


class NoEffectError(UsageError):
    """An option that would change nothing here."""


class ArgumentTypeError(SphereifyError, TypeError):
    """An argument of the wrong type, such as something that is no module where a model is expected."""

    exit_code = 2


class UnsupportedModelError(SphereifyError):
    """The model is in a state that cannot be converted (wrapped, lazy, quantized). Change the model first."""

    exit_code = 2


class PlanMismatchError(SphereifyError):
    """A plan or a set of tensors belongs to another model than the one at hand."""


class ArtifactError(SphereifyError):
    """An artifact on disk is missing, damaged, newer than this version, or in the way."""


class HubError(ArtifactError):
    """A repository on the Hugging Face Hub is missing, closed to this user, or out of reach.

    Attributes:
        is_missing: True if there is no such repository or revision.
        is_missing_file: True if the repository is there, and has no such file.
    """

    def __init__(self, message: str, *, is_missing: bool = False, is_missing_file: bool = False):
        super().__init__(message)
        self.is_missing, self.is_missing_file = is_missing, is_missing_file


class DataError(SphereifyError):
    """A data set cannot be read or does not fit the model."""


class ExportError(SphereifyError):
    """A model cannot be written in that form, or what was written computes something else."""


class TrainingError(SphereifyError, ArithmeticError):
    """Training cannot go on: a loss that is not finite."""


class Interrupted(SphereifyError):
    """A signal asked to stop; what was done is saved."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.exit_code = 128 + signal

    def __reduce__(self) -> tuple[type, tuple[str, int]]:  # so that it can come from another process
        return type(self), (str(self), self.exit_code - 128)


def without_colours(text: str) -> str:
    """A text without the escape sequences that colour it in a terminal."""
    return _COLOUR.sub("", text)


_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, for a message of one line."""
    lines = without_colours(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def invalid(
    name: str,
    value: object,
    expected: str,
    remedy: str = "",
    *,
    default: float | None = None,
    place: str = "",
) -> UsageError:
    """The error for a value that an option does not take.

    Args:
        name: the option, as Python spells it.
        value: what arrived.
        expected: what it takes, as a noun phrase: "a number above 0".
        remedy: what to try, as a sentence without its full stop.
        default: the default, if it is to be told.
        place: what the message begins with, if it is not the option by itself.

    >>> error = invalid("lr", -1.0, "a number above 0", "A usual value is 1e-3")
    >>> print(error)
    lr: got -1.0, expected a number above 0. A usual value is 1e-3.
    >>> error.option, error.value, error.expected
    ('lr', -1.0, 'a number above 0')
    """
    told = "" if default is None else f"; the default is {default:g}"
    advice = f". {remedy}." if remedy else ""
    message = f"{place or option(name)}: got {value!r}, expected {expected}{told}{advice}"
    return UsageError(message, option=name, value=value, expected=expected, remedy=remedy)


def choose(name: str | None, value: object, choices: Iterable[str], *, place: str = "") -> UsageError:
    """The error for a word that is not among `choices`, with the nearest one suggested.

    Args:
        name: the option; None if the word is not the value of one.
        value: what arrived.
        choices: what it takes.
        place: what the message begins with, if it is not the option by itself.

    >>> print(choose("head", "s-softmx", ["keep", "s-softmax"]))
    head: got 's-softmx', expected one of keep, s-softmax. Did you mean 's-softmax'?
    """
    choices = list(choices)
    expected, remedy = f"one of {', '.join(choices)}", did_you_mean(str(value), choices)
    message = f"{place or option(name or '')}: got {value!r}, expected {expected}.{remedy and ' '}{remedy}"
    return UsageError(message, option=name, value=value, expected=expected, remedy=remedy)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The nearest of some words to one that is not among them, as a question; empty if none is near.

    >>> did_you_mean("formt", ("format", "opset"))
    "Did you mean 'format'?"
    """
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"Did you mean {near[0]!r}?" if near else ""


def no_effect(name: str, where: str = "", *, since: str = "", value: object = None) -> NoEffectError:
    """The error for an option that would change nothing.

    Args:
        name: the option.
        where: the circumstances: "without …", "on …".
        since: the reason, if that is what there is to tell.
        value: what arrived, if it is to be told.

    >>> print(no_effect("scale", f"on {option('head', 'a-softmax')}"))
    scale: has no effect on head='a-softmax'
    >>> print(no_effect("radius", since="there is no convolution", value=2.0))
    radius=2.0: has no effect, since there is no convolution
    """
    why = f", since {since}" if since else f" {where}"
    return NoEffectError(f"{option(name, value)}: has no effect{why}", option=name, value=value)


def exclusive(first: str, second: str, expected: str = "one at a time") -> UsageError:
    """The error for two options that were both given, of which one is expected.

    >>> print(exclusive("pretrained", "weights", "one source of weights"))
    pretrained and weights: got both, expected one source of weights
    """
    message = f"{option(first)} and {option(second)}: got both, expected {expected}"
    return UsageError(message, option=first, expected=expected)


def refused(name: str, why: str, *, value: object = None) -> UsageError:
    """The error for an option that is refused for a reason of its own.

    Args:
        name: the option.
        why: the reason, and what to try.
        value: what arrived, if it is to be told.

    >>> print(refused("fsdp", f"does not go with {option('ema')}"))
    fsdp: does not go with ema
    """
    return UsageError(f"{option(name, value)}: {why}", option=name, value=value)


def wrong_type(where: str, value: object, expected: str) -> ArgumentTypeError:
    """The error for an argument of the wrong type.

    >>> print(wrong_type("AngularLoss", [1], "a model or an AngularHead"))
    AngularLoss: got list, expected a model or an AngularHead
    """
    return ArgumentTypeError(f"{where}: got {type(value).__name__}, expected {expected}")

"""Errors that a user can cause, classed by what can be done about them.

Every message names the place, what arrived, what was expected and what to try.
"""

import difflib
import re
from collections.abc import Callable, Iterable

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
    """The request itself is wrong: an option, a name, a pattern. Change the call."""

    exit_code = 2


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


def invalid(name: str, value: object, expected: str, remedy: str = "") -> UsageError:
    """The error for a value that an option does not take.

    Args:
        name: the option, as Python spells it.
        value: what arrived.
        expected: what it takes, as a noun phrase: "a number above 0".
        remedy: what to try, as a sentence without its full stop.

    >>> print(invalid("lr", -1.0, "a number above 0", "A usual value is 1e-3"))
    lr: got -1.0, expected a number above 0. A usual value is 1e-3.
    """
    advice = f". {remedy}." if remedy else ""
    return UsageError(f"{option(name)}: got {value!r}, expected {expected}{advice}")


def wrong_type(where: str, value: object, expected: str) -> ArgumentTypeError:
    """The error for an argument of the wrong type.

    >>> print(wrong_type("AngularLoss", [1], "a model or an AngularHead"))
    AngularLoss: got list, expected a model or an AngularHead
    """
    return ArgumentTypeError(f"{where}: got {type(value).__name__}, expected {expected}")


def choose(what: str, given: object, choices: Iterable[str]) -> UsageError:
    """The error for a word that is not among `choices`, with the nearest one suggested."""
    choices = list(choices)
    near = difflib.get_close_matches(str(given), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UsageError(f"{what}: got {given!r}, expected one of {', '.join(choices)}.{hint}")

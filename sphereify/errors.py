"""What a user can get wrong, classed by what can be done about it.

Every message names the place, what arrived, what was expected and what to try.
"""

import difflib
from collections.abc import Iterable


class SphereifyError(Exception):
    """Base of every error that this package raises on purpose. Shown on the command line without a traceback."""

    exit_code = 1


class UsageError(SphereifyError, ValueError):
    """The request itself is wrong: an option, a name, a pattern. Change the call."""

    exit_code = 2


class UnsupportedModelError(SphereifyError):
    """The model is in a state that cannot be converted (wrapped, lazy, quantized). Change the model first."""

    exit_code = 2


class PlanMismatchError(SphereifyError):
    """A plan or a set of tensors belongs to another model than the one at hand."""


class ArtifactError(SphereifyError):
    """An artifact on disk is missing, damaged, newer than this version, or in the way."""


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


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, for a message of one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def choose(what: str, given: object, choices: Iterable[str]) -> UsageError:
    """The error for a word that is not among `choices`, with the nearest one suggested."""
    choices = list(choices)
    near = difflib.get_close_matches(str(given), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UsageError(f"{what}: got {given!r}, expected one of {', '.join(choices)}.{hint}")

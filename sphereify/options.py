"""Options, each declared once: a field of a frozen dataclass with its type, default, valid values and help.

Python takes the fields as keyword arguments, the command line makes its options from them, and JSON is written from and
read into them.

>>> @dataclass(frozen=True)
... class Rates:
...     lr: float = option_field(1e-3, "Peak learning rate.", above=0, usual="1e-4 to 1e-3")
...     def __post_init__(self):
...         check_options(self)
>>> Rates(lr=0)
Traceback (most recent call last):
    ...
sphereify.errors.UsageError: lr: got 0, expected a number above 0. Usual: 1e-4 to 1e-3.
"""

import dataclasses
import inspect
import math
import numbers
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from sphereify.choices import canonical
from sphereify.errors import choose, did_you_mean, invalid, no_effect, option, spelled
from sphereify.wording import enumerated

_KEY = "option"

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """Help, valid values and presentation of an option; its name, type and default are those of the field."""

    help: str
    """A sentence for the person who sets it, with the unit."""
    panel: str = ""
    """The group under which the command line lists it."""
    choices: tuple[str, ...] = ()
    """Words that it takes, in any case, with `_` for `-` if one likes."""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    noun: str = "a number"
    """Noun for a number within the range, for errors: "a share", "an accuracy"."""
    usual: str = ""
    """Usual values, for help and errors."""
    command_line: str = ""
    """Its name on the command line, if other than `--` and the name with hyphens; "-" if it has none there."""
    metavar: str = ""
    """Name of its value on the command line, if its type says too little."""
    python_help: str = ""
    """Help for Python's documentation, if `help` says how the command line writes the value."""

    @property
    def help_in_python(self) -> str:
        """Help for Python's documentation, with other options as Python spells them."""
        return spelled(self.python_help or self.help)

    @property
    def expected(self) -> str:
        """The valid values, as a noun phrase."""
        bounds = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        phrases = [f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None]
        of = "of " if phrases and phrases[0].startswith("at ") else ""
        return f"{self.noun} {of}{' and '.join(phrases)}"

    def allows(self, value: Any) -> bool:
        """True if a value is a finite number within the range."""
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
            return False
        number = float(value)
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    @property
    def is_number(self) -> bool:
        """True if a range is declared."""
        return any(bound is not None for bound in (self.at_least, self.above, self.at_most, self.below))


def option_field(default: Any, help: str, **about: Any) -> Any:
    """A dataclass field that is an option; `about` are the fields of `Option`."""
    start: dict[str, Any] = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**start, metadata={_KEY: Option(help, **about)})


def same_option(cls: Any, name: str, **changes: Any) -> Any:
    """A dataclass field that is an option of another dataclass, with its default; `changes` are fields of `Option`.

    >>> @dataclass(frozen=True)
    ... class Rates:
    ...     lr: float = option_field(1e-3, "Peak learning rate.", above=0)
    >>> @dataclass(frozen=True)
    ... class Settings:
    ...     peak: float = same_option(Rates, "lr", panel="Training")
    >>> Settings().peak, options_of(Settings)["peak"].above
    (0.001, 0)
    """
    about = dataclasses.replace(options_of(cls)[name], **changes)
    return dataclasses.field(default=_field(cls, name).default, metadata={_KEY: about})


def options_of(cls: Any) -> dict[str, Option]:
    """The options that a dataclass declares, by name and in order."""
    return {field.name: field.metadata[_KEY] for field in dataclasses.fields(cls) if _KEY in field.metadata}


def check_options(values: Any) -> None:
    """Check each declared option of a dataclass instance by itself, and bring words into their canonical spelling.

    None passes where it is the default.

    Raises:
        UsageError: the first value that is not valid, with what is.
    """
    for name in options_of(values):
        given = getattr(values, name)
        value = checked_option(type(values), name, given)
        if value is not given:
            object.__setattr__(values, name, value)


def checked_option(cls: Any, name: str, value: Any, *, called: str = "", required: bool = False) -> Any:
    """A value of an option that a dataclass declares, valid; a word in its canonical spelling.

    None passes where it is the default.

    Args:
        cls: the dataclass.
        name: the option.
        value: what arrived.
        called: the name of the option in the error, if it has another one where it was given.
        required: True to refuse None, too.

    Raises:
        UsageError: the value is not valid.

    >>> @dataclass(frozen=True)
    ... class Rates:
    ...     lr: float = option_field(1e-3, "Peak learning rate.", above=0)
    >>> checked_option(Rates, "lr", -1, called="rate")
    Traceback (most recent call last):
        ...
    sphereify.errors.UsageError: rate: got -1, expected a number above 0
    """
    field, called = _field(cls, name), called or name
    about: Option = field.metadata[_KEY]
    if value is None and field.default is None and not required:
        return value
    if about.choices:
        word = canonical(str(value))
        if word not in about.choices:
            raise choose(called, value, about.choices)
        return word
    if about.is_number and not about.allows(value):
        raise invalid(called, value, about.expected, f"Usual: {about.usual}" if about.usual else "")
    is_whole = isinstance(value, numbers.Integral)
    if about.is_number and not is_whole and float not in alternatives(get_type_hints(cls)[name]):
        raise invalid(called, value, about.expected.replace("a number", "a whole number", 1))
    if about.is_number and not isinstance(value, (int, float)):  # a number of numpy's
        return int(value) if is_whole else float(value)
    return value


def from_keywords(cls: type[T], keywords: Mapping[str, Any], function: str) -> T:
    """The options that a function was given as keywords.

    Raises:
        TypeError: a name that is no option.
        UsageError: a value that is not valid.
    """
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in keywords:
        if name not in names:
            hint = did_you_mean(name, names)
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint and '. '}{hint}")
    return cls(**keywords)


def _field(cls: Any, name: str) -> "dataclasses.Field[Any]":
    return next(field for field in dataclasses.fields(cls) if field.name == name)


def check_belongs(name: str, words: Iterable[str], chooser: str, word: str) -> None:
    """Make sure that an option has an effect.

    Args:
        name: the option that was given.
        words: the choices with which it has one.
        chooser: the option that chooses among such words.
        word: its choice.

    Raises:
        NoEffectError: it has none.

    >>> check_belongs("scale", ("s-softmax",), "head", "a-softmax")
    Traceback (most recent call last):
        ...
    sphereify.errors.NoEffectError: scale: has no effect on head='a-softmax'; it belongs to s-softmax
    """
    if word not in words:
        raise no_effect(name, f"on {option(chooser, word)}; it belongs to {enumerated(words)}")


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a value may have, by its type hint.

    >>> alternatives(int | None), alternatives(str)
    ((<class 'int'>, <class 'NoneType'>), (<class 'str'>,))
    """
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def to_json(values: Any) -> dict[str, Any]:
    """The fields of a dataclass instance as plain JSON values; a dataclass inside becomes a dictionary of its own.

    >>> to_json(Option("Peak learning rate.", above=0))["above"]
    0
    """
    return {field.name: _plain(getattr(values, field.name)) for field in dataclasses.fields(values)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_json(cls: type[T], plain: Mapping[str, Any]) -> T:
    """The instance of a dataclass that `to_json` was given. A field that is missing takes its default.

    Raises:
        UsageError: a name that is no field, with the nearest one; or a value that is not valid.

    >>> about = Option("Head.", choices=("keep", "auto"))
    >>> from_json(Option, to_json(about)) == about
    True
    """
    hints = get_type_hints(cls)
    for name in plain:
        if name not in hints:
            raise choose(None, name, hints, place="option")
    return cls(**{name: _typed(hints[name], value) for name, value in plain.items()})


def _typed(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_json(hint, value)  # type: ignore[arg-type]
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if isinstance(value, str) and hint == Path | None else value


def with_keywords_of(cls: Any) -> Callable[[Function], Function]:
    """Show the options of a dataclass in the signature and the documentation of a function that takes `**keywords`.

    The options become keyword-only parameters of `inspect.signature`, which `help()` and completion read. In the
    docstring they take the place of the line `{options}`.

    >>> @dataclass(frozen=True)
    ... class Rates:
    ...     lr: float = option_field(1e-3, "Peak learning rate.")
    >>> @with_keywords_of(Rates)
    ... def train(model, *, epochs=1, **rates):
    ...     '''Train a model.
    ...
    ...     {options}
    ...     '''
    >>> inspect.signature(train)
    <Signature (model, *, lr: float = 0.001, epochs=1)>
    >>> print(inspect.getdoc(train))
    Train a model.
    <BLANKLINE>
    lr: Peak learning rate.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        positional = [p for p in own if p.kind is not p.KEYWORD_ONLY]
        keywords = [p for p in own if p.kind is p.KEYWORD_ONLY]
        parameters = [*positional, *map(_parameter, dataclasses.fields(cls)), *keywords]
        function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        if function.__doc__ is not None:  # as it is under python -OO
            function.__doc__ = _with_options(function.__doc__, cls)
        return function

    return decorate


def _parameter(field: "dataclasses.Field[Any]") -> inspect.Parameter:
    has_factory = field.default_factory is not dataclasses.MISSING
    default = field.default_factory() if has_factory else field.default  # type: ignore[operator, misc]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field.type)


def _with_options(docstring: str, cls: Any) -> str:
    """A docstring with the options of a dataclass in place of the line `{options}`."""
    lines = docstring.splitlines()
    place = next(i for i, line in enumerate(lines) if line.strip() == "{options}")
    indent = lines[place].removesuffix("{options}")
    described = [
        textwrap.fill(
            f"{name}: {about.help_in_python}",
            width=120,
            initial_indent=indent,
            subsequent_indent=f"{indent}    ",
            break_on_hyphens=False,
        )
        for name, about in options_of(cls).items()
    ]
    return "\n".join([*lines[:place], *described, *lines[place + 1 :]])

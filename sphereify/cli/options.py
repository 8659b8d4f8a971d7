"""Options of the command line, made from the dataclasses that declare them: the one place where Typer meets them."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from sphereify.cli.spelling import Spelling, use
from sphereify.convert.options import Overrides
from sphereify.errors import UsageError, spelled
from sphereify.options import Option, alternatives, options_of


@dataclass(frozen=True)
class Fields:
    """A choice among the options of a dataclass, in the annotation of a command's parameter.

    `Annotated[Settings, Fields(only=("device", "amp"))]` gives Settings with these two options, the others at their
    defaults; `Annotated[dict, Fields(of=ConversionOptions)]` gives the values by name, unchecked.
    """

    of: Any = None
    """The dataclass, if it is not the annotated type."""
    only: tuple[str, ...] = ()
    """Options to take; default: all."""
    without: tuple[str, ...] = ()
    """Options to leave out."""
    panel: str | None = None
    """The group under which `--help` lists them; default: as declared."""


def with_options(
    prepare: Callable[[typer.Context, dict[str, Any]], dict[str, Any]] = lambda context, values: values,
    *,
    flags: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function whose parameters may be dataclasses of options.

    Each option of such a dataclass becomes an option of the command, and the function receives the instance that their
    values make. Two dataclasses may declare an option of one name: it is one option, and both get its value.

    Args:
        prepare: changes the values by parameter name, as they came from the command line, before anything is made of
            them.
        flags: flags of the command for names that the library's messages use.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own: list[str] = []
        spelling = Spelling(flags)
        groups: dict[str, _Group] = {}
        parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        for parameter in inspect.signature(function).parameters.values():
            group = _group(parameter.annotation)
            if group is None:
                own.append(parameter.name)
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            else:
                groups[parameter.name] = group
                parameters += group.parameters(spelling)
        unique: dict[str, inspect.Parameter] = {}
        for parameter in parameters:
            unique.setdefault(parameter.name, parameter)

        @functools.wraps(function)
        def command(context: typer.Context, **values: Any) -> None:
            use(spelling)
            values = prepare(context, values)
            made = {name: group.make(values) for name, group in groups.items()}
            arguments = {**values, "context": context}
            function(**{name: arguments[name] for name in own}, **made)

        command.__signature__ = inspect.Signature(list(unique.values()))  # type: ignore[attr-defined]
        command.__annotations__ = {name: parameter.annotation for name, parameter in unique.items()}
        return command

    return decorate


@dataclass(frozen=True)
class _Group:
    """The options that one parameter of a command stands for."""

    cls: Any
    fields: Fields
    as_dict: bool

    def parameters(self, spelling: Spelling) -> list[inspect.Parameter]:
        """A parameter for Typer for each option; `spelling` learns them."""
        declared = [option for option in _declared(self.cls) if self._takes(option[0])]
        for name, default, _, about in declared:
            spelling.learn(name, default, about)
        return [_parameter(*option, self.fields.panel, spelling) for option in declared]

    def make(self, values: Mapping[str, Any]) -> Any:
        """The instance that the values of the command line describe."""
        if self.as_dict:
            return {n: _value(h, d, values[n]) for n, d, h, _ in _declared(self.cls) if self._takes(n)}
        return self._instance(self.cls, values)

    def _instance(self, cls: Any, values: Mapping[str, Any]) -> Any:
        hints, arguments = get_type_hints(cls), {}
        for field in dataclasses.fields(cls):
            hint = hints[field.name]
            if dataclasses.is_dataclass(hint):
                arguments[field.name] = self._instance(hint, values)
            elif field.name in values and field.name in options_of(cls) and self._takes(field.name):
                arguments[field.name] = _value(hint, _default(field), values[field.name])
        return cls(**arguments)

    def _takes(self, name: str) -> bool:
        return (not self.fields.only or name in self.fields.only) and name not in self.fields.without


def _group(hint: Any) -> _Group | None:
    """The options that an annotation stands for; None if it is that of an ordinary parameter."""
    if get_origin(hint) is Annotated:
        kind, *marks = get_args(hint)
        fields = next((mark for mark in marks if isinstance(mark, Fields)), None)
        return _Group(fields.of or kind, fields, as_dict=fields.of is not None) if fields is not None else None
    return _Group(hint, Fields(), as_dict=False) if dataclasses.is_dataclass(hint) else None


def _declared(cls: Any) -> list[tuple[str, Any, Any, Option]]:
    """Name, default, type and description of each option that the command line has, nested dataclasses included."""
    hints, declared = get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        about = options_of(cls).get(field.name)
        if about is not None and about.command_line != "-":
            declared.append((field.name, _default(field), hints[field.name], about))
        elif dataclasses.is_dataclass(hints[field.name]):
            declared += _declared(hints[field.name])
    return declared


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


# --------------------------------------------------------------------------------------------- options and their values


def _parameter(
    name: str, default: Any, hint: Any, about: Option, panel: str | None, spelling: Spelling
) -> inspect.Parameter:
    flag = spelling(name)
    usual = f" Usual: {about.usual}." if about.usual and about.usual not in about.help else ""
    information = typer.Option(
        f"{flag}/--no-{flag[2:]}" if default is True else flag,
        help=spelled(about.help + usual, spelling).replace("[", r"\["),  # not Rich's markup
        rich_help_panel=about.panel if panel is None else panel or None,
        metavar=about.metavar or None,
    )
    # The empty list is the default of an option that may be repeated, which Typer spells None.
    shown = None if _is_repeatable(hint) else default
    annotation = Annotated[_terminal_type(hint), information]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=shown, annotation=annotation)


def _terminal_type(hint: Any) -> Any:
    """The type by which Typer reads the words of an option."""
    kinds = alternatives(hint)
    if _is_repeatable(hint):
        inside = next((one for one in (int, float) if any(one in get_args(kind) for kind in kinds)), str)
        return list[inside] | None  # type: ignore[valid-type]
    kind = next((kind for kind in (bool, int, float, Path) if kind in kinds), str)
    return kind | None if type(None) in kinds else kind


def _is_repeatable(hint: Any) -> bool:
    """True if one of the types that a value may have is a collection."""
    return any(issubclass(get_origin(kind) or object, Iterable) for kind in alternatives(hint))


def _value(hint: Any, default: Any, words: Any) -> Any:
    """The value of an option from what Typer read."""
    if not _is_repeatable(hint):
        return words
    if not words:
        return default
    return dict(map(parse_override, words)) if hint == Overrides else tuple(words)


def parse_override(text: str) -> tuple[str, dict[str, Any] | str]:
    """PATTERN=keep or PATTERN=key:value,… as a pair for `ConversionOptions.overrides`.

    Raises:
        UsageError: a text of another form.

    >>> parse_override("layer1.*=operator:sigmoid,k:0.7")
    ('layer1.*', {'operator': 'sigmoid', 'k': 0.7})
    """
    pattern, equals, setting = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"--override: got {text!r}, expected PATTERN=keep or PATTERN=operator:linear,k:0.3")
    if setting == "keep":
        return pattern, "keep"
    values: dict[str, Any] = {}
    for part in setting.split(","):
        key, colon, value = part.partition(":")
        if not colon:
            raise UsageError(f"--override: got {part!r} in {text!r}, expected key:value, such as operator:linear")
        values[key.strip()] = _setting(key.strip(), value.strip())
    return pattern, values


def _setting(key: str, text: str) -> float | str | bool:
    if key == "weighted":
        if text.lower() not in ("true", "false"):
            raise UsageError(f"--override: {key}: got {text!r}, expected true or false")
        return text.lower() == "true"
    if key not in _NUMBERS:
        return text
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--override: {key}: got {text!r}, expected a number") from None


_NUMBERS = ("k", "radius", "magnitude_radius", "magnitude_beta")
"""Keys of an override whose value is a number."""

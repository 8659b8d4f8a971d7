"""The messages of the package, read off its source: what a page may quote, and the list of all errors."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sphereify import errors

PACKAGE = Path(errors.__file__).parent
HOLE = "…"
"""What stands for the variable part of a message."""

ERRORS = {
    name: member
    for name, member in vars(errors).items()
    if isinstance(member, type) and issubclass(member, errors.SphereifyError)
}
"""The classes of errors by name."""
WORDINGS: dict[str, Any] = {
    name: getattr(errors, name) for name in ("invalid", "choose", "no_effect", "exclusive", "refused", "wrong_type")
}
"""The functions that word an error, by name."""


@dataclass(frozen=True)
class Message:
    """A message that the source holds."""

    text: str
    """The message, with `…` for what is filled in and with options as Python spells them."""
    place: str
    """The module, relative to the package."""
    line: int
    error: str = ""
    """The class of error that is made of it; empty for another string."""


def template(node: ast.expr) -> str | None:
    """The text of a string expression with `…` for what is filled in; None if the expression is no string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else _filled(part) for part in node.values)
    return None


def strings(tree: ast.AST) -> Iterator[ast.expr]:
    """The string expressions in a tree, whole: no docstrings, no parts of f-strings."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue  # a docstring
        if isinstance(child, ast.expr) and template(child) is not None:
            yield child
        if not isinstance(child, ast.JoinedStr):
            yield from strings(child)
        else:
            for part in child.values:
                if isinstance(part, ast.FormattedValue):
                    yield from strings(part)


@cache
def source(place: str) -> ast.Module:
    """The syntax tree of a module of the package."""
    return ast.parse((PACKAGE / place).read_text(encoding="utf-8"))


@cache
def all_strings() -> tuple[str, ...]:
    """The texts of all string expressions of the package."""
    places = [file.relative_to(PACKAGE).as_posix() for file in sorted(PACKAGE.rglob("*.py"))]
    return tuple(template(node) or "" for place in places for node in strings(source(place)))


def error_messages() -> list[Message]:
    """The message of each place in the package that makes an error of its own, in the order of the source."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE).as_posix()
        if place == "errors.py":
            continue  # which words the errors of the others
        for node in ast.walk(source(place)):
            if isinstance(node, ast.Call) and (made := _message(node)):
                found.append(Message(made[1], place, node.lineno, made[0]))
    return sorted(found, key=lambda message: (message.place, message.line))


def _message(call: ast.Call) -> tuple[str, str] | None:
    """The class and the text of the error that a call makes; None for any other call, or a text made elsewhere."""
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    if name in ERRORS:
        text = template(call.args[0]) if call.args else None
        return (name, text) if text and text.strip(HOLE) else None
    if name not in WORDINGS:
        return None
    arguments = [template(argument) or _FILLED_IN for argument in call.args]
    keywords = {keyword.arg or "": template(keyword.value) or _FILLED_IN for keyword in call.keywords}
    error = WORDINGS[name](*arguments, **keywords)
    return type(error).__name__, str(error)


class _FilledIn(str):
    """An argument that the source does not say: it is written as `…`."""

    def __repr__(self) -> str:
        return HOLE

    def __str__(self) -> str:
        return ""  # close to no choice, so that none is suggested

    def __format__(self, form: str) -> str:
        return HOLE

    def __iter__(self) -> Iterator[str]:
        return iter([HOLE])

    def __bool__(self) -> bool:
        return True


_FilledIn.__name__ = HOLE
_FILLED_IN = _FilledIn()


def _filled(part: ast.expr) -> str:
    value = part.value if isinstance(part, ast.FormattedValue) else part
    return _option(value) or HOLE


def _option(value: ast.expr) -> str | None:
    """The option that a call of `errors.option` names, as Python spells it."""
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "option"):
        return None
    arguments = [argument.value if isinstance(argument, ast.Constant) else HOLE for argument in value.args]
    return errors.spelled(errors.option(*arguments)).replace(f"'{HOLE}'", HOLE)

"""The messages of the package, read off its source: what a page may quote, and the list of all errors."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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
        for node in ast.walk(source(place)):
            if isinstance(node, ast.Call) and (made := _message(node)):
                found.append(Message(made[1], place, node.lineno, made[0]))
    return sorted(found, key=lambda message: (message.place, message.line))


def _message(call: ast.Call) -> tuple[str, str] | None:
    """The class and the text of the error that a call makes; None for any other call, or a text made elsewhere."""
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    texts = [template(argument) for argument in call.args]
    if name in ERRORS and texts and texts[0] and texts[0].strip(HOLE):
        return name, texts[0]
    first, _, *more = [*(text or HOLE for text in texts), "", "", ""]
    if name == "invalid" and len(texts) > 2:
        advice = f". {more[1]}." if more[1] else ""
        return "UsageError", f"{first}: got {HOLE}, expected {more[0]}{advice}"
    if name == "wrong_type" and len(texts) > 2:
        return "ArgumentTypeError", f"{first}: got {HOLE}, expected {more[0]}"
    if name == "choose" and len(texts) > 2:
        return "UsageError", f"{_option(call.args[0]) or first}: got {HOLE}, expected one of {HOLE}"
    return None


def _filled(part: ast.expr) -> str:
    value = part.value if isinstance(part, ast.FormattedValue) else part
    return _option(value) or HOLE


def _option(value: ast.expr) -> str | None:
    """The option that a call of `errors.option` names, as Python spells it."""
    if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "option"):
        return None
    arguments = [argument.value if isinstance(argument, ast.Constant) else HOLE for argument in value.args]
    return errors.spelled(errors.option(*arguments)).replace(f"'{HOLE}'", HOLE)

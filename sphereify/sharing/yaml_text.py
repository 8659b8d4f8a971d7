"""Plain values as YAML, for the head of a model card."""

import json
import re
from typing import Any

_PLAIN = re.compile(r"[A-Za-z][\w./\-]*")
_WORDS = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")


def as_yaml(value: Any, indent: int = 0) -> str:
    """Dictionaries, lists, text and numbers as the lines of a YAML block, each with its line break.

    >>> print(as_yaml({"license": "mit", "tags": ["a", "b: c"]}), end="")
    license: mit
    tags:
    - a
    - "b: c"
    """
    space = " " * indent
    if isinstance(value, dict):
        lines = []
        for key, inner in value.items():
            nested = isinstance(inner, (dict, list)) and bool(inner)
            lines.append(
                f"{space}{key}:\n{as_yaml(inner, _inside(inner, indent))}"
                if nested
                else f"{space}{key}: {_scalar(inner)}\n"
            )
        return "".join(lines)
    if isinstance(value, list):
        return "".join(
            f"{space}- {as_yaml(inner, indent + 2)[indent + 2 :]}"
            if isinstance(inner, dict)
            else f"{space}- {_scalar(inner)}\n"
            for inner in value
        )
    return f"{space}{_scalar(value)}\n"


def _inside(inner: Any, indent: int) -> int:
    return indent + 2 if isinstance(inner, dict) else indent


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)

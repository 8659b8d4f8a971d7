"""The reasons and notes that a plan can give, read off the planner's source: docs/plans.md explains each of them."""

import ast
import re
from collections.abc import Iterator
from functools import cache

from documentation.messages import source, strings, template

MODULES = {
    "convert/planner.py": {"_no_sites", "_not_classifiers", "_nothing_to_convert", "_check_head", "_operator"},
    "convert/notes.py": {"plan_details", "few"},
    "convert/graph.py": {"read_graph", "_is_shortcut_by_name"},
    "convert/sites.py": set(),
    "convert/causality.py": set(),
    "convert/plan.py": {"of", "summary", "__str__", "size", "from_json"},
}
"""The modules in which reasons and notes are worded, each with the functions whose texts are something else."""
FUNCTIONS = {"convert/merging.py": "merging_note"}
"""Modules in which a single function words a note."""
FRAGMENTS = {
    "not included",
    "the model",
    "depthwise convolution",
    "linear map",
    "causal convolution",
    "about … of the time that all angles take",
    "and … like it",
    "… …: give them as example_inputs if they call it",
    "…; …",
    "; without:",
}
"""Pieces of longer texts, which the page quotes as a whole."""


@cache
def reasons() -> tuple[str, ...]:
    """The texts of all reasons and notes, with `…` for what is filled in."""
    found: dict[str, None] = {}
    for place, others in MODULES.items():
        for node in strings(_Reasons(others).visit(ast.parse(ast.unparse(source(place))))):
            found.setdefault(_normal(template(node) or ""))
    for place, name in FUNCTIONS.items():
        function = next(n for n in ast.walk(source(place)) if isinstance(n, ast.FunctionDef) and n.name == name)
        for node in strings(function):
            found.setdefault(_normal(template(node) or ""))
    return tuple(text for text in found if " " in text and re.search(r"[a-z]{3}", text) and text not in FRAGMENTS)


def _normal(text: str) -> str:
    return text.strip().strip(";").strip()


class _Reasons(ast.NodeTransformer):
    """Takes out what holds no reasons: raised errors, and some functions."""

    def __init__(self, functions: set[str]):
        self.functions = functions

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.copy_location(ast.Pass(), node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return ast.Pass() if node.name in self.functions else self.generic_visit(node)


def unexplained(page: str) -> Iterator[str]:
    """The reasons and notes that a page does not quote as `code`."""
    return (reason for reason in reasons() if f"`{reason}`" not in page)

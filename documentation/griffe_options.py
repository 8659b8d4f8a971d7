"""Griffe reads the source without running it; this extension adds what `with_keywords_of` does when it runs.

It also sets the examples of docstrings, which begin with `>>>`, as blocks of code.
"""

import ast
import importlib
import inspect
import re
from typing import Any

import griffe


class Options(griffe.Extension):
    """Shows the options of a dataclass in the signature and the docstring of a function that takes them as keywords."""

    def on_function_instance(self, *, node: ast.AST, func: griffe.Function, **kwargs: Any) -> None:
        """Take the docstring and the parameters of the running function where the source has a stand-in."""
        for parameter in func.parameters:
            parameter.default = _written_out(parameter.default, func.module.path)
        if func.docstring is None or "{options}" not in func.docstring.value:
            return
        function = getattr(importlib.import_module(func.module.path), func.name)
        func.docstring.value = inspect.cleandoc(function.__doc__)
        written = {parameter.name: parameter.default for parameter in func.parameters}
        parameters = [_parameter(p, written.get(p.name)) for p in inspect.signature(function).parameters.values()]
        func.parameters = griffe.Parameters(*parameters)

    def on_instance(self, *, node: Any, obj: griffe.Object, **kwargs: Any) -> None:
        """Fence the examples."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    """A docstring with each paragraph that begins with `>>>` as a block of code.

    >>> print(fenced("The half.\\n\\n>>> half(4)").replace("`", "'").replace(">>>", ">"))
    The half.
    <BLANKLINE>
    '''pycon
    > half(4)
    '''
    """
    paragraphs = re.split(r"\n[ \t]*\n", docstring)
    return "\n\n".join(f"```pycon\n{p.strip()}\n```" if p.lstrip().startswith(">>>") else p for p in paragraphs)


def _written_out(default: Any, module: str) -> Any:
    """The value of a default that the source takes from a class of options, `EnergyOptions.s`; any other as it is."""
    if not re.fullmatch(r"\w+Options\.\w+", str(default)):
        return default
    cls, name = str(default).split(".")
    return repr(getattr(getattr(importlib.import_module(module), cls), name))


def _parameter(parameter: inspect.Parameter, written: Any) -> griffe.Parameter:
    """A parameter of the running function; `written` is its default in the source, if it is there."""
    hint = parameter.annotation
    shown = None if hint is parameter.empty else hint if isinstance(hint, str) else inspect.formatannotation(hint)
    return griffe.Parameter(
        parameter.name,
        annotation=None if shown is None else shown.replace("typing.", ""),
        kind=griffe.ParameterKind(parameter.kind.description),
        default=None if parameter.default is parameter.empty else written or repr(parameter.default),
    )

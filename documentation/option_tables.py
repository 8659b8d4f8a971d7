"""The reference of the options in Python: each dataclass of options as a table, from the dataclass itself."""

import dataclasses
import importlib
from typing import Any

from documentation.commands import plain
from sphereify.options import options_of

CLASSES = (
    "sphereify.convert.options.ConversionOptions",
    "sphereify.training.settings.Settings",
    "sphereify.training.terms.Terms",
    "sphereify.training.data_options.DataOptions",
    "sphereify.training.knowledge_options.KnowledgeOptions",
    "sphereify.training.evaluation_options.EvaluationOptions",
    "sphereify.training.verification_options.VerificationOptions",
    "sphereify.training.comparison_options.ComparisonOptions",
    "sphereify.calibration.options.CalibrationOptions",
    "sphereify.calibration.options.SuggestionOptions",
    "sphereify.deployment.options.ExportOptions",
    "sphereify.preparation.PreparationOptions",
    "sphereify.prediction.options.PredictOptions",
    "sphereify.sharing.options.PushOptions",
    "sphereify.models.SourceOptions",
    "sphereify.convert.input_options.InputOptions",
)
"""The classes of options, in the order of the page."""


def page() -> str:
    """The page of all options, in Markdown."""
    lines = [
        "# Options",
        "",
        "Each option is declared once, as a field of a frozen dataclass: with its type, its default, its valid values "
        "and its help. Functions take them as keyword arguments, the [command line](commands.md) as flags.",
    ]
    for path in CLASSES:
        module, _, name = path.rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        lines += ["", f"## {name}", "", f"`{path}`", "", plain((cls.__doc__ or "").split("\n\n")[0]), ""]
        lines += ["| option | type | default | |", "|---|---|---|---|", *_rows(cls)]
    return "\n".join(lines) + "\n"


def _rows(cls: Any) -> list[str]:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    return [
        f"| `{name}` | {_type(fields[name].type, about)} | {_default(fields[name])} | {_help(about)} |"
        for name, about in options_of(cls).items()
    ]


def _type(hint: Any, about: Any) -> str:
    if about.choices:
        return ", ".join(f"`{choice}`" for choice in about.choices)
    shown = hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint))
    return f"`{plain(str(shown)).replace('typing.', '')}`"


def _default(field: Any) -> str:
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return f"`{default!r}`"


def _help(about: Any) -> str:
    bounds = f" Expected: {about.expected}." if about.is_number else ""
    usual = f" Usual: {about.usual}." if about.usual and about.usual not in about.help else ""
    return plain(about.help_in_python + bounds + usual)

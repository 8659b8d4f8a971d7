"""What a person reads in the terminal."""

import sys

from rich.console import Console
from rich.table import Table

from sphereify.convert import ConversionPlan, Decision

COLOURS = {"convert": "green", "keep": "yellow"}


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; where there is none, wide enough that layer names are not cut."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 140, highlight=False)


def plan_table(plan: ConversionPlan) -> Table:
    """Each site of the model, what happens to it, and why."""
    table = Table("layer", "kind", "action", "operator", "role", "why", title=plan.model, header_style="bold")
    for decision in plan.decisions:
        colour = COLOURS[decision.action]
        table.add_row(
            ", ".join([decision.name or "(the model)", *decision.aliases]),
            decision.kind,
            f"[{colour}]{decision.action}[/]",
            _operator(decision),
            "" if decision.role == "hidden" else decision.role,
            decision.reason,
        )
    return table


def print_plan(out: Console, plan: ConversionPlan) -> None:
    """The table, the notes, and the sum in one line."""
    out.print(plan_table(plan))
    for note in plan.notes:
        out.print(f"note: {note}", style="yellow", markup=False)
    out.print(plan.summary(), style="bold", markup=False)


def _operator(decision: Decision) -> str:
    k = "" if decision.k is None else f" k={decision.k:g}"
    shared = f"/{decision.share_k}" if decision.share_k not in (None, "filter") else ""
    return f"{decision.operator or ''}{k}{shared}"

"""What a person reads in the terminal."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from sphereify.calibration.results import Calibration, LayerFit
from sphereify.calibration.suggestion import Suggestion
from sphereify.convert.plan import ConversionPlan, Decision
from sphereify.deployment.exporting import Exported
from sphereify.training import Comparison, Evaluation

COLOURS = {"convert": "green", "keep": "yellow"}


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


def print_export(out: Console, written: Exported) -> None:
    """What was written, and how it was checked."""
    table = Table(show_header=False)
    table.add_row("file", str(written.path))
    table.add_row("format", written.format + (f", opset {written.opset}" if written.opset else ""))
    table.add_row("size", f"{written.size / 1e6:.1f} MB")
    table.add_row("largest difference", "unknown" if written.difference is None else f"{written.difference:.1e}")
    table.add_row("operators", ", ".join(f"{times} {name}" for name, times in written.operators.items()))
    out.print(table)
    out.print(written.note, style=None if written.difference is not None else "yellow", markup=False)


def calibration_table(layers: Iterable[LayerFit], title: str) -> Table:
    """How much of each layer's original output is explained, before and after."""
    table = Table("layer", "copied", "calibrated", "positions", "unknowns", "note", title=title, header_style="bold")
    for layer in layers:
        colour = "green" if layer.after >= 0.8 else "yellow" if layer.after >= 0.5 else "red"
        table.add_row(
            layer.name, _share(layer.before), f"[{colour}]{_share(layer.after)}[/]", f"{layer.rows:,}",
            f"{layer.unknowns:,}", layer.note,
        )  # fmt: skip
    table.caption = "share of the original layer's output that is explained (R²)"
    return table


def print_calibration(out: Console, calibration: Calibration) -> None:
    """Print the fit of each layer in their order, the notes, and the summary."""
    out.print(calibration_table(calibration.layers.values(), "calibration"))
    for note in calibration.notes:
        out.print(f"note: {note}", style="yellow", markup=False)
    out.print(calibration.summary(), style="bold", markup=False)


def print_suggestion(out: Console, suggestion: Suggestion) -> None:
    """Print the layers by what is explained of them, the trials, and the options to give."""
    out.print(calibration_table(suggestion.layers, "the least explained layers first"))
    table = Table("layers excluded", "agreement with the original", header_style="bold")
    for number, agreement in suggestion.trials.items():
        table.add_row(str(number), f"{agreement:.1%}")
    out.print(table)
    if not suggestion.reached:
        out.print(
            f"{suggestion.goal:.1%} was not reached; try --calibration-images with more images, another --operator, or "
            f"accept a greater loss",
            style="yellow",
            markup=False,
        )
    elif not suggestion.exclude:
        out.print(f"{suggestion.agreement:.1%} with all layers converted: nothing to exclude", style="bold")
    if suggestion.exclude:
        first = suggestion.given.get("overrides")  # overrides win over --exclude, and the first one that matches wins
        options = (f"--override {name}=keep" if first else f"--exclude {name}" for name in suggestion.exclude)
        place = ", given before your own --override" if first else ""
        line = f"{suggestion.agreement:.1%} with: {' '.join(options)}{place}"
        out.print(line, style="bold", markup=False, soft_wrap=True)


def _share(value: float) -> str:
    return "< 0" if value < 0 else f"{value:.3f}"


def print_evaluation(out: Console, found: Evaluation, classes: list[str], rows: int = 20) -> None:
    """Accuracies, and those of each class, the worst first."""
    table = Table("class", "images", "accuracy", title="accuracy by class", header_style="bold")
    counts = found.confusion.sum(1).tolist()
    order = sorted(range(len(classes)), key=lambda c: (found.per_class[c] if counts[c] else 2.0, c))
    for place in order[:rows]:
        table.add_row(classes[place], str(counts[place]), f"{found.per_class[place]:.2%}" if counts[place] else "")
    if len(classes) > rows:
        table.caption = f"the {rows} worst of {len(classes)} classes"
    out.print(table)
    skipped = f", {found.skipped} could not be read" if found.skipped else ""
    top5 = f", top-5 {found.top5:.2%}" if len(classes) > 5 else ""
    out.print(f"top-1 {found.top1:.2%}{top5} of {found.images} images{skipped}; "
              f"{found.images_per_second:.0f} images/s", style="bold", markup=False)  # fmt: skip


def comparison_table(found: Comparison) -> Table:
    """One network a line, the original first."""
    table = Table(*found.columns(), header_style="bold")
    for row in found.rows():
        table.add_row(*row)
    return table


def _operator(decision: Decision) -> str:
    k = "" if decision.k is None else f" k={decision.k:g}"
    shared = f"/{decision.share_k}" if decision.share_k not in (None, "filter") else ""
    return f"{decision.operator or ''}{k}{shared}"

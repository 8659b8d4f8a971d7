"""Tables and lines for a person at the terminal. Names of layers and classes may hold brackets, so cells are `Text`."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sphereify.calibration.agreement import RadiusChoice, Trial
from sphereify.calibration.held_out import LOW_CONTRAST
from sphereify.calibration.results import Calibration, LayerFit
from sphereify.calibration.suggestion import Suggestion
from sphereify.convert.plan import ConversionPlan, Decision
from sphereify.deployment.exporting import Exported
from sphereify.training import Comparison, Evaluation, Robustness

COLOURS = {"convert": "green", "keep": "yellow"}


def plan_table(plan: ConversionPlan) -> Table:
    """A row for each site of the model: what happens to it, and why."""
    has_radius = any(decision.radius for decision in plan.decisions)
    radius = ["radius"] if has_radius else []
    headers = ("layer", "kind", "action", "operator", *radius, "role", "why")
    table = Table(*headers, title=Text(plan.model), header_style="bold")
    for decision in plan.decisions:
        _add_row(
            table,
            ", ".join([decision.name or "(the model)", *decision.aliases]),
            decision.kind,
            Text(decision.action, COLOURS[decision.action]),
            _operator(decision),
            *([_radius(decision)] if has_radius else []),
            "" if decision.role == "hidden" else decision.role,
            decision.reason,
        )
    return table


def _radius(decision: Decision) -> str:
    learned = " learned" if decision.learn_radius else ""
    return f"{decision.radius:g}{learned}" if decision.radius else ""


def print_plan(out: Console, plan: ConversionPlan) -> None:
    """Print the table of the sites, the notes, and a summary in one line."""
    out.print(plan_table(plan))
    for note in plan.notes:
        out.print(f"note: {note}", style="yellow", markup=False)
    out.print(plan.summary(), style="bold", markup=False)


def print_export(out: Console, written: Exported) -> None:
    """Print what was written, and how it was checked."""
    rows = {
        "file": str(written.path),
        **({"with": ", ".join(file.name for file in written.companions)} if written.companions else {}),
        "format": written.format + (f", opset {written.opset}" if written.opset else ""),
        "size": f"{written.size / 1e6:.1f} MB",
        "largest difference": "unknown" if written.difference is None else f"{written.difference:.1e}",
        "operators": ", ".join(f"{times} {name}" for name, times in written.operators.items()),
    }
    table = Table(show_header=False)
    for row in rows.items():
        _add_row(table, *row)
    out.print(table)
    out.print(written.note, style=None if written.difference is not None else "yellow", markup=False)


def calibration_table(layers: Iterable[LayerFit], title: str) -> Table:
    """A row for each layer: the share of its original output that is explained, before and after the calibration."""
    table = Table("layer", "copied", "calibrated", "positions", "unknowns", "note", title=title, header_style="bold")
    for layer in layers:
        colour = "green" if layer.after >= 0.8 else "yellow" if layer.after >= 0.5 else "red"
        after = Text(_share(layer.after), colour)
        sizes = f"{layer.rows:,}", f"{layer.unknowns:,}"
        _add_row(table, layer.name, _share(layer.before), after, *sizes, layer.note)
    table.caption = "share of the original layer's output that is explained (R²)"
    return table


def print_calibration(out: Console, calibration: Calibration) -> None:
    """Print the fit of each layer in their order, the notes, and the summary."""
    out.print(calibration_table(calibration.layers.values(), "calibration"))
    for note in calibration.notes:
        out.print(f"note: {note}", style="yellow", markup=False)
    out.print(calibration.summary(), style="bold", markup=False)


def print_radius_choice(out: Console, choice: RadiusChoice) -> None:
    """Print the trials of radii, the radii of layers that have their own, and how far the chosen network agrees."""
    out.print(_trials_table(choice.trials))
    if not choice.chosen.is_uniform:
        table = Table("layer", "ρ", "calibrated", title="radii of the layers' own", header_style="bold")
        for name, radius in choice.chosen.radii.items():
            _add_row(table, name, f"{radius:.3g}", _share(choice.chosen.r2[name]) if name in choice.chosen.r2 else "")
        out.print(table)
    fit, _, _ = choice.inputs
    out.print(
        f"{choice.summary()}; {choice.contrast:.1%} keep their class at {LOW_CONTRAST:g} of their contrast",
        style="bold" if choice.reached else "yellow",
        markup=False,
    )
    if not choice.reached:
        out.print(
            f"what may help: more images than the {fit} that the layers were fitted to (--calibration-images), "
            f"--calibrate-steps 300, or fewer layers (sphereify suggest)",
            style="yellow",
            markup=False,
        )


def _trials_table(trials: list[Trial]) -> Table:
    """A row for each radius that was tried, the smallest first."""
    table = Table("radius", "agreement", "same class at low contrast", "mean R²", header_style="bold")
    for trial in sorted(trials, key=lambda trial: (not trial.is_uniform, trial.radius)):
        contrast = "" if trial.contrast != trial.contrast else f"{trial.contrast:.1%}"
        explained = sum(trial.r2.values()) / max(len(trial.r2), 1)
        _add_row(table, trial.described, f"{trial.agreement:.1%}", contrast, f"{explained:.3f}")
    return table


def print_suggestion(out: Console, suggestion: Suggestion) -> None:
    """Print the trials of radii, the layers by what is explained of them, the trials, and the options to give."""
    if suggestion.radii:
        out.print(_trials_table(suggestion.radii))
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
    radius = [f"--radius {suggestion.radius:.3g}"] if suggestion.radius else []
    if not suggestion.exclude:
        how = f" and {radius[0]}" if radius else ""
        out.print(f"{suggestion.agreement:.1%} with all layers converted{how}: nothing to exclude", style="bold")
    else:
        first = suggestion.given.get("overrides")  # overrides win over --exclude, and the first one that matches wins
        options = (f"--override {name}=keep" if first else f"--exclude {name}" for name in suggestion.exclude)
        place = ", given before your own --override" if first else ""
        line = f"{suggestion.agreement:.1%} with: {' '.join([*radius, *options])}{place}"
        out.print(line, style="bold", markup=False, soft_wrap=True)


def _share(value: float) -> str:
    return "< 0" if value < 0 else f"{value:.3f}"


def print_evaluation(out: Console, evaluation: Evaluation, classes: list[str], rows: int = 20) -> None:
    """Print the accuracy of each class, the worst first and at most `rows` of them, and of all images."""
    table = Table("class", "images", "accuracy", title="accuracy by class", header_style="bold")
    counts, accuracies = evaluation.by_class.tolist(), evaluation.per_class
    order = sorted(range(len(classes)), key=lambda c: (accuracies[c] if counts[c] else 2.0, c))
    for place in order[:rows]:
        _add_row(table, classes[place], str(counts[place]), f"{accuracies[place]:.2%}" if counts[place] else "")
    if len(classes) > rows:
        table.caption = f"the {rows} worst of {len(classes)} classes"
    out.print(table)
    top5 = f", top-5 {evaluation.top5:.2%}" if len(classes) > 5 else ""
    skipped = f", {evaluation.skipped} could not be read" if evaluation.skipped else ""
    accuracy = f"top-1 {evaluation.top1:.2%}{top5} of {evaluation.images} images{skipped}"
    out.print(f"{accuracy}; {evaluation.images_per_second:.0f} images/s", style="bold", markup=False)
    if evaluation.unanswered:
        out.print(f"note: {evaluation.not_finite()}", style="yellow", markup=False)


def comparison_table(comparison: Comparison) -> Table:
    """A row for each network, the original first."""
    table = Table(*comparison.columns(), header_style="bold")
    for row in comparison.rows():
        _add_row(table, *row)
    return table


def robustness_table(found: Robustness) -> Table:
    """A row for each network: its accuracy on clean images, the means over the strengths, and the mean of these."""
    table = Table(*found.columns(), header_style="bold", title="accuracy on corrupted images")
    for row in found.rows():
        _add_row(table, *row)
    skipped = f"; {found.skipped} could not be read" if found.skipped else ""
    table.caption = f"means over five strengths, {found.images} images{skipped}; chance is {found.chance:.1%}"
    return table


def _add_row(table: Table, *cells: str | Text) -> None:
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def _operator(decision: Decision) -> str:
    k = "" if decision.k is None else f" k={decision.k:g}"
    shared = f"/{decision.share_k}" if decision.share_k not in (None, "filter") else ""
    return f"{decision.operator or ''}{k}{shared}"

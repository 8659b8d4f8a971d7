"""Tables and lines for a person at the terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sphereify.calibration.agreement import RadiusChoice, Trial
from sphereify.calibration.held_out import LOW_CONTRAST
from sphereify.calibration.results import Calibration, LayerFit
from sphereify.calibration.suggestion import Suggestion
from sphereify.convert.plan import ConversionPlan
from sphereify.deployment.exporting import Exported
from sphereify.prediction.predicting import Prediction
from sphereify.terminal import Name, add_row, say, text_table, width_of
from sphereify.training import Comparison, Evaluation, Robustness, Verification

COLOURS = {"convert": "green", "keep": "yellow"}


def plan_table(plan: ConversionPlan, *, every: bool = False) -> Table:
    """A table of what happens to each site, and why; repeated layers share a row unless `every` is True."""
    table = text_table("layer", "kind", "becomes", "why", title=plan.model, whole=["kind"])
    for row in plan.rows(every=every):
        layer = row.layer if every else Name(row.layer)
        add_row(table, layer, row.kind, Text(row.becomes, COLOURS[row.action]), row.why)
    return table


def print_plan(out: Console, plan: ConversionPlan, *, verbose: bool = False, every: bool = False) -> None:
    """Print the table of the sites, the inputs of the run, the notes, the summary, and the size of what is angular.

    Args:
        out: the console.
        plan: the plan.
        every: True for a row of each site with its whole name; False to let repeated layers share a row.
        verbose: True to print, after the notes, the details that they count.
    """
    table = plan_table(plan, every=every)
    out.print(table)
    if table.row_count < len(plan.decisions):
        say(out, f"{table.row_count} rows for {len(plan.decisions)} layers; --all prints each layer", "dim")
    if plan.inputs:
        say(out, f"run on {plan.inputs}", "dim")
    for note in plan.notes:
        say(out, f"note: {note}", "yellow")
    if plan.details and not verbose:
        say(out, "--verbose prints the details" + ("" if plan.inputs else ", --input gives the model inputs"), "dim")
    for detail in plan.details if verbose else []:
        say(out, detail, "dim")
    say(out, plan.summary(), "bold")
    say(out, plan.size(), "bold")


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
    table = text_table("", "")
    for row in rows.items():
        add_row(table, *row)
    out.print(table)
    say(out, written.note, "" if written.difference is not None else "yellow")
    if written.preparation is not None:
        say(out, f"images: {written.preparation.described()}")


def print_predictions(out: Console, predictions: Sequence[Prediction]) -> None:
    """Print a row for each class of each image that has a prediction."""
    predicted = [prediction for prediction in predictions if prediction.error is None]
    if not predicted:
        return
    table = text_table("image", "class", "probability")
    table.columns[-1].justify = "right"
    for prediction in predicted:
        for place, guess in enumerate(prediction.guesses):
            is_last = place == len(prediction.guesses) - 1 and prediction is not predicted[-1]
            cells = Text("" if place else prediction.image), Text(str(guess)), Text(f"{guess.probability:.2%}")
            table.add_row(*cells, end_section=is_last)
    out.print(table)


def calibration_table(layers: Iterable[LayerFit], title: str) -> Table:
    """A row for each layer: the share of its original output that is explained, before and after the calibration."""
    caption = "share of the original layer's output that is explained (R²)"
    layers = list(layers)
    note = ["note"] if any(layer.note for layer in layers) else []
    numbers = ["copied", "calibrated", "positions", "unknowns"]
    table = text_table("layer", *numbers, *note, title=title, caption=caption, whole=numbers)
    for layer in layers:
        colour = "green" if layer.after >= 0.8 else "yellow" if layer.after >= 0.5 else "red"
        after = Text(_share(layer.after), colour)
        sizes = f"{layer.rows:,}", f"{layer.unknowns:,}"
        remark = [layer.note] if note else []
        add_row(table, Name(layer.name), _share(layer.before), after, *sizes, *remark)
    return table


def print_calibration(out: Console, calibration: Calibration) -> None:
    """Print the fit of each layer in their order, the notes, and the summary."""
    out.print(calibration_table(calibration.layers.values(), "calibration"))
    for note in calibration.notes:
        say(out, f"note: {note}", "yellow")
    say(out, calibration.summary(), "bold")


def print_radius_choice(out: Console, choice: RadiusChoice) -> None:
    """Print the trials of radii, the radii of layers that have their own, and how far the chosen network agrees."""
    out.print(_trials_table(choice.trials))
    if not choice.chosen.is_uniform:
        table = text_table("layer", "ρ", "calibrated", title="radii of the layers' own")
        for name, radius in choice.chosen.radii.items():
            add_row(
                table, Name(name), f"{radius:.3g}", _share(choice.chosen.r2[name]) if name in choice.chosen.r2 else ""
            )
        out.print(table)
    fit, _, _ = choice.inputs
    contrast = f"{choice.contrast:.1%} keep their class at {LOW_CONTRAST:g} of their contrast"
    say(out, f"{choice.summary()}; {contrast}", "bold" if choice.reached else "yellow")
    if not choice.reached:
        say(
            out,
            f"what may help: more images than the {fit} that the layers were fitted to (--calibration-images), "
            f"--calibrate-steps 300, or fewer layers (sphereify suggest)",
            "yellow",
        )


def _trials_table(trials: list[Trial]) -> Table:
    """A row for each radius that was tried, the smallest first."""
    table = text_table("radius", "agreement", "same class at low contrast", "mean R²")
    for trial in sorted(trials, key=lambda trial: (not trial.is_uniform, trial.radius)):
        contrast = "" if trial.contrast != trial.contrast else f"{trial.contrast:.1%}"
        explained = sum(trial.r2.values()) / max(len(trial.r2), 1)
        add_row(table, trial.described, f"{trial.agreement:.1%}", contrast, f"{explained:.3f}")
    return table


def print_suggestion(out: Console, suggestion: Suggestion) -> None:
    """Print the trials of radii, the layers by what is explained of them, the trials, and the options to give."""
    if suggestion.radii:
        out.print(_trials_table(suggestion.radii))
    out.print(calibration_table(suggestion.layers, "the least explained layers first"))
    table = text_table("layers excluded", "agreement with the original")
    for number, agreement in suggestion.trials.items():
        add_row(table, str(number), f"{agreement:.1%}")
    out.print(table)
    if not suggestion.reached:
        say(
            out,
            f"{suggestion.goal:.1%} was not reached; try --calibration-images with more images, another --operator, or "
            f"accept a greater loss",
            "yellow",
        )
    radius = [f"--radius {suggestion.radius:.3g}"] if suggestion.radius else []
    if not suggestion.exclude:
        how = f" and {radius[0]}" if radius else ""
        say(out, f"{suggestion.agreement:.1%} with all layers converted{how}: nothing to exclude", "bold")
    else:
        first = suggestion.given.get("overrides")  # overrides win over --exclude, and the first one that matches wins
        options = (f"--override {name}=keep" if first else f"--exclude {name}" for name in suggestion.exclude)
        place = ", given before your own --override" if first else ""
        line = f"{suggestion.agreement:.1%} with: {' '.join([*radius, *options])}{place}"
        say(out, line, "bold", soft_wrap=True)


def _share(value: float) -> str:
    return "< 0" if value < 0 else f"{value:.3f}"


def print_evaluation(out: Console, evaluation: Evaluation, classes: list[str], rows: int = 20) -> None:
    """Print the accuracy of each class, the worst first and at most `rows` of them, and of all images."""
    caption = f"the {rows} worst of {len(classes)} classes" if len(classes) > rows else ""
    table = text_table(
        "class", "images", "accuracy", title="accuracy by class", caption=caption, whole=["images", "accuracy"]
    )
    counts, accuracies = evaluation.by_class.tolist(), evaluation.per_class
    order = sorted(range(len(classes)), key=lambda c: (accuracies[c] if counts[c] else 2.0, c))
    for place in order[:rows]:
        add_row(table, classes[place], str(counts[place]), f"{accuracies[place]:.2%}" if counts[place] else "")
    out.print(table)
    top5 = f", top-5 {evaluation.top5:.2%}" if len(classes) > 5 else ""
    skipped = f", {evaluation.skipped} could not be read" if evaluation.skipped else ""
    accuracy = f"top-1 {evaluation.top1:.2%}{top5} of {evaluation.images} images{skipped}"
    say(out, f"{accuracy}; {evaluation.images_per_second:.0f} images/s", "bold")
    if evaluation.unanswered:
        say(out, f"note: {evaluation.not_finite()}", "yellow")


def print_comparison(out: Console, comparison: Comparison) -> None:
    """Print the measures of each network, the original first."""
    out.print(_table_of_networks(out, comparison.columns(), comparison.rows()))


def print_robustness(out: Console, robustness: Robustness) -> None:
    """Print the accuracy of each network on clean images, the means over the strengths, and the mean of these."""
    skipped = f"; {robustness.skipped} could not be read" if robustness.skipped else ""
    caption = f"means over five strengths, {robustness.images} images{skipped}; chance is {robustness.chance:.1%}"
    out.print(
        _table_of_networks(
            out, robustness.columns(), robustness.rows(), title="accuracy on corrupted images", caption=caption
        )
    )


def _table_of_networks(out: Console, columns: list[str], rows: list[list[str]], **titles: str) -> Table:
    """A row for each network where that fits into the width of the console; otherwise a column for each network."""
    wide = text_table(*columns, **titles)
    for name, *cells in rows:
        add_row(wide, name, *cells)
    if len(rows) >= len(columns) or width_of(wide) <= out.width:
        return wide
    high = text_table(columns[0], *(name for name, *_ in rows), **titles)
    for measure, *cells in list(zip(columns, *rows, strict=True))[1:]:
        add_row(high, measure, *cells)
    return high


def print_verification(out: Console, verification: Verification, name: str) -> None:
    """Print the measures of a verification, with what too few pairs leave open, and of what they are."""
    remarks = {rate: verification.too_few(rate) for rate in verification.tar}
    note = [""] if any(remarks.values()) else []
    table = text_table("measure", "%", *note, title=f"verification of {name}", whole=["%"])
    for rate, share in verification.tar.items():
        value = "" if share is None else f"{100 * share:.2f}"
        remark = [remarks[rate]] if note else []
        add_row(table, f"true accept rate at a false accept rate of {rate:g}", value, *remark)
    add_row(table, "equal error rate", f"{100 * verification.eer:.2f}", *note)
    if verification.neighbour_accuracy is not None:
        nearest = (
            "nearest neighbour" if verification.neighbours == 1 else f"{verification.neighbours} nearest neighbours"
        )
        add_row(table, f"accuracy by {nearest}", f"{100 * verification.neighbour_accuracy:.2f}", *note)
    out.print(table)
    say(out, verification.of_what(), "bold")

"""The outcomes of cells, their table and their curves."""

import statistics
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

from examples.papers.report import markdown


@dataclass(frozen=True)
class Outcome:
    """The result of a cell with one seed."""

    seed: int
    accuracy: float | None
    """Test accuracy after the last iteration, in [0, 1]; None: training did not converge."""
    per_class: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    """Each test during training: step, accuracy, loss (the mean over the training batches since the test before, with
    its regularizers), images_per_second."""
    failure: str = ""
    measured: dict[str, Any] = field(default_factory=dict)
    """What the cell's own measurement gave."""
    lr: float | None = None
    """Learning rate at the start."""

    def steps_to(self, goal: float) -> float | None:
        """Iterations at the first test with at least this accuracy."""
        return next((point["step"] for point in self.curve if point["accuracy"] >= goal), None)

    @property
    def last_accuracy(self) -> float:
        """Accuracy in the last test during training; 0 if it did not converge."""
        return self.curve[-1]["accuracy"] if self.curve else 0.0


def table(experiment: Any, cells: Sequence[Any], outcomes: dict[str, list[Outcome]], scale: Any) -> str:
    """The table of an experiment, a cell that has an outcome in each line."""
    rates = ["learning rate"] if any(cell.rates for cell in cells) else []
    source = [f"{experiment.source}, %"] if experiment.source else []
    goals = [f"iterations to {goal:.0%}" for goal in scale.goals]
    columns = ["", *rates, "test accuracy, %", *source, *experiment.columns, *goals]
    rows = []
    for cell in cells:
        found, authors = outcomes[cell.name], experiment.authors.get(cell.name)
        if not found:
            continue
        row = [cell.name, *([f"{found[0].lr:g}"] if rates else [])]
        row += [percent([o.accuracy for o in found]) + finished(found, scale.seeds)]
        row += ["" if authors is None else f"{authors:.2f}"] if source else []
        row += [percent([f(o) if o.accuracy is not None else None for o in found]) for f in experiment.columns.values()]
        rows += [row + [mean_steps([o.steps_to(goal) for o in found]) for goal in scale.goals]]
    compared = differences(experiment, cells, outcomes)
    return markdown(columns, rows) + (f"\n{compared}" if compared else "")


def differences(experiment: Any, cells: Sequence[Any], outcomes: dict[str, list[Outcome]]) -> str:
    """The table of differences between the cells of `experiment.pairs`, seed by seed; empty where there is none.

    Those that are larger than chance explains are bold.
    """
    values: dict[str, Callable[[Outcome], float | None]] = {"test accuracy": lambda outcome: outcome.accuracy}
    values |= {name.removesuffix(", %"): value for name, value in experiment.columns.items()}
    rows = []
    for one, other in experiment.pairs(cells) if experiment.pairs else []:
        both = paired(outcomes[one.name], outcomes[other.name])
        if both:
            told = [difference([f(a) - f(b) for a, b in both]) for f in values.values()]  # type: ignore[operator]
            rows += [[f"{one.panel}: {one.label} less {other.label}", str(len(both)), *told]]
    return markdown(["difference in points", "seeds", *values], rows) if rows else ""


def paired(some: Sequence[Outcome], others: Sequence[Outcome]) -> list[tuple[Outcome, Outcome]]:
    """The outcomes of two cells with the same seed, where both converged."""
    by_seed = {outcome.seed: outcome for outcome in others if outcome.accuracy is not None}
    return [(one, by_seed[one.seed]) for one in some if one.accuracy is not None and one.seed in by_seed]


CHANCE = {2: 8.98, 3: 2.48, 4: 1.59, 5: 1.24}
"""How many of its standard deviations a mean difference may be by chance, by the number of seeds: Student's t for 95 %,
divided by the root of that number. It falls with more seeds, so that the last one is a bound for these, too."""


def difference(shares: Sequence[float]) -> str:
    """Mean and standard deviation of differences in points; bold if chance does not explain it.

    The bound is that of a paired t-test at 95 %, so that one in twenty differences is bold where there is none.

    >>> difference([0.02, 0.03, 0.04]), difference([0.0, 0.03, 0.06]), difference([0.03])
    ('**+3.0 ± 1.0**', '+3.0 ± 3.0', '+3.0')
    """
    told = mean_percent(shares, signed=True)
    if len(shares) < min(CHANCE):
        return told
    clear = abs(statistics.mean(shares)) > CHANCE[min(len(shares), max(CHANCE))] * statistics.stdev(shares)
    return f"**{told}**" if clear else told


def mean_percent(shares: Iterable[float | None], *, signed: bool = False, digits: int = 1) -> str:
    """Mean and standard deviation of shares in %; empty where there is none, or where one is missing.

    >>> mean_percent([0.5, 0.52]), mean_percent([0.01], signed=True), mean_percent([0.5, None])
    ('51.0 ± 1.4', '+1.0', '')
    """
    values = list(shares)
    known = [100 * share for share in values if share is not None]
    if not known or len(known) < len(values):
        return ""
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    mean = round(statistics.mean(known), digits) + 0.0  # -0.0 becomes 0.0
    return f"{mean:{'+' if signed else ''}.{digits}f}{spread}"


def against(*labels: str) -> Callable[[Sequence[Any]], list[tuple[Any, Any]]]:
    """Pairs of each cell with those of its panel that have one of the labels, in the order of the cells.

    Cells with two of the labels are paired once: the one with the later label is compared with the other.
    """

    def pairs(cells: Sequence[Any]) -> list[tuple[Any, Any]]:
        return [(cell, other) for other in cells if other.label in labels for cell in cells
                if cell.panel == other.panel and cell.label not in labels[: labels.index(other.label) + 1]]  # fmt: skip

    return pairs


def finished(found: Sized, seeds: int) -> str:
    """How many seeds have finished, unless all have."""
    return "" if len(found) == seeds else f" ({len(found)} of {seeds} seeds)"


def not_converged(failed: int) -> str:
    """How many runs did not converge, if there are any."""
    return f" ({failed} not converged)" if failed else ""


def percent(values: Sequence[float | None]) -> str:
    """Mean and standard deviation of shares, in %."""
    numbers = [100 * value for value in values if value is not None]
    if not numbers:
        return "not converged"
    spread = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.2f}{spread}{not_converged(len(values) - len(numbers))}"


def mean_steps(steps: Sequence[float | None]) -> str:
    """The mean, if every seed reached the goal."""
    reached = [step for step in steps if step is not None]
    return f"{statistics.mean(reached):.0f}" if len(reached) == len(steps) else "not reached"


def curves(cells: Sequence[Any], outcomes: dict[str, list[Outcome]]) -> dict[str, dict[str, Any]]:
    """The tests during training of each cell and seed, by panel and label."""
    panels: dict[str, dict[str, Any]] = {cell.panel: {} for cell in cells}
    for cell in cells:
        if runs := [outcome.curve for outcome in outcomes[cell.name] if outcome.curve]:
            panels[cell.panel][cell.label] = runs
    return panels

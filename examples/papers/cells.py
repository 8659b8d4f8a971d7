"""Networks of an experiment, each trained once by `sphereify.training`, and the table, picture and JSON of all.

A cell is one network: how it is built, converted and trained. Cells that have finished are not repeated, unfinished
ones continue where they stopped.
"""

import dataclasses
import json
import math
import os
import re
import signal
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.papers.report import finish, markdown, parse
from examples.papers.training_images import with_few_images
from sphereify.datasets import Data, class_count, load_data
from sphereify.errors import SphereifyError, TrainingError
from sphereify.files import write_text
from sphereify.plots import plot_panels
from sphereify.training import Settings, Terms, Variant, evaluate, train_once, trained

SMOOTHED = Terms(label_smoothing=0.01)
"""The loss of the authors' code."""
FALLS = (34 / 64, 54 / 64)
"""Shares of a run after which the learning rate is divided by ten."""


@dataclass(frozen=True)
class Scale:
    """Size of an experiment."""

    iterations: int
    batch_size: int
    width: float
    """Filters of each layer, as a share of the number in the papers."""
    train_images: int | None
    """Number of training images; None: all."""
    test_images: int | None
    """Number of images of the tests during training."""
    seeds: int
    goals: tuple[float, float]
    """Accuracies to which the table counts iterations."""
    last_images: int | None = None
    """Number of images of the test after training; None: all."""
    tests: int = 32
    """Number of tests during training; with 32 the rate falls exactly where the authors' does."""
    name: str = "full"

    def settings(self, cell: "Cell", seed: int, workers: int) -> Settings:
        """The authors' settings: Adam with a rate of 1e-3, divided by ten after 34/64 and 54/64 of the iterations."""
        iterations = cell.iterations or self.iterations
        tests = min(self.tests, iterations)
        return Settings(
            epochs=tests,
            epoch_batches=iterations // tests,
            batch_size=cell.batch_size or self.batch_size,
            opt="adam",
            lr=1e-3,
            sched="multistep",
            milestones=tuple(max(1, round(tests * fall)) for fall in FALLS),
            warmup_epochs=0,
            weight_decay=5e-4,  # the angular layers have no length to decay
            seed=seed,
            workers=workers,
            terms=cell.terms,
        )


FULL = Scale(10_000, 128, 1.0, None, None, 3, (0.8, 0.85))
CPU = Scale(2_000, 64, 1 / 8, 10_000, 1_000, 1, (0.4, 0.5), name="cpu")
QUICK = Scale(2, 8, 1 / 16, 40, 20, 1, (0.1, 0.2), last_images=20, tests=2, name="quick")


@dataclass(frozen=True)
class Cell:
    """A network of an experiment, before it is trained."""

    panel: str
    """Panel of the figure to which the network belongs."""
    label: str
    """Name of the network in that panel."""
    build: Callable[[int], nn.Module]
    """Builder of the plain network for a number of classes; can be pickled."""
    options: dict[str, Any] | None
    """Options of `sphereify`; None: the network stays plain."""
    terms: Terms = SMOOTHED
    batch_size: int | None = None
    """Images per batch; None: that of the scale. The same holds for the iterations."""
    iterations: int | None = None
    shift: bool = False
    """True if training images are shifted as well as mirrored (CIFAR-10+)."""
    rare: tuple[int, float] | None = None
    """Number of rare classes, the first ones, and the share of their training images that is used."""

    @property
    def name(self) -> str:
        return f"{self.panel}: {self.label}"

    @property
    def variant(self) -> Variant:
        return Variant(self.name, self.options)


@dataclass(frozen=True)
class Outcome:
    """The result of a cell with one seed."""

    seed: int
    accuracy: float | None
    """Test accuracy after the last iteration, in [0, 1]; None: training did not converge."""
    per_class: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    """Each test during training: step, accuracy, loss, images_per_second."""
    failure: str = ""

    def steps_to(self, goal: float) -> float | None:
        """Iterations at the first test with at least this accuracy."""
        return next((point["step"] for point in self.curve if point["accuracy"] >= goal), None)


@dataclass(frozen=True)
class Experiment:
    """The cells of an experiment at any scale, and the authors' numbers."""

    name: str
    about: str | None
    cells: Callable[[Scale], list[Cell]]
    authors: dict[str, float]
    """Test accuracy in % by the name of a cell."""
    source: str
    """Source of these numbers, the head of their column."""
    cpu: Scale = CPU
    full: Scale = FULL
    quick: Scale = QUICK
    columns: dict[str, Callable[[Outcome], float]] = field(default_factory=dict)
    """Further columns of the table, in %."""
    draw: Callable[[Callable[[str], nn.Module], Path], None] | None = None
    """Function that draws a second picture; it takes a getter of trained networks by label, and the file."""


def run(experiment: Experiment, argv: list[str] | None = None) -> None:
    """Run a whole experiment, from the command line to its results."""
    args = parse(experiment.about, argv, trains=True)
    scale: Scale = getattr(experiment, args.scale)
    given = {name: getattr(args, name) for name in ("iterations", "seeds") if getattr(args, name)}
    scale = replace(scale, **given)
    cells = experiment.cells(scale)
    try:
        outcomes = _train_all(cells, scale, args)
    except SphereifyError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    plot_panels(_curves(cells, outcomes), args.output / "figure.png")
    if experiment.draw is not None:
        experiment.draw(partial(_labelled, cells, args), args.output / "second.png")
    found = {name: [dataclasses.asdict(outcome) for outcome in runs] for name, runs in outcomes.items()}
    document = {"settings": dataclasses.asdict(scale), "authors": experiment.authors, "cells": found}
    finish(args, experiment.name, _table(experiment, cells, outcomes, scale), None, document)


# --------------------------------------------------------------------------------------------------------- training


def _train_all(cells: list[Cell], scale: Scale, args: Any) -> dict[str, list[Outcome]]:
    """Train the networks, several at a time on request; returns the outcomes of each cell, one for each seed.

    Every cell is trained with the first seed before one is with the second, so that a run cut short compares all cells.
    """
    work = [(cell, seed, scale, args.data, args.output / "runs", args.workers)
            for seed in range(scale.seeds) for cell in cells]  # fmt: skip
    if args.jobs > 1:
        in_processes(work, args.jobs, _train)
    outcomes: dict[str, list[Outcome]] = {cell.name: [] for cell in cells}
    for cell, *how in work:
        outcomes[cell.name] += [_train(cell, *how)]
    return outcomes


def in_processes(work: list[Any], jobs: int, do: Callable[..., Any]) -> None:
    """Do all of the work in several processes, each of which takes the next piece when it has finished one.

    Args:
        work: the arguments of `do` for each piece.
        do: a function of a module; its outcomes go to files.
    """
    context = get_context("spawn")
    taken = context.Value("i", 0)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    processes = [context.Process(target=_take_work, args=(work, taken, threads, do)) for _ in range(jobs)]
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    except KeyboardInterrupt:  # a terminal sends it to all of them; a second signal would not let them save
        for process in processes:
            process.join(30)
        raise SystemExit(128 + signal.SIGINT) from None
    finally:  # whatever happened, no process stays behind; each saves where it is
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()
        signal.signal(signal.SIGTERM, before)
    if codes := [process.exitcode for process in processes if process.exitcode]:
        raise SystemExit(max(codes))


def _take_work(work: list[Any], taken: Any, threads: int, do: Callable[..., Any]) -> None:
    torch.set_num_threads(threads)
    try:
        while True:
            with taken.get_lock():
                place, taken.value = taken.value, taken.value + 1
            if place >= len(work):
                return
            do(*work[place])
    except SphereifyError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def _train(cell: Cell, seed: int, scale: Scale, data: str, folder: Path, workers: int) -> Outcome:
    """Train one network with one seed, or read its outcome if it has finished before."""
    place = folder_of(folder, cell, seed)
    known = place / "outcome.json"
    asked = {"data": data, "scale": repr(scale), "cell": repr(replace(cell, build=None))}  # type: ignore[arg-type]
    before = json.loads(known.read_text()) if known.is_file() else {}
    if before.get("asked") == asked:
        return Outcome(**before["outcome"])
    images = _images(data, cell.shift, scale.train_images, scale.test_images)
    images = images if cell.rare is None else _with_rare(images, *cell.rare)
    build = Builder(cell, len(images.classes))
    settings = scale.settings(cell, seed, workers)
    try:
        result = train_once(build, images, cell.variant, settings, output=place)
        last = evaluate(trained(build, cell.variant, place), _images(data, False, 1, scale.last_images),
                        replace(settings, batch_size=500))  # fmt: skip
        curve = [{"step": e.step, "accuracy": e.accuracy, "loss": e.loss, "images_per_second": e.images_per_second}
                 for e in result.epochs]  # fmt: skip
        outcome = Outcome(seed, last.top1, last.per_class, curve)
    except TrainingError as error:
        outcome = Outcome(seed, None, failure=str(error))
    write_text(known, json.dumps({"asked": asked, "outcome": dataclasses.asdict(outcome)}, indent=1) + "\n")
    print(f"{cell.name}, seed {seed}: {_percent([outcome.accuracy])}", file=sys.stderr, flush=True)
    return outcome


def folder_of(folder: Path, cell: Cell, seed: int = 0) -> Path:
    """The folder of a cell's run."""
    return folder / f"{re.sub(r'[^0-9A-Za-z.,=]+', '-', cell.name)}-seed{seed}"


@dataclass(frozen=True)
class Builder:
    """Builder of the plain network of a cell."""

    cell: Cell
    classes: int

    def __call__(self) -> nn.Module:
        return self.cell.build(self.classes)


@cache
def _images(folder: str, shift: bool, train_images: int | None, test_images: int | None) -> Data:
    """The images of a folder, in memory: at most as many as the scale says."""
    whole = load_data(folder, img_size=32, shift=shift)
    counts = [min(wanted or math.inf, len(part)) for wanted, part in  # type: ignore[arg-type]
              ((train_images, whole.train), (test_images, whole.test))]  # fmt: skip
    train, test = (int(count) for count in counts)
    return load_data(folder, img_size=32, shift=shift, train_images=train, test_images=test, in_memory=True)


def _with_rare(data: Data, classes: int, share: float) -> Data:
    """The data with only a share of the training images of the first classes."""
    return with_few_images(data, data.classes[:classes], share)


def network_of(cell: Cell, data: str, folder: Path) -> nn.Module:
    """The trained network of the first seed, in eval mode."""
    return trained(Builder(cell, class_count(data)), cell.variant, folder_of(folder, cell))


def network_trained(cell: Cell, scale: Scale, args: Any) -> tuple[nn.Module, float]:
    """A network, trained now unless it was before, and its test accuracy in [0, 1]."""
    outcome = _train(cell, 0, scale, args.data, args.output / "runs", 0)
    if outcome.accuracy is None:
        raise TrainingError(f"{cell.name}: {outcome.failure}")
    return network_of(cell, args.data, args.output / "runs"), outcome.accuracy


def _labelled(cells: list[Cell], args: Any, label: str) -> nn.Module:
    return network_of(next(cell for cell in cells if cell.label == label), args.data, args.output / "runs")


# ---------------------------------------------------------------------------------------------------------- results


def _table(experiment: Experiment, cells: list[Cell], outcomes: dict[str, list[Outcome]], scale: Scale) -> str:
    columns = ["", "test accuracy, %", f"{experiment.source}, %", *experiment.columns]
    rows = []
    for cell in cells:
        found, authors = outcomes[cell.name], experiment.authors.get(cell.name)
        more = [
            _percent([f(o) if o.accuracy is not None else None for o in found]) for f in experiment.columns.values()
        ]
        row = [cell.name, _percent([o.accuracy for o in found]), "" if authors is None else f"{authors:.2f}", *more]
        rows += [row + [_mean_steps([o.steps_to(goal) for o in found]) for goal in scale.goals]]
    return markdown([*columns, *(f"iterations to {goal:.0%}" for goal in scale.goals)], rows)


def _percent(values: Sequence[float | None]) -> str:
    """Mean and standard deviation of shares, in %."""
    numbers = [100 * value for value in values if value is not None]
    if not numbers:
        return "not converged"
    spread = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    failed = len(values) - len(numbers)
    return f"{statistics.mean(numbers):.2f}{spread}" + (f" ({failed} not converged)" if failed else "")


def _mean_steps(steps: Sequence[float | None]) -> str:
    """The mean, if every seed reached the goal."""
    reached = [step for step in steps if step is not None]
    return f"{statistics.mean(reached):.0f}" if len(reached) == len(steps) else "not reached"


def _curves(cells: list[Cell], outcomes: dict[str, list[Outcome]]) -> dict[str, dict[str, Any]]:
    panels: dict[str, dict[str, Any]] = {cell.panel: {} for cell in cells}
    for cell in cells:
        if runs := [outcome.curve for outcome in outcomes[cell.name] if outcome.curve]:
            panels[cell.panel][cell.label] = runs
    return panels

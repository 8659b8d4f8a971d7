"""Networks of an experiment, each trained once by `sphereify.training`, and the table, picture and JSON of all.

A cell is one network: how it is built, converted and trained. Cells that have finished are not repeated, unfinished
ones continue where they stopped.
"""

import copy
import dataclasses
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.papers.report import PICTURES, finish, parse, told_errors
from examples.papers.results import Outcome, curves, percent, table
from examples.papers.training_images import with_few_images
from sphereify.datasets import Data, class_count, load_data
from sphereify.errors import TrainingError, UsageError
from sphereify.files import write_text
from sphereify.fingerprint import fingerprint
from sphereify.images.transforms import make_transform
from sphereify.plots import plot_panels
from sphereify.training import Settings, Terms, Variant, evaluate, train_once, trained
from sphereify.training.settings import WITHOUT_EFFECT

RATE = ", rate "
"""What stands between the name of a network and its learning rate, where there are cells with several."""
SIZE = 32
"""Height and width of an image in pixels."""
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
    goals: tuple[float, ...]
    """Accuracies to which the table counts iterations."""
    last_images: int | None = None
    """Number of images of the test after training; None: all."""
    tests: int = 32
    """Number of tests during training; with 32 the rate falls exactly where the authors' does."""
    name: str = "full"

    def settings(self, cell: "Cell", seed: int, workers: int) -> Settings:
        """The authors' settings, unless the cell has its own: Adam with a rate of 1e-3, divided by ten after 34/64 and
        54/64 of the iterations."""
        iterations = cell.iterations or self.iterations
        tests = min(self.tests, iterations)
        settings = Settings(
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
        return replace(settings, **cell.settings)


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
    jitter: float | None = None
    """Strength of the colour jitter of training images; None: none."""
    rare: tuple[int, float] | None = None
    """Number of rare classes, the first ones, and the share of their training images that is used."""
    learned: str = "nothing"
    """How much of what `build` makes has been trained, as for `sphereify.training.compare`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the training that are not those of the scale, such as the learning rate `lr`."""
    rates: tuple[float, ...] = ()
    """Learning rates to choose from: each is tried with the first seed, and all seeds take the one that was best in the
    last test during training."""
    weights: Path | None = None
    """File of the weights with which `build` begins; None: they are drawn."""
    measure: Callable[[nn.Module, Data, int], dict[str, Any]] | None = None
    """Function that measures the trained network on the test images; it takes the seed, too, and can be pickled."""

    @property
    def name(self) -> str:
        return f"{self.panel}: {self.label}"

    @property
    def variant(self) -> Variant:
        return Variant(self.name, self.options)


@dataclass(frozen=True)
class Experiment:
    """The cells of an experiment at any scale, and the authors' numbers."""

    name: str
    about: str | None
    cells: Callable[..., list[Cell]]
    """Function that lists the cells of a scale; it takes the values of `arguments` as keywords."""
    authors: dict[str, float] = field(default_factory=dict)
    """Test accuracy in % by the name of a cell."""
    source: str = ""
    """Source of these numbers, the head of their column; "": there is no such column."""
    cpu: Scale = CPU
    full: Scale = FULL
    quick: Scale = QUICK
    columns: dict[str, Callable[[Outcome], float]] = field(default_factory=dict)
    """Further columns of the table, in %."""
    pairs: Callable[[list[Cell]], list[tuple[Cell, Cell]]] | None = None
    """Function that says which cells are compared seed by seed in a table below the first."""
    table: Callable[..., str] | None = None
    """Function that writes another table than that of `results.table`; it takes the same."""
    figure: Callable[[list[Cell], dict[str, list[Outcome]], Path], Any] | None = None
    """Function that draws figure.png; default: accuracy over iterations."""
    draw: Callable[[Callable[[str], nn.Module], Path], None] | None = None
    """Function that draws a second picture, when all networks have converged; it takes a getter of them by label, and
    the file."""
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further arguments of the command line, by name, each with what argparse takes."""


def run(experiment: Experiment, argv: list[str] | None = None) -> None:
    """Run a whole experiment, from the command line to its results."""
    args = parse(experiment.about, argv, trains=True, further={**experiment.arguments, **ONLY})
    scale: Scale = getattr(experiment, args.scale)
    given = {name: getattr(args, name) for name in ("iterations", "seeds") if getattr(args, name)}
    scale = replace(scale, **given)
    further = {
        name: getattr(args, name) for name in (word.strip("-").replace("-", "_") for word in experiment.arguments)
    }
    with told_errors():
        cells = experiment.cells(scale, **further)
        outcomes = _outcomes(cells, scale, args)
    args.output.mkdir(parents=True, exist_ok=True)
    if any(outcomes.values()):
        (experiment.figure or _draw_accuracy)(cells, outcomes, args.output / PICTURES[0])
    sound = all(runs and runs[0].accuracy is not None for runs in outcomes.values())
    if experiment.draw is not None and sound and not args.report:
        experiment.draw(partial(_labelled, cells, args), args.output / PICTURES[1])
    found = {name: [dataclasses.asdict(outcome) for outcome in runs] for name, runs in outcomes.items()}
    document = {"settings": dataclasses.asdict(scale), "authors": experiment.authors, "cells": found}
    finish(args, experiment.name, (experiment.table or table)(experiment, cells, outcomes, scale), None, document)


def _draw_accuracy(cells: list[Cell], outcomes: dict[str, list[Outcome]], path: Path) -> None:
    plot_panels(curves(cells, outcomes), path)


ONLY = {
    "--only": {"nargs": "+", "metavar": "NAME", "help": "networks to train, by their names in the table; "
               "all that have finished are reported; default: all"}
}  # fmt: skip


def _chosen(cells: list[Cell], names: Sequence[str] | None) -> list[Cell]:
    """The cells with these names, all without names. A name without a rate is that of the cells with any rate.

    Raises:
        UsageError: there is no cell with one of the names.
    """
    known = {cell.name: {cell.name, cell.name.partition(RATE)[0]} for cell in cells}
    if unknown := [name for name in names or () if not any(name in some for some in known.values())]:
        raise UsageError(f"only: there is no {unknown[0]!r}; there are {'; '.join(known)}")
    return [cell for cell in cells if names is None or known[cell.name] & set(names)]


# --------------------------------------------------------------------------------------------------------- training


def _outcomes(cells: list[Cell], scale: Scale, args: Any) -> dict[str, list[Outcome]]:
    """The outcomes of each cell, one for each seed; what is missing is trained, if it is asked for.

    Every cell is trained with the first seed before one is with the second, so that a run cut short compares all cells.
    The learning rates of cells that leave a choice are tried before.
    """
    chosen = _chosen(cells, args.only)
    asked = set() if args.report else {cell.name for cell in chosen}
    trials = {cell.name: _trials(cell) for cell in cells if cell.rates}
    tries = [(trial, 0, name in asked) for name, some in trials.items() for trial in some]
    tried = _train_all(tries, scale, args)
    best = [_best(trials[cell.name], tried) if cell.rates else cell for cell in cells]
    both = list(zip(cells, best, strict=True))
    seeds = [(one, seed, cell.name in asked) for seed in range(scale.seeds) for cell, one in both if one]
    outcomes = _train_all(seeds, scale, args)
    return {cell.name: outcomes.get(one.name, []) if one else [] for cell, one in both}


def _trials(cell: Cell) -> list[Cell]:
    """The cell with each of its learning rates."""
    return [
        replace(cell, label=f"{cell.label}{RATE}{rate:g}", rates=(), settings={**cell.settings, "lr": rate})
        for rate in cell.rates
    ]


def _best(trials: list[Cell], tried: dict[str, list[Outcome]]) -> Cell | None:
    """The trial with the highest accuracy in the last test during training; None if one is missing."""
    if not all(tried[trial.name] for trial in trials):
        return None
    return max(trials, key=lambda trial: tried[trial.name][0].last_accuracy)


def _train_all(runs: list[tuple[Cell, int, bool]], scale: Scale, args: Any) -> dict[str, list[Outcome]]:
    """Train networks, each with a seed, several at a time on request; returns the outcomes of each cell.

    Args:
        runs: cell, seed, and whether it is trained if it has not been before.
    """
    where = (scale, args.data, args.output / "runs", args.workers)
    if args.jobs > 1 and any(asked for *_, asked in runs):
        in_processes([(cell, seed, *where) for cell, seed, asked in runs if asked], args.jobs, _train)
    outcomes: dict[str, list[Outcome]] = {cell.name: [] for cell, *_ in runs}
    for cell, seed, asked in runs:
        outcome = _train(cell, seed, *where) if asked else _finished(cell, seed, *where)
        outcomes[cell.name] += [] if outcome is None else [outcome]
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
    codes = [process.exitcode for process in processes if process.exitcode]
    if killed := [-code for code in codes if code < 0]:
        why = "; out of memory? Try fewer --jobs" if killed[0] == signal.SIGKILL else ""
        raise SystemExit(f"error: signal {killed[0]} ended a process, what has finished is kept{why}")
    if codes:
        raise SystemExit(max(codes))


def _take_work(work: list[Any], taken: Any, threads: int, do: Callable[..., Any]) -> None:
    torch.set_num_threads(threads)
    try:
        with told_errors():
            while True:
                with taken.get_lock():
                    place, taken.value = taken.value, taken.value + 1
                if place >= len(work):
                    return
                do(*work[place])
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def _train(cell: Cell, seed: int, scale: Scale, data: str, folder: Path, workers: int) -> Outcome:
    """Train one network with one seed, or read its outcome if it has finished before."""
    finished = _finished(cell, seed, scale, data, folder, workers)
    if finished is not None:
        return finished
    place, settings = folder_of(folder, cell, seed), scale.settings(cell, seed, workers)
    images = _images(data, cell.shift, cell.jitter, scale.train_images, scale.test_images)
    images = images if cell.rare is None else _with_rare(images, *cell.rare)
    build = Builder(cell, len(images.classes))
    try:
        result = train_once(build, images, cell.variant, settings, output=place, learned=cell.learned)
        last, tests = trained(build, cell.variant, place), _images(data, False, None, 1, scale.last_images)
        evaluation = evaluate(last, tests, replace(settings, batch_size=500))
        curve = [{"step": e.step, "accuracy": e.accuracy, "loss": e.loss, "images_per_second": e.images_per_second}
                 for e in result.epochs]  # fmt: skip
        measured = {} if cell.measure is None else cell.measure(last, tests, seed)
        outcome = Outcome(seed, evaluation.top1, evaluation.per_class, curve, measured=measured, lr=settings.lr)
    except TrainingError as error:
        outcome = Outcome(seed, None, failure=str(error), lr=settings.lr)
    asked = _asked(cell, settings, scale, data)
    write_text(place / KNOWN, json.dumps({"asked": asked, "outcome": dataclasses.asdict(outcome)}, indent=1) + "\n")
    print(f"{cell.name}, seed {seed}: {percent([outcome.accuracy])}", file=sys.stderr, flush=True)
    return outcome


KNOWN = "outcome.json"
"""File in the folder of a run that holds its outcome, and what was asked for."""


def _finished(cell: Cell, seed: int, scale: Scale, data: str, folder: Path, workers: int) -> Outcome | None:
    """The outcome of a cell with a seed; None if it has not finished, or was asked for with something else."""
    known = folder_of(folder, cell, seed) / KNOWN
    before = json.loads(known.read_text()) if known.is_file() else {}
    asked = _asked(cell, scale.settings(cell, seed, workers), scale, data)
    return Outcome(**before["outcome"]) if before.get("asked") == asked else None


def _asked(cell: Cell, settings: Settings, scale: Scale, data: str) -> dict[str, Any]:
    """What an outcome depends on, as plain JSON values; `train_once` looks at the network itself."""
    lasting = {name: value for name, value in settings.to_json().items() if name not in WITHOUT_EFFECT}
    asked = {
        **lasting,
        "data": [
            place_of(data),
            scale.train_images,
            scale.test_images,
            scale.last_images,
            cell.shift,
            cell.jitter,
            cell.rare,
        ],
        "conversion": repr(cell.options),
        "learned": cell.learned,
        "measure": None if cell.measure is None else repr(getattr(cell.measure, "keywords", {})),
    }
    return json.loads(json.dumps(asked))  # type: ignore[no-any-return]


def place_of(data: str) -> str:
    """The name of the data, of a folder its absolute path, wherever the program was started."""
    return os.path.realpath(data) if Path(data).is_dir() else data


def folder_of(folder: Path, cell: Cell, seed: int = 0) -> Path:
    """The folder of a cell's run, another one for other weights to begin with."""
    return folder / f"{run_name(cell.name, cell.weights)}-seed{seed}"


def run_name(name: str, weights: Path | None) -> str:
    """The name of a run as that of a folder, with a fingerprint of the weights with which it begins."""
    known = [] if weights is None else [fingerprint(torch.load(weights, map_location="cpu"))[:8]]
    return "-".join([re.sub(r"[^0-9A-Za-z.,=]+", "-", name).strip("-"), *known])


@dataclass(frozen=True)
class Builder:
    """Builder of the plain network of a cell."""

    cell: Cell
    classes: int

    def __call__(self) -> nn.Module:
        return self.cell.build(self.classes)


def _images(folder: str, shift: bool, jitter: float | None, train_images: int | None, test_images: int | None) -> Data:
    """The images of a folder, in memory: at most as many as the scale says."""
    data = _decoded(folder, train_images, test_images)
    train: Any = copy.copy(data.train)  # the pixels are shared
    train.transform = make_transform(SIZE, 3, {}, training=True, augment=None, shift=shift, color_jitter=jitter)
    return replace(data, train=train)


@cache
def _decoded(folder: str, train_images: int | None, test_images: int | None) -> Data:
    whole = load_data(folder, img_size=SIZE)
    counts = [min(wanted or math.inf, len(part)) for wanted, part in  # type: ignore[arg-type]
              ((train_images, whole.train), (test_images, whole.test))]  # fmt: skip
    train, test = (int(count) for count in counts)
    return load_data(folder, img_size=SIZE, train_images=train, test_images=test, in_memory=True)


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

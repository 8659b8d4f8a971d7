"""Low contrast, light, fog and noise: does a conversion gain over its rivals?

    python -m examples.evidence.contrast --data CIFAR10 -o out/contrast --jobs 2

CNN-9 and ResNet-20 from scratch: plain; plain with its training images changed in contrast, brightness and saturation
("jitter"); plain behind per-image contrast standardisation, in training as well, alone and with jitter; plain with
GroupNorm or InstanceNorm in place of BatchNorm; with cosine layers, without and with the pooled radius, and that with
jitter, alone and standardised. And a ResNet-20 that came trained (benchmarks/plain_networks.py): original and
standardised; converted, without and with the pooled radius; original, standardised, converted, and both, with jitter.
Each is trained further for a pass over the images, with the same batches and rate; they are left out where --plain has
no weights.

The table has the accuracy on all test images, and on 1,000 of them under seven corruptions: means over five strengths.
figure.png shows CNN-9 at each strength, second.png the ResNet-20 that came trained, third.png that from scratch. On a
CPU: a quarter of the filters of CNN-9, 20,000 images, 2,000 iterations with batches of 64, three seeds; three and a
half hours on two cores (estimated).
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.plain_networks import ResNet20
from examples.evidence.networks import ANGULAR, normalized, plain_cnn, standardized
from examples.papers.cells import CPU, FULL, QUICK, Cell, Experiment, Scale, run
from examples.papers.operators_and_losses import terms_of
from examples.papers.report import PICTURES
from examples.papers.results import Outcome
from sphereify.datasets import Data, choose_images
from sphereify.plots import plot_robustness
from sphereify.training import Settings, Terms
from sphereify.training.corruptions import CORRUPTIONS
from sphereify.training.robustness import corrupted_accuracies

CNN, RESNET, TRAINED = "CNN-9", "ResNet-20", "ResNet-20, trained further"
BEST = "standardised, jitter"
"""The best rival: all that can be done without a conversion; with it as well."""
JITTER = 0.8
"""Strength of the changes of brightness, contrast and saturation: each by a factor from 0.2 to 1.8."""
RADIUS = 2.0
TRAINED_RADIUS = 4.0
"""Pooled radius of a network that came trained; the package's choice."""
CORRUPTED_IMAGES = {"quick": 20, "cpu": 1_000, "full": 10_000}
TRAINED_ITERATIONS = {"quick": 2, "cpu": 312, "full": 3_900}
"""Most iterations of the networks that came trained: a pass over the images on a CPU, ten at full scale."""
GENTLE: dict[str, Any] = {"opt": "sgd", "lr": 0.01, "sched": "cosine"}
"""Settings of the networks that came trained, where they differ from the others'."""


def cells(scale: Scale, *, plain: Path) -> list[Cell]:
    measure = partial(corrupted, images=CORRUPTED_IMAGES[scale.name])
    scratch = [*from_scratch(CNN, plain_cnn(scale.width)), *from_scratch(RESNET, ResNet20)]
    return [replace(cell, measure=measure) for cell in [*scratch, *trained_further(scale, plain)]]


def from_scratch(panel: str, build: Callable[[int], nn.Module]) -> list[Cell]:
    """The cells of a network that is trained from scratch."""
    pooled, angular = {**ANGULAR, "radius": RADIUS}, terms_of("cosine")
    return [
        Cell(panel, "plain", build, None),
        Cell(panel, "plain, jitter", build, None, jitter=JITTER),
        Cell(panel, "plain, standardised", standardized(build), None),
        Cell(panel, f"plain, {BEST}", standardized(build), None, jitter=JITTER),
        Cell(panel, "GroupNorm", normalized(build, "GroupNorm"), None),
        Cell(panel, "InstanceNorm", normalized(build, "InstanceNorm"), None),
        Cell(panel, "ρ = 0", build, {**ANGULAR, "radius": 0.0}, angular),
        Cell(panel, f"ρ = {RADIUS:g}", build, pooled, angular),
        Cell(panel, f"ρ = {RADIUS:g}, jitter", build, pooled, angular, jitter=JITTER),
        Cell(panel, f"ρ = {RADIUS:g}, {BEST}", standardized(build), pooled, angular, jitter=JITTER),
    ]


def trained_further(scale: Scale, plain: Path) -> list[Cell]:
    """The cells of the network that came trained; none where there are no weights."""
    file = plain / "resnet20.pt"
    if not file.is_file():
        print(f"left out: {TRAINED}, for there is no {file}; python -m benchmarks.plain_networks trains it",
              file=sys.stderr)  # fmt: skip
        return []
    build, pooled = partial(resnet20, file=file), {**ANGULAR, "radius": TRAINED_RADIUS}
    common: dict[str, Any] = {
        "terms": Terms(),
        "iterations": min(scale.iterations, TRAINED_ITERATIONS[scale.name]),
        "shift": True,
        "learned": "all",
        "settings": GENTLE,
        "weights": file,
    }
    return [
        Cell(TRAINED, "original", build, None, **common),
        Cell(TRAINED, "original, jitter", build, None, jitter=JITTER, **common),
        Cell(TRAINED, "original, standardised", standardized(build), None, **common),
        Cell(TRAINED, f"original, {BEST}", standardized(build), None, jitter=JITTER, **common),
        Cell(TRAINED, "ρ = 0", build, {**ANGULAR, "radius": 0.0}, **common),
        Cell(TRAINED, f"ρ = {TRAINED_RADIUS:g}", build, pooled, **common),
        Cell(TRAINED, f"ρ = {TRAINED_RADIUS:g}, jitter", build, pooled, jitter=JITTER, **common),
        Cell(TRAINED, f"ρ = {TRAINED_RADIUS:g}, {BEST}", standardized(build), pooled, jitter=JITTER, **common),
    ]


def resnet20(classes: int, *, file: Path) -> nn.Module:
    """The ResNet-20 of the benchmarks with the weights of a file; a classifier for other classes starts anew."""
    network, weights = ResNet20(classes), torch.load(file)
    if len(weights["fc.weight"]) != classes:
        weights |= {name: value for name, value in network.state_dict().items() if name.startswith("fc.")}
    network.load_state_dict(weights)
    return network


def rivals(cells: list[Cell]) -> list[tuple[Cell, Cell]]:
    """The conversion with a radius against all else of its panel, and with the care of its rivals against them."""
    pairs = []
    scratch, trained = (f"ρ = {RADIUS:g}", "plain"), (f"ρ = {TRAINED_RADIUS:g}", "original")
    for panel, (ours, plain) in {CNN: scratch, RESNET: scratch, TRAINED: trained}.items():
        found = {cell.label: cell for cell in cells if cell.panel == panel}
        jittered = [label for label in found if label.startswith(plain) and label.endswith("jitter")]
        wanted = [*((ours, label) for label in found if label != ours), *((f"{ours}, jitter", one) for one in jittered),
                  (f"{ours}, {BEST}", f"{plain}, {BEST}")]  # fmt: skip
        pairs += [(found[one], found[other]) for one, other in wanted if one in found and other in found]
    return pairs


def corrupted(network: nn.Module, data: Data, seed: int, *, images: int) -> dict[str, Any]:
    """Accuracies on test images as they are and corrupted, as in `CorruptedAccuracy`."""
    some = choose_images(data, "test", min(images, len(data.test)))  # type: ignore[arg-type]
    found = corrupted_accuracies({"": network}, some, Settings(batch_size=500, seed=seed))
    return asdict(found.networks[""])


def under(outcome: Outcome, corruption: str) -> float:
    """Mean accuracy over the strengths of a corruption."""
    return statistics.mean(outcome.measured["corrupted"][corruption])


def under_all(outcome: Outcome) -> float:
    """Mean accuracy over all corruptions and strengths."""
    return statistics.mean(under(outcome, corruption) for corruption in CORRUPTIONS)


def draw(cells: list[Cell], outcomes: dict[str, list[Outcome]], path: Path) -> None:
    """The accuracies over the strengths, a picture for each panel of which networks have finished."""
    for panel, file in zip((CNN, TRAINED, RESNET), PICTURES, strict=True):
        measured = {cell.label: found for cell in cells
                    if cell.panel == panel and (found := [o for o in outcomes[cell.name] if o.measured])}  # fmt: skip
        if measured:
            classes = len(next(iter(measured.values()))[0].per_class)
            means = {label: mean(found) for label, found in measured.items()}
            plot_robustness(means, 1 / classes, path.with_name(file))


def mean(found: list[Outcome]) -> dict[str, Any]:
    """Mean accuracies over the seeds, as in `CorruptedAccuracy`."""
    measured = [outcome.measured for outcome in found]
    strengths = {name: zip(*(m["corrupted"][name] for m in measured), strict=True) for name in CORRUPTIONS}
    corrupted = {name: [statistics.mean(seeds) for seeds in shares] for name, shares in strengths.items()}
    return {"clean": statistics.mean(m["clean"] for m in measured), "corrupted": corrupted}


EXPERIMENT = Experiment(
    "contrast",
    __doc__,
    cells,
    cpu=replace(CPU, width=1 / 4, train_images=20_000, seeds=3, tests=8, goals=()),
    full=replace(FULL, goals=()),
    quick=replace(QUICK, goals=()),
    columns={**{f"{name}, %": partial(under, corruption=name) for name in CORRUPTIONS}, "mean of these, %": under_all},
    pairs=rivals,
    figure=draw,
    arguments={"--plain": {"type": Path, "default": Path("data/plain"), "help": "folder with resnet20.pt, trained"}},
)


def main(argv: list[str] | None = None) -> None:
    run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()

"""Operators at a real width: do angular networks converge faster, and are they more accurate?

    python -m examples.evidence.operators --data CIFAR10 -o out/operators --jobs 2

CNN-9 as in tables 1 and 2 of "Deep Hyperspherical Learning": plain, and with each operator, cosine with the pooled
radius too, all with the original softmax; plain and cosine also with the linear GA-Softmax of margin 4. The figure
shows the test accuracy and the loss of the training batches over iterations. Each point of the loss is the mean since
the point before; label smoothing, a margin, and the orthogonality penalty of angular filters are parts of it. The
learning rate is chosen for each network alike, 1e-3 or 3e-3: each is tried with the first seed, and all seeds take the
one with the highest accuracy at the end on the test images of the training (1,000 of them on a CPU). Half of the
filters, all images, 4,000 iterations with batches of 64, three seeds.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.evidence.networks import plain_cnn
from examples.papers.cells import CPU, FULL, QUICK, Cell, Experiment, Scale, run
from examples.papers.operators_and_losses import options_of, terms_of
from examples.papers.results import Outcome, against, curves
from sphereify.plots import plot_panels

SOFTMAX, MARGIN = "softmax", "linear GA-Softmax m=4"
RADIUS = 2.0
RATES = (1e-3, 3e-3)


def cells(scale: Scale) -> list[Cell]:
    build = plain_cnn(scale.width)
    pooled: dict[str, Any] = {**(options_of("cosine", SOFTMAX) or {}), "radius": RADIUS}
    operators = ("plain", "cosine", "linear", "sigmoid .3", "learnable")
    return [
        *(Cell(SOFTMAX, name, build, options_of(name, SOFTMAX), terms_of(name), rates=RATES) for name in operators),
        Cell(SOFTMAX, f"cosine, ρ = {RADIUS:g}", build, pooled, terms_of("cosine"), rates=RATES),
        *(
            Cell(MARGIN, name, build, options_of(name, MARGIN), terms_of(name), rates=RATES)
            for name in ("plain", "cosine")
        ),
    ]


def draw(cells: list[Cell], outcomes: dict[str, list[Outcome]], path: Path) -> None:
    """Test accuracy, and below it the loss of the training batches, over iterations."""
    plot_panels(curves(cells, outcomes), path, values=("accuracy", "loss"))


EXPERIMENT = Experiment(
    "operators",
    __doc__,
    cells,
    pairs=against("plain"),
    cpu=replace(CPU, width=1 / 2, iterations=4_000, train_images=None, seeds=3, goals=(0.7, 0.75, 0.8)),
    full=replace(FULL, iterations=20_000, goals=(0.7, 0.75, 0.8)),
    quick=replace(QUICK, goals=(0.1,)),
    figure=draw,
)


def main(argv: list[str] | None = None) -> None:
    run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()

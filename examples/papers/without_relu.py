"""No ReLU: table 3 of "Deep Hyperspherical Learning".

    python -m examples.papers.without_relu --data CIFAR10 -o out/without_relu

CNN-18 with BatchNorm and without a ReLU: all that is not linear in the plain network are its three max-poolings. The
cosine operator is not linear in its input for the division by its length alone.
"""

from dataclasses import replace
from functools import partial

from examples.papers.cells import CPU, Cell, Experiment, Scale, run
from examples.papers.depth import SIX, head
from examples.papers.operators_and_losses import terms_of
from examples.papers.plain_cnn import cnn, wide

PANEL = "CNN-18 without ReLU"
AUTHORS = {"plain": 80.73, "linear": 85.34, "cosine": 85.25, "sigmoid .1": 86.29, "sigmoid .3": 85.67,
           "sigmoid .7": 85.51}  # fmt: skip
FEW = {"quick": ("plain", "cosine"), "cpu": ("plain", "linear", "cosine", "sigmoid .1")}


def cells(scale: Scale) -> list[Cell]:
    build = partial(
        cnn, depth=18, relu=False, filters=wide((64, 96, 128), scale.width), features=wide((256,), scale.width)[0]
    )
    return [Cell(PANEL, name, build, head(name), terms_of(name)) for name in FEW.get(scale.name, SIX)]


EXPERIMENT = Experiment(
    "without_relu",
    __doc__,
    cells,
    {f"{PANEL}: {operator}": value for operator, value in AUTHORS.items()},
    "authors, table 3",
    cpu=replace(CPU, batch_size=32, iterations=1_200, goals=(0.3, 0.4), tests=16),
)


def main(argv: list[str] | None = None) -> None:
    run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()

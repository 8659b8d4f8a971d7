"""Deeper networks: table 2 and figure 3(d) of "Deep Hyperspherical Learning".

    python -m examples.papers.depth --data CIFAR10 -o out/depth

CNN-3 to CNN-69 without shortcuts, and ResNet-32: plain with softmax, angular with the cosine W-Softmax. On a CPU CNN-9
and CNN-69 with an eighth of the filters.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from examples.papers.cells import CPU, Cell, Experiment, Scale, run
from examples.papers.operators_and_losses import OPERATORS, options_of, terms_of
from examples.papers.plain_cnn import cnn, resnet32, wide

AUTHORS = {
    "CNN-3": (81.19, 82.31, 82.23, 82.08, 81.92, 82.40),
    "CNN-9": (90.68, 91.15, 90.99, 91.13, 91.28, 91.18),
    "CNN-18": (90.62, 91.24, 91.23, 91.43, 91.55, 91.69),
    "CNN-45": (88.23, 90.15, 90.05, 89.34, 89.73, 89.85),
    "CNN-60": (88.15, 89.91, 89.28, 87.67, 87.85, 88.42),
    "ResNet-32": (90.40, 91.25, 91.38, 90.94, 91.70, 91.19),
}
"""Accuracies of plain, linear, cosine, sigmoid with k = .1, .3, .7. Figure 3(d) says "nearly 90 %" of cosine CNN-69."""
SIX = [name for name in OPERATORS if name != "learnable"]
NETWORKS: dict[str, Any] = {f"CNN-{depth}": depth for depth in (3, 9, 18, 45, 60, 69)} | {"ResNet-32": None}
FEW = {"quick": ("CNN-69",), "cpu": ("CNN-9", "CNN-69")}


def cells(scale: Scale) -> list[Cell]:
    found = []
    for name in FEW.get(scale.name, NETWORKS):
        operators = SIX if name in AUTHORS and scale.name == "full" else ["plain", "cosine"]
        found += [Cell(name, operator, network(name, scale.width), head(operator), terms_of(operator))
                  for operator in operators]  # fmt: skip
    return found


def network(name: str, width: float) -> Any:
    """Builder of a network with a share of its filters."""
    if name == "ResNet-32":
        return partial(resnet32, filters=wide((96, 192, 384), width))
    return partial(cnn, depth=NETWORKS[name], filters=wide((64, 96, 128), width), features=wide((256,), width)[0])


def head(operator: str) -> dict[str, Any] | None:
    """Options of `sphereify`; the plain network keeps its softmax, as in the paper."""
    return None if operator == "plain" else options_of(operator, "cosine W-Softmax")


EXPERIMENT = Experiment(
    "depth",
    __doc__,
    cells,
    {f"{name}: {operator}": value
     for name, row in AUTHORS.items() for operator, value in zip(SIX, row, strict=True)},
    "authors, table 2",
    cpu=replace(CPU, batch_size=32, iterations=608, goals=(0.3, 0.4), tests=16),
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()

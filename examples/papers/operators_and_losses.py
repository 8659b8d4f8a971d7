"""Operators against losses: table 1 of "Deep Hyperspherical Learning".

    python -m examples.papers.operators_and_losses --data CIFAR10 -o out/operators_and_losses

CNN-9 with each operator and each loss; mirrored images, batch 128 (64 on a CPU).
"""

from functools import partial
from typing import Any

from examples.papers.cells import Cell, Experiment, Scale, run
from examples.papers.plain_cnn import cnn, wide
from sphereify.nn import SigmoidOperator
from sphereify.training import Terms

OPERATORS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "linear": {"operator": "linear"},
    "cosine": {"operator": "cosine"},
    "sigmoid .1": {"operator": "sigmoid", "k": 0.1},
    "sigmoid .3": {"operator": "sigmoid", "k": 0.3},
    "sigmoid .7": {"operator": "sigmoid", "k": 0.7},
    "learnable": {"operator": "learnable-sigmoid"},
}
LOSSES: dict[str, dict[str, Any]] = {
    "softmax": {"head": "keep"},
    "sigmoid .1 W-Softmax": {"head": "w-softmax", "head_operator": SigmoidOperator(0.1)},
    "sigmoid .3 W-Softmax": {"head": "w-softmax", "head_operator": "sigmoid"},
    "sigmoid .7 W-Softmax": {"head": "w-softmax", "head_operator": SigmoidOperator(0.7)},
    "linear W-Softmax": {"head": "w-softmax", "head_operator": "linear"},
    "cosine W-Softmax": {"head": "w-softmax", "head_operator": "cosine"},
    "A-Softmax m=4": {"head": "a-softmax", "margin": 4},
    "linear GA-Softmax m=4": {"head": "ga-softmax", "margin": 4, "head_operator": "linear"},
}
AUTHORS = {
    "sigmoid .1": (90.97, 90.91, 90.89, 90.88, 91.07, 91.13, 91.87, 91.99),
    "sigmoid .3": (91.08, 91.44, 91.37, 91.21, 91.34, 91.28, 92.13, 92.38),
    "sigmoid .7": (91.05, 91.16, 91.47, 91.07, 90.99, 91.18, 92.22, 92.36),
    "linear": (91.10, 90.93, 91.42, 90.96, 90.95, 91.24, 92.21, 92.32),
    "cosine": (90.89, 90.88, 91.08, 91.22, 91.17, 90.99, 91.94, 92.19),
    "plain": (90.58, 90.58, 90.73, 90.78, 91.08, 90.68, 91.78, 91.80),
}
"""Accuracies in the order of LOSSES, at the best of 64,000 iterations."""
ON_CPU = ("softmax", "cosine W-Softmax", "linear GA-Softmax m=4")


def cells(scale: Scale) -> list[Cell]:
    build = partial(cnn, filters=wide((64, 96, 128), scale.width), features=wide((256,), scale.width)[0])
    losses = list(LOSSES) if scale.name == "full" else ON_CPU
    operators = [name for name in OPERATORS if scale.name == "full" or name not in ("sigmoid .1", "sigmoid .7")]
    return [
        Cell(loss, operator, build, options_of(operator, loss), terms_of(operator))
        for loss in losses
        for operator in (operators if scale.name != "quick" else operators[:2])
    ]


def options_of(operator: str, loss: str) -> dict[str, Any] | None:
    """Options of `sphereify` for an operator and a loss; a plain network may have an angular head."""
    given = OPERATORS[operator]
    if given is None:
        return None if loss == "softmax" else {"include": "classifier", **LOSSES[loss]}
    return {**given, **LOSSES[loss]}


def terms_of(operator: str) -> Terms:
    """The authors' label smoothing, and their orthogonality penalty where filters are angular."""
    return Terms(label_smoothing=0.01, orthogonality=0.0 if OPERATORS[operator] is None else 1e-4)


EXPERIMENT = Experiment(
    "operators_and_losses",
    __doc__,
    cells,
    {f"{loss}: {operator}": value
     for operator, row in AUTHORS.items() for loss, value in zip(LOSSES, row, strict=True)}
    | {"cosine W-Softmax: learnable": 91.64, "softmax: learnable": 91.66},
    "authors, table 1",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()

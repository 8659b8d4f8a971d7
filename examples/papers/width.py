"""Wider networks: figure 3(c) of "Deep Hyperspherical Learning".

    python -m examples.papers.width --data CIFAR10 -o out/width

CNN-9 with 16/32/48 to 256/384/512 filters, plain and cosine, both with softmax. On a CPU 8/16/24 and 16/32/48.
"""

from dataclasses import replace
from functools import partial

from examples.papers.cells import CPU, Cell, Experiment, Scale, run
from examples.papers.operators_and_losses import options_of, terms_of
from examples.papers.plain_cnn import cnn

WIDTHS = {
    "quick": [(2, 4, 6)],
    "cpu": [(8, 16, 24), (16, 32, 48)],
    "full": [(16, 32, 48), (64, 96, 128), (128, 192, 256), (256, 384, 512)],
}


def cells(scale: Scale) -> list[Cell]:
    return [
        Cell("/".join(map(str, filters)), name, partial(cnn, filters=filters), options_of(name, "softmax"),
             terms_of(name))
        for filters in WIDTHS[scale.name] for name in ("plain", "cosine")
    ]  # fmt: skip


EXPERIMENT = Experiment(
    "width",
    __doc__,
    cells,
    {},
    "authors (curves only)",
    cpu=replace(CPU, batch_size=32, iterations=1_200, tests=16),
)


def main(argv: list[str] | None = None) -> None:
    run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()

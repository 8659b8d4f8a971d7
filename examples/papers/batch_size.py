"""Small batches: figure 5 of "Deep Hyperspherical Learning".

    python -m examples.papers.batch_size --data CIFAR10 -o out/batch_size

CNN-9 with softmax and batches of 4, 8, 16 and 32 images, normalized by BatchNorm, by SphereNorm (the cosine operator in
a network without BatchNorm), rescaled by learned β and γ, with orthogonal filters, or by both. On a CPU batches of 4
and 16.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from examples.papers.cells import CPU, FULL, SMOOTHED, Cell, Experiment, Scale, run
from examples.papers.plain_cnn import cnn, wide

ANGULAR: dict[str, Any] = {"operator": "cosine", "head": "keep"}
ORTHOGONAL = replace(SMOOTHED, orthogonality=1e-4)
NORMS: dict[str, dict[str, Any]] = {
    "BatchNorm": {"norm": True, "options": None},
    "SphereNorm": {"norm": False, "options": {**ANGULAR, "rescale": "never"}},
    "SphereNorm, rescaled": {"norm": False, "options": {**ANGULAR, "rescale": "always"}},
    "SphereNorm, orthogonal": {"norm": False, "options": {**ANGULAR, "rescale": "never"}, "terms": ORTHOGONAL},
    "both": {"norm": True, "options": {**ANGULAR, "rescale": "never"}},
}
BATCHES = {"quick": (4,), "cpu": (4, 16), "full": (4, 8, 16, 32)}


def cells(scale: Scale) -> list[Cell]:
    plain = partial(cnn, filters=wide((64, 96, 128), scale.width), features=wide((256,), scale.width)[0])
    return [
        Cell(f"batch {size}", name, partial(plain, norm=how["norm"]), how["options"], how.get("terms", SMOOTHED),
             batch_size=size)
        for size in BATCHES[scale.name] for name, how in NORMS.items()
    ]  # fmt: skip


EXPERIMENT = Experiment(
    "batch_size",
    __doc__,
    cells,
    {},
    "authors (curves only)",
    cpu=replace(CPU, iterations=2_000, goals=(0.3, 0.4), tests=16),
    full=replace(FULL, iterations=60_000, seeds=1),
)


def main(argv: list[str] | None = None) -> None:
    run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()

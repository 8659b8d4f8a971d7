"""Small batches: what takes the place of BatchNorm best, figure 5 of "Deep Hyperspherical Learning"?

    python -m examples.evidence.small_batches --data CIFAR10 -o out/small_batches --jobs 2

CNN-9 with batches of 2, 4, 8 and 16 images and equal numbers of iterations: plain with BatchNorm or GroupNorm; cosine
with SphereNorm, rescaled, in place of BatchNorm, alone or with the pooled radius; cosine with BatchNorm ("both"). The
learning rate is chosen for each network and batch alike, from 1e-4, 3e-4, 1e-3 and 3e-3: each is tried with the first
seed, and all seeds take the one with the highest accuracy at the end on the test images of the training (500 on a CPU).
The accuracy in the table is of 5,000 test images. On a CPU: a quarter of the filters, 1,600 iterations, three seeds;
about 45 minutes on two cores.
"""

from dataclasses import replace
from typing import Any

from examples.evidence.networks import ANGULAR, normalized, plain_cnn
from examples.papers.cells import CPU, FULL, QUICK, Cell, Experiment, Scale, run
from examples.papers.operators_and_losses import terms_of
from examples.papers.results import against

BATCHES = {"quick": (4,), "cpu": (2, 4, 8, 16), "full": (2, 4, 8, 16)}
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
RADIUS = 2.0


def cells(scale: Scale) -> list[Cell]:
    build, angular = plain_cnn(scale.width), terms_of("cosine")
    replaced: dict[str, Any] = {**ANGULAR, "norm": "replace"}
    found = []
    for size in BATCHES[scale.name]:
        panel, common = f"batch {size}", {"batch_size": size, "rates": RATES}
        found += [
            Cell(panel, "BatchNorm", build, None, **common),
            Cell(panel, "GroupNorm", normalized(build, "GroupNorm"), None, **common),
            Cell(panel, "SphereNorm", build, replaced, angular, **common),
            Cell(panel, f"SphereNorm, ρ = {RADIUS:g}", build, {**replaced, "radius": RADIUS}, angular, **common),
            Cell(panel, "both", build, ANGULAR, angular, **common),
        ]
    return found


EXPERIMENT = Experiment(
    "small_batches",
    __doc__,
    cells,
    pairs=against("BatchNorm", "GroupNorm"),
    cpu=replace(
        CPU,
        width=1 / 4,
        iterations=1_600,
        train_images=None,
        test_images=500,
        last_images=5_000,
        seeds=3,
        tests=8,
        goals=(0.4,),
    ),
    full=replace(FULL, iterations=20_000, goals=(0.6, 0.7)),
    quick=replace(QUICK, goals=(0.1,)),
)


def main(argv: list[str] | None = None) -> None:
    run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()

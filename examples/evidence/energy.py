"""Energy and orthogonality: do they make plain or converted networks more accurate?

    python -m examples.evidence.energy --data CIFAR10 -o out/energy --jobs 2

CNN-9, plain and with cosine convolutions, each with a loss that keeps filters apart or does not: the energy of
"Learning towards Minimum Hyperspherical Energy" for s = 2, of filters (MHE) or, by angles, of directions (half-space
A-MHE); the same of random projections (compressive MHE); the orthogonality penalty alone, with the weight 1e-4 of
"Deep Hyperspherical Learning". The energy has the weight 1, ten times that for the output layer, as in the authors'
code. On a CPU: half of the filters, all images, 2,000 iterations with batches of 64, two seeds; an hour and a quarter
on two cores.
"""

from dataclasses import replace

from examples.evidence.networks import ANGULAR, plain_cnn
from examples.papers.cells import CPU, FULL, QUICK, SMOOTHED, Cell, Experiment, Scale, run
from examples.papers.minimum_energy import energy
from examples.papers.results import against
from sphereify.training import Terms

LOSSES: dict[str, Terms] = {
    "baseline": SMOOTHED,
    "MHE": energy("MHE"),
    "half-space A-MHE": energy("half-space A-MHE"),
    "compressive MHE": replace(energy("MHE"), mhe_energy="compressive"),
    "orthogonality": replace(SMOOTHED, orthogonality=1e-4),
}
NETWORKS = {"plain": None, "cosine": ANGULAR}


def cells(scale: Scale) -> list[Cell]:
    build = plain_cnn(scale.width)
    return [Cell(network, loss, build, options, terms)
            for loss, terms in LOSSES.items() for network, options in NETWORKS.items()]  # fmt: skip


EXPERIMENT = Experiment(
    "energy",
    __doc__,
    cells,
    pairs=against("baseline"),
    cpu=replace(CPU, width=1 / 2, train_images=None, seeds=2, tests=16, goals=(0.6, 0.7)),
    full=replace(FULL, iterations=20_000, goals=(0.7, 0.8)),
    quick=replace(QUICK, goals=(0.1,)),
)


def main(argv: list[str] | None = None) -> None:
    run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()

"""Hyperspherical energy: tables 1 to 4 of "Learning towards Minimum Hyperspherical Energy", on CIFAR-10.

    python -m examples.papers.minimum_energy --data CIFAR10 -o out/minimum_energy

Plain networks, not converted: cross-entropy, alone or with the energy of the filters. Variants (table 1), width (2),
depth (3), hidden or output layers (4), and a training set in which three classes keep a twentieth of their images. The
papers' tables 2 to 4 are of CIFAR-100; their numbers stand here as accuracies.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from examples.papers.cells import CPU, SMOOTHED, Cell, Experiment, Outcome, Scale, run
from examples.papers.plain_cnn import cnn, wide
from sphereify.training import Terms

RARE = (3, 0.05)
"""Classes, and the share of their training images that they keep."""
ENERGIES: dict[str, dict[str, Any]] = {
    "MHE": {},
    "half-space MHE": {"mhe_half_space": True},
    "A-MHE": {"mhe_distance": "angular"},
    "half-space A-MHE": {"mhe_distance": "angular", "mhe_half_space": True},
}
OUTPUT_WEIGHT = 10.0
"""Weight of the output layer's energy; that of the hidden layers is 1, as in the authors' code for s = 1."""
TABLE_1 = {"MHE": (6.22, 6.74, 6.44), "half-space MHE": (6.28, 6.54, 6.30), "A-MHE": (6.21, 6.77, 6.45),
           "half-space A-MHE": (6.52, 6.49, 6.44)}  # fmt: skip
TABLE_2 = {"baseline": (47.72, 38.64, 28.13, 24.95, 25.45), "MHE": (36.84, 30.05, 26.75, 24.05, 23.14),
           "half-space MHE": (35.16, 29.33, 25.96, 23.38, 21.83)}  # fmt: skip
TABLE_3 = {"baseline": (32.08, 28.13, None), "MHE": (28.16, 26.75, 26.90), "half-space MHE": (27.56, 25.96, 25.84)}
TABLE_4 = {"output": (26.85, None, 27.80, None), "hidden": (26.55, 26.28, 26.56, 26.64),
           "both": (26.16, 25.61, 26.17, 26.03)}  # fmt: skip
"""Errors in % of the variants, in the order of ENERGIES; None: not converged, or not published."""
FACTORS = (1 / 4, 1 / 2, 1, 2, 4)
DEPTHS = (6, 9, 15)
FEW = {
    "quick": ("variants: half-space A-MHE, s=0", "imbalance: MHE"),
    "cpu": ("variants: baseline", "variants: MHE, s=2", "variants: half-space MHE, s=2", "variants: A-MHE, s=2",
            "layers: MHE, output", "imbalance: baseline", "imbalance: MHE"),
}  # fmt: skip
WIDTHS = {factor: "/".join(map(str, wide((64, 128, 256), factor))) for factor in FACTORS}


def energy(name: str, s: float = 2.0, *, hidden: float = 1.0, output: float = OUTPUT_WEIGHT) -> Terms:
    """The loss of a row of the tables."""
    if name == "baseline":
        return SMOOTHED
    return replace(SMOOTHED, mhe=1.0, mhe_s=s, mhe_hidden=hidden, mhe_output=output, **ENERGIES[name])


def cells(scale: Scale) -> list[Cell]:
    width = scale.width
    every = [
        *variants(width),
        *(Cell(f"width {WIDTHS[factor]}", name, network(width * factor), None, energy(name))
          for factor in FACTORS for name in TABLE_2),
        *(Cell(f"CNN-{depth}", name, network(width, depth), None, energy(name))
          for depth in DEPTHS for name in TABLE_3),
        *layers(width),
        *(Cell("imbalance", name, network(width), None, energy(name), rare=RARE) for name in TABLE_2),
    ]  # fmt: skip
    return [cell for cell in every if cell.name in FEW.get(scale.name, [cell.name])]


def variants(width: float) -> list[Cell]:
    """Table 1."""
    rows = [(f"{name}, s={s}", energy(name, s)) for s in (2, 1, 0) for name in ENERGIES]
    return [Cell("variants", label, network(width), None, terms) for label, terms in [("baseline", SMOOTHED), *rows]]


def layers(width: float) -> list[Cell]:
    """Table 4."""
    weights = {"output": (0.0, OUTPUT_WEIGHT), "hidden": (1.0, 0.0), "both": (1.0, OUTPUT_WEIGHT)}
    return [
        Cell("layers", f"{name}, {part}", network(width), None, energy(name, hidden=hidden, output=output))
        for part, (hidden, output) in weights.items()
        for name, error in zip(ENERGIES, TABLE_4[part], strict=True) if error is not None
    ]  # fmt: skip


def network(width: float, depth: int = 9) -> Callable[[int], Any]:
    """The second paper's CNN, with a share of its filters."""
    return partial(cnn, depth=depth, filters=wide((64, 128, 256), width), features=wide((256,), width)[0])


def authors() -> dict[str, float]:
    """Accuracies by the names of the cells at full scale."""
    found: dict[str, float | None] = {"variants: baseline": 7.75}
    found |= {
        f"variants: {name}, s={s}": error
        for name, row in TABLE_1.items()
        for s, error in zip((2, 1, 0), row, strict=True)
    }
    found |= {
        f"width {width}: {name}": error
        for name, row in TABLE_2.items()
        for width, error in zip(WIDTHS.values(), row, strict=True)
    }
    found |= {
        f"CNN-{depth}: {name}": error for name, row in TABLE_3.items() for depth, error in zip(DEPTHS, row, strict=True)
    }
    found |= {f"layers: {name}, {part}": error for part, row in TABLE_4.items()
              for name, error in zip(ENERGIES, row, strict=True)}  # fmt: skip
    return {name: round(100 - error, 2) for name, error in found.items() if error is not None}


def of_rare(outcome: Outcome) -> float:
    """Mean accuracy of the first classes, which are the rare ones."""
    return sum(outcome.per_class[: RARE[0]]) / RARE[0]


EXPERIMENT = Experiment(
    "minimum_energy",
    __doc__,
    cells,
    authors(),
    "authors (tables 2 to 4: CIFAR-100)",
    cpu=replace(CPU, iterations=800, goals=(0.3, 0.4), tests=16),
    columns={f"first {RARE[0]} classes, %": of_rare},
)


def main(argv: list[str] | None = None) -> None:
    run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()

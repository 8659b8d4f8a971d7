"""The kinds of hyperspherical energy: each a function of banks of filters (groups, N, fan_in) -> (groups,)."""

from typing import Protocol

from torch import Tensor

from sphereify.nn.energies.compressive import CompressiveEnergy
from sphereify.nn.energies.determinant import GramDeterminant
from sphereify.nn.energies.pairs import PairEnergy
from sphereify.nn.energies.separation import Separation
from sphereify.shared_options import EnergyOptions


class Measure(Protocol):
    """An energy of filters: the lower, the more evenly they lie on the sphere. It prints as its name and options."""

    def __call__(self, filters: Tensor, half_space: bool) -> Tensor:
        """The energy of each bank: (groups, N, fan_in) -> (groups,)."""

    def least(self, count: int, fan_in: int, half_space: bool) -> float | None:
        """The smallest energy of `count` ≥ 2 filters, where it is known."""


def make_measure(options: EnergyOptions) -> Measure:
    """The energy that the options describe."""
    pairs = PairEnergy(options.s, options.distance, options.self_pairs)
    measures: dict[str, Measure] = {
        "mhe": pairs,
        "compressive": CompressiveEnergy(pairs, options.dimensions, options.projections),
        "separation": Separation(options.distance),
        "determinant": GramDeterminant(options.gamma),
    }
    return measures[options.energy]

"""The options of an energy, checked by themselves and against its kind."""

import math
from dataclasses import dataclass, fields

from sphereify import choices
from sphereify.errors import choose, invalid
from sphereify.options import check_belongs


@dataclass(frozen=True)
class EnergyOptions:
    """Kind of energy and what it takes; see `HypersphericalEnergy`.

    Raises:
        UsageError: a number out of range, an unknown word, or an option that the kind does not take.
    """

    energy: str = "mhe"
    s: float = 1
    distance: str = "euclidean"
    self_pairs: bool = True
    dimensions: int | None = None
    projections: int = 20
    gamma: float = 1.0

    def __post_init__(self) -> None:
        energy = choices.canonical(str(self.energy))
        if energy not in choices.ENERGIES:
            raise choose("energy", self.energy, choices.ENERGIES)
        object.__setattr__(self, "energy", energy)
        if not (_is_number(self.s) and self.s >= 0):
            raise invalid("s", self.s, "a number ≥ 0")
        if self.distance not in choices.FILTER_DISTANCES:
            raise choose("distance", self.distance, choices.FILTER_DISTANCES)
        if self.dimensions is not None and not (type(self.dimensions) is int and self.dimensions >= 2):
            raise invalid("dimensions", self.dimensions, "a whole number of at least 2, or None", "Usual: 20 to 40")
        if not (type(self.projections) is int and self.projections >= 1):
            raise invalid("projections", self.projections, "a whole number of at least 1", "Usual: 5 to 30")
        if not (_is_number(self.gamma) and self.gamma > 0):
            raise invalid("gamma", self.gamma, "a number above 0", "Usual: 0.5 to 4")
        for field in fields(self):
            if field.name in choices.ENERGY_OPTIONS and getattr(self, field.name) != field.default:
                check_belongs(field.name, choices.ENERGY_OPTIONS[field.name], "energy", energy)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)

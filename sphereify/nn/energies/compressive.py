"""Compressive energy (CoMHE, CVPR 2020, arXiv 1906.04892): the energy of random projections of the filters."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sphereify.nn.energies import blocks
from sphereify.nn.energies.pairs import PairEnergy
from sphereify.nn.energies.unit import unit
from sphereify.nn.precision import no_autocast
from sphereify.nn.recomputation import recomputed
from sphereify.shared_options import DIMENSIONS


@dataclass(frozen=True)
class CompressiveEnergy:
    """E = mean over projections P of the pair energy of the vectors Pŵ_i, each brought back to length 1.

    P has independent normal entries, drawn anew in each call. In few dimensions the energy has fewer poor minima, and
    pairs cost less.
    """

    pairs: PairEnergy
    dimensions: int | None
    """Dimensions of a projection; None: 30, and filters of no more inputs are not projected."""
    projections: int

    def __call__(self, filters: Tensor, half_space: bool) -> Tensor:
        """The energy of each bank: (groups, N, fan_in) -> (groups,)."""
        groups, count, fan_in = filters.shape
        dimensions = self.dimensions or DIMENSIONS
        if self.dimensions is None and fan_in <= dimensions:
            return self.pairs(filters, half_space)
        with no_autocast(filters.device.type):
            directions = unit(filters)
            projections = torch.randn(
                self.projections, fan_in, dimensions, dtype=directions.dtype, device=directions.device
            )
            parts = projections.split(max(1, blocks.ROOM // max(1, groups * count * dimensions)))
            if len(parts) == 1:
                return self._mean(directions, projections, half_space)
            sums = [recomputed(self._mean, directions, part, half_space) * len(part) for part in parts]
            return torch.stack(sums).sum(0) / self.projections

    def _mean(self, directions: Tensor, projections: Tensor, half_space: bool) -> Tensor:
        """The mean energy over some projections (P, fan_in, dimensions): (groups,)."""
        side_by_side = projections.transpose(0, 1).flatten(1)
        projected = (directions @ side_by_side).unflatten(2, (len(projections), -1)).movedim(2, 0)
        energies = self.pairs(projected.flatten(0, 1), half_space)
        return energies.view(len(projections), -1).mean(0)

    def least(self, count: int, fan_in: int, half_space: bool) -> float | None:
        """The minimum where nothing is projected; a projection has none that is known."""
        is_projected = self.dimensions is not None or fan_in > DIMENSIONS
        return None if is_projected else self.pairs.least(count, fan_in, half_space)

    def __str__(self) -> str:
        return f"compressive, {self.projections} × {self.dimensions or DIMENSIONS} dimensions, {self.pairs}"

"""Maximum minimum separation (AISTATS 2021, arXiv 2103.01649): the distance of the two closest filters."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sphereify.nn.energies.blocks import cosines, row_blocks, whole_banks
from sphereify.nn.energies.pairs import simplex_distance
from sphereify.nn.energies.unit import unit
from sphereify.nn.precision import no_autocast


@dataclass(frozen=True)
class Separation:
    """E = -min over pairs i ≠ j of z_ij: to minimise it drives the closest pair apart, and only that."""

    distance: str

    def __call__(self, filters: Tensor, half_space: bool) -> Tensor:
        """The energy of each bank: (groups, N, fan_in) -> (groups,)."""
        with no_autocast(filters.device.type):
            directions = unit(filters)
            first, second, sign = _closest(directions.detach(), half_space)
            bank = torch.arange(len(directions), device=directions.device)
            u, v = directions[bank, first], sign[:, None] * directions[bank, second]
            apart, together = _length(u - v, u, v), _length(u + v, u, v)
            # arccos of a cosine near 1 has few digits; the ratio of the two lengths has all.
            return -(apart if self.distance == "euclidean" else 2 * torch.atan2(apart, together))

    def least(self, count: int, fan_in: int, half_space: bool) -> float | None:
        """The value of a simplex: the minimum for up to fan_in + 1 filters in the full space."""
        return None if half_space or count > fan_in + 1 else -simplex_distance(count, self.distance)

    def __str__(self) -> str:
        return f"separation, {self.distance}"


def _closest(unit: Tensor, half_space: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The closest pair of each bank: the indices of the two filters, and -1 where the opposite of the second is meant,
    else 1; (groups,) each."""
    rows = torch.arange(unit.shape[1], device=unit.device)
    parts = []
    for banks in whole_banks(unit):
        closest = [_closest_of_rows(banks, block, half_space) for block in row_blocks(banks, rows)]
        nearness, first, second, sign = (torch.stack(values) for values in zip(*closest, strict=True))
        best = nearness.argmax(0, keepdim=True)
        parts.append([value.gather(0, best)[0] for value in (first, second, sign)])
    first, second, sign = (torch.cat(values) for values in zip(*parts, strict=True))
    return first, second, sign


def _closest_of_rows(unit: Tensor, rows: Tensor, half_space: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The greatest cosine of some filters with any other, and whose it is; (groups,) each."""
    cos, itself = cosines(unit, rows)
    nearness = (cos.abs() if half_space else cos).masked_fill(itself, -2)
    nearest, place = nearness.flatten(1).max(1)
    count = unit.shape[1]
    sign = torch.where(half_space & (cos.flatten(1).gather(1, place[:, None])[:, 0] < 0), -1, 1)
    return nearest, rows[place // count], place % count, sign


def _length(difference: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """‖u - v‖ = √(2 - 2·u·v) of unit vectors; a zero vector is at a right angle to all. The gradient is finite at 0."""
    zeros = (u == 0).all(-1).to(u.dtype) + (v == 0).all(-1).to(u.dtype)
    squared = difference.square().sum(-1) + zeros
    return squared.clamp_min(torch.finfo(u.dtype).tiny).sqrt()

"""Minimum hyperspherical energy (MHE): the mean of a repulsion over all pairs of filters (NIPS 2018, eq. 1 to 5)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sphereify.nn.energies.blocks import cosines, row_blocks, whole_banks
from sphereify.nn.energies.unit import unit
from sphereify.nn.operators import SIN_FLOOR, inner_acos, with_value
from sphereify.nn.precision import no_autocast
from sphereify.nn.recomputation import recomputed


@dataclass(frozen=True)
class PairEnergy:
    """E = mean over pairs i ≠ j of f(z_ij), with f(z) = z^(-s), or -log z for s = 0."""

    s: float
    distance: str
    self_pairs: bool

    def __call__(self, filters: Tensor, half_space: bool) -> Tensor:
        """The energy of each bank: (groups, N, fan_in) -> (groups,)."""
        return pair_energy(filters, self.s, self.distance, half_space, self_pairs=self.self_pairs)

    def least(self, count: int, fan_in: int, half_space: bool) -> float | None:
        """The energy of a simplex: the minimum for up to fan_in + 1 filters, Euclidean, in the full space."""
        if (self.distance == "angular" and count > 2) or half_space or count > fan_in + 1:
            return None
        z = simplex_distance(count, self.distance)
        return -math.log(z) if self.s == 0 else z**-self.s

    def __str__(self) -> str:
        return f"s={self.s:g}, {self.distance}"


def simplex_distance(count: int, distance: str) -> float:
    """The distance of any two of `count` ≥ 2 unit vectors in simplex position."""
    cos = -1 / (count - 1)
    return math.acos(cos) if distance == "angular" else math.sqrt(2 - 2 * cos)


def pair_energy(
    filters: Tensor,
    s: float = 1,
    distance: str = "euclidean",
    half_space: bool = False,
    *,
    self_pairs: bool = True,
    rows: Tensor | None = None,
) -> Tensor:
    """The mean energy of each bank's pairs, or of some filters with all others; see `HypersphericalEnergy`.

    Args:
        filters: (groups, N, fan_in) of any floating type; fp32 or above inside.
        rows: indices (R,) of filters: then the mean over j ≠ i of the pairs (i, j), for each of them.

    Returns:
        (groups,), or with `rows` (groups, R). 0 where there is no pair.
    """
    count = filters.shape[1]
    with no_autocast(filters.device.type):
        directions = unit(filters)
        own = torch.arange(count, device=directions.device) if rows is None else rows
        sums = _row_sums(directions, own, s, distance, half_space)
    if rows is not None:
        return sums / max(1, count - 1)
    if not half_space:
        return sums.sum(1) / max(1, count * (count - 1))
    # An unordered pair {i, j} is four pairs of 2N vectors: two at the distance z, two at that of the opposite. The sum
    # over ordered pairs i ≠ j has each of the two distances twice, and so counts all four.
    pairs = 2 * count * (count - 1)
    if not self_pairs:
        return sums.sum(1) / max(1, pairs)
    z = 2.0 if distance == "euclidean" else math.pi
    return (sums.sum(1) + count * (-math.log(z) if s == 0 else z**-s)) / (pairs + count)


def _row_sums(unit: Tensor, own: Tensor, s: float, distance: str, half_space: bool) -> Tensor:
    """Σ_j≠i f(z_ij) of the rows i in `own`, (groups, R), as many pairs at a time as there is room for."""
    parts = [(banks, row_blocks(banks, own)) for banks in whole_banks(unit)]
    if len(parts) == 1 and len(parts[0][1]) == 1:
        return _block(unit, own, s, distance, half_space)
    sums = [
        torch.cat([recomputed(_block, banks, rows, s, distance, half_space) for rows in blocks], 1)
        for banks, blocks in parts
    ]
    return torch.cat(sums)


def _block(unit: Tensor, rows: Tensor, s: float, distance: str, half_space: bool) -> Tensor:
    cos, itself = cosines(unit, rows)
    energy = _repulsion(cos, s, distance)
    if half_space:
        energy = energy + _repulsion(-cos, s, distance)
    return energy.masked_fill(itself, 0).sum(-1)


def _repulsion(cos: Tensor, s: float, distance: str) -> Tensor:
    """f(z) of the cosines; next to z = 0 value and slope are held where they are finite."""
    # z^-s and its slope in cos θ must stay in range, however large s is.
    most = 1e250 if cos.dtype == torch.float64 else 1e30
    floor = max(SIN_FLOOR[cos.dtype], most ** (-1 / (s + 2)))
    if distance == "angular":
        z = with_value(inner_acos(cos), cos.clamp(-1, 1).acos().clamp_min(floor))
        return -z.log() if s == 0 else z**-s
    squared = 2 - 2 * cos
    squared = with_value(squared, squared.clamp_min(floor**2))
    return squared.log() / -2 if s == 0 else squared ** (-s / 2)

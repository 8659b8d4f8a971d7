"""Regularizers of a network's filters: energy, which spreads them over the sphere, and a penalty for orthogonality.

Both work on any network, angular or not, and on a tensor of filters.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sphereify.errors import UsageError, choose
from sphereify.nn.filters import Bank, filter_banks
from sphereify.nn.operators import SIN_FLOOR, inner_acos, with_value
from sphereify.nn.precision import LARGEST_HALF, accumulated, no_autocast
from sphereify.patterns import PatternList, Patterns

DISTANCES = ("euclidean", "angular")
ROOM = 1 << 22
"""Pairs of filters at a time: 16 MiB in fp32 for each of the few tensors that hold them."""


class HypersphericalEnergy(nn.Module):
    """Minimum hyperspherical energy: filters repel each other on the unit sphere (NIPS 2018, eq. 1 to 5).

        E = mean over pairs i ≠ j of f(z_ij),    f(z) = z^(-s),  or -log z for s = 0,
        z_ij = ‖ŵ_i - ŵ_j‖ (Euclidean) or arccos(ŵ_i·ŵ_j) in radians (angular, "A-MHE")

    Of a model: hidden_weight · Σ over hidden layers + output_weight · output layer. Add it to the loss; the
    authors use a total weight of 1 and an output_weight of 10 for s = 1.

    Args:
        s: ≥ 0, any real number. Usual: 0, 1, 2. The authors' code takes -log z² for s = 0, twice what stands here.
        distance: "euclidean" or "angular".
        half_space: filters and their opposites repel each other, so that w and -w count as the same direction. The
            output layer always takes the full space.
        hidden_weight, output_weight: ≥ 0; 0 leaves that part out.
        self_pairs: with `half_space`, count the constant pairs of a filter and its own opposite in the mean, as the
            authors' code does.
        output: name of the output layer; default: the `AngularHead`, the classifier that the model itself names
            (`get_classifier()`), or the last linear layer.
        exclude: globs over names of layers to leave out, or `re:` and a regular expression.

    Shape:
        a model -> a scalar: over the convolutions, transposed ones too, and linear layers, angular or plain, each group
            a bank of its own; layers of one filter have no pairs and do not count.
        a tensor of filters (N, ...), flattened to (N, fan_in) -> the mean pair energy, a scalar; 0 for N = 1.

    The length of a filter has no influence; the value is finite for duplicates and opposites, and computed in fp32 or
    above. N filters make N² pairs, of which at most 4 million are held at a time.

    Raises:
        UsageError: s or a weight < 0, an unknown distance, a model without filters, an output that is no layer, a
            pattern that matches none.

    >>> HypersphericalEnergy(s=2)(torch.eye(3)).item()
    0.5
    """

    def __init__(
        self,
        s: float = 1,
        distance: str = "euclidean",
        half_space: bool = False,
        hidden_weight: float = 1.0,
        output_weight: float = 1.0,
        *,
        self_pairs: bool = True,
        output: str | None = None,
        exclude: PatternList = None,
    ):
        super().__init__()
        for name, value in {"s": s, "hidden_weight": hidden_weight, "output_weight": output_weight}.items():
            if not (isinstance(value, (int, float)) and value >= 0 and math.isfinite(value)):
                raise UsageError(f"{name}: got {value!r}, expected a number ≥ 0")
        if distance not in DISTANCES:
            raise choose("distance", distance, DISTANCES)
        self.s, self.distance, self.half_space, self.self_pairs = s, distance, half_space, self_pairs
        self.hidden_weight, self.output_weight = hidden_weight, output_weight
        self.output = output
        self.exclude = Patterns("exclude", exclude)

    def forward(self, model_or_filters: nn.Module | Tensor) -> Tensor:
        if isinstance(model_or_filters, Tensor):
            return self._energy(_as_filters(model_or_filters)[None], self.half_space)
        total: Any = 0.0
        for bank in self._banks(model_or_filters):
            weight = self.output_weight if bank.is_output else self.hidden_weight
            if weight:
                total = total + weight * self._energy(bank.filters, self.half_space and not bank.is_output)
        return total if isinstance(total, Tensor) else _zero_like(model_or_filters)

    def report(self, model: nn.Module) -> "EnergyReport":
        """The energy of each layer, in the order of the model."""
        with torch.no_grad():
            rows = [self._layer_energy(bank) for bank in self._banks(model)]
        return EnergyReport(rows, self.extra_repr())

    def _banks(self, model: nn.Module) -> list[Bank]:
        banks = _without(self.exclude, filter_banks(model, self.output))
        if not banks:
            raise UsageError(
                f"{type(model).__name__}: there is no layer with two or more filters, so nothing could repel"
            )
        return banks

    def _energy(self, filters: Tensor, half_space: bool) -> Tensor:
        return pair_energy(filters, self.s, self.distance, half_space, self_pairs=self.self_pairs).mean()

    def _layer_energy(self, bank: Bank) -> "LayerEnergy":
        energy = self._energy(bank.filters, self.half_space and not bank.is_output).item()
        groups, filters, fan_in = bank.filters.shape
        return LayerEnergy(bank.layer, groups, filters, fan_in, energy, self._least(bank), bank.is_output)

    def _least(self, bank: Bank) -> float | None:
        """The energy of a simplex: the minimum for up to fan_in + 1 filters, Euclidean, in the full space."""
        _, count, fan_in = bank.filters.shape
        if (self.distance == "angular" and count > 2) or (self.half_space and not bank.is_output) or count > fan_in + 1:
            return None
        cos = -1 / (count - 1)
        z = math.acos(cos) if self.distance == "angular" else math.sqrt(2 - 2 * cos)
        return -math.log(z) if self.s == 0 else z**-self.s

    def extra_repr(self) -> str:
        space = ", half space" if self.half_space else ""
        return f"s={self.s:g}, {self.distance}{space}"


@dataclass(frozen=True)
class LayerEnergy:
    """The energy of one layer."""

    layer: str
    groups: int
    filters: int
    """In each group."""
    fan_in: int
    energy: float
    least: float | None
    """The minimum, for at most fan_in + 1 filters with Euclidean distances in the full space; otherwise None."""
    is_output: bool


@dataclass(frozen=True)
class EnergyReport:
    """The energy of every layer of a model; prints as a table. `sphereify.plots.plot_energy` draws it."""

    layers: list[LayerEnergy]
    measure: str
    """Exponent, distance and space of the energy, as it prints itself."""

    def __str__(self) -> str:
        width = max(len("layer"), *(len(row.layer) for row in self.layers))
        wide = max(8, *(len(f"{row.energy:.4f}") for row in self.layers))
        lines = [
            f"hyperspherical energy ({self.measure})",
            f"{'layer':<{width}}  {'filters':>9}  fan-in  {'energy':>{wide}}  {'least':>8}",
        ]
        for row in self.layers:
            filters = f"{row.groups}×{row.filters}" if row.groups > 1 else str(row.filters)
            least = "" if row.least is None else f"{row.least:.4f}"
            numbers = f"{filters:>9}  {row.fan_in:>6}  {row.energy:>{wide}.4f}  {least:>8}"
            lines.append(f"{row.layer:<{width}}  {numbers}".rstrip())
        return "\n".join(lines)


class OrthogonalityPenalty(nn.Module):
    """‖WᵀW - I‖²_F of the filters of each hidden layer, W of shape (fan_in, filters); summed over groups and layers.

    Args:
        normalize: bring filters to unit length first: the form for angular layers, to which length does not matter.
            False: take the filters as they are, as in the authors' SphereNet code (there times 1/2 and 2e-4).
        output: name of the output layer, which does not count; default as `HypersphericalEnergy`.
        exclude: globs over names of layers to leave out, or `re:` and a regular expression.

    Shape:
        a model, or a tensor of filters (N, ...) -> a scalar, at least in fp32.

    Raises:
        UsageError: a model without filters, a pattern that matches no layer.

    >>> OrthogonalityPenalty()(2 * torch.eye(3)).item()
    0.0
    """

    def __init__(self, normalize: bool = True, *, output: str | None = None, exclude: PatternList = None):
        super().__init__()
        self.normalize = normalize
        self.output = output
        self.exclude = Patterns("exclude", exclude)

    def forward(self, model_or_filters: nn.Module | Tensor) -> Tensor:
        if isinstance(model_or_filters, Tensor):
            return self._penalty(_as_filters(model_or_filters)[None])
        banks = _without(self.exclude, filter_banks(model_or_filters, self.output, single=True))
        banks = [bank for bank in banks if not bank.is_output]
        if not banks:
            raise UsageError(f"{type(model_or_filters).__name__}: there is no hidden convolution or linear layer")
        return torch.stack([self._penalty(bank.filters) for bank in banks]).sum()

    def _penalty(self, filters: Tensor) -> Tensor:
        with no_autocast(filters.device.type):
            w = _unit(filters) if self.normalize else _precise(filters)
            _, count, fan_in = w.shape
            if count <= fan_in:
                return (w @ w.mT - torch.eye(count, dtype=w.dtype, device=w.device)).square().sum()
            # ‖WᵀW‖ = ‖WWᵀ‖, and the smaller of the two matrices is cheaper: ‖A - I‖² = ‖A‖² - 2·tr A + N.
            return (w.mT @ w).square().sum() - 2 * w.square().sum() + len(w) * count

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}"


# ------------------------------------------------------------------------------------------------------- the energy


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
        unit = _unit(filters)
        own = torch.arange(count, device=unit.device) if rows is None else rows
        sums = torch.cat([_row_sums(part, own, s, distance, half_space) for part in _whole_banks(unit)])
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


def _whole_banks(unit: Tensor) -> tuple[Tensor, ...]:
    """The banks in parts, each of as many as have room for all their pairs, at least one."""
    return unit.split(max(1, ROOM // max(1, unit.shape[1] ** 2)))


def _row_sums(unit: Tensor, own: Tensor, s: float, distance: str, half_space: bool) -> Tensor:
    """Σ_j≠i f(z_ij) of the rows i in `own`, (groups, R), as many rows at a time as there is room for."""
    parts = own.split(max(1, ROOM // max(1, len(unit) * unit.shape[1])))
    if len(parts) == 1:
        return _block(unit, own, s, distance, half_space)
    # The pairs of a block are computed again in the backward pass; only its sums are kept.
    blocks = [
        checkpoint(_block, unit, part, s, distance, half_space, use_reentrant=False, preserve_rng_state=False)
        for part in parts
    ]
    return torch.cat(blocks, 1)


def _block(unit: Tensor, own: Tensor, s: float, distance: str, half_space: bool) -> Tensor:
    cos = unit[:, own] @ unit.mT
    energy = _repulsion(cos, s, distance)
    if half_space:
        energy = energy + _repulsion(-cos, s, distance)
    itself = torch.arange(unit.shape[1], device=unit.device) == own[:, None]
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


def _unit(filters: Tensor) -> Tensor:
    """The filters at length 1; one of length 0 stays where it is, and no gradient pushes it in a random direction."""
    filters = _precise(filters)
    largest = filters.detach().abs().amax(-1, keepdim=True)
    is_zero = largest == 0
    # Divided by their largest value first: squares of 1e-30 are 0 in fp32, and those of 1e30 infinite.
    scaled = torch.where(is_zero, 1, filters) / torch.where(is_zero, 1, largest)
    return torch.where(is_zero, 0, torch.nn.functional.normalize(scaled, dim=-1, eps=0))


def _precise(filters: Tensor) -> Tensor:
    precise = accumulated(filters)
    if filters.dtype is torch.float16 and precise.requires_grad:
        precise.register_hook(lambda grad: grad.clamp(-LARGEST_HALF, LARGEST_HALF))  # fp16 would make it infinite
    return precise


def _without(exclude: Patterns, banks: Iterable[Bank]) -> list[Bank]:
    """The banks whose layers match no pattern."""
    banks = list(banks)
    exclude.check([bank.layer for bank in banks], "layer")
    return [bank for bank in banks if not exclude.match([bank.layer])]


def _as_filters(filters: Tensor) -> Tensor:
    if filters.dim() < 2 or not filters.is_floating_point():
        raise UsageError(
            f"got a tensor of shape {tuple(filters.shape)} and {filters.dtype}, expected filters (N, fan_in) of floats"
        )
    return filters.flatten(1)


def _zero_like(model: nn.Module) -> Tensor:
    first = next(model.parameters())
    return torch.zeros((), device=first.device, dtype=torch.promote_types(first.dtype, torch.float32))

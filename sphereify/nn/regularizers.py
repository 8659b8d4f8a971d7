"""Hyperspherical energy, which spreads the filters of a network over the sphere.

It works on any network, angular or not, and on a tensor of filters.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sphereify.errors import UsageError, option
from sphereify.nn.energies import make_measure
from sphereify.nn.energy_report import EnergyReport, LayerEnergy
from sphereify.nn.filters import Bank, as_filters, filter_banks, without
from sphereify.patterns import PatternList, Patterns
from sphereify.shared_options import DIMENSIONS, EnergyOptions


class HypersphericalEnergy(nn.Module):
    """Energy of filters on the unit sphere: the lower, the more evenly they are spread (MHE, NIPS 2018, and its kin).

        mhe           mean over pairs i ≠ j of f(z_ij), f(z) = z^(-s), or -log z for s = 0
        compressive   the same of random projections of the filters, drawn anew in each call (CoMHE, CVPR 2020)
        separation    -min over pairs i ≠ j of z_ij: the distance of the closest pair (AISTATS 2021)
        determinant   -log det(K + 1e-6·I), K_ij = exp(-γ‖ŵ_i - ŵ_j‖²): the volume that the filters span (ibid.)

    z_ij is ‖ŵ_i - ŵ_j‖ (Euclidean), or arccos(ŵ_i·ŵ_j) in radians (angular, "A-MHE").

    Of a model: hidden_weight · Σ over hidden layers + output_weight · output layer. Add it to the loss; the
    authors use a total weight of 1 and an output_weight of 10 for mhe with s = 1. A determinant grows with the number
    of filters and takes a weight of about one hundredth of that.

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
        energy: "mhe", "compressive", "separation" or "determinant".
        dimensions: of a projection of the compressive energy, ≥ 2 and at most the inputs of a filter. Usual: 20 to 40.
            None: 30, and layers with no more inputs than that are not projected.
        projections: number of projections of the compressive energy, ≥ 1. Usual: 5 to 30.
        gamma: γ > 0 of the determinant's kernel. Usual: 0.5 to 4; the larger, the less distant filters count.

    Shape:
        a model -> a scalar: over the convolutions, transposed ones too, and linear layers, angular or plain, each group
            a bank of its own; layers of one filter have no pairs and do not count.
        a tensor of filters (N, ...), flattened to (N, fan_in) -> its energy, a scalar; 0 for N = 1, where the
            separation and the determinant are refused.

    The length of a filter has no influence; the value is finite for duplicates and opposites, and computed in fp32 or
    above. N filters make N² pairs, of which at most 4 million are held at a time; of more than 2,048 filters the
    determinants of random parts are summed.

    Raises:
        UsageError: a number out of range, an unknown word, an option that the energy does not have, a model without
            filters, an output that is no layer, a pattern that matches none, one filter, projections of more dimensions
            than a layer has inputs.

    >>> HypersphericalEnergy(s=2)(torch.eye(3)).item()
    0.5
    >>> round(HypersphericalEnergy(energy="separation", distance="angular")(torch.eye(3)).item(), 4)
    -1.5708
    """

    def __init__(
        self,
        s: float = EnergyOptions.s,
        distance: str = EnergyOptions.distance,
        half_space: bool = EnergyOptions.half_space,
        hidden_weight: float = EnergyOptions.hidden_weight,
        output_weight: float = EnergyOptions.output_weight,
        *,
        self_pairs: bool = EnergyOptions.self_pairs,
        output: str | None = None,
        exclude: PatternList = None,
        energy: str = EnergyOptions.energy,
        dimensions: int | None = EnergyOptions.dimensions,
        projections: int = EnergyOptions.projections,
        gamma: float = EnergyOptions.gamma,
    ):
        super().__init__()
        options = EnergyOptions(
            energy=energy,
            s=s,
            half_space=half_space,
            self_pairs=self_pairs,
            distance=distance,
            dimensions=dimensions,
            projections=projections,
            gamma=gamma,
            hidden_weight=hidden_weight,
            output_weight=output_weight,
        )
        self.options = options
        self.s, self.distance, self.half_space, self.self_pairs = s, options.distance, half_space, self_pairs
        self.hidden_weight, self.output_weight = hidden_weight, output_weight
        self.output = output
        self.exclude = Patterns("exclude", exclude)
        self.measure = make_measure(options)

    def forward(self, model_or_filters: nn.Module | Tensor) -> Tensor:
        if isinstance(model_or_filters, Tensor):
            filters = as_filters(model_or_filters)[None]
            self._check("", filters)
            return self._energy(filters, self.half_space)
        total: Any = 0.0
        for bank in self._banks(model_or_filters):
            weight = self.output_weight if bank.is_output else self.hidden_weight
            if weight:
                total = total + weight * self._energy(bank.filters, self.half_space and not bank.is_output)
        return total if isinstance(total, Tensor) else _zero_like(model_or_filters)

    def report(self, model: nn.Module) -> EnergyReport:
        """The energy of each layer, in the order of the model."""
        with torch.no_grad():
            rows = [self._layer_energy(bank) for bank in self._banks(model)]
        return EnergyReport(rows, self.extra_repr())

    def check(self, model: nn.Module, dimensions_name: str = "dimensions") -> None:
        """Make sure that a model has filters for this energy.

        Args:
            dimensions_name: the caller's name of the option `dimensions`, for the message.

        Raises:
            UsageError: as a call.
        """
        self._banks(model, dimensions_name)

    def _banks(self, model: nn.Module, dimensions_name: str = "dimensions") -> list[Bank]:
        banks = without(self.exclude, filter_banks(model, self.output))
        if not banks:
            raise UsageError(
                f"{type(model).__name__}: there is no layer with two or more filters, so nothing could repel"
            )
        for bank in banks:
            if self.output_weight if bank.is_output else self.hidden_weight:
                self._check(f"{bank.layer}: ", bank.filters, dimensions_name)
        return banks

    def _check(self, place: str, filters: Tensor, dimensions_name: str = "dimensions") -> None:
        """Make sure that the energy is defined for a bank of filters."""
        _, count, fan_in = filters.shape
        if count < 2 and self.options.energy in ("separation", "determinant"):
            name = option("energy", self.options.energy)
            raise UsageError(f"{place}{name}: got {count} filter{'' if count == 1 else 's'}, expected two or more")
        dimensions = self.options.dimensions
        if dimensions is not None and dimensions > fan_in:
            raise UsageError(
                f"{place}{option(dimensions_name, dimensions)}: a projection cannot be wider than its filters, which "
                f"have {fan_in} inputs. Take at most {fan_in}, or leave it out: layers of no more than {DIMENSIONS} "
                f"inputs are then not projected.",
                option=dimensions_name,
                value=dimensions,
            )

    def _energy(self, filters: Tensor, half_space: bool) -> Tensor:
        return self.measure(filters, half_space).mean()

    def _layer_energy(self, bank: Bank) -> LayerEnergy:
        half_space = self.half_space and not bank.is_output
        energy = self._energy(bank.filters, half_space).item()
        groups, filters, fan_in = bank.filters.shape
        least = self.measure.least(filters, fan_in, half_space)
        return LayerEnergy(bank.layer, groups, filters, fan_in, energy, least, bank.is_output)

    def extra_repr(self) -> str:
        return f"{self.measure}, half space" if self.half_space else str(self.measure)


def _zero_like(model: nn.Module) -> Tensor:
    first = next(model.parameters())
    return torch.zeros((), device=first.device, dtype=torch.promote_types(first.dtype, torch.float32))

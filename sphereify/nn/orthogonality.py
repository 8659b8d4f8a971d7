"""A penalty for filters that are not orthogonal."""

import torch
from torch import Tensor, nn

from sphereify.errors import UsageError
from sphereify.nn.energies.unit import precise, unit
from sphereify.nn.filters import as_filters, filter_banks, without
from sphereify.nn.precision import no_autocast
from sphereify.patterns import PatternList, Patterns


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
            return self._penalty(as_filters(model_or_filters)[None])
        banks = without(self.exclude, filter_banks(model_or_filters, self.output, single=True))
        banks = [bank for bank in banks if not bank.is_output]
        if not banks:
            raise UsageError(f"{type(model_or_filters).__name__}: there is no hidden convolution or linear layer")
        return torch.stack([self._penalty(bank.filters) for bank in banks]).sum()

    def _penalty(self, filters: Tensor) -> Tensor:
        with no_autocast(filters.device.type):
            w = unit(filters) if self.normalize else precise(filters)
            _, count, fan_in = w.shape
            if count <= fan_in:
                return (w @ w.mT - torch.eye(count, dtype=w.dtype, device=w.device)).square().sum()
            # ‖WᵀW‖ = ‖WWᵀ‖, and the smaller of the two matrices is cheaper: ‖A - I‖² = ‖A‖² - 2·tr A + N.
            return (w.mT @ w).square().sum() - 2 * w.square().sum() + len(w) * count

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}"

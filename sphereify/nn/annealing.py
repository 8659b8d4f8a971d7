"""The annealing of a margin."""

import math

import torch
from torch import Tensor, nn

from sphereify.errors import UsageError, invalid


class MarginAnnealing(nn.Module):
    """λ of SphereFace (CVPR 2017): the margin comes in slowly, λ = max(floor, start·(1 + rate·t)^(-power)).

    It belongs to an `AngularLoss`, counts that loss's calls in training mode, and its count is in the state dict.

    Args:
        start: λ before the first step, ≥ 0. SphereFace: 1000.
        floor: the least λ, ≥ 0; SphereFace: 5, so that the target score stays (5·g + ψ)/6. 0 ends at the pure margin.
        rate: per step, ≥ 0. SphereFace: 0.12.
        power: > 0. SphereFace: 1.
        every: calls of the loss that make one step t, ≥ 1: the number of batches whose gradients are accumulated.

    Raises:
        UsageError: a number out of its range.
    """

    calls: Tensor

    def __init__(
        self, start: float = 1000.0, floor: float = 5.0, rate: float = 0.12, power: float = 1.0, every: int = 1
    ):
        super().__init__()
        for name, value in {"start": start, "floor": floor, "rate": rate}.items():
            if not (value >= 0 and math.isfinite(value)):
                raise invalid(name, value, "a number ≥ 0", place=f"annealing: {name}")
        if not power > 0 or every < 1:
            raise UsageError(f"annealing: got power={power!r}, every={every!r}, expected power > 0 and every ≥ 1")
        self.start, self.floor, self.rate, self.power, self.every = start, floor, rate, power, every
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self) -> Tensor:
        """λ at the present step: a tensor of no dimensions."""
        step = torch.div(self.calls, self.every, rounding_mode="floor").float()
        return (self.start * (1 + self.rate * step) ** -self.power).clamp_min(self.floor)

    def extra_repr(self) -> str:
        return f"start={self.start:g}, floor={self.floor:g}, rate={self.rate:g}, power={self.power:g}"

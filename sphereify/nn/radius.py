"""The pooled radius ρ: an angle in one dimension more, which keeps how long a patch is beside the others of its input.

With s_i the squared norm of patch i of one input (one sample, one group) and m the mean of s over its patches,

    N_i² = s_i + ρ²·m + ε            cos θ_i = w·x_i / (N_w · N_i)

is the cosine between the filter and the patch lifted by a coordinate of length ρ·√m, in which filters are 0. For ρ = 0
it is the paper's; with growing ρ a flat patch weighs less than the others, as in the original convolution, which is the
limit, normalized by the energy of its input. As m scales with s, the output does not depend on the length of the input.

The backward differs in two places. With r_i = Σ_filters ∂L/∂cos_i · cos_i / N_i², the gradient of s_i is -½·r_i without
a radius, and with it -½·(r_i + ρ²·mean_j r_j); that of ρ is -ρ·m·Σ_i r_i, summed over samples and groups.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.errors import invalid, option, refused
from sphereify.nn.precision import gathered

Radius = float | Tensor
"""ρ ≥ 0: a number, or a tensor of one element where it is learned."""


def is_pooled(radius: Radius) -> bool:
    """True if patches are pooled: ρ is learned or not 0."""
    return isinstance(radius, Tensor) or radius != 0


def pool(squares: Tensor, radius: Radius) -> Tensor:
    """ρ²·m of each sample and group of s (B, groups, *space), with dimensions of 1 in place of space."""
    return squares.mean(_space(squares), keepdim=True) * (radius * radius)


def pool_backward(radial: Tensor, radius: Radius) -> Tensor:
    """r_i + ρ²·mean_j r_j, for r of shape (B, groups, *space)."""
    return radial + pool(radial, radius)


def radius_backward(radial: Tensor, norm: Tensor, radius: Tensor, eps: float) -> Tensor:
    """The gradient of ρ, of the shape of `radius`, from r before `pool_backward` and N, both (B, groups, *space)."""
    space = _space(norm)
    mean = ((norm * norm).mean(space) - eps) / (1 + radius * radius)
    return (-radius * (mean * radial.sum(space)).sum()).reshape(radius.shape)


def _space(patches: Tensor) -> list[int]:
    return list(range(2, patches.dim()))


def check_radius(radius: Any, learned: bool = False) -> float:
    """ρ as a float, 0 or more.

    Raises:
        UsageError: no finite number of at least 0, or 0 where it is learned: the gradient of ρ is 0 there.
    """
    if isinstance(radius, bool) or not isinstance(radius, (int, float)) or not 0 <= radius < math.inf:
        raise invalid("radius", radius, "a finite number of at least 0", "Usual: 1 to 4")
    if learned and radius == 0:
        raise refused(
            "learn_radius",
            f"starts from {option('radius')}, whose gradient is 0 at 0; got {option('radius', radius)}. Try "
            f"{option('radius', 1.0)}.",
        )
    return float(radius)


class HasRadius(nn.Module):
    """A module with a radius, fixed or learned."""

    log_radius: nn.Parameter | None
    """log ρ, of shape (1,), where ρ is learned: it stays positive, and wants no weight decay."""

    def _set_radius(self, radius: float, learned: bool, like: Tensor | None = None) -> None:
        """Take a radius; a learned one on the device and in the dtype of `like`."""
        self._radius = check_radius(radius, learned)
        start = torch.tensor([math.log(radius) if learned else 0.0])
        if like is not None:
            start = start.to(like)
        self.register_parameter("log_radius", nn.Parameter(start) if learned else None)

    @property
    def radius(self) -> Radius:
        """ρ: a float, or a tensor of shape (1,) where it is learned."""
        return self._radius if self.log_radius is None else self.log_radius.exp()

    @property
    def radius_value(self) -> float:
        """ρ as a number."""
        return self._radius if self.log_radius is None else float(gathered(self.log_radius.detach()).exp())

    def _radius_repr(self) -> str:
        """The radius for `extra_repr`; empty for 0."""
        learned = ", learn_radius=True" if self.log_radius is not None else ""
        return f", radius={self.radius_value:g}{learned}" if is_pooled(self.radius) else ""

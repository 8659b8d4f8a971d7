"""Start values of a converted layer and of the BatchNorm behind it, from the weights alone: no data is seen.

For filters of random directions cos θ has mean 0 and variance 1 / fan_in, with a pooled radius ρ 1 / (fan_in·(1+ρ²)).
Most angles lie near π/2, where g(θ) is nearly cos θ times the slope of g there. A magnitude is taken at the mean length
of patches.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sphereify.convert.sites import has_statistics
from sphereify.nn.magnitudes import SPHERE, Magnitude
from sphereify.nn.operators import CosineOperator, is_built_in

FEW_CHANNELS = 4
"""Channels of a filter that sees an image, or in a depthwise convolution one channel of features."""


@dataclass(frozen=True)
class Filters:
    """The filters of a layer or call that is converted, and the h(‖x‖)·g(θ) that they get."""

    shape: tuple[int, ...]
    """Filters first, as `weight`."""
    weight: Tensor | None
    """None for a weight that is computed, whose lengths are not known."""
    bias: Tensor | None
    operator: Any
    groups: int = 1
    radius: float = 0.0
    magnitude: Magnitude = SPHERE
    eps: float = 0.0

    @property
    def fan_in(self) -> int:
        """Number of weights of one filter."""
        return math.prod(self.shape[1:])

    def lengths(self) -> Tensor:
        """‖w‖ of each filter."""
        assert self.weight is not None
        return self.weight.detach().float().flatten(1).norm(dim=1)

    def are_zero(self) -> Tensor:
        """True for each filter that has no direction, as in layers that start as the zero map."""
        assert self.weight is not None
        return ~self.weight.detach().flatten(1).any(1)

    @property
    def is_unchanged(self) -> bool:
        """True if the layer computes what it did before the conversion."""
        return self.magnitude.keeps_scale and type(self.operator) is CosineOperator and not self.radius

    def gains(self, patches: Any) -> Any:
        """The factor from w·x / (‖w‖·‖x‖) to the output, for patches of the length `patches`.

        Both are a number, or one for each filter.
        """
        gains = _slope_at_right_angles(self.operator, self.shape[0]) / math.sqrt(1 + self.radius**2)
        if self.magnitude.form != "sphere":
            is_number = not isinstance(patches, Tensor)
            sizes = self.magnitude.at_mean(torch.tensor(patches, device="cpu") if is_number else patches)
            gains = gains * (float(sizes) if is_number else sizes)
        if self.magnitude.weighted and self.weight is not None:
            gains = gains * (self.lengths() ** 2 + self.eps).sqrt()
        return gains

    def usual_gains(self) -> Any:
        """The same for inputs of unit RMS."""
        return self.gains(math.sqrt(self.fan_in))


def start_beta(beta: Tensor, filters: Filters, patches: float | None = None) -> None:
    """Start β where the output is nearly the inner product that was there before.

    It is so for patches of the length `patches`; by default for inputs of unit RMS.

    The filters then have the gradient that they had, too. So have filters of zeros, which g(θ) divides by √ε and not by
    0: with a β of √(ε·fan_in) such a layer is the zero map until it is trained. With a β of 0 nothing in it would move.
    """
    if filters.weight is not None and not filters.is_unchanged:
        with torch.no_grad():
            lengths = filters.lengths().clamp_min(math.sqrt(filters.eps))
            patches = patches or math.sqrt(filters.fan_in)
            beta.copy_(lengths * patches / filters.gains(patches))


def start_classes(weight: Tensor) -> None:
    """Give each class whose weights are all zero the direction that a fresh `nn.Linear` would have.

    The angle to a filter of zeros is not defined, and a head has no β that could make the scores 0 instead. The
    directions are the same in each call.
    """
    if weight.is_meta:
        return
    with torch.inference_mode():  # as for statistics
        zero = ~weight.any(1)
        if zero.any():
            uniform = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))
            weight[zero] = ((2 * uniform - 1) / math.sqrt(weight.shape[1])).to(weight)[zero]


class Statistics(NamedTuple):
    """Running statistics for a BatchNorm."""

    mean: Tensor
    variance: Tensor

    def hand_to(self, norm: Any) -> None:
        """Write these statistics into the buffers of a BatchNorm."""
        with torch.inference_mode():  # the buffers may have been made there, and can then be written nowhere else
            norm.running_mean.copy_(self.mean)
            norm.running_var.copy_(self.variance)


def has_trained_statistics(norm: Any) -> bool:
    """True if the running statistics of a BatchNorm are other than those with which it is made."""
    return bool((norm.running_mean != 0).any() or (norm.running_var != 1).any())


def statistics_behind(norm: Any, filters: Filters, beta: Tensor | None) -> Statistics | None:
    """The running statistics of β·g(θ) + bias for the BatchNorm behind it; None where it keeps its own.

    A fresh BatchNorm gets those of filters of random directions. One with trained statistics gets those with which it
    scales and shifts each channel as before, if patches are as long as the statistics suggest.
    """
    if not has_statistics(norm) or norm.running_mean.is_meta or (filters.is_unchanged and beta is None):
        return None
    with torch.no_grad():
        scale: Any = 1.0 if beta is None else beta.float()
        shift: Any = 0.0 if filters.bias is None else filters.bias.float()
        zeros = torch.zeros_like(norm.running_mean, dtype=torch.float32)
        fresh = Statistics(zeros + shift, zeros + (scale * filters.usual_gains()) ** 2 / filters.fan_in)
        if not has_trained_statistics(norm):
            return fresh
        if filters.weight is None:
            return None
        factor = scale * _factors(norm, filters)
        variance = factor**2 * (norm.running_var.float() + norm.eps) - norm.eps
        variance = torch.where(filters.are_zero(), fresh.variance, variance.clamp_min(0))  # directions are to come
        return Statistics(factor * (norm.running_mean.float() - shift) + shift, variance)


def take_over_norm(beta: Tensor, shift: Tensor, norm: Any, filters: Filters) -> None:
    """Start SphereNorm with the scale and shift of each channel by the BatchNorm that it replaces."""
    with torch.no_grad():
        if has_statistics(norm) and not beta.is_meta and filters.weight is not None and has_trained_statistics(norm):
            bias: Any = 0.0 if filters.bias is None else filters.bias.float()
            scale = norm.weight.float() * (norm.running_var.float() + norm.eps).rsqrt()
            moved = scale * (bias - norm.running_mean.float())
            beta.copy_(scale / _factors(norm, filters))
        else:
            moved = torch.zeros_like(beta, dtype=torch.float32)
            beta.copy_(norm.weight.float() * math.sqrt(filters.fan_in) / filters.usual_gains())
        shift.copy_(moved if norm.bias is None else norm.bias.float() + moved)


def _factors(norm: Any, filters: Filters) -> Tensor:
    """The factor of each filter from its inner product to g(θ), by the statistics that a trained BatchNorm has of it.

    A filter of random direction gives the product a mean square of ‖w‖²·‖x‖² / fan_in, and a trained one a multiple of
    it (see `_alignment`); so the filters of a group together tell the length of the patches that they saw. Filters of
    zeros tell nothing.
    """
    shift: Any = 0.0 if filters.bias is None else filters.bias.float()
    lengths = (filters.lengths() ** 2 + filters.eps).sqrt()
    squares = (norm.running_var.float() + (norm.running_mean.float() - shift) ** 2) / lengths**2
    tells = (~filters.are_zero()).float().view(filters.groups, -1)
    sums = (squares.view(filters.groups, -1) * tells).sum(1, keepdim=True)
    grouped = (sums / tells.sum(1, keepdim=True).clamp_min(1)).expand_as(tells)
    patches = (grouped.reshape(-1) * filters.fan_in / _alignment(filters.shape) + filters.eps).sqrt()
    return filters.gains(patches) / (lengths * patches)


def _alignment(shape: tuple[int, ...]) -> float:
    """The mean square of a trained filter's product with its patches, beside that of a filter of random direction.

    Rounded medians over the layers of three small networks trained on photographs (a ResNet, a VGG and a MobileNet).
    Windows over many channels are the most aligned with what they see.
    """
    if len(shape) > 1 and shape[1] <= FEW_CHANNELS:
        return 1.0
    return 4.0 if math.prod(shape[2:]) > 1 else 2.0


def _slope_at_right_angles(operator: Any, filters: int) -> Any:
    """dg/dcos at θ = π/2: a number, or one for each filter; 1 where an operator of the user's own has none."""
    if is_built_in(operator):
        return operator.slope_at_right_angles()
    own = next(iter(operator.parameters()), None) if isinstance(operator, nn.Module) else None
    with torch.inference_mode(False), torch.enable_grad():
        cos = (
            torch.zeros(1, filters, device=own.device, dtype=own.dtype) if own is not None else torch.zeros(1, filters)
        )
        try:
            (slope,) = torch.autograd.grad(operator(cos.requires_grad_()).sum(), cos)
        except RuntimeError:  # not differentiable, or its parameters were made in inference mode
            return 1.0
    return torch.where((slope > 0) & slope.isfinite(), slope, torch.ones_like(slope))[0].float()

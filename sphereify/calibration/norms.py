"""Normalizations behind an angular layer: their affine form in evaluation, and how a calibration sets them."""

from typing import Any

import torch
from torch import Tensor, nn

from sphereify.calibration.layer_pairs import LayerPair
from sphereify.calibration.rows import Batch, rows_at

CHANNELS_FIRST = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
"""Normalizations of which the channels are axis 1."""


def scales_filters(norm: nn.Module, output: Tensor, spatial: int) -> bool:
    """True if the channels of a normalization that takes a layer's output lie on the axis of the filters.

    Args:
        norm: the normalization.
        output: of a convolution with `spatial` axes of space, or of a linear map, which has none.
        spatial: number of these axes.
    """
    filters = output.dim() - 1 - spatial
    if isinstance(norm, CHANNELS_FIRST):
        return filters == 1
    if type(norm) in (nn.LayerNorm, getattr(nn, "RMSNorm", nn.LayerNorm)):
        return filters >= output.dim() - len(norm.normalized_shape)  # type: ignore[arg-type]
    return True  # a class of its own knows where its channels are


def scale_of(norm: Any) -> Tensor:
    """The factor of each channel that a BatchNorm applies in evaluation."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    return _in_precision_of(norm, scale if norm.weight is None else scale * norm.weight.double())


def shift_of(norm: Any) -> Tensor:
    """The constant of each channel that a BatchNorm adds in evaluation, after the factor."""
    shift = -norm.running_mean.double() * scale_of(norm).double()
    return _in_precision_of(norm, shift if norm.bias is None else shift + norm.bias.double())


def _in_precision_of(norm: Any, values: Tensor) -> Tensor:
    return values if norm.running_var.dtype is torch.float64 else values.float()


def set_batch_norm(norm: Any, beta: Tensor, gamma: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Let a BatchNorm compute β·g + γ of its input g.

    Its running statistics become those of g, given as `mean` and `variance`, so that training finds what it expects.
    """
    if norm.weight is None:
        # The statistics are all that it can change: they take β and γ.
        safe = beta.double().clamp_min(1e-6)
        norm.running_mean.copy_(-gamma.double() / safe)
        norm.running_var.copy_((1 / safe.square() - norm.eps).clamp_min(0))
        return
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_(beta.double() * (norm.running_var.double() + norm.eps).sqrt())
    norm.bias.copy_(gamma.double() + beta.double() * norm.running_mean.double())


def refit_affine(pair: LayerPair, norm: Any, batches: list[Batch]) -> None:
    """Set the affine part of a normalization over channels or tokens by regression on its output in the original."""
    if any(batch.normalized is None or batch.call is not None for batch in batches):
        return
    n, sums = 0, torch.zeros(4, norm.weight.numel(), dtype=torch.float64, device=norm.weight.device)
    for batch in batches:
        y = rows_at(pair, norm.forward(pair.layer.forward(batch.x)), batch.positions).double()
        target = batch.normalized.double()  # type: ignore[union-attr]
        n += len(y)
        sums += torch.stack([value.sum(0) for value in (y, target, y * y, y * target)])
    y, target, square, product = sums / max(n, 1)
    variance = square - y * y
    slope = torch.where(variance > 1e-12, (product - y * target) / variance.clamp_min(1e-12), 1.0)
    norm.weight.mul_(slope.view_as(norm.weight))
    if norm.bias is not None:
        norm.bias.copy_((norm.bias.flatten().double() * slope + target - slope * y).view_as(norm.bias))

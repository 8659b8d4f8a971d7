"""Windows of a convolution over a tensor with one channel a group: their sums, and the adjoint."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Ints = tuple[int, ...]


class Projection(NamedTuple):
    """The geometry of a convolution; `None` in its place means a linear map over the last dimension."""

    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, projection: Projection) -> Tensor:
    """torch's convolution of any dimension."""
    stride, padding, dilation, groups = projection
    return torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def is_identity(kernel: Sequence[int], projection: Projection) -> bool:
    """Whether every window is one place of x, in order."""
    return math.prod(kernel) == 1 and math.prod(projection.stride) == 1 and not any(projection.padding)


def box_sum(squares: Tensor, kernel: Sequence[int], projection: Projection) -> Tensor:
    """The sum over each window of a (B, groups, H, W) tensor: one channel a group, so it costs next to nothing.

    A depthwise convolution with ones; pooling has no dilation and is several times slower on many channels.
    """
    groups = projection.groups
    if is_identity(kernel, projection):
        return squares
    if groups == 1 and squares.device.type == "cpu" and not torch.compiler.is_compiling():
        return _sum_by_axis(squares, kernel, projection)
    return convolve(squares, squares.new_ones(groups, 1, *kernel), None, projection)


def _sum_by_axis(squares: Tensor, kernel: Sequence[int], projection: Projection) -> Tensor:
    """The same along one axis after the other, as sums of shifted views: a convolution costs more than it does here."""
    stride, padding, dilation, _ = projection
    if any(padding):
        squares = F.pad(squares, [side for p in reversed(padding) for side in (p, p)])
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        last = squares.shape[axis] - d * (k - 1)
        views = [squares.narrow(axis, j * d, last) for j in range(k)]
        if s > 1:
            views = [view[(slice(None),) * axis + (slice(None, None, s),)] for view in views]
        squares = views[0] if k == 1 else views[0] + views[1]
        for view in views[2:]:
            squares += view
    return squares


def box_spread(windows: Tensor, size: Sequence[int], kernel: Sequence[int], projection: Projection) -> Tensor:
    """The adjoint of `box_sum`: every place of a (B, groups, *size) tensor receives the sum over its windows."""
    stride, padding, dilation, groups = projection
    if is_identity(kernel, projection):
        return windows
    mirrored = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True))
    if math.prod(stride) == 1 and min(mirrored) >= 0:
        # The window is symmetric: its adjoint is itself. On a CPU this is 30 times faster than the general way.
        return box_sum(windows, kernel, projection._replace(padding=mirrored))
    ones = windows.new_ones(groups, 1, *kernel)
    shape_only = windows.new_empty(1).expand(*windows.shape[:2], *size)
    zeros = [0] * len(stride)
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        windows, shape_only, ones, None, stride, padding, dilation, False, zeros, groups, (True, False, False)
    )[0]

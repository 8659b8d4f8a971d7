"""Geometry of a convolution: strides and padding as numbers, its products with the filters, sums over its windows.

Every linear operation here has its adjoint beside it: `project` and `project_backward`, `box_sum` and `box_spread`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sphereify.errors import UsageError, invalid
from sphereify.nn.precision import CHANNELS_LAST, is_channels_last, runs_eagerly

Ints = tuple[int, ...]


class Projection(NamedTuple):
    """The geometry of a convolution; `None` in its place means a linear map over the last dimension."""

    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int


# ---- Arguments of a convolution


def resolve(
    x: Tensor,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Tensor, Projection]:
    """The input as a batch, and the geometry of a convolution in numbers.

    Args:
        x: (B, C, *space) or (C, *space).
        kernel: size of the window in each dimension of space.
        stride, padding, dilation, groups: as `torch.nn.functional.conv2d`; padding also 'same' or 'valid'.

    Raises:
        UsageError: a padding that is no such word, or 'same' with a stride.
    """
    dim = len(kernel)
    x = x if x.dim() == dim + 2 else x.unsqueeze(0)
    strides, dilations = per_axis(stride, dim), per_axis(dilation, dim)
    if not isinstance(padding, str):
        return x, Projection(strides, per_axis(padding, dim), dilations, groups)
    sides = padding_sides(padding, kernel, strides, dilations)
    if any(front != behind for front, behind in sides):
        # A convolution pads both sides alike, so x itself is padded.
        x, sides = F.pad(x, [side for pair in reversed(sides) for side in pair]), [(0, 0)] * dim
    return x, Projection(strides, tuple(front for front, _ in sides), dilations, groups)


def per_axis(value: int | Sequence[int], dim: int) -> Ints:
    """A stride, padding or dilation in the form that torch takes, as one number for each of `dim` axes."""
    return (value,) * dim if isinstance(value, int) else tuple(value) * (dim if len(value) == 1 else 1)


def padding_sides(padding: str, kernel: Sequence[int], stride: Ints, dilation: Ints) -> list[tuple[int, int]]:
    """Zeros in front of and behind each axis for 'same' and 'valid'; 'same' may need one more behind than in front."""
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding != "same":
        raise invalid("padding", padding, "numbers, 'same' or 'valid'")
    if any(s != 1 for s in stride):
        raise UsageError(f"padding='same' needs a stride of 1, got {stride}. Give the padding as numbers.")
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return [(r // 2, r - r // 2) for r in reach]


def output_size(size: Sequence[int], kernel: Sequence[int], projection: Projection) -> list[int]:
    """Number of windows along each axis of an input of that size."""
    stride, padding, dilation, _ = projection
    spans = zip(size, kernel, stride, padding, dilation, strict=True)
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in spans]


def is_identity(kernel: Sequence[int], projection: Projection) -> bool:
    """True if every window is one place of the input, in order."""
    return math.prod(kernel) == 1 and math.prod(projection.stride) == 1 and not any(projection.padding)


# ---- Inner products of filters and patches


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, projection: Projection) -> Tensor:
    """torch's convolution, of any number of dimensions."""
    stride, padding, dilation, groups = projection
    return torch.ops.aten.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


def project(x: Tensor, filters: Tensor, projection: Projection | None) -> Tensor:
    """The inner products of filters and patches: (B, O, H', W') for a convolution, (*, O) for a linear map."""
    return x @ filters.t() if projection is None else convolve(x, filters, None, projection)


def project_backward(
    grad: Tensor, x: Tensor, filters: Tensor, projection: Projection | None, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of the filters from that of `project`; None for one that is not `needed`."""
    if projection is None:
        grad_x = grad @ filters if needed[0] else None
        return grad_x, _rows(grad).t() @ _rows(x) if needed[1] else None
    stride, padding, dilation, groups = projection
    zeros, mask = [0] * len(stride), (needed[0], needed[1], False)
    grads = torch.ops.aten.convolution_backward(
        grad, x, filters, None, stride, padding, dilation, False, zeros, groups, mask
    )
    return grads[0], grads[1]


def _rows(tensor: Tensor) -> Tensor:
    """(*, C) -> (N, C); `flatten` has no rule for gradients in a batch."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


# ---- Sums over windows


def box_sum(squares: Tensor, kernel: Sequence[int], projection: Projection, plus: float = 0.0) -> Tensor:
    """The sum over each window of a (B, groups, H, W) tensor, and `plus`: one channel a group, so it costs little.

    A depthwise convolution with ones; pooling has no dilation and is several times slower on many channels.
    """
    groups = projection.groups
    if is_identity(kernel, projection):
        return squares + plus if plus else squares
    if groups == 1 and _goes_by_axis(squares):
        sums = _sum_by_axis(squares, kernel, projection)
        return sums + plus if plus else sums
    bias = squares.new_full((groups,), plus) if plus else None  # without a pass of its own
    return convolve(squares, squares.new_ones(groups, 1, *kernel), bias, projection)


def _goes_by_axis(tensor: Tensor) -> bool:
    """True where sums over windows of one channel are not left to a convolution.

    On a CPU it is slower, unless compiled. On a GPU cuDNN would round the squares to TF32, which torch allows it by
    default, and the norms would err by 2e-4.
    """
    return tensor.device.type != "cpu" or not torch.compiler.is_compiling()


def _sum_by_axis(squares: Tensor, kernel: Sequence[int], projection: Projection) -> Tensor:
    """`box_sum` along one axis after the other, as sums of shifted views."""
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
    if groups == 1 and _goes_by_axis(windows):
        return _spread_by_axis(windows, size, kernel, projection)
    # The adjoint depends on the shape of the input only. Where it lies in memory as `windows` do, none is copied.
    shape = (*windows.shape[:2], *size)
    if runs_eagerly(windows):
        layout = CHANNELS_LAST[windows.dim()] if is_channels_last(windows) else torch.contiguous_format
        shape_only = torch.empty(shape, dtype=windows.dtype, device=windows.device, memory_format=layout)
    else:
        shape_only = windows.new_empty(1).expand(shape)
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        windows, shape_only, windows.new_ones(groups, 1, *kernel), None, stride, padding, dilation, False,
        [0] * len(stride), groups, (True, False, False),
    )[0]  # fmt: skip


def _spread_by_axis(windows: Tensor, size: Sequence[int], kernel: Sequence[int], projection: Projection) -> Tensor:
    """`box_spread` along one axis after the other, likewise."""
    stride, padding, dilation, _ = projection
    for axis, (n, k, s, p, d) in enumerate(zip(size, kernel, stride, padding, dilation, strict=True), start=2):
        reach = s * (windows.shape[axis] - 1) + 1
        padded = list(windows.shape)
        padded[axis] = max(n + 2 * p, d * (k - 1) + reach)
        places = windows.new_zeros(padded)
        for j in range(k):
            places[(slice(None),) * axis + (slice(j * d, j * d + reach, s),)] += windows
        windows = places.narrow(axis, p, n)
    return windows

"""The folded layers in the form that ONNX Runtime runs fast: the same maps, of other operations.

ONNX Runtime keeps the activations of convolutional networks in blocks of channels, in which it has convolutions
and products of equal shapes, and fuses a convolution with the activation behind it. Square roots, quotients and
broadcasting are done outside of the blocks, which costs two copies and the fusion. So

- the norms of patches are made on one channel, by a sum over channels and a mean over windows;
- a window of one position divides its input where that has the fewer channels: what follows stays fused;
- otherwise 1/N is spread over the channels by a convolution with ones, and b is the bias of a convolution with one
  weight for each channel, which takes the activation in;
- norms of rows are a root mean square, for which it has one kernel, and images of one position are rows;
- squares are products, and arcsin is π/2 - arccos: its kernels for powers and arcsin take two to three times as long.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sphereify.nn.geometry import Projection, convolve, is_identity
from sphereify.nn.precision import accumulate_dtype, cast
from sphereify.nn.radius import pool

_opset: ContextVar[int | None] = ContextVar("opset", default=None)

RMS_OPSET = 23
"""The first version of ONNX's operators that has RMSNormalization."""


@contextmanager
def traced_for_onnx(opset: int) -> Iterator[None]:
    """Let folded layers be traced in this form, with the operators of this version of ONNX."""
    token = _opset.set(opset)
    try:
        yield
    finally:
        _opset.reset(token)


def is_traced_for_onnx() -> bool:
    """True inside of `traced_for_onnx`."""
    return _opset.get() is not None


def arcsin(cos: Tensor) -> Tensor:
    """arcsin of numbers in [-1, 1], exactly 0 at 0.

    The polynomial of `sphereify.nn.arcsine` would be twenty operations here, each of a fifth of the time of arccos.
    """
    return math.pi / 2 - cos.acos()


def convolution(layer: Any, x: Tensor, weight: Tensor, projection: Projection) -> Tensor:
    """The outputs of a folded convolution for x (B, C, *space)."""
    precise, groups = accumulate_dtype(x.dtype), projection.groups
    filters, channels = weight.shape[:2]
    if groups == 1 and is_identity(weight.shape[2:], projection) and _one_position(x) and not layer.radius:
        y = rows(layer, _reshape(x, [0, -1], [x.shape[0], channels]), weight.flatten(1))
        return _reshape(y, [0, 0, *x.shape[2:]], [x.shape[0], filters, *x.shape[2:]])
    norm = _patch_norm(cast(x, precise), weight, projection, layer.eps, layer.radius)
    if groups == 1 and is_identity(weight.shape[2:], projection) and (channels < filters or _one_position(x)):
        bias = cast(layer.bias, x.dtype) if layer.curve == "cosine" and layer.bias is not None else None
        unit = cast(x, precise) / norm if _one_position(x) else cast(x, precise) * norm.reciprocal()
        dot = convolve(cast(unit, x.dtype), weight, bias, projection)
        return _finish(layer, cast(dot, precise), done=layer.curve == "cosine")
    dot = cast(convolve(x, weight, None, projection), precise)
    if groups == 1 and _in_blocks(x):
        return _finish(layer, dot * _spread(norm.reciprocal(), filters), in_blocks=True)
    if groups == 1:
        return _finish(layer, dot * norm.reciprocal())
    if groups == filters:
        return _finish(layer, dot / norm)
    return _finish(layer, (dot.unflatten(1, (groups, -1)) / norm.unsqueeze(2)).flatten(1, 2))


def rows(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """The outputs of a folded linear map for x (*, in_features)."""
    precise = accumulate_dtype(x.dtype)
    unit = cast(_unit_rows(cast(x, precise), layer.eps), x.dtype)
    if layer.curve == "cosine":
        return F.linear(unit, weight, None if layer.bias is None else cast(layer.bias, x.dtype))
    return _finish(layer, cast(F.linear(unit, weight), precise), dim=-1)


# ---- Norms


def _patch_norm(x: Tensor, weight: Tensor, projection: Projection, eps: float, radius: float) -> Tensor:
    """sqrt(‖patch‖² + ρ²·m + ε): (B, groups, *space)."""
    groups, (channels, *kernel) = projection.groups, weight.shape[1:]
    if groups == 1:
        squares = _window_sums(_sum_of_squares(x), kernel, projection)
    elif channels == 1 and is_identity(kernel, projection):
        squares = x * x
    elif not radius:
        ones = x.new_ones(groups, channels, *kernel)
        return convolve(x * x, ones, x.new_full((groups,), eps), projection).sqrt()
    else:
        squares = convolve(x * x, x.new_ones(groups, channels, *kernel), None, projection)
    return (squares + (pool(squares, radius) + eps if radius else eps)).sqrt()


def _window_sums(x: Tensor, kernel: Sequence[int], projection: Projection) -> Tensor:
    """Sums over the windows of one channel: (B, 1, *space) -> (B, 1, *space).

    As means where there are such: a convolution would make a whole block of channels.
    """
    stride, padding, dilation, _ = projection
    if is_identity(kernel, projection):
        return x
    if any(d > 1 for d in dilation) or any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        return convolve(x, x.new_ones(1, 1, *kernel), None, projection)
    means = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    return means(x, list(kernel), list(stride), list(padding)) * math.prod(kernel)


def _sum_of_squares(x: Tensor) -> Tensor:
    """The sum of squares over the channels: (B, C, *space) -> (B, 1, *space).

    As a product of matrices: ONNX Runtime's reductions take three times as long where there are many positions.
    """
    batch, channels, *space = x.shape
    if _one_position(x) or not _is_fixed(space):
        axes = {"keepdims": 1}
        return _operator("ReduceSumSquare", (x, torch.tensor([1])), axes, x, [batch, 1, *space])
    squares = _reshape(x * x, [0, 0, -1], [batch, channels, math.prod(space)])
    total = x.new_ones(1, channels) @ squares
    return _reshape(total, [0, 1, *space], [batch, 1, *space])


def _reshape(x: Tensor, to: list[int], shape: list[Any]) -> Tensor:
    """x in another shape, which `to` says without the size of the batch: 0 keeps a size, -1 takes the rest."""
    return _operator("Reshape", (x, torch.tensor(to)), {}, x, shape)


def _unit_rows(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(‖x‖² + ε) over the last dimension, as the root mean square that ONNX Runtime knows, times 1/√C."""
    size = x.shape[-1]
    scale = x.new_full((size,), size**-0.5)
    opset = _opset.get()
    if opset is not None and opset >= RMS_OPSET:
        return _operator("RMSNormalization", (x, scale), {"axis": -1, "epsilon": eps / size}, x, x.shape)
    return x / (x.pow(2).mean(-1, keepdim=True) + eps / size).sqrt() * scale


def _spread(inverse: Tensor, filters: int) -> Tensor:
    """(B, 1, *space) -> (B, filters, *space), all alike."""
    space = inverse.dim() - 2
    ones = inverse.new_ones(filters, 1, *[1] * space)
    return convolve(inverse, ones, None, Projection((1,) * space, (0,) * space, (1,) * space, 1))


def _in_blocks(x: Tensor) -> bool:
    """True if ONNX Runtime can keep x in blocks: images whose size does not change from run to run."""
    return x.dim() == 4 and _is_fixed(x.shape[2:]) and not _one_position(x)


def _is_fixed(space: Sequence[Any]) -> bool:
    """True if no size differs from run to run."""
    return all(isinstance(size, int) for size in space)


def _one_position(x: Tensor) -> bool:
    """True if every channel is one number, as behind a global pooling."""
    return _is_fixed(x.shape[2:]) and math.prod(x.shape[2:]) == 1


# ---- What follows


def _finish(layer: Any, cos: Tensor, *, done: bool = False, in_blocks: bool = False, dim: int = 1) -> Tensor:
    """a·g(θ) + b from cosines, or from a·cos + b where all is `done`; the filters lie along `dim`.

    Outside of blocks a shift alone is an addition; with a scale it is cheaper to go into them.
    """
    if done:
        return cos
    shape = (-1,) if dim == -1 else (1, -1, *[1] * (cos.dim() - 2))
    y = cos if layer.curve == "cosine" else layer._g(cos, shape)
    scale, shift = (None if v is None else cast(v, y.dtype) for v in (layer.scale, layer.bias))
    if shift is not None and (in_blocks or (scale is not None and _in_blocks(y))):
        return _scaled_channels(y, scale, shift)
    y = y if scale is None else y * scale.view(shape)
    return y if shift is None else y + shift.view(shape)


def _scaled_channels(y: Tensor, scale: Tensor | None, shift: Tensor) -> Tensor:
    """scale·y + shift for each channel of images, as the convolution that takes in an activation behind it."""
    filters = (torch.ones_like(shift) if scale is None else scale).view(-1, 1, 1, 1)
    return convolve(y, filters, shift, Projection((1, 1), (0, 0), (1, 1), len(shift)))


def _operator(name: str, inputs: tuple[Tensor, ...], attributes: dict[str, Any], like: Tensor, shape: Any) -> Tensor:
    """An operator of ONNX by its name, whose result has the dtype of `like`."""
    import torch.onnx.ops

    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=like.dtype, shape=shape, version=_opset.get())

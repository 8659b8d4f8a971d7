"""The passes as Triton kernels: for CUDA, or anywhere in Triton's interpreter.

When a kernel cannot be compiled or launched, or computes something else than the reference (`self_check`), the process
warns once and stays with the other passes (`with_passes`).
SPHEREIFY_KERNELS=0 in the environment, or `enabled(False)`, switches the kernels off.

Triton itself is imported with the first launch.
"""

import importlib.util
import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sphereify.nn.geometry import Projection, is_identity, output_size
from sphereify.nn.operators import SIN_FLOOR
from sphereify.nn.passes.protocol import CurveGradients
from sphereify.nn.passes.switch import KernelFailure, Switch
from sphereify.nn.precision import is_channels_last, is_dense, runs_eagerly
from sphereify.nn.radius import Radius, is_pooled, pool

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TILE = 2048
"""Elements of a program's tile, 16 for each thread of its four warps."""
WINDOW_TILE = 256
"""Elements of a tile for sums over windows of one channel; four times as many where there are more channels."""
LARGEST = 2**29
"""Bound on the pixels of a batch, and on the elements of a sample: places in a tile are counted in 32 bits."""


# ---- When they are used


_switch = Switch("SPHEREIFY_KERNELS")
enabled = _switch.enabled


def serves(device: torch.device) -> bool:
    """True if tensors on this device may be given to the kernels: they are switched on, and Triton can run them."""
    return _switch.on and (device.type == "cuda" or (device.type == "cpu" and _interpreted())) and _has_triton()


def usable(x: Tensor, weight: Tensor, projection: Projection | None) -> bool:
    """True if the kernels can serve an angular map of x (in the compute dtype) and weight, in a forward or a backward.

    They write to memory directly, so operations must run eagerly and tensors be dense: channels_last or contiguous for
    a convolution of up to two dimensions, contiguous for a linear map.
    """
    if torch.compiler.is_compiling() or not _switch.on or _switch.failed:
        return False
    if not (x.is_cuda or (x.device.type == "cpu" and _interpreted())):
        return False
    return (
        runs_eagerly(x, weight)
        and x.device == weight.device
        and all(t.dtype in DTYPES and t.numel() > 0 for t in (x, weight))
        and is_dense(weight)
        and (x.is_contiguous() if projection is None else len(projection.stride) < 3 and is_dense(x))
        and _is_small(x, weight, projection)
        and _has_triton()
    )


def give_up(failure: KernelFailure) -> None:
    """Warn that a kernel failed, after which none is `usable` in this process."""
    _switch.failed = True
    warnings.warn(
        f"The Triton kernel {failure} failed, so this process goes on without kernels, slower: "
        f"{type(failure.__cause__).__name__}: {failure.__cause__}",
        RuntimeWarning,
        stacklevel=2,
    )


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_small(x: Tensor, weight: Tensor, projection: Projection | None) -> bool:
    channels = x.shape[-1 if projection is None else 1]
    pixels = x.numel() // channels
    sample = 1 if projection is None else pixels // x.shape[0]
    return max(pixels, sample * max(channels, weight.shape[0])) < LARGEST


# ---- Forward


def normalize_filters(weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(w / N in `dtype`, N) with N = sqrt(‖w‖² + ε) of shape (O, 1, …) in fp32."""
    unit = torch.empty_like(weight, dtype=dtype)
    norm = torch.empty((weight.shape[0], *[1] * (weight.dim() - 1)), dtype=torch.float32, device=weight.device)
    fan_in = weight[0].numel()
    _launch("normalize_rows", (len(weight),), weight, unit, norm, fan_in, eps, BLOCK=_row_block(fan_in))
    return unit, norm


def patch_norm(
    x: Tensor, kernel: Sequence[int], eps: float, projection: Projection | None, radius: Radius = 0.0
) -> Tensor:
    """sqrt(‖patch‖² + ρ²·m + ε) in fp32: (B, groups, H', W') for a convolution, (*, 1) for a linear map."""
    if projection is None:
        return _square_sum(x, 1, _Tensor.of(x, None), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32), eps)
    if is_pooled(radius):  # the mean of all sums comes before their roots
        squares = _patch_squares(x, kernel, None, projection)
        return squares.add_(pool(squares, radius).add_(eps)).sqrt_()
    return _patch_squares(x, kernel, eps, projection)


def _patch_squares(x: Tensor, kernel: Sequence[int], eps: float | None, projection: Projection) -> Tensor:
    """‖patch‖², or with an `eps` sqrt(‖patch‖² + ε)."""
    groups, layout = projection.groups, _Tensor.of(x, projection)
    size = x.shape[2:]
    if is_identity(kernel, projection):
        return _square_sum(x, groups, layout, _empty_map(x, groups, size, layout), eps)
    depthwise = layout.columns == groups
    squares = x if depthwise else _square_sum(x, groups, layout, _empty_map(x, groups, size, layout), None)
    norm = _empty_map(x, groups, output_size(size, kernel, projection), layout)
    return _window_map(squares, norm, kernel, projection, layout.channels_last, eps=eps, square=depthwise)


def curve(
    dot: Tensor,
    norm: Tensor,
    curve: str,
    k: float | Tensor | None,
    projection: Projection | None,
    beta: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """g of dot / norm, which takes the place of `dot`, and β·g + shift, None where there is neither of them."""
    layout = _Tensor.of(dot, projection)
    dot, norm = layout.arrange(dot), layout.arrange(norm)
    y = torch.empty_like(dot) if beta is not None or shift is not None else None
    groups = projection.groups if projection else 1
    blocks = _elementwise(layout)
    _launch(
        "epilogue", layout.grid(blocks), dot, norm, _as_argument(k), _adjacent(beta), _adjacent(shift), dot, y,
        layout.rows, layout.columns // groups, groups,
        GROUPED=groups > 1, **_of_curve(curve, k), **layout.constants(groups), **blocks,
    )  # fmt: skip
    return dot, y


# ---- Backward


def curve_backward(
    grad: Tensor,
    g: Tensor,
    norm: Tensor,
    curve: str,
    k: float | Tensor | None,
    projection: Projection | None,
    beta: Tensor | None = None,
    shift_dtype: torch.dtype | None = None,
    needed: Sequence[bool] = (True, True, True),
) -> CurveGradients:
    """The gradients that follow from that of β·g + shift, with cos and the slopes recovered from g.

    Sums are always computed in the same order.
    """
    layout = _Tensor.of(g, projection)
    g, grad, norm = layout.arrange(g), layout.arrange(grad), layout.arrange(norm)
    groups = projection.groups if projection else 1
    d_dot, radial = torch.empty_like(g), torch.empty_like(norm)
    blocks = _grouped(layout, groups)
    grid = layout.grid(blocks, groups)
    learned = isinstance(k, Tensor) and needed[2]
    partial_k, partial_beta, partial_shift = (
        g.new_empty((grid[0], layout.columns), dtype=torch.float32) if present else None
        for present in (learned, beta is not None, shift_dtype is not None)
    )
    _launch(
        "prologue", grid, grad, g, norm, _as_argument(k), _adjacent(beta), d_dot, radial,
        partial_k, partial_beta, partial_shift,
        layout.rows, layout.columns // groups, groups, SIN_FLOOR[g.dtype],
        **_of_curve(curve, k), **layout.constants(groups), **blocks,
    )  # fmt: skip
    grad_k = None
    if partial_k is not None and isinstance(k, Tensor):
        by_filter = partial_k.sum(0)
        grad_k = by_filter.view(k.shape) if k.numel() > 1 else by_filter.sum().view(k.shape)
    grad_beta = None if partial_beta is None or beta is None else partial_beta.sum(0).to(beta.dtype)
    grad_shift = None if partial_shift is None else partial_shift.sum(0).to(shift_dtype)
    return CurveGradients(d_dot, radial, grad_k, grad_beta, grad_shift)


def subtract_radial(
    grad_x: Tensor, x: Tensor, radial: Tensor, kernel: Sequence[int], projection: Projection | None
) -> Tensor:
    """grad_x - x · (the sum of `radial` over the patches of each element), in place where the layouts agree."""
    layout = _Tensor.of(x, projection)
    grad_x, radial = layout.arrange(grad_x), layout.arrange(radial)
    groups = projection.groups if projection else 1
    gather = projection is not None and not is_identity(kernel, projection)
    if projection is not None and gather and 1 < groups < layout.columns:
        # Neither one map nor one for each channel: gathered once for a group, not once for each of its channels.
        spread = _empty_map(x, groups, x.shape[2:], layout)
        radial, gather = _window_map(radial, spread, kernel, projection, layout.channels_last, spread=True), False
    blocks = _elementwise(layout)
    _launch(
        "correct", layout.grid(blocks), grad_x, x, radial, layout.rows, layout.columns // groups, groups,
        *_sizes(radial, x, projection),
        GATHER=gather, GROUPED=groups > 1, **_geometry(kernel, projection), **layout.constants(groups), **blocks,
    )  # fmt: skip
    return grad_x


def filter_gradient(v: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
    """(v - ŵ (ŵ·v)) / N in the dtype and layout of weight; v of any floating dtype, N of `normalize_filters`."""
    if v.stride() != weight.stride():
        v = torch.empty_like(weight, dtype=v.dtype).copy_(v)
    out = torch.empty_like(weight)
    fan_in = weight[0].numel()
    _launch("project_rows", (len(weight),), v, weight, norm, out, fan_in, BLOCK=_row_block(fan_in))
    return out


# ---- Sums that several passes share


def _square_sum(x: Tensor, groups: int, layout: "_Tensor", out: Tensor, eps: float | None) -> Tensor:
    """The sum of squares over the channels of each group, with an `eps` sqrt(sum + eps), written to `out`."""
    blocks = _grouped(layout, groups)
    _launch(
        "square_sum", layout.grid(blocks, groups), x, out, layout.rows, layout.columns // groups, groups, eps or 0.0,
        ROOT=eps is not None, **layout.constants(groups), **blocks,
    )  # fmt: skip
    return out


def _window_map(
    tensor: Tensor, out: Tensor, kernel: Sequence[int], projection: Projection, channels_last: bool,
    *, eps: float | None = None, square: bool = False, spread: bool = False,
) -> Tensor:  # fmt: skip
    """The sum over each window, of squares with `square`, with an `eps` sqrt(sum + eps), written to `out`.

    With `spread`, the adjoint of the sum.
    """
    layout = _Tensor.of(out, projection, channels_last)
    columns = min(_power(layout.columns), 32, WINDOW_TILE)
    blocks = {"BLOCK_ROWS": (1 if layout.columns == 1 else 4) * WINDOW_TILE // columns, "COLUMN_BLOCK": columns}
    _launch(
        "window_map", layout.grid(blocks), tensor, out, layout.rows, layout.columns, *_sizes(tensor, out, projection),
        eps or 0.0, SPREAD=spread, SQUARE=square, ROOT=eps is not None, CHANNELS_LAST=channels_last,
        ALIGN=_alignment(layout.columns), **_geometry(kernel, projection), **blocks,
    )  # fmt: skip
    return out


# ---- How a tensor is seen


class _Tensor(NamedTuple):
    """A tensor as the kernels see it: samples of (rows, columns), which `triton_kernels` explains."""

    samples: int
    rows: int
    columns: int
    channels_last: bool
    linear: bool

    @classmethod
    def of(cls, tensor: Tensor, projection: Projection | None, channels_last: bool | None = None) -> "_Tensor":
        if projection is None:
            return cls(1, tensor.numel() // tensor.shape[-1], tensor.shape[-1], True, True)
        samples, columns = tensor.shape[:2]
        rows = math.prod(tensor.shape[2:])
        if is_channels_last(tensor) if channels_last is None else channels_last:
            return cls(1, samples * rows, columns, True, False)
        return cls(samples, rows, columns, False, False)

    def arrange(self, tensor: Tensor) -> Tensor:
        """The tensor in this layout, copied where it has another."""
        channels_last = self.channels_last and not self.linear
        return tensor.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def grid(self, blocks: dict[str, Any], groups: int = 1) -> tuple[int, int]:
        """Programs: blocks of rows of all samples, blocks of columns, or of groups where a program sums over them."""
        sums = "GROUP_BLOCK" in blocks
        columns = -(-groups // blocks["GROUP_BLOCK"]) if sums else -(-self.columns // blocks["COLUMN_BLOCK"])
        return self.samples * -(-self.rows // blocks["BLOCK_ROWS"]), columns

    def constants(self, groups: int) -> dict[str, Any]:
        """Constants for the compiler. In channels_last the number of rows grows with the batch, so it is not one."""
        row_align = 1 if self.channels_last else _alignment(self.rows)
        aligned = {"ALIGN": _alignment(self.columns // groups), "GROUP_ALIGN": _alignment(groups)}
        return {"CHANNELS_LAST": self.channels_last, "ROW_ALIGN": row_align, **aligned}


def _elementwise(layout: _Tensor) -> dict[str, Any]:
    """The block sizes of a pass over all elements. In channels_last they do not depend on the size of the batch."""
    rows, columns = _tile(layout, layout.columns)
    return {"BLOCK_ROWS": rows, "COLUMN_BLOCK": columns}


def _grouped(layout: _Tensor, groups: int) -> dict[str, Any]:
    """The block sizes of a pass that sums over the channels of each group."""
    per = layout.columns // groups
    rows, columns = _tile(layout, layout.columns)
    if groups == 1:
        return {"BLOCK_ROWS": rows, "GROUP_BLOCK": 1, "COLUMN_BLOCK": columns, "DENSE": True}
    of_group = min(_power(per), columns)
    at_once = 1 if of_group < per else min(_power(groups), columns // of_group)
    dense = at_once == 1 or of_group == per
    return {"BLOCK_ROWS": rows, "GROUP_BLOCK": at_once, "COLUMN_BLOCK": of_group, "DENSE": dense}


def _tile(layout: _Tensor, columns: int) -> tuple[int, int]:
    """(rows, columns) of a tile, powers of two: whole cache lines of what is adjacent, with little beyond the edge."""
    if layout.channels_last:
        wide = min((128, 64, 32), key=lambda size: -(-columns // size) * size)
        wide = min(wide, _power(columns), TILE)
        return TILE // wide, wide
    rows = min(_power(layout.rows), 128, TILE)
    return rows, min(_power(columns), TILE // rows)


def _row_block(fan_in: int) -> int:
    return min(_power(fan_in), TILE)


def _power(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def _alignment(number: int) -> int:
    """The largest power of two up to 16 that divides `number`."""
    return math.gcd(number, 16)


def _empty_map(x: Tensor, groups: int, size: Sequence[int], layout: _Tensor) -> Tensor:
    """An empty fp32 (B, groups, *size) in the layout of x."""
    memory_format = torch.channels_last if layout.channels_last else torch.contiguous_format
    return torch.empty((x.shape[0], groups, *size), dtype=torch.float32, device=x.device, memory_format=memory_format)


def _sizes(source: Tensor, target: Tensor, projection: Projection | None) -> tuple[int, int, int, int]:
    """(pixels of the target, height and width of the source, width of the target); one dimension is one row."""
    if projection is None:
        return 1, 1, 1, 1
    height, width = (1, *source.shape[2:])[-2:]
    return math.prod(target.shape[2:]), height, width, target.shape[-1]


def _geometry(kernel: Sequence[int], projection: Projection | None) -> dict[str, int]:
    """The constants of a window, in two dimensions."""
    stride, padding, dilation, _ = projection or ((1, 1), (0, 0), (1, 1), 1)
    lifted = {"KERNEL": (1, 1, *kernel), "STRIDE": (1, *stride), "PAD": (0, *padding), "DILATION": (1, *dilation)}
    return {f"{name}_{axis}": values[-2 + i] for name, values in lifted.items() for i, axis in enumerate("HW")}


def _of_curve(curve: str, k: float | Tensor | None) -> dict[str, Any]:
    learned = isinstance(k, Tensor)
    return {"CURVE": "sigmoid" if "sigmoid" in curve else curve, "LEARNED": learned,
            "SHARED": isinstance(k, Tensor) and k.numel() == 1}  # fmt: skip


def _as_argument(k: float | Tensor | None) -> float | Tensor:
    """k in the form that the kernels take: a contiguous tensor or a number, 1 where the curve has no k."""
    return k.contiguous() if isinstance(k, Tensor) else 1.0 if k is None else k


def _adjacent(values: Tensor | None) -> Tensor | None:
    """One value for each filter, contiguous."""
    return None if values is None else values.contiguous()


# ---- Launching


@cache
def _kernels() -> ModuleType:
    from sphereify.nn.passes import triton_kernels

    return triton_kernels


class _Launched(threading.local):
    names: list[str] | None = None


_launched = _Launched()


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the kernels that this thread launches inside `with`."""
    names: list[str] = []
    _launched.names = names
    try:
        yield names
    finally:
        _launched.names = None


def _launch(name: str, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first tensor; `KernelFailure` where that cannot be."""
    device = args[0].device
    if _launched.names is not None:
        _launched.names.append(name)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            # Said aloud, because Triton 3.9 warns about its default.
            getattr(_kernels(), name)[grid](*args, **constants, enable_fp_fusion=True)
    except Exception as error:
        raise KernelFailure(name) from error

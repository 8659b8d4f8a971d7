"""The passes as compiled loops, one for each pass (`kernels.cpp`): for fp32 on a CPU, in eager mode.

In ATen a pass is many operations, each of which goes through memory and through torch's dispatch, and an angle is many
more. Here an element is read and written once, angles are polynomials, and a pass is one call.

Tensors of other dtypes are served by `cpu`, and so are windows of three dimensions. The loops are compiled at the first
use on a machine (`library`). SPHEREIFY_COMPILED_PASSES=0 in the environment, or `enabled(False)`, switches them off;
without a C++ compiler they are off. When they cannot be compiled, or compute something else than the reference
(`self_check`), the process warns once and stays with `cpu`.
"""

import ctypes
import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from sphereify.errors import first_line
from sphereify.nn.geometry import Ints, Projection, is_identity, output_size
from sphereify.nn.operators import SIN_FLOOR
from sphereify.nn.passes import cpu, library
from sphereify.nn.passes.protocol import CurveGradients
from sphereify.nn.passes.switch import KernelFailure, Switch
from sphereify.nn.precision import CHANNELS_LAST, is_channels_last, is_dense
from sphereify.nn.radius import Radius, is_pooled, pool

# ---- When they are used


_switch = Switch("SPHEREIFY_COMPILED_PASSES")
enabled = _switch.enabled


def serves() -> bool:
    """True if tensors on the CPU may be given to the passes: they are switched on, and there is a compiler."""
    return _switch.on and not _switch.failed and library.compiler() is not None


def usable(x: Tensor, weight: Tensor, projection: Projection | None) -> bool:
    """True if these passes can serve an angular map of x and weight, where operations run eagerly."""
    return (
        serves()
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and weight.device.type == "cpu"
        and cpu.usable(x, weight, projection)
        and (x.is_contiguous() if projection is None else is_dense(weight))
        and not _is_watched()
    )


def _is_watched() -> bool:
    """True inside a mode that counts, records or fakes operations, which would see none of these.

    Modes that look for other operations do not matter: a default device, since every tensor is made on the device of
    another, and those that say so by an attribute `ignores_passes`.
    """
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return torch._C._len_torch_dispatch_stack() > 0 or not all(
        isinstance(mode, DeviceContext) or getattr(mode, "ignores_passes", False) for mode in modes
    )


def state() -> str:
    """The state of the compiled passes in this process, in words."""
    if not _switch.on:
        return "switched off (SPHEREIFY_COMPILED_PASSES)"
    if _switch.failed:
        return "given up, since they could not be compiled or were wrong"
    if library.compiler() is None:
        return "not used without a C++ compiler (CXX, or g++ on Linux)"
    return "in use for fp32 on the CPU"


def give_up(failure: KernelFailure) -> None:
    """Warn that the passes could not be compiled or are wrong, after which none is `usable` in this process."""
    _switch.failed = True
    warnings.warn(
        f"The compiled passes failed ({failure}), so this process stays with slower ones on the CPU: "
        f"{first_line(failure.__cause__ or failure)}. SPHEREIFY_COMPILED_PASSES=0 leaves the attempt out.",
        RuntimeWarning,
        stacklevel=2,
    )


def _call(name: str, *arguments: Any) -> None:
    """A function of the library, with tensors given as their addresses.

    Raises:
        KernelFailure: the library cannot be compiled or loaded.
        RuntimeError: a tensor lies on another device.
    """
    try:
        function = library.load()[name]
    except (OSError, RuntimeError) as error:
        raise KernelFailure("compilation") from error
    function(*[_address(a) if type(a) in TENSORS else a for a in arguments], torch.get_num_threads())


def _address(tensor: Tensor) -> int:
    if tensor.device.type != "cpu":
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cpu and {tensor.device}")
    return tensor.data_ptr()


TENSORS = frozenset((Tensor, torch.nn.Parameter))
"""The classes of tensors that these passes are given (`is_plain`)."""


# ---- How tensors lie in memory, as `kernels.cpp` says

ROWS, CELLS, PLANES = range(3)


class Shape(NamedTuple):
    """The outputs of a layer in memory."""

    form: int
    rows: int
    groups: int
    filters: int
    """Number of filters of a row or a plane."""
    places: int
    layout: torch.memory_format

    @classmethod
    def of(cls, outputs: Tensor, projection: Projection | None) -> "Shape":
        if projection is None:
            filters = outputs.shape[-1]
            return cls(ROWS, outputs.numel() // filters, 1, filters, 1, torch.contiguous_format)
        batch, filters = outputs.shape[:2]
        places, groups = outputs.numel() // (batch * filters), projection.groups
        if not is_channels_last(outputs):
            return cls(PLANES, batch * groups, groups, filters // groups, places, torch.contiguous_format)
        layout = CHANNELS_LAST[outputs.dim()]
        if groups == filters:
            return cls(CELLS, batch * places, 1, filters, 1, layout)
        return cls(ROWS, batch * places * groups, groups, filters // groups, 1, layout)


@lru_cache(maxsize=4096)
def _window(size: Ints, outputs: Ints, inner: int, kernel: Ints, projection: Projection) -> Any:
    """The geometry of a window over images of one or two dimensions, as the library takes it."""
    axes = [(1, 1, 1, 1, 0, 1)] * (2 - len(size))
    stride, padding, dilation, _ = projection
    axes += list(zip(size, outputs, kernel, stride, padding, dilation, strict=True))
    sizes, places, *geometry = zip(*axes, strict=True)
    numbers = [*sizes, *places, inner, *(number for pair in geometry for number in pair)]
    return (ctypes.c_int64 * len(numbers))(*numbers)


# ---- Forward


def normalize_filters(weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(w / N in `dtype`, N) with N = sqrt(‖w‖² + ε) of shape (O, 1, …)."""
    if weight.dtype is not torch.float32 or dtype is not torch.float32 or not is_dense(weight):
        return cpu.normalize_filters(weight, eps, dtype)
    unit, norm = torch.empty_like(weight), weight.new_empty(len(weight), *[1] * (weight.dim() - 1))
    _call("normalize_filters", weight, len(weight), weight.numel() // len(weight), float(eps), unit, norm)
    return unit, norm


def patch_norm(
    x: Tensor, kernel: Sequence[int], eps: float, projection: Projection | None, radius: Radius = 0.0
) -> Tensor:
    """sqrt(‖patch‖² + ρ²·m + ε): (B, groups, H', W') for a convolution, (*, 1) for a linear map."""
    if x.dtype is not torch.float32:
        return cpu.patch_norm(x, kernel, eps, projection, radius)
    eps = float(eps)  # of a tensor the library would get the address
    if projection is None:
        norm = x.new_empty(*x.shape[:-1], 1)
        _call("sum_squares", x, False, norm.numel(), x.shape[-1], 1, True, eps, norm)
        return norm
    identity, rooted = is_identity(kernel, projection), not is_pooled(radius)
    if len(kernel) > 2 and not identity:
        return cpu.patch_norm(x, kernel, eps, projection, radius)
    batch, channels, *size = x.shape
    groups, last = projection.groups, is_channels_last(x)
    layout = CHANNELS_LAST[x.dim()] if last else torch.contiguous_format
    squares = x
    if identity or channels > groups:
        squares = torch.empty((batch, groups, *size), memory_format=layout, dtype=x.dtype, device=x.device)
        rows, pixels = (squares.numel(), 1) if last else (batch * groups, math.prod(size))
        _call("sum_squares", x, not last, rows, channels // groups, pixels, identity and rooted, eps, squares)
    if not identity:
        places = output_size(size, kernel, projection)
        inner, images = (groups, batch) if last else (1, batch * groups)
        window = _window(tuple(size), tuple(places), inner, tuple(kernel), projection)
        sums = torch.empty((batch, groups, *places), memory_format=layout, dtype=x.dtype, device=x.device)
        _call("box_sum", squares, images, window, squares is x, rooted, eps, sums)
        squares = sums
    return squares if rooted else squares.add_(pool(squares, radius).add_(eps)).sqrt_()


CURVES = {"cosine": 0, "linear": 1, "sigmoid": 2, "learnable-sigmoid": 2}
ACTIVATIONS = {None: 0, "relu": 1, "hardswish": 2}


def curve(
    dot: Tensor,
    norm: Tensor,
    curve: str,
    k: float | Tensor | None,
    projection: Projection | None,
    beta: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """g of dot / norm, which takes the place of `dot`, and β·g + shift, None where there is neither of them."""
    if not _are_floats(dot, norm):
        return cpu.curve(dot, norm, curve, k, projection, beta, shift)
    *shape, layout = Shape.of(dot, projection)
    dot, norm = dot.contiguous(memory_format=layout), norm.contiguous(memory_format=layout)
    y = None if beta is None and shift is None else torch.empty_like(dot)
    beta, shift, (k, count) = _floats(beta), _floats(shift), _k(k)
    _call("curve", shape[0], CURVES[curve], *shape[1:], dot, norm, k, count, beta, shift, y)
    return dot, y


def folded(
    dot: Tensor,
    norm: Tensor,
    curve: str,
    sharpness: Tensor | None,
    projection: Projection | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None = None,
) -> Tensor:
    """The outputs of a folded layer from its products and patch norms, in place of `dot`.

    Args:
        curve: which of the three forms in `sphereify.deployment.folded_layers`.
        sharpness, scale, shift: c, a and b there, of (filters,), or (1,) for c; None where there is none.
        activation: of `ACTIVATIONS`, or None.
    """
    *shape, layout = Shape.of(dot, projection)
    dot, norm = dot.contiguous(memory_format=layout), norm.contiguous(memory_format=layout)
    count = 0 if sharpness is None else sharpness.numel()
    sharpness, scale, shift = _floats(sharpness), _floats(scale), _floats(shift)
    constants = (sharpness, count, scale, shift, ACTIVATIONS[activation])
    _call("folded", shape[0], CURVES[curve], *shape[1:], dot, norm, *constants)
    return dot


def _are_floats(*tensors: Tensor) -> bool:
    return all(tensor.dtype is torch.float32 for tensor in tensors)


def _floats(values: Any) -> Any:
    """A tensor as contiguous fp32; None stays."""
    return None if values is None else values.detach().to(torch.float32).contiguous()


def _k(k: float | Tensor | None) -> tuple[Any, int]:
    """The values of k in memory, and how many there are."""
    if isinstance(k, Tensor):
        return _floats(k), k.numel()
    return (None, 0) if k is None else (ctypes.byref(ctypes.c_float(k)), 1)


# ---- Backward


def curve_backward(
    grad: Tensor,
    g: Tensor,
    norm: Tensor,
    curve: str,
    k: float | Tensor | None,
    projection: Projection | None,
    beta: Tensor | None,
    shift_dtype: torch.dtype | None,
    needed: Sequence[bool],
) -> CurveGradients:
    """The gradients that follow from that of β·g + shift, with cos and the slopes recovered from g."""
    if not _are_floats(grad, g, norm):
        return cpu.curve_backward(grad, g, norm, curve, k, projection, beta, shift_dtype, needed)
    *shape, layout = Shape.of(g, projection)
    grad, g, norm = (tensor.contiguous(memory_format=layout) for tensor in (grad, g, norm))
    d_dot, radial = torch.empty_like(g), torch.empty_like(norm)
    filters = g.shape[-1 if projection is None else 1]
    values, count = _k(k)
    by_k = g.new_empty(count) if isinstance(k, Tensor) and needed[2] else None
    by_beta = None if beta is None else g.new_empty(filters)
    by_shift = None if shift_dtype is None else g.new_empty(filters)
    _call(
        "curve_backward", shape[0], CURVES[curve], *shape[1:], grad, g, norm, SIN_FLOOR[g.dtype], values, count,
        _floats(beta), d_dot, radial, by_k, by_beta, by_shift,
    )  # fmt: skip
    return CurveGradients(
        d_dot,
        radial,
        by_k.view(k.shape) if by_k is not None and isinstance(k, Tensor) else None,
        by_beta.to(beta.dtype) if by_beta is not None and beta is not None else None,
        None if by_shift is None else by_shift.to(shift_dtype),
    )


def subtract_radial(
    grad_x: Tensor, x: Tensor, radial: Tensor, kernel: Sequence[int], projection: Projection | None
) -> Tensor:
    """grad_x - x · (the sum of `radial` over the patches of each element), in place."""
    identity = projection is None or is_identity(kernel, projection)
    if not _are_floats(grad_x, x, radial) or (len(kernel) > 2 and not identity):
        return cpu.subtract_radial(grad_x, x, radial, kernel, projection)
    form, rows, groups, channels, _, layout = Shape.of(x, projection)
    grad_x, radial = grad_x.contiguous(memory_format=layout), radial.contiguous(memory_format=layout)
    if projection is None or (identity and form == ROWS):
        _call("subtract_rows", grad_x, x, radial, rows, channels)
        return grad_x
    size, windows = tuple(x.shape[2:]), tuple(radial.shape[2:])
    if identity:  # of any number of dimensions
        kernel, projection = (1, 1), Projection((1, 1), (0, 0), (1, 1), groups)
        size = windows = (1, math.prod(size))
    planes = form == PLANES
    images, inner = (rows, 1) if planes else (len(x), radial.shape[1])
    channels = channels if form != CELLS else 1
    window = _window(size, windows, inner, tuple(kernel), projection)
    _call("subtract_radial", grad_x, x, radial, planes, images, channels, window)
    return grad_x


def filter_gradient(v: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
    """(v - ŵ (ŵ·v)) / N in the dtype of the weight, N of `normalize_filters`; v may be overwritten."""
    if not _are_floats(v, weight, norm) or not is_dense(weight):
        return cpu.filter_gradient(v, weight, norm)
    v = v if v.stride() == weight.stride() else torch.empty_like(weight).copy_(v)
    _call("filter_gradient", v, weight, norm, len(weight), weight.numel() // len(weight))
    return v

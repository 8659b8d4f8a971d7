"""The passes in ATen, in place and a block at a time: for the CPU, in eager mode.

The reference runs every operation over a whole tensor and makes a new one. Here all operations run over a block that
stays in the cache before the next block is touched, and write to tensors that are needed anyway.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sphereify.nn.geometry import Projection, box_spread, box_sum
from sphereify.nn.operators import CURVES, SIN_FLOOR, clip
from sphereify.nn.passes.protocol import CurveGradients
from sphereify.nn.passes.reference import rescaled
from sphereify.nn.passes.views import View
from sphereify.nn.precision import accumulate_dtype, is_channels_last, is_dense
from sphereify.nn.radius import Radius, is_pooled, pool

BLOCK = 2**18
"""Elements of a block: 1 MiB of fp32. Smaller blocks fit closer caches but cost more calls and synchronisation."""


def usable(x: Tensor, weight: Tensor, projection: Projection | None) -> bool:
    """True if these passes can serve an angular map of x and weight, where operations run eagerly.

    They cut x as it lies in memory, so it must be dense.
    """
    return x.device.type == "cpu" and x.numel() > 0 and weight.numel() > 0 and (projection is None or is_dense(x))


# ---- Forward


def normalize_filters(weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(w / N in `dtype`, N) with N = sqrt(‖w‖² + ε) of shape (O, 1, …)."""
    accumulate = accumulate_dtype(weight.dtype)
    rows = tuple(range(1, weight.dim()))
    norm = torch.linalg.vector_norm(weight, dim=rows, keepdim=True, dtype=accumulate)
    norm.mul_(norm).add_(eps).sqrt_()
    return (weight / norm).to(dtype), norm


def patch_norm(
    x: Tensor, kernel: Sequence[int], eps: float, projection: Projection | None, radius: Radius = 0.0
) -> Tensor:
    """sqrt(‖patch‖² + ρ²·m + ε): (B, groups, H', W') for a convolution, (*, 1) for a linear map."""
    view = _view(x, projection)
    squares = view.empty_patches(x)
    for piece, total in _split(view(x), view.patches(squares)):
        if view.single:
            torch.mul(piece.to(total.dtype), piece, out=total)
        elif view.channels_last and not view.whole and piece.shape[-1] < 16:
            # A norm of short rows is not vectorized.
            torch.matmul(piece.to(total.dtype) ** 2, total.new_ones(piece.shape[-1], 1), out=total)
        elif view.channels_last:
            torch.linalg.vector_norm(piece, dim=view.channels, keepdim=True, dtype=total.dtype, out=total)
            total.mul_(total)
        else:
            piece = piece.to(total.dtype)
            torch.sum(piece * piece, view.channels, keepdim=True, out=total)
    if projection is not None:
        squares = box_sum(squares, kernel, projection)
    return squares.add_(pool(squares, radius).add_(eps) if is_pooled(radius) else eps).sqrt_()


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
    view, dim = _view(dot, projection), dot.dim()
    dot, k = view.arranged(dot), view.of_filters(k, dim)
    beta, shift = (None if v is None else view.of_filters(v.to(norm.dtype), dim) for v in (beta, shift))
    y = None if beta is None and shift is None else torch.empty_like(dot)
    for piece, n, out in _split(view(dot), view.patches(norm), view(dot if y is None else y)):
        g = CURVES[curve].value(clip(piece.to(n.dtype).div_(n), -1, 1), k)
        if piece.dtype is not n.dtype:
            piece.copy_(g)
        if beta is not None and shift is not None and out.dtype is g.dtype:
            torch.addcmul(shift, g, beta, out=out)
        elif y is not None:
            out.copy_(rescaled(g, beta, shift))
    return dot, y


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
    view, dim = _view(g, projection), g.dim()
    g, grad, filters_k = view.arranged(g), view.arranged(grad), view.of_filters(k, dim)
    factor = None if beta is None else view.of_filters(beta.to(norm.dtype), dim)
    d_dot, radial = torch.empty_like(g), view.empty_patches(g) if needed[0] else None
    by_k = by_beta = by_shift = None
    places = view.places(dim)
    tensors = (view(grad), view(g), view.patches(norm), view(d_dot))
    totals = () if radial is None else (view.patches(radial),)
    for up, value, n, out, *total in _split(*tensors, *totals):
        up, value = up.to(n.dtype), value.to(n.dtype)
        if shift_dtype is not None:
            by_shift = _plus(by_shift, up.sum(places))
        if factor is not None:
            by_beta = _plus(by_beta, (up * value).sum(places))
            up = up * factor
        slope = CURVES[curve].slope(value, filters_k, SIN_FLOOR[g.dtype])
        if slope.by_k is not None and needed[2]:
            by_k = _plus(by_k, slope.by_k.mul_(up).sum_to_size(filters_k.shape))
        d = up if slope.by_cos is None else slope.by_cos.mul_(up)
        for sums in total:
            if view.single:
                torch.mul(d, slope.cos, out=sums)
            else:
                torch.sum(d * slope.cos, view.channels, keepdim=True, out=sums)
            sums.div_(n).div_(n)
        if out.dtype is n.dtype:
            torch.div(d, n, out=out)
        else:
            out.copy_(d / n)
    return CurveGradients(
        d_dot,
        radial,
        by_k.view(k.shape) if by_k is not None and isinstance(k, Tensor) else None,
        by_beta.flatten().to(beta.dtype) if by_beta is not None and beta is not None else None,
        by_shift.flatten().to(shift_dtype) if by_shift is not None and shift_dtype is not None else None,
    )


def subtract_radial(
    grad_x: Tensor, x: Tensor, radial: Tensor, kernel: Sequence[int], projection: Projection | None
) -> Tensor:
    """grad_x - x · (the sum of `radial` over the patches of each element), in place."""
    view = _view(x, projection)
    grad_x = view.arranged(grad_x)
    places = radial if projection is None else box_spread(radial, x.shape[2:], kernel, projection)
    for piece, values, place in _split(view(grad_x), view(x), view.patches(places)):
        if piece.dtype is place.dtype:
            piece.addcmul_(values, place, value=-1)
        else:
            piece.copy_(piece.to(place.dtype).addcmul_(values.to(place.dtype), place, value=-1))
    return grad_x


def filter_gradient(v: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
    """(v - ŵ (ŵ·v)) / N in the dtype of the weight, N of `normalize_filters`; v may be overwritten."""
    w, wide = weight.to(norm.dtype), v.to(norm.dtype)
    inward = torch.linalg.vecdot(_rows(w, v), _rows(wide, v)).view(norm.shape) / norm / norm
    return wide.addcmul_(w, inward, value=-1).div_(norm).to(weight.dtype)


def _rows(filters: Tensor, like: Tensor) -> Tensor:
    """(O, fan_in), in the order of `like` in memory, which does not matter to sums."""
    return (filters.movedim(1, -1) if is_channels_last(like) else filters).flatten(1)


# ---- Blocks


def _view(tensor: Tensor, projection: Projection | None) -> View:
    """The view of a layer's tensors: as they are where they fit into one block, since views cost time, too."""
    return View.of(tensor, projection, whole=tensor.numel() <= 2 * BLOCK)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    """The sum over one block more; the first is the total so far."""
    return part if total is None else total.add_(part)


def _split(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of tensors that have their first dimension in common, of about `BLOCK` elements of the first tensor.

    Views of four dimensions have the last in common too, and are cut along it where a single sample is too large.
    """
    first = tensors[0]
    each = first.numel() // len(first)
    if first.numel() <= 2 * BLOCK:
        yield tensors
    elif each <= 2 * BLOCK or first.dim() < 4:
        step = max(1, BLOCK // each)
        yield from zip(*(tensor.split(step) for tensor in tensors), strict=True)
    else:
        step = max(1, BLOCK * first.shape[-1] // each)
        for sample in zip(*(tensor.split(1) for tensor in tensors), strict=True):
            yield from zip(*(tensor.split(step, -1) for tensor in sample), strict=True)

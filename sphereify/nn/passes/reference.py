"""The passes in plain ATen, each operation over a whole tensor: the reference, which works everywhere.

It runs on every device, under torch.compile, tracers and vmap, and its results can be differentiated again. The other
makers equal it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sphereify.nn.geometry import Projection, box_spread, box_sum, project
from sphereify.nn.operators import CURVES, SIN_FLOOR, clip, g_of, overwrite
from sphereify.nn.passes.protocol import AngularMap, CurveGradients
from sphereify.nn.precision import accumulated, cast
from sphereify.nn.radius import Radius, is_pooled, pool

# ---- Forward


def normalize_filters(weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(w / N in `dtype`, N) with N = sqrt(‖w‖² + ε) of shape (O, 1, …)."""
    weight = accumulated(weight)
    norm = ((weight * weight).sum(dim=tuple(range(1, weight.dim())), keepdim=True) + eps).sqrt()
    return (weight / norm).to(dtype), norm


def patch_norm(
    x: Tensor, kernel: Sequence[int], eps: float, projection: Projection | None, radius: Radius = 0.0
) -> Tensor:
    """sqrt(‖patch‖² + ρ²·m + ε): (B, groups, H', W') for a convolution, (*, 1) for a linear map."""
    squares = accumulated(x).square()
    if projection is None:
        return (squares.sum(-1, keepdim=True) + eps).sqrt()
    groups = projection.groups
    if groups == 1:
        squares = squares.sum(1, keepdim=True)
    elif squares.shape[1] > groups:
        squares = _grouped(squares, groups).sum(2)
    squares = box_sum(squares, kernel, projection)
    return (squares + (pool(squares, radius) + eps if is_pooled(radius) else eps)).sqrt()


def curve(
    dot: Tensor,
    norm: Tensor,
    curve: str,
    k: float | Tensor | None,
    projection: Projection | None,
    beta: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """g of dot / norm, and β·g + shift, None where there is neither of them."""
    dtype, dot = dot.dtype, accumulated(dot)
    cos = _by_patch(lambda a, b: overwrite(a, "div", b), dot, norm, projection)
    g = CURVES[curve].value(clip(cos, -1, 1), k)
    # A cast that changes nothing returns the same tensor, whose gradient torch.compile loses in torch 2.11.
    return cast(g, dtype), None if beta is None and shift is None else cast(rescale(g, beta, shift, projection), dtype)


def rescale(g: Tensor, beta: Tensor | None, shift: Tensor | None, projection: Projection | None) -> Tensor:
    """SphereNorm's β·g + γ (NIPS 2017, section 3.5), of which either may be missing; both are (O,)."""
    return rescaled(g, _of_filters(beta, g, projection), _of_filters(shift, g, projection))


def rescaled(g: Tensor, beta: Tensor | None, shift: Tensor | None) -> Tensor:
    """β·g + shift, of which either may be missing, with both in a shape that broadcasts."""
    if beta is None:
        return g if shift is None else g + shift
    return g * beta if shift is None else torch.addcmul(shift, g, beta)


def composed(
    x: Tensor,
    weight: Tensor,
    form: AngularMap,
    k: float | Tensor | None,
    beta: Tensor | None,
    shift: Tensor | None,
    radius: Radius,
) -> Tensor:
    """The angular map as operations that torch differentiates itself, in any mode: β·g(θ) + shift."""
    projection, curve, eps = form
    unit, _ = normalize_filters(weight, eps, x.dtype)
    dot = accumulated(project(x, unit, projection))
    cos = _by_patch(torch.Tensor.div, dot, patch_norm(x, weight.shape[2:], eps, projection, radius), projection)
    return cast(rescale(g_of(cos, k, curve), beta, shift, projection), x.dtype)


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
    value, upstream = accumulated(g), grad.to(norm.dtype)
    others = [d for d in range(g.dim()) if d != (g.dim() - 1 if projection is None else 1)]
    grad_shift = None if shift_dtype is None else upstream.sum(others).to(shift_dtype)
    grad_beta = None
    if beta is not None:
        grad_beta = (upstream * value).sum(others).to(beta.dtype)
        upstream = rescale(upstream, beta, None, projection)
    slope = CURVES[curve].slope(value, k, SIN_FLOOR[g.dtype])
    d = upstream if slope.by_cos is None else upstream * slope.by_cos
    d_dot = _by_patch(torch.Tensor.div, d, norm, projection).to(g.dtype)
    radial = _sum_filters(d * slope.cos, projection) / (norm * norm) if needed[0] else None
    grad_k = None
    if slope.by_k is not None and needed[2]:
        assert isinstance(k, Tensor)
        grad_k = (upstream * slope.by_k).sum_to_size(k.shape)
    return CurveGradients(d_dot, radial, grad_k, grad_beta, grad_shift)


def subtract_radial(
    grad_x: Tensor, x: Tensor, radial: Tensor, kernel: Sequence[int], projection: Projection | None
) -> Tensor:
    """grad_x - x · (the sum of `radial` over the patches of each element)."""
    precise = x.to(radial.dtype)
    if projection is None:
        along = precise * radial
    else:
        places = box_spread(radial, x.shape[2:], kernel, projection)
        along = _by_patch(torch.Tensor.mul, precise, places, projection)
    return (grad_x.to(radial.dtype) - along).to(x.dtype)


def filter_gradient(v: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
    """(v - ŵ (ŵ·v)) / N in the dtype of the weight, N of `normalize_filters`."""
    unit, v = weight.to(norm.dtype) / norm, v.to(norm.dtype)
    inward = (unit * v).sum(dim=tuple(range(1, v.dim())), keepdim=True)
    return ((v - unit * inward) / norm).to(weight.dtype)


# ---- Filters and patches


def _of_filters(values: Tensor | None, outputs: Tensor, projection: Projection | None) -> Tensor | None:
    """(O,) in the shape and dtype in which it broadcasts over (B, O, …) or (*, O)."""
    if values is None:
        return None
    dim = outputs.dim() - 2 if projection else 0
    return values.to(outputs.dtype).view(-1, *[1] * dim)


def _by_patch(operation: Callable, outputs: Tensor, patches: Tensor, projection: Projection | None) -> Tensor:
    """An elementwise operation between (B, O, H', W') and (B, groups, H', W')."""
    if projection is None or projection.groups == 1 or outputs.shape[1] == projection.groups:
        return operation(outputs, patches)
    return operation(_grouped(outputs, projection.groups), patches.unsqueeze(2)).reshape(outputs.shape)


def _sum_filters(outputs: Tensor, projection: Projection | None) -> Tensor:
    """The sum over the filters of each group, in the shape of the patch norms."""
    if projection is None:
        return outputs.sum(-1, keepdim=True)
    if projection.groups == 1:
        return outputs.sum(1, keepdim=True)
    return _grouped(outputs, projection.groups).sum(2)


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """(B, C, *space) -> (B, groups, C / groups, *space); `unflatten` has no rule for gradients in a batch."""
    return tensor.reshape(tensor.shape[0], groups, tensor.shape[1] // groups, *tensor.shape[2:])

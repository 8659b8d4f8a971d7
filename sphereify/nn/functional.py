"""SphereConv as functions: g(θ) of the angle between each filter and each patch, with a hand-written backward.

    cos θ = w·x / (sqrt(‖w‖² + ε) · sqrt(‖x‖² + ε)),    output = g(θ) + bias

One `autograd.Function` serves convolutions of one to three dimensions and linear maps: a `Projection` says what the
inner product, the patch norm and their adjoints are. Its forward is the plain convolution with normalized filters, a
division by the patch norms (one channel a group) and the operator's curve. The backward keeps x, the weight, the
output and the patch norms; what the curve's slope needs is recovered from the output. On CUDA everything around the
products is done by the Triton kernels of `kernels`, which equal the code here.

With d = ∂L/∂cos, N the norms and ŵ = w/N_w:

    ∂L/∂x = conv_transpose(d/N_x, ŵ) - x · spread(Σ_filters d·cos / N_x²)
    ∂L/∂w = (v - ŵ (ŵ·v)) / N_w,    v = conv_weight(d/N_x, x)
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sphereify.choices import DEFAULT_EPS
from sphereify.errors import UsageError
from sphereify.nn.geometry import Ints, Projection, box_spread, box_sum, convolve
from sphereify.nn.operators import CURVES, SIN_FLOOR, accumulate_dtype, broadcast_k, clip, is_built_in, overwrite
from sphereify.nn.passes import cpu as blocks
from sphereify.nn.passes import triton as kernels
from sphereify.nn.rescaling import of_channels, rescaled, unscaled

# Asked once: torch.compile cannot follow the question in torch 2.11.
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "privateuseone")
    if torch.amp.is_autocast_available(device)
)  # fmt: skip

Operator = Callable[[Tensor], Tensor]


def gathered(tensor: Tensor) -> Tensor:
    """A tensor that is spread over processes (a DTensor, as FSDP makes parameters) as a whole; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sphere_conv1d(
    x: Tensor,
    weight: Tensor,
    operator: Operator,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = DEFAULT_EPS,
    beta: Tensor | None = None,
) -> Tensor:
    """SphereConv over (B, C, L) or (C, L); otherwise as `sphere_conv2d`."""
    return _sphere_conv(1, x, weight, operator, bias, stride, padding, dilation, groups, eps, beta)


def sphere_conv2d(
    x: Tensor,
    weight: Tensor,
    operator: Operator,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = DEFAULT_EPS,
    beta: Tensor | None = None,
) -> Tensor:
    """g(θ) of the angle between every filter and every patch, plus `bias` (NIPS 2017, eq. 1).

    Args:
        x: (B, C, H, W) or (C, H, W). B may be 0. Useful up to norms of 1e18 in fp32.
        weight: (O, C / groups, kH, kW). Its scale does not matter, as far as `eps` allows.
        operator: `CosineOperator()` and kin, or any callable cos -> g. A per-filter k has shape (O,).
        bias: (O,) or None.
        stride, padding, dilation, groups: as `torch.nn.functional.conv2d`; padding also 'same' or 'valid'.
        eps: > 0, added to both squared norms inside the roots. A patch of zeros has no angle: its output is
            g(π/2) = 0 and its gradient is finite.
        beta: (O,) or None: SphereNorm's β, which multiplies g (NIPS 2017, section 3.5).

    Returns:
        (B, O, H', W') in the dtype that `F.conv2d` returns, under autocast too; norms and angles are taken in fp32.
        Without bias and β it is the tensor that backward needs: do not change it in place.

    Raises:
        UsageError: a shape, dtype or eps that does not fit.

    >>> from sphereify.nn import CosineOperator
    >>> x = torch.ones(1, 2, 4, 4)
    >>> round(sphere_conv2d(x, torch.ones(3, 2, 3, 3), CosineOperator())[0, 0, 0, 0].item(), 4)
    1.0
    """
    return _sphere_conv(2, x, weight, operator, bias, stride, padding, dilation, groups, eps, beta)


def sphere_conv3d(
    x: Tensor,
    weight: Tensor,
    operator: Operator,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    eps: float = DEFAULT_EPS,
    beta: Tensor | None = None,
) -> Tensor:
    """SphereConv over (B, C, D, H, W) or (C, D, H, W); otherwise as `sphere_conv2d`."""
    return _sphere_conv(3, x, weight, operator, bias, stride, padding, dilation, groups, eps, beta)


def sphere_linear(
    x: Tensor,
    weight: Tensor,
    operator: Operator,
    bias: Tensor | None = None,
    eps: float = DEFAULT_EPS,
    beta: Tensor | None = None,
) -> Tensor:
    """g(θ) of the angle between x and every row of the weight, plus `bias`.

    Args:
        x: (*, in_features), any number of leading dimensions.
        weight: (out_features, in_features).
        operator: as for `sphere_conv2d`; a per-filter k has shape (out_features,).
        bias: (out_features,) or None.
        eps, beta: as for `sphere_conv2d`.

    Returns:
        (*, out_features)

    Raises:
        UsageError: a shape, dtype or eps that does not fit.

    >>> from sphereify.nn import LinearOperator
    >>> g = sphere_linear(torch.tensor([[3.0, 3.0]]), torch.tensor([[5.0, 0.0]]), LinearOperator(), eps=1e-9)
    >>> round(g.item(), 4)  # 45° is halfway between 1 and 0
    0.5
    """
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise UsageError(
            f"sphere_linear: got x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)}, expected "
            f"(*, in_features) and (out_features, in_features)"
        )
    rows = x.unsqueeze(0) if x.dim() == 1 else x
    whole = bias is None or bias.dim() == 1
    y = _angular(rows, weight, operator, eps, None, beta, bias if whole else None)
    if bias is not None and not whole:
        y = y + bias.to(y.dtype)
    return y.squeeze(0) if x.dim() == 1 else y


def _sphere_conv(
    dim: int,
    x: Tensor,
    weight: Tensor,
    operator: Operator,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    eps: float,
    beta: Tensor | None,
) -> Tensor:
    if weight.dim() != dim + 2 or x.dim() not in (dim + 1, dim + 2) or x.shape[-dim - 1] != weight.shape[1] * groups:
        raise UsageError(
            f"sphere_conv{dim}d: got x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)} with "
            f"groups={groups}, expected {dim + 1} or {dim + 2} dimensions of x, and weight.shape[1] * groups channels"
        )
    batched = x if x.dim() == dim + 2 else x.unsqueeze(0)
    strides, dilations = per_axis(stride, dim), per_axis(dilation, dim)
    batched, paddings = _resolve_padding(batched, padding, weight.shape[2:], strides, dilations)
    y = _angular(batched, weight, operator, eps, Projection(strides, paddings, dilations, groups), beta, bias)
    return y if x.dim() == dim + 2 else y.squeeze(0)


def per_axis(value: int | Sequence[int], dim: int) -> Ints:
    """A stride, padding or dilation as torch takes it, as one number for each of `dim` axes."""
    return (value,) * dim if isinstance(value, int) else tuple(value) * (dim if len(value) == 1 else 1)


def _resolve_padding(
    x: Tensor, padding: int | Sequence[int] | str, kernel: Sequence[int], stride: Ints, dilation: Ints
) -> tuple[Tensor, Ints]:
    """Padding as numbers. 'same' with an even reach needs one zero more behind than in front, so it pads x itself."""
    dim = len(kernel)
    if not isinstance(padding, str):
        return x, per_axis(padding, dim)
    if padding == "valid":
        return x, (0,) * dim
    if padding != "same":
        raise UsageError(f"padding: got {padding!r}, expected numbers, 'same' or 'valid'")
    if any(s != 1 for s in stride):
        raise UsageError(f"padding='same' needs a stride of 1, got {stride}. Give the padding as numbers.")
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if all(r % 2 == 0 for r in reach):
        return x, tuple(r // 2 for r in reach)
    sides = [side for r in reversed(reach) for side in (r // 2, r - r // 2)]
    return F.pad(x, sides), (0,) * dim


def _angular(
    x: Tensor, weight: Tensor, operator: Operator, eps: float, projection: Projection | None,
    beta: Tensor | None, shift: Tensor | None,
) -> Tensor:  # fmt: skip
    """β·g + shift of the angles; the border where dtype, autocast and the kind of operator are settled."""
    if not eps > 0:
        raise UsageError(f"eps: got {eps!r}, expected a positive number; the default is {DEFAULT_EPS:g}")
    dtype = _compute_dtype(x, weight)
    x = _fit_into(dtype, x, math.prod(weight.shape[1:]))
    with no_autocast(x.device.type):
        return _map(x, weight, operator, eps, projection, beta, shift)


def _map(
    x: Tensor, weight: Tensor, operator: Operator, eps: float, projection: Projection | None,
    beta: Tensor | None, shift: Tensor | None,
) -> Tensor:  # fmt: skip
    """The fused map for the four operators; an operator of the user's own follows that of the cosine."""
    if not is_built_in(operator):
        cos, _ = _SphereMap.apply(x, weight, None, None, None, "cosine", eps, projection)
        g = operator(cos)
        return rescaled(g, of_channels(beta, g, projection), of_channels(shift, g, projection))
    # The filters of a linear map are its last dimension, those of a convolution dimension 1.
    k = broadcast_k(operator.k, x.dim() if projection else 0, accumulate_dtype(x.dtype))
    y, *_ = _SphereMap.apply(x, weight, k, beta, shift, operator.name, eps, projection)
    return y


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which torch's own convolution would multiply."""
    device = x.device.type
    if autocast_is_on(device) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(device)
    if x.dtype is not weight.dtype:
        raise UsageError(
            f"got x of {x.dtype} and weight of {weight.dtype}, expected one dtype. Try x.to(weight.dtype)."
        )
    if x.dtype not in SIN_FLOOR:
        raise UsageError(f"got tensors of {x.dtype}, expected one of {', '.join(str(d) for d in SIN_FLOOR)}")
    return x.dtype


def autocast_is_on(device: str) -> bool:
    """Whether autocast is active; devices that know no autocast (meta) have it off."""
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def _fit_into(dtype: torch.dtype, x: Tensor, fan_in: int) -> Tensor:
    """x in `dtype`, with each sample divided down whose inner products could exceed fp16's 65504.

    Angles do not care about scale, so all other samples stay exactly as they are. ε is not divided: it then counts for
    patches that lie six orders below the sample's largest, where fp16 has no digits left either.
    """
    if dtype is not torch.float16 or x.numel() == 0:
        return x.to(dtype)
    peak = x.detach().to(torch.float32).abs().amax(dim=tuple(range(1, x.dim())), keepdim=True)
    return (x / (peak * (math.sqrt(fan_in) / 6e4)).clamp_min(1)).to(dtype)


def no_autocast(device: str) -> AbstractContextManager:
    """Autocast would take the sums of squares in half precision on CUDA; all that should be cast is cast by hand."""
    return torch.autocast(device, enabled=False) if autocast_is_on(device) else nullcontext()


class _SphereMap(torch.autograd.Function):
    """(x, weight) -> (β·g(θ) + shift, patch norms, g), or (g, patch norms) where there is neither β nor shift.

    What follows the first is returned to be saved, not to be differentiated.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        k: Any,
        beta: Tensor | None,
        shift: Tensor | None,
        name: str,
        eps: float,
        projection: Projection | None,
    ) -> tuple[Tensor, ...]:
        done = _by_passes(_forward_by, x, weight, k, beta, shift, name, eps, projection)
        if done is not None:
            return done
        accumulate = accumulate_dtype(x.dtype)
        unit, _ = _normalize_filters(weight.to(accumulate), eps)
        norm = _patch_norm(x, weight, eps, projection)
        dot = _project(x, unit.to(x.dtype), projection).to(accumulate)
        cos = _by_patch(lambda a, b: overwrite(a, "div", b), dot, norm, projection)
        cos = clip(cos, -1, 1)
        g = CURVES[name].value(cos, k)
        # A cast that changes nothing returns the same tensor, whose gradient torch.compile loses in torch 2.11.
        cast = g if g.dtype is x.dtype else g.to(x.dtype)
        if beta is None and shift is None:
            return cast, norm
        y = rescaled(g, of_channels(beta, g, projection), of_channels(shift, g, projection))
        return y if y.dtype is x.dtype else y.to(x.dtype), norm, cast

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, weight, k, beta, shift, ctx.name, ctx.eps, ctx.projection = inputs
        g, norm = output[-1] if len(output) > 2 else output[0], output[1]
        ctx.mark_non_differentiable(*output[1:])
        ctx.k = None if isinstance(k, Tensor) else k
        ctx.shift_dtype = None if shift is None else shift.dtype
        ctx.extra = [isinstance(value, Tensor) for value in (k, beta)]
        ctx.save_for_backward(x, weight, g, norm, *(value for value in (k, beta) if isinstance(value, Tensor)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:  # type: ignore[override]
        with no_autocast(grad.device.type):
            return _SphereMap._backward(ctx, grad)

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple:
        x, weight, g, norm, *rest = ctx.saved_tensors
        extra = iter(rest)
        k, beta = (next(extra) if there else None for there in ctx.extra)
        k = ctx.k if k is None else k
        done = _by_passes(
            _backward_by, x, weight, k, beta, ctx.shift_dtype, ctx.name, ctx.eps, ctx.projection, grad, g, norm,
            ctx.needs_input_grad,
        )  # fmt: skip
        if done is not None:
            return *done, None, None, None
        if torch.is_grad_enabled():
            # A second derivative is being asked for: what was saved is constant to autograd, what is made now is not.
            norm = _patch_norm(x, weight, ctx.eps, ctx.projection)
            if beta is not None or ctx.shift_dtype is not None:
                g, _ = _SphereMap.apply(x, weight, k, None, None, ctx.name, ctx.eps, ctx.projection)
        grad, grad_beta, grad_shift = unscaled(grad, g, beta, ctx.shift_dtype, ctx.projection)
        accumulate = accumulate_dtype(x.dtype)
        slope = CURVES[ctx.name].slope(g.to(accumulate), k, SIN_FLOOR[g.dtype])
        upstream = grad.to(accumulate)
        d = upstream if slope.by_cos is None else upstream * slope.by_cos

        unit, filter_norm = _normalize_filters(weight.to(accumulate), ctx.eps)
        d_dot = _by_patch(torch.Tensor.div, d, norm, ctx.projection).to(x.dtype)
        grad_x, v = _project_backward(d_dot, x, unit.to(x.dtype), ctx.projection, ctx.needs_input_grad[:2])
        if grad_x is not None:
            radial = _sum_filters(d * slope.cos, norm, ctx.projection) / (norm * norm)
            grad_x = (grad_x.to(accumulate) - _spread(radial, x, weight, ctx.projection)).to(x.dtype)
        grad_weight = None
        if v is not None:
            v = v.to(accumulate)
            inward = (unit * v).sum(dim=tuple(range(1, v.dim())), keepdim=True)
            grad_weight = ((v - unit * inward) / filter_norm).to(weight.dtype)
        grad_k = None
        if slope.by_k is not None and ctx.needs_input_grad[2]:
            grad_k = (upstream * slope.by_k).sum_to_size(k.shape)
        return grad_x, grad_weight, grad_k, grad_beta, grad_shift, None, None, None


def _by_passes(function: Callable, x: Tensor, weight: Tensor, *given: Any) -> Any:
    """function(passes, x, weight, …) with the module whose passes can do it fastest; None where there is none."""
    projection = given[5]
    if kernels.usable(x, weight, projection):
        done = kernels.attempt(function, kernels, x, weight, *given)
        if done is not None:
            return done
    return function(blocks, x, weight, *given) if blocks.usable(x, weight, projection) else None


def _forward_by(
    passes: Any, x: Tensor, weight: Tensor, k: Any, beta: Tensor | None, shift: Tensor | None, name: str, eps: float,
    projection: Projection | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    unit, _ = passes.normalize_filters(weight, eps, x.dtype)
    dot = _project(x, unit, projection)  # first, for its complaints about shapes
    norm = passes.patch_norm(x, weight.shape[2:], eps, projection)
    g, y = passes.epilogue(dot, norm, name, k, projection, beta, shift)
    return (g, norm) if y is None else (y, norm, g)


def _backward_by(
    passes: Any, x: Tensor, weight: Tensor, k: Any, beta: Tensor | None, shift_dtype: torch.dtype | None, name: str,
    eps: float, projection: Projection | None, grad: Tensor, g: Tensor, norm: Tensor, wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of x, weight, k, β and the shift."""
    grad, grad_beta, grad_shift = passes.unscaled(grad, g, beta, shift_dtype, projection)
    d_dot, radial, grad_k = passes.prologue(grad, g, norm, name, k, projection, wanted)
    unit, filter_norm = passes.normalize_filters(weight, eps, x.dtype)
    grad_x, v = _project_backward(d_dot, x, unit, projection, wanted[:2])
    if grad_x is not None:
        grad_x = passes.correct(grad_x, x, radial, weight.shape[2:], projection)
    if v is not None:
        v = passes.filter_gradient(v, weight, filter_norm)
    return grad_x, v, grad_k, grad_beta, grad_shift


def _normalize_filters(weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """w / sqrt(‖w‖² + ε), and that root with shape (O, 1, …)"""
    norm = ((weight * weight).sum(dim=tuple(range(1, weight.dim())), keepdim=True) + eps).sqrt()
    return weight / norm, norm


def _patch_norm(x: Tensor, weight: Tensor, eps: float, projection: Projection | None) -> Tensor:
    """sqrt(‖patch‖² + ε): (B, groups, H', W') for a convolution, (*, 1) for a linear map."""
    squares = x.to(accumulate_dtype(x.dtype)).square()
    if projection is None:
        return (squares.sum(-1, keepdim=True) + eps).sqrt()
    groups = projection.groups
    if groups == 1:
        squares = squares.sum(1, keepdim=True)
    elif weight.shape[1] > 1:
        squares = squares.unflatten(1, (groups, -1)).sum(2)
    return (box_sum(squares, weight.shape[2:], projection) + eps).sqrt()


def _by_patch(operation: Callable, of_filters: Tensor, of_patches: Tensor, projection: Projection | None) -> Tensor:
    """Apply an elementwise operation between (B, O, H', W') and (B, groups, H', W')."""
    if projection is None or projection.groups == 1 or of_filters.shape[1] == projection.groups:
        return operation(of_filters, of_patches)
    grouped = of_filters.unflatten(1, (projection.groups, -1))
    return operation(grouped, of_patches.unsqueeze(2)).flatten(1, 2)


def _sum_filters(of_filters: Tensor, like_norm: Tensor, projection: Projection | None) -> Tensor:
    """The sum over the filters of each group, in the shape of the patch norms."""
    if projection is None:
        return of_filters.sum(-1, keepdim=True)
    if projection.groups == 1:
        return of_filters.sum(1, keepdim=True)
    return of_filters.unflatten(1, (projection.groups, -1)).sum(2)


def _spread(radial: Tensor, x: Tensor, weight: Tensor, projection: Projection | None) -> Tensor:
    """x times the sum of `radial` over the patches that each element belongs to."""
    x = x.to(radial.dtype)
    if projection is None:
        return x * radial
    places = box_spread(radial, x.shape[2:], weight.shape[2:], projection)
    return _by_patch(torch.Tensor.mul, x, places, projection)


def _project(x: Tensor, unit: Tensor, projection: Projection | None) -> Tensor:
    """The inner products of filters and patches."""
    return x @ unit.t() if projection is None else convolve(x, unit, None, projection)


def _project_backward(
    d_dot: Tensor, x: Tensor, unit: Tensor, projection: Projection | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The adjoints of `_project`, for x and for the filters."""
    if projection is None:
        grad_x = d_dot @ unit if wanted[0] else None
        return grad_x, d_dot.flatten(0, -2).t() @ x.flatten(0, -2) if wanted[1] else None
    stride, padding, dilation, groups = projection
    zeros = [0] * len(stride)
    mask = (wanted[0], wanted[1], False)
    grads = torch.ops.aten.convolution_backward(
        d_dot, x, unit, None, stride, padding, dilation, False, zeros, groups, mask
    )
    return grads[0], grads[1]

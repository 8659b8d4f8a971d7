"""SphereConv as functions: g(θ) of the angle between each filter and each patch, with a hand-written backward.

    cos θ = w·x / (sqrt(‖w‖² + ε) · sqrt(‖x‖² + ε)),    output = β·g(θ) + bias

One `autograd.Function` serves convolutions of one to three dimensions and linear maps: a `Projection` says what the
inner product and its adjoint are, and `Passes` make what surrounds them. The forward is the plain convolution with
normalized filters, a division by the patch norms (one channel a group) and the operator's curve. The backward keeps x,
the weight, the output and the patch norms; what the curve's slope needs is recovered from the output.

With d = ∂L/∂cos, N the norms and ŵ = w/N_w:

    ∂L/∂x = conv_transpose(d/N_x, ŵ) - x · spread(Σ_filters d·cos / N_x²)
    ∂L/∂w = (v - ŵ (ŵ·v)) / N_w,    v = conv_weight(d/N_x, x)

A radius pools the patch norms of each input, and the sum over filters in ∂L/∂x likewise: see `radius`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sphereify.choices import DEFAULT_EPS
from sphereify.errors import UsageError, invalid
from sphereify.nn.geometry import Projection, project, project_backward, resolve
from sphereify.nn.operators import broadcast_k, is_built_in
from sphereify.nn.passes import reference, with_passes
from sphereify.nn.passes.protocol import AngularMap, Passes
from sphereify.nn.precision import (
    accumulate_dtype,
    compute_dtype,
    fit_into,
    in_forward_mode,
    in_transform,
    no_autocast,
)
from sphereify.nn.radius import Radius, check_radius, is_pooled, pool_backward, radius_backward

Operator = Callable[[Tensor], Tensor]
Size = int | Sequence[int]
"""One number for all dimensions of space, or one for each."""


def sphere_conv1d(
    x: Tensor,
    weight: Tensor,
    operator: Operator,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    eps: float = DEFAULT_EPS,
    beta: Tensor | None = None,
    radius: Radius = 0.0,
) -> Tensor:
    """SphereConv over (B, C, L) or (C, L); see `sphere_conv2d`."""
    batch, projection = _batched(1, x, weight, stride, padding, dilation, groups)
    y = _angular(batch, weight, operator, bias, eps, beta, projection, radius)
    return y if batch.dim() == x.dim() else y.squeeze(0)


def sphere_conv2d(
    x: Tensor,
    weight: Tensor,
    operator: Operator,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    eps: float = DEFAULT_EPS,
    beta: Tensor | None = None,
    radius: Radius = 0.0,
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
        radius: ρ ≥ 0, a number or a tensor of one element that learns: the pooled radius (see `sphereify.nn.radius`).
            0 is the paper's operator; usual: 1 to 4. Each sample and group has a pool of its own.

    Returns:
        (B, O, H', W') in the dtype that `F.conv2d` returns, under autocast too; norms and angles are taken in fp32.
        Without bias and β it is the tensor that the backward needs: do not change it in place (see `writable`).

    Raises:
        UsageError: a shape, dtype, eps or radius that does not fit.

    >>> from sphereify.nn import CosineOperator
    >>> x = torch.ones(1, 2, 4, 4)
    >>> round(sphere_conv2d(x, torch.ones(3, 2, 3, 3), CosineOperator())[0, 0, 0, 0].item(), 4)
    1.0
    """
    batch, projection = _batched(2, x, weight, stride, padding, dilation, groups)
    y = _angular(batch, weight, operator, bias, eps, beta, projection, radius)
    return y if batch.dim() == x.dim() else y.squeeze(0)


def sphere_conv3d(
    x: Tensor,
    weight: Tensor,
    operator: Operator,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    eps: float = DEFAULT_EPS,
    beta: Tensor | None = None,
    radius: Radius = 0.0,
) -> Tensor:
    """SphereConv over (B, C, D, H, W) or (C, D, H, W); see `sphere_conv2d`."""
    batch, projection = _batched(3, x, weight, stride, padding, dilation, groups)
    y = _angular(batch, weight, operator, bias, eps, beta, projection, radius)
    return y if batch.dim() == x.dim() else y.squeeze(0)


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
    by_filter = bias is None or bias.shape == weight.shape[:1]
    y = _angular(rows, weight, operator, bias if by_filter else None, eps, beta, None)
    if bias is not None and not by_filter:
        y = y + bias.to(y.dtype)
    return y.squeeze(0) if x.dim() == 1 else y


def writable(y: Tensor, beta: Tensor | None, bias: Tensor | None) -> Tensor:
    """The result of a function above as a tensor that may be changed in place, copied where the backward needs it.

    Backward recovers what it needs from g itself, which an operation in place (ReLU, +=) would destroy. With β or a
    bias the result is another tensor than g.
    """
    return y.clone() if beta is None and bias is None and y.requires_grad else y


def _batched(
    dim: int, x: Tensor, weight: Tensor, stride: Size, padding: Size | str, dilation: Size, groups: int
) -> tuple[Tensor, Projection]:
    """The input of a convolution as a batch, and its geometry in numbers."""
    if weight.dim() != dim + 2 or x.dim() not in (dim + 1, dim + 2) or x.shape[-dim - 1] != weight.shape[1] * groups:
        raise UsageError(
            f"sphere_conv{dim}d: got x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)} with "
            f"groups={groups}, expected {dim + 1} or {dim + 2} dimensions of x, and weight.shape[1] * groups channels"
        )
    return resolve(x, weight.shape[2:], stride, padding, dilation, groups)


def _angular(
    x: Tensor,
    weight: Tensor,
    operator: Operator,
    bias: Tensor | None,
    eps: float,
    beta: Tensor | None,
    projection: Projection | None,
    radius: Radius = 0.0,
) -> Tensor:
    """β·g + bias of a batch; the border where ε, ρ, dtype, autocast and the kind of operator are settled.

    One of the Functions below computes it, wherever torch can differentiate one.
    """
    if not eps > 0:
        raise invalid("eps", eps, "a positive number", default=DEFAULT_EPS)
    for name, values in (("bias", bias), ("beta", beta)):
        if values is not None and values.shape != weight.shape[:1]:
            raise UsageError(f"{name}: got shape {tuple(values.shape)}, expected ({weight.shape[0]},), one a filter")
    x = fit_into(compute_dtype(x, weight), x, math.prod(weight.shape[1:]))
    radius = radius.to(accumulate_dtype(x.dtype)) if isinstance(radius, Tensor) else check_radius(radius)
    # An operator of the user's own follows the map of the cosine.
    built_in = operator if is_built_in(operator) else None
    k = None if built_in is None else _k_of(built_in, x, weight, projection)
    form = AngularMap(projection, "cosine" if built_in is None else built_in.name, eps)
    arguments = (x, weight, form, k, *((beta, bias) if built_in else (None, None)), radius)
    with no_autocast(x.device.type):
        if in_forward_mode():
            y = reference.composed(*arguments)
        elif _needs_function():
            y = _function().apply(*arguments)[0]
        else:
            y = with_passes(_forward, *arguments)[0]
        return y if built_in else reference.rescale(operator(y), beta, bias, projection)


def _k_of(operator: Any, x: Tensor, weight: Tensor, projection: Projection | None) -> float | Tensor | None:
    """The k of a built-in operator in a shape that broadcasts over the outputs.

    The filters of a linear map are its last dimension, those of a convolution dimension 1.
    """
    k = operator.k
    if isinstance(k, Tensor) and k.numel() not in (1, weight.shape[0]):
        raise UsageError(f"operator: got {k.numel()} values of k, expected 1 or {weight.shape[0]}, one a filter")
    return broadcast_k(k, x.dim() if projection else 0, accumulate_dtype(x.dtype))


def _needs_function() -> bool:
    """True where a result may be differentiated; torch.jit.trace cannot look into a Function."""
    if torch._C._get_tracing_state():
        return False
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or in_transform()


def _function() -> type[torch.autograd.Function]:
    """The Function that serves here; torch looks up the signature of a transformable one in each call."""
    return _TransformableSphereMap if torch.compiler.is_compiling() or in_transform() else _SphereMap


class _SphereMap(torch.autograd.Function):
    """(x, weight) -> (β·g(θ) + shift, patch norms, filter norms, g), without the last where there is no β or shift.

    The results behind the first are there to be saved, not to be differentiated.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        output = with_passes(_forward, *arguments)
        _save(ctx, arguments, output)
        ctx.set_materialize_grads(False)  # torch would fill tensors of zeros for the results that have no gradient
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:  # type: ignore[override]
        return (None,) * len(ctx.needs_input_grad) if grad is None else _gradients(ctx, grad)


class _TransformableSphereMap(torch.autograd.Function):
    """The same in the form that torch.func and torch.compile can transform; they read the arguments' names."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        form: AngularMap,
        k: float | Tensor | None,
        beta: Tensor | None,
        shift: Tensor | None,
        radius: Radius,
    ) -> tuple[Tensor, ...]:
        return with_passes(_forward, x, weight, form, k, beta, shift, radius)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:  # type: ignore[override]
        return _gradients(ctx, grad)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    """Keep for the backward what both Functions need there."""
    x, weight, ctx.form, k, beta, shift, radius = inputs
    g, norm, filter_norm = output[-1] if len(output) > 3 else output[0], output[1], output[2]
    ctx.mark_non_differentiable(*output[1:])
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.constants = [None if isinstance(value, Tensor) else value for value in (k, beta, radius)]
    ctx.is_tensor = [isinstance(value, Tensor) for value in (k, beta, radius)]
    ctx.save_for_backward(x, weight, g, norm, filter_norm, *(v for v in (k, beta, radius) if isinstance(v, Tensor)))


def _gradients(ctx: Any, grad: Tensor) -> tuple:
    """The gradients of the arguments of both Functions."""
    x, weight, g, norm, filter_norm, *tensors = ctx.saved_tensors
    saved = iter(tensors)
    k, beta, radius = (
        next(saved) if is_tensor else constant for is_tensor, constant in zip(ctx.is_tensor, ctx.constants, strict=True)
    )
    with no_autocast(grad.device.type):
        if torch.is_grad_enabled():
            # This backward is to be differentiated: what was saved is constant to autograd, what is computed here is
            # not.
            norm = reference.patch_norm(x, weight.shape[2:], ctx.form.eps, ctx.form.projection, radius)
            _, filter_norm = reference.normalize_filters(weight, ctx.form.eps, x.dtype)
            if beta is not None or ctx.shift_dtype is not None:
                g, *_ = _function().apply(x, weight, ctx.form, k, None, None, radius)
        return with_passes(
            _backward, x, weight, ctx.form, k, beta, ctx.shift_dtype, radius,
            grad, g, norm, filter_norm, ctx.needs_input_grad,
        )  # fmt: skip


def _forward(
    passes: Passes,
    x: Tensor,
    weight: Tensor,
    form: AngularMap,
    k: float | Tensor | None,
    beta: Tensor | None,
    shift: Tensor | None,
    radius: Radius,
) -> tuple[Tensor, ...]:
    """(y, patch norms, filter norms, g), or (g, patch norms, filter norms) where there is neither β nor shift."""
    projection, curve, eps = form
    unit, filter_norm = passes.normalize_filters(weight, eps, x.dtype)
    dot = project(x, unit, projection)  # before the norms, for torch's complaints about shapes
    norm = passes.patch_norm(x, weight.shape[2:], eps, projection, radius)
    g, y = passes.curve(dot, norm, curve, k, projection, beta, shift)
    return (g, norm, filter_norm) if y is None else (y, norm, filter_norm, g)


def _backward(
    passes: Passes,
    x: Tensor,
    weight: Tensor,
    form: AngularMap,
    k: float | Tensor | None,
    beta: Tensor | None,
    shift_dtype: torch.dtype | None,
    radius: Radius,
    grad: Tensor,
    g: Tensor,
    norm: Tensor,
    filter_norm: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of `_forward` behind the passes."""
    projection, curve, eps = form
    needs_x, needs_weight, _, needs_k, _, _, needs_radius = needed
    needs = (needs_x or needs_radius, needs_weight, needs_k)
    d_dot, radial, grad_k, grad_beta, grad_shift = passes.curve_backward(
        grad, g, norm, curve, k, projection, beta, shift_dtype, needs
    )
    grad_radius = None
    if radial is not None and is_pooled(radius):
        if needs_radius:
            assert isinstance(radius, Tensor)
            grad_radius = radius_backward(radial, norm, radius, eps)
        radial = pool_backward(radial, radius)
    unit = (weight.to(filter_norm.dtype) / filter_norm).to(x.dtype)
    grad_x, v = project_backward(d_dot, x, unit, projection, needed[:2])
    if grad_x is not None:
        assert radial is not None
        grad_x = passes.subtract_radial(grad_x, x, radial, weight.shape[2:], projection)
    grad_weight = None if v is None else passes.filter_gradient(v, weight, filter_norm)
    return grad_x, grad_weight, None, grad_k, grad_beta, grad_shift, grad_radius

"""Decoupled layers: h(‖x‖)·g(θ), of g(θ), the norms of patches and a magnitude h (see `sphereify.nn.magnitudes`).

The norms have one channel a group, so what this adds to a layer is a pass over its input and one over its output.

A layer between the original and what it is to become (`morph` below 1, see `sphereify.training.morph`) computes

    (‖w‖·‖x‖)^(1-t) · (β·h(‖x‖))^t · ((1-t)·cos θ + t·g(θ)) + bias

with a pooled radius of t·ρ: for t = 0 the plain layer, for t = 1 its own function.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.errors import UsageError, option
from sphereify.nn.functional import sphere_conv1d, sphere_conv2d, sphere_conv3d, sphere_linear
from sphereify.nn.geometry import Projection, resolve
from sphereify.nn.magnitudes import SPHERE, Magnitude
from sphereify.nn.operators import CosineOperator
from sphereify.nn.passes.reference import normalize_filters, patch_norm
from sphereify.nn.precision import accumulate_dtype, accumulated, autocast_is_on, no_autocast
from sphereify.nn.radius import Radius, is_pooled

ANGULAR: tuple[Any, ...] = (sphere_linear, sphere_conv1d, sphere_conv2d, sphere_conv3d)
"""The angular function by the dimensions of space."""
PLAIN: tuple[Any, ...] = (F.linear, F.conv1d, F.conv2d, F.conv3d)
"""torch's, likewise."""
MOMENTUM = 0.1
"""Share of a batch in the running mean of the patch norms, as that of a BatchNorm."""
SMALLEST_BETA = 1e-3
"""The |β| below which a power of β is continued by a line, since its slope has no bound."""
COSINE = CosineOperator()
ALL = slice(None)


class Decoupled(nn.Module):
    """A module with a magnitude.

    Attributes:
        magnitude: h. `Magnitude()` is the paper's layer, which leaves lengths out.
        morph: t in [0, 1]; 1 once the layer is what it is to be.
        log_magnitude_radius: log ρ of each filter, where ρ is learned.
        mean_norm: the running mean of the patch norms, where ρ is relative to it; 0 before the first batch.
    """

    magnitude: Magnitude = SPHERE
    morph: float = 1.0
    weight: Any
    operator: Any
    eps: float
    log_magnitude_radius: Any
    mean_norm: Any

    def _set_magnitude(self, magnitude: Magnitude, filters: int, like: Tensor) -> None:
        """Take a magnitude; that of the paper leaves no trace in the state."""
        if magnitude.is_sphere:
            return
        self.magnitude = magnitude
        if magnitude.learned:
            start = torch.full((filters,), math.log(magnitude.radius or 1.0), device=like.device, dtype=like.dtype)
            self.register_parameter("log_magnitude_radius", nn.Parameter(start))
        if magnitude.mean == "data":
            self.register_buffer("mean_norm", torch.zeros((), device=like.device))

    @property
    def is_decoupled(self) -> bool:
        """True if the layer is more than g(θ)."""
        return self.morph < 1 or not self.magnitude.is_sphere

    @property
    def is_plain(self) -> bool:
        """True if h(‖x‖)·g(θ) is an inner product with the filters, or with the unit filters: a plain layer."""
        pooled = is_pooled(getattr(self, "radius", 0.0))
        return self.magnitude.form == "linear" and type(self.operator) is CosineOperator and not pooled

    @property
    def magnitude_radius(self) -> Tensor | float | None:
        """ρ: a number, or a tensor of shape (filters,) where it is learned; None where the magnitude has none."""
        return self.log_magnitude_radius.exp() if self.magnitude.learned else self.magnitude.radius

    def size(self, norms: Tensor, rho: Tensor | float | None) -> Tensor:
        """h for patches with these norms: (B, groups or filters, *space), or (*, 1) of a linear map.

        `rho` is ρ: a number, or a tensor that broadcasts over the outputs; None where the magnitude has none.
        """
        return self.magnitude.of(norms, None if rho is None else rho * self._mean(norms))

    def usual_size(self, norms: Tensor) -> Tensor:
        """The same with one ρ for all filters: the geometric mean of theirs."""
        rho = self.magnitude_radius
        return self.size(norms, rho.detach().log().mean().exp().to(norms.dtype) if isinstance(rho, Tensor) else rho)

    def _mean(self, norms: Tensor) -> Tensor:
        """The mean patch norm: of each input and group, or the running one."""
        if self.magnitude.mean == "input":
            return norms.mean(list(range(2, norms.dim())), keepdim=True)
        before = self.mean_norm
        now = norms.detach().mean() if norms.numel() else before.to(norms.dtype)
        if self.training:
            with torch.no_grad():
                before.copy_(torch.where(before > 0, torch.lerp(before, now.to(before.dtype), MOMENTUM), now))
        return torch.where(before > 0, before, now).to(norms.dtype)

    def _magnitude_repr(self) -> str:
        """The magnitude for `extra_repr`; empty for the paper's."""
        return "" if self.magnitude.is_sphere else f", magnitude={self.magnitude}"


def check_complete(model: nn.Module, what: str) -> None:
    """Make sure that no layer is between the original and what it is to become, which only a training knows.

    Raises:
        UsageError: one is.
    """
    for name, module in model.named_modules():
        if getattr(module, "morph", 1.0) != 1.0:
            raise UsageError(
                f"{what}: {name or type(model).__name__} is still between the original and its own function "
                f"({module.morph:.0%} of the way); train to the end of {option('morph')}"
            )


def decoupled(
    layer: Any,
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    geometry: Sequence[Any] = (),
    beta: Tensor | None = None,
    rows: slice = ALL,
) -> Tensor:
    """β·h(‖x‖)·g(θ) + shift, times ‖w‖ in the weighted form. It may be changed in place.

    Args:
        layer: a `Decoupled` with an operator and ε, and a convolution with a radius.
        x, weight, shift, beta: as for `sphere_conv2d`.
        geometry: stride, padding, dilation, groups; empty for a linear map.
        rows: the filters of the layer that `weight` is, if it is some of them.
    """
    if layer.morph == 0 and not torch.is_grad_enabled():
        return _plain(x, weight, shift, geometry, None)
    if layer.morph == 1 and layer.is_plain:
        filters = weight if layer.magnitude.weighted else normalize_filters(weight, layer.eps, weight.dtype)[0]
        return _plain(x, filters, shift, geometry, beta)
    batch, geometry = _batched(x, weight, geometry)
    if layer.morph == 1 and layer.magnitude.form != "sphere" and _is_product(layer, x, weight):
        y = _sized_product(layer, batch, weight, shift, geometry, beta, rows)
        return y if batch.dim() == x.dim() else y.squeeze(0)
    g = _angles(layer, batch, weight, geometry)
    with no_autocast(x.device.type):
        channels = (-1, *[1] * (weight.dim() - 2))
        y = g.to(accumulate_dtype(g.dtype))
        y, factor = (_whole if layer.morph == 1 else _between)(layer, y, batch, weight, geometry, beta, rows)
        y = y if factor is None else y * factor.view(channels)
        if shift is not None:
            y = y + (shift.to(y.dtype).view(channels) if shift.shape == weight.shape[:1] else shift.to(y.dtype))
        y = y.to(g.dtype)
    return y if batch.dim() == x.dim() else y.squeeze(0)


def _is_product(layer: Any, x: Tensor, weight: Tensor) -> bool:
    """True if g(θ) is the cosine, and x of a precision in which no inner product leaves the range."""
    precise = x.dtype is weight.dtype and x.dtype in (torch.float32, torch.float64)
    return type(layer.operator) is CosineOperator and precise and not autocast_is_on(x.device.type)


def _sized_product(
    layer: Any,
    x: Tensor,
    weight: Tensor,
    shift: Tensor | None,
    geometry: Sequence[Any],
    beta: Tensor | None,
    rows: slice,
) -> Tensor:
    """The same for the cosine: inner products with β·ŵ or β·w, times h / N. It makes fewer passes over the output."""
    channels = (-1, *[1] * (weight.dim() - 2))
    filters = weight if layer.magnitude.weighted else normalize_filters(weight, layer.eps, weight.dtype)[0]
    filters = filters if beta is None else filters * beta.view(-1, *[1] * (weight.dim() - 1))
    y = PLAIN[weight.dim() - 2](x, filters, None, *geometry)  # before the norms, for torch's complaints about shapes
    norms = _norms(layer, x, weight, geometry)
    factor = _sizes(layer, norms, weight, rows)
    if geometry and is_pooled(layer.radius):
        norms = _norms(layer, x, weight, geometry, layer.radius)
    factor = factor / norms
    if shift is None:
        return y * factor  # type: ignore[no-any-return]
    return torch.addcmul(shift.view(channels) if shift.shape == weight.shape[:1] else shift, y, factor)


def _whole(
    layer: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[Any], beta: Tensor | None, rows: slice
) -> tuple[Tensor, Tensor | None]:
    """h·g, and the factor of each filter; None for 1."""
    y = g if layer.magnitude.form == "sphere" else g * _sizes(layer, _norms(layer, x, weight, geometry), weight, rows)
    lengths = filter_norms(weight, layer.eps).to(g.dtype) if layer.magnitude.weighted else None
    if beta is None or lengths is None:
        return y, lengths if beta is None else beta.to(g.dtype)
    return y, lengths * beta


def _between(
    layer: Any, g: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[Any], beta: Tensor | None, rows: slice
) -> tuple[Tensor, Tensor | None]:
    """The same on the way from the original."""
    t = layer.morph
    g = mixed(g, lambda: _angles(layer, x, weight, geometry, COSINE).to(g.dtype), layer)
    norms = _norms(layer, x, weight, geometry)
    y = g * norms.pow(1 - t)
    if layer.magnitude.form != "sphere":
        y = y * _sizes(layer, norms, weight, rows).pow(t)
    lengths = filter_norms(weight, layer.eps).to(g.dtype)
    factor = lengths if layer.magnitude.weighted else lengths.pow(1 - t)
    return y, factor if beta is None else factor * _power(beta.to(g.dtype), t)


def mixed(g: Tensor, cosine: Callable[[], Tensor], layer: Any) -> Tensor:
    """(1-t)·cos θ + t·g(θ); `cosine` gives cos θ where g is another function."""
    if type(layer.operator) is CosineOperator:
        return g
    cos = cosine()
    return cos + layer.morph * (g - cos)


def _power(beta: Tensor, t: float) -> Tensor:
    """sign(β)·|β|^t, with a bounded slope at 0."""
    size = beta.abs()
    power = size.clamp_min(SMALLEST_BETA).pow(t)
    return torch.where(size > SMALLEST_BETA, beta.sign() * power, beta * SMALLEST_BETA ** (t - 1))


def _angles(layer: Any, x: Tensor, weight: Tensor, geometry: Sequence[Any], operator: Any = None) -> Tensor:
    """g(θ), with the radius that the layer has at present."""
    pooled = {"radius": layer.radius if layer.morph == 1 else layer.radius * layer.morph} if geometry else {}
    function = ANGULAR[weight.dim() - 2]
    return function(x, weight, operator or layer.operator, None, *geometry, eps=layer.eps, **pooled)  # type: ignore[no-any-return]


def _plain(x: Tensor, weight: Tensor, shift: Tensor | None, geometry: Sequence[Any], beta: Tensor | None) -> Tensor:
    """torch's own function; β·(w·x) + shift."""
    function, channels = PLAIN[weight.dim() - 2], (-1, *[1] * (weight.dim() - 2))
    by_filter = shift is None or shift.shape == weight.shape[:1]
    if beta is None and by_filter:
        return function(x, weight, shift, *geometry)  # type: ignore[no-any-return]
    y = function(x, weight, None, *geometry)
    y = y if beta is None else y * beta.to(y.dtype).view(channels)
    if shift is None:
        return y  # type: ignore[no-any-return]
    return y + (shift.to(y.dtype).view(channels) if by_filter else shift.to(y.dtype))  # type: ignore[no-any-return]


# ---- Norms


def patch_norms(x: Tensor, weight: Tensor, geometry: Sequence[Any], eps: float, radius: Radius = 0.0) -> Tensor:
    """sqrt(‖patch‖² + ρ²·m + ε) of a batch, differentiable.

    (B, groups, *space) for a convolution, (*, 1) for a linear map.
    """
    projection = Projection(*geometry) if geometry else None
    return patch_norm(x, weight.shape[2:], eps, projection, radius)


def filter_norms(weight: Tensor, eps: float) -> Tensor:
    """sqrt(‖w‖² + ε) of each filter, by which g(θ) divides it: (filters,)."""
    squares = accumulated(weight).square().flatten(1).sum(1)
    return (squares + eps).sqrt()


def _norms(layer: Any, x: Tensor, weight: Tensor, geometry: Sequence[Any], radius: Radius = 0.0) -> Tensor:
    """The patch norms in a shape that broadcasts over the outputs."""
    norms, filters = patch_norms(x, weight, geometry, layer.eps, radius), len(weight)
    if not geometry or norms.shape[1] in (1, filters):
        return norms
    batch, groups, *space = norms.shape
    return norms.unsqueeze(2).expand(batch, groups, filters // groups, *space).flatten(1, 2)


def _sizes(layer: Any, norms: Tensor, weight: Tensor, rows: slice) -> Tensor:
    """h, with ρ as the layer has it."""
    rho = layer.magnitude_radius
    if isinstance(rho, Tensor):
        rho = rho[rows].to(norms.dtype).view(-1, *[1] * (weight.dim() - 2))
    return layer.size(norms, rho)  # type: ignore[no-any-return]


def _batched(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> tuple[Tensor, Sequence[Any]]:
    """The input as a batch, and the geometry in numbers."""
    if not geometry:
        return x if x.dim() > 1 else x.unsqueeze(0), ()
    return resolve(x, weight.shape[2:], *geometry)

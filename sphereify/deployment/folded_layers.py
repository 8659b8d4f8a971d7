"""Angular layers for inference, with all that is constant multiplied into the filters.

With unit filters ŵ, N the norm of the patch, and a following normalization s·y + t:

    cosine      s·(β·ŵ·x / N + γ) + t   =  (a·ŵ)·x / N + b            a = s·β, b = s·γ + t
    linear      a·arcsin(ŵ·x / N) + b                                 a = s·β·2/π
    sigmoid     a·(logistic(c·arcsin(ŵ·x / N)) - ½) + b               a = 2·s·β / tanh(π/4k), c = 1/k

Of the magnitudes, filter lengths are a part of a, and a layer that is plain again (magnitude linear, cosine, no radius)
is torch's own; the others depend on each patch, and such layers are not folded.

The convolution is one call of torch's; then the output is passed over once, in place. Where a window is one position
and has fewer channels than there are filters, the input is divided instead, and b added by the convolution itself.
"""

import math
import sys
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.deployment import onnx_layers
from sphereify.deployment.onnx_layers import is_traced_for_onnx
from sphereify.errors import UnsupportedModelError
from sphereify.head_numbers import HEAD_NUMBERS
from sphereify.nn import passes
from sphereify.nn.arcsine import arcsin_in_right_angles, is_fused
from sphereify.nn.geometry import Ints, Projection, box_sum, convolve, is_identity, project, resolve
from sphereify.nn.heads import head_eps, length_of
from sphereify.nn.layers import ConvGeometry
from sphereify.nn.operators import is_built_in
from sphereify.nn.passes import compiled
from sphereify.nn.passes.reference import normalize_filters
from sphereify.nn.precision import (
    CHANNELS_LAST,
    accumulate_dtype,
    cast,
    compute_dtype,
    fit_into,
    in_forward_mode,
    is_channels_last,
    is_plain,
    no_autocast,
    runs_eagerly,
)
from sphereify.nn.radius import pool
from sphereify.nn.sphereface2 import similarity
from sphereify.nn.tracing import one_node

Layer = TypeVar("Layer", bound="FoldedLayer")


class Activation(NamedTuple):
    """An activation that can be part of a folded layer."""

    module: type[nn.Module]
    """Its class, of which timm's norms with an activation hold an instance."""
    function: Any
    """Its function, which takes `inplace`."""


ACTIVATIONS = {"relu": Activation(nn.ReLU, F.relu), "hardswish": Activation(nn.Hardswish, F.hardswish)}
"""These activations by the name that `FoldedLayer` and the compiled passes know."""

PLAIN = "plain"
"""The curve of a layer that has become an inner product again."""


class FoldedLayer(nn.Module):
    """Base of the folded layers, which are made from angular layers and fixed: parameters require no gradient.

    Attributes:
        weight: the unit filters; for the cosine operator, times a.
        bias: b of shape (filters,), or None.
        scale: a of shape (filters,), or None where it is 1 or part of the weight.
        sharpness: c of the sigmoid, of shape (filters,) or (1,), else None.
        curve: the operator's name, "own" for an operator object of the user's, which stays as it is, or "plain" for an
            inner product that nothing divides.
        activation: a name of `ACTIVATIONS` that comes behind it all, or None.

    Gradients flow to the input. `train()` is refused with an `UnsupportedModelError`.
    """

    folded: ClassVar[bool] = True
    weight: Any
    bias: Any
    scale: Any
    sharpness: Any
    operator: Any
    eps: float
    curve: str
    activation: str | None
    _map: Any

    def take_constants(self, operator: Any, scale: Tensor | None, shift: Tensor | None) -> None:
        """Become scale·g(θ) + shift, both of shape (filters,) or None for 1 and 0, from the layer that this copies."""
        unit, _ = normalize_filters(self.weight.detach().double(), self.eps, torch.float64)
        sharpness = self.activation = None
        self.curve = operator.name if is_built_in(operator) else "own"
        if self.curve == "cosine" and scale is not None:
            unit, scale = unit * scale.view(-1, *[1] * (unit.dim() - 1)), None
        elif self.curve == "linear":
            scale = (1 if scale is None else scale) * unit.new_full((len(unit),), 2 / math.pi)
        elif self.curve.endswith("sigmoid"):
            k = torch.as_tensor(operator.k, dtype=unit.dtype, device=unit.device).detach().reshape(-1)
            sharpness = 1 / k
            scale = ((2 if scale is None else 2 * scale) / (math.pi / (4 * k)).tanh()).expand(len(unit))
        for name in ("operator", "beta", "gamma", "scale"):  # a head has a scale of its own: a number
            if not (name == "operator" and self.curve == "own"):
                for home in (vars(self), self._modules, self._parameters):
                    home.pop(name, None)
        like = self._parameters.pop("weight")
        for name, value in {"weight": unit, "bias": shift, "scale": scale, "sharpness": sharpness}.items():
            self._parameters[name] = None if value is None else constant(value, like)

    def train(self: Layer, mode: bool = True) -> Layer:
        if mode and not _only_traced():
            raise UnsupportedModelError(
                "train(): this model is folded for inference and cannot be trained. Train the model that it was folded "
                "from, and fold that again"
            )
        return super().train(False)

    def _fit_into(self, dtype: torch.dtype, x: Tensor) -> Tensor:
        """x in `dtype`, within its range together with filters that are longer than 1."""
        longest = None
        if dtype is torch.float16:
            longest = self.weight.to(torch.float32).flatten(1).norm(dim=1).amax(dim=0)
        return fit_into(dtype, x, self.weight[0].numel(), longest)

    def _finish(self, dot: Tensor, inverse: Tensor | None, channels: Ints) -> Tensor:
        """The outputs made of inner products, in place: times 1/N, through the curve, scaled and shifted.

        `channels` is the shape in which (filters,) broadcasts. Without `inverse` the products are cosines already, and
        for the cosine operator all is done.
        """
        shift = None if self.bias is None else cast(self.bias, dot.dtype).view(channels)
        if self.curve == "cosine":
            return dot if inverse is None else _scale_and_shift(dot, inverse, shift)
        g = self._g(dot if inverse is None else dot.mul_(inverse), channels)
        if self.scale is not None:
            return _scale_and_shift(g, cast(self.scale, g.dtype).view(channels), shift)
        return g if shift is None else g + shift

    def _g(self, cos: Tensor, channels: Ints) -> Tensor:
        """The part of the operator's curve that the scale does not hold, in place for one of the four operators."""
        cos = F.hardtanh(cos, inplace=True)
        if self.curve == "own":
            return self.operator(cos)  # type: ignore[no-any-return]
        if self.curve == "cosine":
            return cos
        if is_traced_for_onnx():
            angle = onnx_layers.arcsin(cos)
        else:
            angle = arcsin_in_right_angles(cos).mul(math.pi / 2) if is_fused(cos) else cos.asin_()
        if self.sharpness is None:
            return angle
        sharpness = cast(self.sharpness, angle.dtype)
        # tanh(u) = 2·logistic(2u) - 1, where the logistic function takes a sixth of the time.
        logistic = angle.mul_(sharpness if len(sharpness) == 1 else sharpness.view(channels)).sigmoid_()
        return logistic - 0.5 if logistic.requires_grad else logistic.sub_(0.5)

    def _outputs(self, x: Tensor, projection: Projection | None) -> Tensor:
        """The outputs for x in the dtype of the products: by compiled loops, or by `_map` of the class."""
        weight = cast(self.weight, x.dtype)
        if self._is_served_by_kernels(x, weight, projection):
            return self._by_kernels(x, weight, projection)
        return self._activated(cast(self._map(x, weight, projection), x.dtype))

    def _is_served_by_kernels(self, x: Tensor, weight: Tensor, projection: Projection | None) -> bool:
        """True if compiled loops (`nn.passes.compiled`) can do all that surrounds the products."""
        if self.curve == "own" or is_traced_for_onnx():
            return False
        constants = (value for value in (self.bias, self.scale, self.sharpness) if value is not None)
        tensors = (x, weight, *constants)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return False
        with torch.no_grad():
            return runs_eagerly(*tensors) and passes.serves(compiled, x, weight, projection, self.curve)

    @torch.no_grad()
    def _by_kernels(self, x: Tensor, weight: Tensor, projection: Projection | None) -> Tensor:
        """The outputs with one pass over x and one over the products."""
        kernel, radius = weight.shape[2:], getattr(self, "radius", 0.0)
        narrow = projection is None or (projection.groups == 1 and is_identity(kernel, projection))
        if self.curve == "cosine" and narrow and weight.shape[1] < weight.shape[0]:
            x = x / compiled.patch_norm(x, kernel, self.eps, projection, radius)
            y = convolve(x, weight, self.bias, projection) if projection else F.linear(x, weight, self.bias)
            return self._activated(y)
        dot = project(x, weight, projection)  # before the norms, for torch's complaints about shapes
        norm = compiled.patch_norm(x, kernel, self.eps, projection, radius)
        constants = (self.sharpness, projection, self.scale, self.bias)
        return compiled.folded(dot, norm, self.curve, *constants, self.activation)

    def _activated(self, y: Tensor) -> Tensor:
        """The output behind the activation, in place where nothing needs it."""
        if self.activation is None:
            return y
        return ACTIVATIONS[self.activation].function(y, inplace=not y.requires_grad)

    def extra_repr(self) -> str:
        behind = f", activation={self.activation}" if self.activation else ""
        return f"{super().extra_repr()}, folded, operator={self.curve}, eps={self.eps:g}{behind}"


def _only_traced() -> bool:
    """True if torchvision asks for training mode while it makes a feature extractor, for which it traces both modes."""
    frame = sys._getframe(2)
    while frame is not None:
        in_torchvision = frame.f_globals.get("__name__") == "torchvision.models.feature_extraction"
        if in_torchvision and frame.f_code.co_name in ("create_feature_extractor", "get_graph_node_names"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def constant(value: Tensor, like: Any) -> nn.Parameter:
    """A parameter that requires no gradient, with the dtype and, for filters, the memory format of another."""
    last = value.dim() > 1 and not like.is_contiguous() and is_channels_last(like)
    form = CHANNELS_LAST[value.dim()] if last else torch.contiguous_format
    return nn.Parameter(value.to(like.dtype).clone(memory_format=form), requires_grad=False)


def _scale_and_shift(y: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """scale·y + shift in one pass; y is overwritten where nothing needs it."""
    if shift is None:
        return y.mul_(scale)
    if y.requires_grad or torch.compiler.is_compiling() or in_forward_mode() or not is_plain(y):
        return torch.addcmul(shift, y, scale)
    return torch.addcmul(shift, y, scale, out=y)


class _FoldedConv(FoldedLayer, ConvGeometry):
    """Base of the three convolutions; a learned radius has become a number."""

    radius: Any

    @one_node
    def forward(self, input: Tensor) -> Tensor:
        if self.curve == PLAIN:
            return self._activated(super().forward(input))
        padded, padding = self._padded(input)
        kernel = self.weight.shape[2:]
        x, projection = resolve(padded, kernel, self.stride, padding, self.dilation, self.groups)
        dtype = compute_dtype(x, self.weight)
        x = self._fit_into(dtype, x)
        with no_autocast(x.device.type):
            y = self._outputs(x, projection)
        return y if input.dim() == len(kernel) + 2 else y.squeeze(0)

    def _map(self, x: Tensor, weight: Tensor, projection: Projection) -> Tensor:
        if is_traced_for_onnx():
            return onnx_layers.convolution(self, x, weight, projection)
        precise = accumulate_dtype(x.dtype)
        groups, ones = projection.groups, [1] * (weight.dim() - 2)
        squares = _squares(cast(x, precise), groups, weight.shape[1])
        squares = box_sum(squares, weight.shape[2:], projection, 0.0 if self.radius else self.eps)
        inverse = (squares.add(pool(squares, self.radius) + self.eps) if self.radius else squares).rsqrt_()
        filters = (1, -1, *ones)
        if groups == 1 and is_identity(weight.shape[2:], projection) and weight.shape[1] < weight.shape[0]:
            bias = cast(self.bias, x.dtype) if self.curve == "cosine" and self.bias is not None else None
            dot = convolve(x * cast(inverse, x.dtype), weight, bias, projection)
            return self._finish(cast(dot, precise), None, filters)
        dot = cast(convolve(x, weight, None, projection), precise)
        if groups == 1 or groups == len(weight):
            return self._finish(dot, inverse, filters)
        if self.curve == "cosine":
            grouped = self._finish(dot.unflatten(1, (groups, -1)), inverse.unsqueeze(2), (1, groups, -1, *ones))
            return grouped.flatten(1, 2)
        dot.unflatten(1, (groups, -1)).mul_(inverse.unsqueeze(2))
        return self._finish(dot, None, filters)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", radius={self.radius:g}" if self.radius else "")


def _squares(x: Tensor, groups: int, per_group: int) -> Tensor:
    """The sum of squares over the channels of each group: (B, C, …) -> (B, groups, …).

    Which way is fastest on a CPU depends on where channels lie in memory; a wrong one takes up to 70 times as long, and
    `square` two to three times as long as a product.
    """
    if per_group == 1:
        return x * x
    if torch.compiler.is_compiling():
        return x.square().sum(1, keepdim=True) if groups == 1 else _by_group(x.square(), groups).sum(2)
    if per_group <= 4 and groups == 1:
        first, *others = x.split(1, dim=1)
        total = first * first
        for channel in others:
            total = torch.addcmul(total, channel, channel)
        return total
    if x.stride(1) == 1:
        return torch.linalg.vector_norm(_by_group(x, groups), dim=2).square()
    return _by_group(x * x, groups).sum(2)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(B, C, …) -> (B, groups, C / groups, …)"""
    return x.unflatten(1, (groups, -1))


class FoldedConv1d(_FoldedConv, nn.Conv1d):
    """The folded `SphereConv1d`: (B, C, L) or (C, L)."""


class FoldedConv2d(_FoldedConv, nn.Conv2d):
    """The folded `SphereConv2d`: (B, C, H, W) or (C, H, W)."""


class FoldedConv3d(_FoldedConv, nn.Conv3d):
    """The folded `SphereConv3d`: (B, C, D, H, W) or (C, D, H, W)."""


class FoldedLinear(FoldedLayer, nn.Linear):
    """The folded `SphereLinear`: (*, in_features) -> (*, out_features); (B, in_features) if a BatchNorm is part of it.

    Such a norm takes dimension 1 for channels, which in an input of more dimensions are not the filters.
    """

    rows_only: bool

    @one_node
    def forward(self, input: Tensor) -> Tensor:
        if self.rows_only and input.dim() != 2:
            raise UnsupportedModelError(
                f"a BatchNorm was folded into this linear map, which takes (B, {self.in_features}) then, and got "
                f"{tuple(input.shape)}"
            )
        if self.curve == PLAIN:
            return self._activated(super().forward(input))
        dtype = compute_dtype(input, self.weight)
        rows = input if input.dim() > 1 else input.unsqueeze(0)
        rows = self._fit_into(dtype, rows)
        with no_autocast(rows.device.type):
            y = self._outputs(rows, None)
        return y if input.dim() > 1 else y.squeeze(0)

    def _map(self, x: Tensor, weight: Tensor, projection: None) -> Tensor:
        if is_traced_for_onnx():
            return onnx_layers.rows(self, x, weight)
        precise = accumulate_dtype(x.dtype)
        inverse = _inverse_length(cast(x, precise), self.eps)
        if len(weight) > weight.shape[1]:
            bias = cast(self.bias, x.dtype) if self.curve == "cosine" and self.bias is not None else None
            return self._finish(cast(F.linear(x * cast(inverse, x.dtype), weight, bias), precise), None, (-1,))
        return self._finish(cast(F.linear(x, weight), precise), inverse, (-1,))


def _inverse_length(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(‖x‖² + ε) over the last dimension, which is kept."""
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() + eps).rsqrt()


class FoldedHead(FoldedLayer, nn.Linear):
    """The folded `AngularHead`: (*, in_features) -> (*, num_classes), logits without a margin.

    With the cosine operator ‖x‖·cos θ_j is ŵ_j·x: a linear map. For sphereface2, `spread` is (r, t), and `shift` of
    shape (num_classes,) is what is added to r·G(g(θ_j)).
    """

    kind: str
    shift: Any
    spread: tuple[float, float]

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    @one_node
    def forward(self, input: Tensor) -> Tensor:
        precise = accumulate_dtype(input.dtype)
        with no_autocast(input.device.type):
            x, weight = cast(input, precise), cast(self.weight, precise)
            if self.curve == "cosine" and self.kind not in HEAD_NUMBERS["scale"]:
                logits = F.linear(x, weight, None if self.bias is None else cast(self.bias, precise))
            else:
                rows = x if x.dim() > 1 else x.unsqueeze(0)
                logits = self._angular(rows, weight, length_of(rows, head_eps(input)))
                logits = logits if x.dim() > 1 else logits.squeeze(0)
        return logits if input.dtype is not self.weight.dtype else cast(logits, input.dtype)

    def _angular(self, x: Tensor, weight: Tensor, length: Tensor) -> Tensor:
        dot = F.linear(x, weight)
        if self.kind == "sphereface2":
            scale, power = self.spread
            return scale * similarity(self._finish(dot, 1 / length, (-1,)), power) + cast(self.shift, length.dtype)
        if self.kind in HEAD_NUMBERS["scale"]:
            return self._finish(dot, 1 / length, (-1,))
        factor = length if self.scale is None else length * cast(self.scale, length.dtype)
        shift = None if self.bias is None else cast(self.bias, length.dtype)
        return _scale_and_shift(self._g(dot.div_(length), (-1,)), factor, shift)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}"

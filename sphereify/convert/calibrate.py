"""A closed-form start for a converted network, from what the original knows and a few unlabelled inputs.

Layer by layer, in the order in which they run: the layer's filters, β and γ become the ridge regression of the original
layer's output on the normalized patches that the layer now receives, from the part already converted. For the cosine
operator that is the exact least-squares layer; for the others the filters' directions come from it, and β and γ from a
second regression, on g. Where a BatchNorm follows in place of β and γ, its statistics take up the scale.

Only sums are kept of the patches: a Gram matrix of fan_in² numbers a layer, whatever the number of inputs.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.convert.plan import ConversionPlan, Decision
from sphereify.convert.rewrite import PLAN_ATTRIBUTE
from sphereify.errors import UsageError
from sphereify.nn import AngularHead
from sphereify.nn.layers import AngularLayer

RIDGE = 1e-4
"""Of the mean eigenvalue of the Gram matrix, added to its diagonal."""

PATCH_BYTES = 64 * 2**20
"""Patches are unrolled for a few inputs at a time, this many bytes."""


@torch.no_grad()
def calibrate(
    model: nn.Module,
    original: nn.Module,
    batches: Iterable[Tensor | tuple[Tensor, ...]],
    *,
    on_layer: Callable[[str, float], None] = lambda name, explained: None,
) -> dict[str, float]:
    """Set the converted layers of `model` to reproduce those of `original`, in place, without labels or training.

    Args:
        model: from `apply_plan(original, plan)`.
        original: the network before the conversion, trained.
        batches: inputs: tensors, or tuples of the model's arguments. 500 to 2,000 images are usual.
        on_layer: called after each layer with its name and R².

    Returns:
        For each converted layer R²: the share of the variance of the original layer's output, in [0, 1] and below 0
        where it is worse than its mean, that the calibrated layer explains on these inputs. Of a head it is
        that of the regression before its class weights lose their length.

    Raises:
        UsageError: no batches, or a model that was not converted.

    Both models run in eval mode and get their mode back afterwards.
    """
    plan: ConversionPlan | None = getattr(model, PLAN_ATTRIBUTE, None)
    if plan is None:
        raise UsageError(f"calibration: {type(model).__name__} was not converted")
    inputs = batches_of(batches)
    modes = [(module, module.training) for network in (model, original) for module in network.modules()]
    model.eval()
    original.eval()
    explained: dict[str, float] = {}
    try:
        for decision in _in_order(original, inputs[0], [d for d in plan.converted if d.call is None]):
            pairs = _Pairs(model, original, decision.name, inputs, _replaced_norm(original, decision))
            fitted = _fit(model, decision, pairs)
            if fitted is not None:
                explained[decision.name] = fitted
                on_layer(decision.name, fitted)
    finally:
        for module, training in modes:
            module.training = training
    return explained


def batches_of(batches: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Batches as tuples of arguments, or the error that says what is wrong with them."""
    inputs = [_arguments(batch) for batch in ([batches] if isinstance(batches, Tensor) else batches)]
    if not inputs:
        raise UsageError("calibration: got no batches, expected tensors of inputs; a few hundred images are enough")
    return inputs


def _arguments(batch: object) -> tuple[Any, ...]:
    if isinstance(batch, tuple):
        return batch
    if isinstance(batch, Tensor):
        return (batch,)
    raise UsageError(
        f"calibration: got a batch of type {type(batch).__name__}, expected a tensor or a tuple of the model's "
        f"arguments. From a loader of images and labels, pass the images: [images for images, _ in loader]."
    )


@dataclass(frozen=True)
class _Pairs:
    """What a converted layer receives, next to what the original layer returned; run anew at each iteration."""

    model: nn.Module
    original: nn.Module
    name: str
    inputs: list[tuple[Tensor, ...]]
    norm: Any = None
    """A BatchNorm that the converted layer replaces: what it made of the output is then the target."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.inputs:
            received = _capture(self.model, self.name, batch, lambda args, out: args[0])
            returned = _capture(self.original, self.name, batch, lambda args, out: out)
            yield from zip(received, map(self._normalized, returned), strict=True)

    def _normalized(self, output: Tensor) -> Tensor:
        if self.norm is None:
            return output
        norm = self.norm
        by_batch = norm.running_mean is None
        return F.batch_norm(output, norm.running_mean, norm.running_var, norm.weight, norm.bias, by_batch, eps=norm.eps)


def _in_order(original: nn.Module, batch: tuple[Any, ...], decisions: list[Decision]) -> list[Decision]:
    """The decisions in the order in which their layers run."""
    order: list[str] = []
    handles = [
        original.get_submodule(d.name).register_forward_hook(lambda *_, name=d.name: order.append(name))  # type: ignore[misc]
        for d in decisions
    ]
    try:
        original(*batch)
    finally:
        for handle in handles:
            handle.remove()
    return sorted(decisions, key=lambda d: order.index(d.name) if d.name in order else len(order))


def _replaced_norm(original: nn.Module, decision: Decision) -> Any:
    return original.get_submodule(decision.norm) if decision.drops_norm and decision.norm else None


def _capture(
    network: nn.Module, name: str, batch: tuple[Tensor, ...], part: Callable[[Any, Any], Tensor]
) -> list[Tensor]:
    """Input or output of each call of a layer during one pass."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        found.append(part(args, out).detach())

    handle = network.get_submodule(name).register_forward_hook(hook)
    try:
        network(*batch)
    finally:
        handle.remove()
    return found


def _fit(model: nn.Module, decision: Decision, pairs: _Pairs) -> float | None:
    """Solve one layer and set it; R², or None for a layer that these inputs never reach."""
    layer: Any = model.get_submodule(decision.name)
    sums: list[_Sums] | None = None
    for x, target in pairs:
        for patches, outputs in _patches(layer, x, target):
            sums = sums or [
                _Sums.zeros(p.shape[1], o.shape[1], p.device) for p, o in zip(patches, outputs, strict=True)
            ]
            for one, p, o in zip(sums, patches, outputs, strict=True):
                one.add(p, o)
    if sums is None:
        return None
    solved = [one.solve() for one in sums]
    direction = torch.cat([s.slope for s in solved])
    layer.weight.copy_(direction.view_as(layer.weight))
    if isinstance(layer, AngularHead):
        return float(torch.cat([s.explained for s in solved]).mean())
    beta, gamma, explained = _regress_on_g(layer, pairs)
    _set_scale(model, decision, layer, beta, gamma)
    return explained


@dataclass
class _Sums:
    """The normal equations of a ridge regression with an intercept, in float64."""

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def zeros(cls, features: int, outputs: int, device: torch.device) -> "_Sums":
        def zero(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(0, zero(features), zero(outputs), zero(features, features), zero(features, outputs), zero(outputs))

    def add(self, x: Tensor, y: Tensor) -> None:
        self.count += len(x)
        self.x += x.sum(0, dtype=torch.float64)
        self.y += y.sum(0, dtype=torch.float64)
        self.xx += (x.t() @ x).double()
        self.xy += (x.t() @ y).double()
        self.yy += y.square().sum(0, dtype=torch.float64)

    def solve(self) -> "_Solution":
        n = max(self.count, 1)
        covariance = self.xx / n - torch.outer(self.x, self.x) / n**2
        cross = self.xy / n - torch.outer(self.x, self.y) / n**2
        ridge = RIDGE * covariance.diagonal().mean().clamp_min(1e-12)
        covariance.diagonal().add_(ridge)
        slope = torch.linalg.solve(covariance, cross)
        variance = (self.yy / n - (self.y / n).square()).clamp_min(1e-30)
        intercept = self.y / n - (self.x / n) @ slope
        return _Solution(slope.t(), intercept, (slope * cross).sum(0) / variance)


@dataclass(frozen=True)
class _Solution:
    slope: Tensor
    intercept: Tensor
    explained: Tensor


def _patches(layer: Any, x: Tensor, target: Tensor) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Rows of unit patches and of outputs, one pair a group, a bounded number of inputs at a time."""
    if isinstance(layer, AngularHead):
        yield [x.flatten(0, -2).float()], [target.flatten(0, -2).float()]
        return
    if layer.weight.dim() == 2:
        rows = x.flatten(0, -2).float()
        yield [rows / (rows.square().sum(1, keepdim=True) + layer.eps).sqrt()], [target.flatten(0, -2).float()]
        return
    positions = math.prod(target.shape[2:]) * layer.weight[0].numel() * layer.groups * 4
    step = max(1, PATCH_BYTES // max(positions, 1))
    for start in range(0, len(x), step):
        patches = _unroll(layer, x[start : start + step].float())
        outputs = target[start : start + step].float().unflatten(1, (layer.groups, -1)).movedim(2, -1).flatten(2, -2)
        of_group = [patches[:, group].flatten(0, 1) for group in range(layer.groups)]
        unit = [r / (r.square().sum(1, keepdim=True) + layer.eps).sqrt() for r in of_group]
        yield unit, [outputs[:, group].flatten(0, 1) for group in range(layer.groups)]


def _unroll(layer: Any, x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, groups, positions, fan_in): every patch of a convolution of any dimension, as rows."""
    dim = layer.weight.dim() - 2
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    padding = layer.padding if not isinstance(layer.padding, str) else None
    sides = (
        layer._reversed_padding_repeated_twice if padding is None else [p for q in reversed(padding) for p in (q, q)]
    )
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, sides, mode=mode) if any(sides) else x
    for axis in range(dim):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        x = x.unfold(2 + axis, reach, stride[axis])[..., :: dilation[axis]]
    # (B, C, *positions, *kernel)
    x = x.unflatten(1, (layer.groups, -1)).flatten(3, 2 + dim)
    return x.movedim(2, 3).flatten(3)


def _regress_on_g(layer: AngularLayer, pairs: _Pairs) -> tuple[Tensor, Tensor, float]:
    """β and γ of each channel that bring β·g + γ closest to the original's output, and R² over all channels."""
    n = 0
    sums: list[Any] = [0.0] * 5
    for x, target in pairs:
        g, y = _g_rows(layer, x), _rows(layer, target)
        n += len(g)
        for i, value in enumerate((g, y, g * g, g * y, y * y)):
            sums[i] = sums[i] + value.sum(0, dtype=torch.float64)
    g, y, gg, gy, yy = (total / n for total in sums)
    spread, total = (gg - g * g).clamp_min(1e-12), (yy - y * y).clamp_min(0)
    beta = (gy - g * y) / spread
    explained = (beta * (gy - g * y)).sum() / total.sum().clamp_min(1e-30)
    return beta, y - beta * g, float(explained)


def _g_rows(layer: Any, x: Tensor) -> Tensor:
    """g(θ) of every patch, without β, γ and bias."""
    beta, gamma, bias = layer.beta, layer.gamma, layer.bias
    layer.beta = layer.gamma = layer.bias = None
    try:
        return _rows(layer, layer.forward(x))
    finally:
        layer.beta, layer.gamma, layer.bias = beta, gamma, bias


def _rows(layer: Any, output: Tensor) -> Tensor:
    if layer.weight.dim() == 2:
        return output.flatten(0, -2).float()
    return output.float().movedim(1, -1).flatten(0, -2)


def _set_scale(model: nn.Module, decision: Decision, layer: Any, beta: Tensor, gamma: Tensor) -> None:
    """Put β and γ where the layer has them, else into the normalization that follows, else into the filter's sign."""
    norm = _norm_after(model, decision)
    if layer.beta is not None:
        layer.beta.copy_(beta)
        shift = layer.bias if layer.bias is not None else layer.gamma
        shift.copy_(gamma)
        return
    # g is odd: a filter that points the other way turns the sign of β.
    sign = torch.where(beta < 0, -1.0, 1.0)
    layer.weight.mul_(sign.to(layer.weight.dtype).view(-1, *[1] * (layer.weight.dim() - 1)))
    scale = (beta * sign).clamp_min(1e-6)
    if norm is None:
        # No place for β: the output keeps its form up to one scale, which a LayerNorm removes again.
        if layer.bias is not None:
            layer.bias.copy_(gamma / scale.mean())
        return
    if layer.bias is not None:
        layer.bias.zero_()  # γ takes its place, inside the norm
    # The norm sees (T - γ)/β instead of T: its mean and deviation move along.
    wanted = (norm.running_var.double() + norm.eps) / scale.square()
    variance = (wanted - norm.eps).clamp_min(0)
    if norm.weight is not None:
        norm.weight.mul_(((variance + norm.eps) / wanted).sqrt().to(norm.weight.dtype))
    norm.running_mean.copy_((norm.running_mean.double() - gamma) / scale)
    norm.running_var.copy_(variance)


def _norm_after(model: nn.Module, decision: Decision) -> Any:
    if decision.norm is None or decision.drops_norm:
        return None
    try:
        norm = model.get_submodule(decision.norm)
    except AttributeError:
        return None
    tracks = isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
    return norm if tracks else None

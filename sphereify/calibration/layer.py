"""Sets one angular layer, and the normalization behind it, from its rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.calibration.layer_pairs import Site
from sphereify.calibration.regression import Fit, fit
from sphereify.calibration.rows import SHORTEST_FILTER, Batch, Geometry, cached, chunks, precise, rows_at
from sphereify.nn import LearnableSigmoidOperator


@dataclass(frozen=True)
class LayerFit:
    """How much of a layer's original output the angular layer explains on the calibration inputs.

    R² is the share of the variance over positions and filters, 1 for all of it, below 0 if worse than the mean. Where
    the output is added to a shortcut or passes a ReLU, it is of what comes out there: of the sum where a ReLU follows
    it, else of the layer's part in the sum. Where positions are few it is of positions that were held out.
    """

    name: str
    before: float
    """With copied weights, on the same inputs."""
    after: float
    rows: int
    """Positions that were looked at."""
    unknowns: int
    """Numbers in one filter."""
    note: str = ""


def set_layer(site: Site, batches: list[Batch]) -> LayerFit:
    layer, first = site.layer, batches[0]
    call, rows = first.call, first.rows
    weight = call.weight if call is not None else layer.weight
    bias = call.bias if call is not None else layer.bias
    free = not site.tied and (call is None or _is_parameter_of(weight, site.owner))
    geometry = Geometry.of(site, call)
    filters = precise(weight.flatten(1))
    operator = layer.operator
    whole = rows == slice(None)
    found = fit(
        cached(lambda: chunks(geometry, batches), batches, filters.shape[1] * geometry.groups),
        operator,
        filters,
        groups=geometry.groups,
        rectified=all(batch.rectified for batch in batches),
        solve_filters=free,
        start=_start(site, bias, rows),
        tune_k=whole and not site.shares_k and isinstance(operator, LearnableSigmoidOperator),
    )
    if not (found.filters.isfinite().all() and found.beta.isfinite().all() and found.gamma.isfinite().all()):
        return LayerFit(site.name, found.before, found.before, found.rows, found.unknowns, "no finite solution: copied")
    if free:
        lengths = filters.norm(dim=1, keepdim=True).clamp_min(SHORTEST_FILTER)
        weight.copy_((found.filters * lengths).reshape(weight.shape))
    _set_scale(site, found, bias, rows, batches)
    after = found.after
    if layer.beta is None and site.norm is None:  # β had no place
        after = found.explained(found.filters, *_start(site, bias, rows))  # type: ignore[misc]
    dead = _constant(batches)
    notes = [
        "" if free else "filters kept: something else uses them",
        "the normalization behind it serves other layers too and is kept" if site.shares_norm else "",
        f"{found.rows:,} positions for {found.unknowns:,} unknowns: held near the copied filters"
        if found.rows < 4 * found.unknowns and free else "",
        f"{dead} of {len(found.beta)} channels are constant" if dead else "",
    ]  # fmt: skip
    return LayerFit(site.name, found.before, after, found.rows, found.unknowns, "; ".join(filter(None, notes)))


def _constant(batches: list[Batch]) -> int:
    """How many filters of the original give one value everywhere."""
    raw = torch.cat([batch.raw for batch in batches])
    return int((raw.amax(0) - raw.amin(0) <= 1e-6 * raw.abs().amax(0)).sum())


def _is_parameter_of(tensor: Tensor, owner: nn.Module) -> bool:
    """Whether writing to this tensor writes to a parameter."""
    storage = tensor.untyped_storage().data_ptr()
    return any(p.untyped_storage().data_ptr() == storage for p in owner.parameters())


def _start(site: Site, bias: Tensor | None, rows: slice) -> tuple[Tensor, Tensor] | None:
    """β and γ of the layer as it is, up to where its output is compared; None where a norm hides them."""
    layer, norm = site.layer, site.new_norm
    ones = torch.ones(site.decision.shape[0], device=next(site.owner.parameters()).device)[rows]
    shift = bias if bias is not None else layer.gamma[rows] if layer.gamma is not None else torch.zeros_like(ones)
    beta = layer.beta[rows] if layer.beta is not None else ones
    if shift.dim() > 1:
        return None
    if layer.beta is None and site.norm is not None:
        if not keeps_statistics(norm):
            return None
        beta, shift = scale_of(norm).flatten() * beta, scale_of(norm).flatten() * shift + shift_of(norm).flatten()
    return precise(beta), precise(shift)


def _set_scale(site: Site, found: Fit, bias: Tensor | None, rows: slice, batches: list[Batch]) -> None:
    """Put β and γ where the layer has them, else into the normalization that follows."""
    layer, norm = site.layer, site.new_norm
    beta, gamma = found.beta, found.gamma
    own = bias if bias is not None else layer.gamma[rows] if layer.gamma is not None else None
    place = own if own is not None and own.dim() == 1 and _is_parameter_of(own, site.owner) else None
    if layer.beta is not None:
        layer.beta[rows].copy_(beta)
        if place is not None:
            place.copy_(gamma)
        return
    if site.norm is None:
        # No place for β: the output keeps its form up to one scale.
        if place is not None:
            place.copy_(gamma / beta.abs().mean().clamp_min(1e-6))
        return
    if place is not None:
        place.zero_()  # γ takes its place, inside the norm
    if keeps_statistics(norm):
        _set_norm(norm, beta, gamma, found.mean, found.variance)
    elif getattr(norm, "weight", None) is not None and norm.weight.numel() == len(beta):
        _refit_norm(site, norm, batches)


def keeps_statistics(norm: Any) -> bool:
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None


def _set_norm(norm: Any, beta: Tensor, gamma: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Let a BatchNorm make β·g + γ of g, with the statistics that g has, so that training finds what it expects."""
    if norm.weight is None:
        # Its only freedom are the statistics: these, then, are absorbed.
        safe = beta.double().clamp_min(1e-6)
        norm.running_mean.copy_(-gamma.double() / safe)
        norm.running_var.copy_((1 / safe.square() - norm.eps).clamp_min(0))
        return
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_(beta.double() * (norm.running_var.double() + norm.eps).sqrt())
    norm.bias.copy_(gamma.double() + beta.double() * norm.running_mean.double())


def _refit_norm(site: Site, norm: Any, batches: list[Batch]) -> None:
    """The affine part of a normalization over channels or tokens: the regression of what it gave in the original."""
    if any(batch.normalized is None or batch.call is not None for batch in batches):
        return
    n, sums = 0, torch.zeros(4, norm.weight.numel(), dtype=torch.float64, device=norm.weight.device)
    for batch in batches:
        y = rows_at(site, norm.forward(site.layer.forward(batch.x)), batch.drawn).double()
        target = batch.normalized.double()  # type: ignore[union-attr]
        n += len(y)
        sums += torch.stack([value.sum(0) for value in (y, target, y * y, y * target)])
    y, target, square, product = sums / max(n, 1)
    variance = square - y * y
    slope = torch.where(variance > 1e-12, (product - y * target) / variance.clamp_min(1e-12), 1.0)
    norm.weight.mul_(slope.view_as(norm.weight))
    if norm.bias is not None:
        norm.bias.copy_((norm.bias.flatten().double() * slope + target - slope * y).view_as(norm.bias))


def scale_of(norm: Any) -> Tensor:
    """What a BatchNorm in evaluation multiplies with, for each channel."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    return _like(scale if norm.weight is None else scale * norm.weight.double(), norm)


def shift_of(norm: Any) -> Tensor:
    shift = -norm.running_mean.double() * scale_of(norm).double()
    return _like(shift if norm.bias is None else shift + norm.bias.double(), norm)


def _like(values: Tensor, norm: Any) -> Tensor:
    return values if norm.running_var.dtype is torch.float64 else values.float()

"""Calibration of one angular layer, and of the normalization behind it, from its rows."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.calibration.layer_pairs import LayerPair
from sphereify.calibration.norms import refit_affine, scale_of, set_batch_norm, shift_of
from sphereify.calibration.patches import Geometry
from sphereify.calibration.regression import Fit, fit
from sphereify.calibration.results import LayerFit
from sphereify.calibration.rows import Batch, cached, chunks
from sphereify.convert.sites import has_statistics
from sphereify.nn import LearnableSigmoidOperator
from sphereify.nn.decoupled import filter_norms
from sphereify.nn.precision import accumulated

SHORTEST_FILTER = 0.3
"""Least length of a solved filter, which else has the length of the copied one: shorter filters would feel ε."""


def set_layer(pair: LayerPair, batches: list[Batch]) -> LayerFit:
    """Set filters, β, γ, k and the normalization of a layer to the least-squares fit of its targets."""
    layer, call, part = pair.layer, batches[0].call, batches[0].filters
    weight = call.weight if call is not None else layer.weight
    bias = call.bias if call is not None else layer.bias
    solvable = not pair.tied and (call is None or _is_part_of_parameter(weight, pair.owner))
    geometry = Geometry.of(pair, call)
    if layer.magnitude.mean == "data":
        layer.mean_norm.copy_(torch.stack([geometry.mean_norm(batch.x) for batch in batches]).mean())
    copied = accumulated(weight.flatten(1))
    operator = layer.operator
    whole = part == slice(None)
    solution = fit(
        cached(lambda: chunks(geometry, batches), batches, copied.shape[1] * geometry.groups),
        operator,
        copied,
        groups=geometry.groups,
        rectified=all(batch.rectified for batch in batches),
        solve_filters=solvable,
        start=_current_scale(pair, weight, bias, part),
        tune_k=whole and not pair.shares_k and isinstance(operator, LearnableSigmoidOperator),
    )
    before, after, rows, unknowns = solution.before, solution.after, solution.rows, solution.unknowns
    if not (solution.filters.isfinite().all() and solution.beta.isfinite().all() and solution.gamma.isfinite().all()):
        return LayerFit(pair.name, before, before, rows, unknowns, "no finite solution: copied")
    if solvable:
        lengths = copied.norm(dim=1).clamp_min(SHORTEST_FILTER)
        if layer.magnitude.weighted and layer.beta is None and pair.norm is None:  # the filters hold β
            lengths = torch.where(solution.beta > 0, solution.beta, lengths)
        weight.copy_((solution.filters * lengths.unsqueeze(1)).reshape(weight.shape))
    if layer.magnitude.weighted:
        solution = _without_lengths(solution, filter_norms(weight, layer.eps))
    _set_scale(pair, solution, bias, part, batches)
    if layer.beta is None and pair.norm is None:  # nothing in the layer could hold β
        scale: Any = _current_scale(pair, weight, bias, part)
        after = solution.explained(solution.filters, *scale)
    constant = _constant_channels(batches)
    notes = [
        "" if solvable else "filters kept: something else uses them",
        "the normalization behind it serves other layers too and is kept" if pair.shares_norm else "",
        f"{rows:,} positions for {unknowns:,} unknowns: held near the copied filters"
        if rows < 4 * unknowns and solvable
        else "",
        f"{constant} of {len(solution.beta)} channels are constant" if constant else "",
    ]
    return LayerFit(pair.name, before, after, rows, unknowns, "; ".join(filter(None, notes)))


def _is_part_of_parameter(tensor: Tensor, owner: nn.Module) -> bool:
    """True if writing to this tensor writes to a parameter of `owner`."""
    storage = tensor.untyped_storage().data_ptr()
    return any(p.untyped_storage().data_ptr() == storage for p in owner.parameters())


def _without_lengths(solution: Fit, lengths: Tensor) -> Fit:
    """The same solution for a layer that multiplies by the lengths of its filters itself."""
    return replace(
        solution,
        beta=solution.beta / lengths,
        mean=solution.mean * lengths,
        variance=solution.variance * lengths.square(),
    )


def _current_scale(pair: LayerPair, weight: Tensor, bias: Tensor | None, part: slice) -> tuple[Tensor, Tensor] | None:
    """The factor of h·g and γ of the layer as it is, up to the point where its output is compared; None where a norm
    hides them."""
    layer, norm = pair.layer, pair.new_norm
    ones = torch.ones(pair.decision.shape[0], device=next(pair.owner.parameters()).device)[part]
    gamma = bias if bias is not None else layer.gamma[part] if layer.gamma is not None else torch.zeros_like(ones)
    beta = layer.beta[part] if layer.beta is not None else ones
    beta = beta * filter_norms(weight, layer.eps) if layer.magnitude.weighted else beta
    if gamma.dim() > 1:
        return None
    if layer.beta is None and pair.norm is not None:
        if not has_statistics(norm):
            return None
        beta, gamma = scale_of(norm).flatten() * beta, scale_of(norm).flatten() * gamma + shift_of(norm).flatten()
    return accumulated(beta), accumulated(gamma)


def _set_scale(pair: LayerPair, solution: Fit, bias: Tensor | None, part: slice, batches: list[Batch]) -> None:
    """Put β and γ where the layer has them, else into the normalization that follows.

    A filter of zeros keeps the β that it started with: with one of 0 it would never be trained.
    """
    layer, norm = pair.layer, pair.new_norm
    beta, gamma = solution.beta, solution.gamma
    has_direction = solution.filters.any(1)
    shift = bias if bias is not None else layer.gamma[part] if layer.gamma is not None else None
    if shift is not None and not (shift.dim() == 1 and _is_part_of_parameter(shift, pair.owner)):
        shift = None
    if layer.beta is not None:
        layer.beta[part].copy_(torch.where(has_direction, beta, layer.beta[part]))
        if shift is not None:
            shift.copy_(gamma)
        return
    if pair.norm is None:
        # Nothing holds β: the output keeps its form up to one scale.
        if shift is not None:
            shift.copy_(gamma / beta.abs().mean().clamp_min(1e-6))
        return
    if shift is not None:
        shift.zero_()  # the norm holds γ
    if has_statistics(norm):
        beta = torch.where(has_direction, beta, scale_of(norm).flatten())
        variance = torch.where(has_direction, solution.variance, norm.running_var)
        set_batch_norm(norm, beta, gamma, solution.mean, variance)
    elif getattr(norm, "weight", None) is not None and norm.weight.numel() == len(beta):
        refit_affine(pair, norm, batches)


def _constant_channels(batches: list[Batch]) -> int:
    """The number of the original's filters that give one value everywhere."""
    raw = torch.cat([batch.raw for batch in batches])
    return int((raw.amax(0) - raw.amin(0) <= 1e-6 * raw.abs().amax(0)).sum())

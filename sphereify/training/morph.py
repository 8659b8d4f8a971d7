"""The way from the original network to its conversion, over a share of the training.

At the start each converted layer computes what the original's did, and at the end of the way its own function; between
them the exponents of the lengths ‖w‖ and ‖x‖ fall from 1 to what the magnitude says, g(θ) grows out of cos θ, and a
pooled radius out of 0 (`sphereify.nn.decoupled`). Every step of an optimizer moves all layers by the same small amount.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.annotations import PLAN
from sphereify.convert.model_inputs import evaluating
from sphereify.convert.names import submodule
from sphereify.convert.sites import has_statistics
from sphereify.convert.start import Filters, start_beta
from sphereify.errors import no_effect, option, refused
from sphereify.nn import AngularHead
from sphereify.nn.decoupled import ALL, Decoupled, filter_norms, patch_norms
from sphereify.nn.functional_calls import AngularCall
from sphereify.nn.geometry import resolve

USUAL_NORM = "usual_norm"
"""Attribute of a layer on its way: the mean norm of the patches that it received from the original."""
LENGTH_IMAGES = 256
"""Number of training images by which β is chosen for the end of the way."""


class Morph:
    """The place of all layers of some networks on the way.

    Args:
        networks: converted networks, such as a model and the moving average of its weights.
        steps: length of the way in optimizer steps; 0: they have arrived.

    Attributes:
        share: the share of the way that is done, in [0, 1].
    """

    def __init__(self, networks: Iterable[nn.Module], steps: float):
        networks = list(networks)
        self._layers = [layer for network in networks for layer in _layers(network)]
        self._normalized = [pair for network in networks for pair in _normalized(network)] if steps else []
        self._steps = steps
        self.share = 1.0

    def at(self, step: int) -> None:
        """Go to the place that belongs to a number of optimizer steps."""
        self.share = self._share(step)
        for layer in self._layers:
            if self.share < 1:
                layer.morph = self.share
            else:  # it is what any other layer of its class is
                vars(layer).pop("morph", None)
                vars(layer).pop(USUAL_NORM, None)

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """The same from the place before. Running statistics behind a layer follow its scale, which they know late."""
        now, then = self.share, self._share(step)
        for layer, norm in self._normalized if now < then else ():
            factor = (_log_scale(layer, then) - _log_scale(layer, now)).exp().to(norm.running_var.dtype)
            shift = 0.0 if layer.bias is None else layer.bias.to(norm.running_mean.dtype)
            norm.running_mean.sub_(shift).mul_(factor).add_(shift)
            norm.running_var.mul_(factor.square())
        self.at(step)

    def _share(self, step: int) -> float:
        return min(1.0, step / self._steps) if self._steps else 1.0


def _normalized(network: nn.Module) -> Iterator[tuple[Any, Any]]:
    """The layers of which the lengths of patches are known, with the BatchNorm that normalizes each of them alone."""
    plan = PLAN.of(network)
    for decision in plan.converted if plan is not None else ():
        layer, norm = submodule(network, decision.name), submodule(network, decision.norm)
        if decision.call is None and decision.owns_norm and has_statistics(norm) and hasattr(layer, USUAL_NORM):
            yield layer, norm


def _log_scale(layer: Any, t: float) -> Tensor:
    """log of the factor of each filter from cos θ to the layer's output, for patches of the usual length."""
    norm, length = getattr(layer, USUAL_NORM), filter_norms(layer.weight, layer.eps)
    filters = Filters(tuple(layer.weight.shape), layer.weight, None, layer.operator, magnitude=layer.magnitude)
    end: Any = filters.gains(norm) if not layer.magnitude.weighted else filters.gains(norm) / filters.lengths() * length
    pool = 1 + (t * getattr(layer, "radius_value", 0.0)) ** 2
    return (1 - t) * (length * norm).log() + t * torch.as_tensor(end, device=length.device).log() - 0.5 * math.log(pool)


def check_morph(model: nn.Module) -> None:
    """Make sure that a network can move from its original to what it is.

    Raises:
        NoEffectError: nothing in it is angular.
        UsageError: a head with a margin, which has no form in between, or a normalization that the conversion dropped.
    """
    layers = _layers(model)
    if not layers:
        raise no_effect("morph", since=f"nothing in {type(model).__name__} is angular")
    head = next((layer for layer in layers if isinstance(layer, AngularHead) and layer.has_margin), None)
    if head is not None:
        raise refused(
            "morph",
            f"the head is {head.kind}, whose margin the original does not have. Take {option('head', 'w-softmax')}, or "
            f"leave {option('morph')} out",
        )
    plan = PLAN.of(model)
    dropped = next((decision for decision in (plan.converted if plan else []) if decision.drops_norm), None)
    if dropped is not None:
        raise refused(
            "morph",
            f"the original normalizes by {dropped.norm}, which {option('norm', 'replace')} drops; convert with "
            f"{option('norm', 'keep')}",
        )


@torch.no_grad()
def start_as_original(model: nn.Module, original: nn.Module, batches: Iterable[Tensor]) -> None:
    """Let a converted network compute what the original does, in place, as the start of a training with `morph`.

    BatchNorms get the original's statistics back. β of a layer, which has no effect yet, becomes the factor with which
    the layer's own function is as large as the original's on some inputs.

    Args:
        model: from a conversion of `original`, with copied weights.
        original: the network before the conversion.
        batches: inputs of the model.

    Raises:
        NoEffectError, UsageError: as `check_morph`.
    """
    check_morph(model)
    plan = PLAN.required(model)
    for name in {decision.norm for decision in plan.converted}:
        norm, before = submodule(model, name), submodule(original, name)
        if norm is not None and before is not None:
            norm.load_state_dict(before.state_dict())
    Morph([model], 1).at(0)
    with evaluating(model), _lengths_seen(model) as seen:
        for batch in batches:
            model(batch)
    for (layer, first, last), (weight, norms) in seen.items():
        length = float(torch.stack(norms).mean())
        setattr(layer, USUAL_NORM, length)
        if layer.beta is not None:
            filters = Filters(
                tuple(weight.shape),
                weight,
                None,
                layer.operator,
                radius=getattr(layer, "radius_value", 0.0),
                magnitude=layer.magnitude,
                eps=layer.eps,
            )
            start_beta(layer.beta[first:last], filters, patches=length)


def _layers(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, (Decoupled, AngularHead))]


@contextmanager
def _lengths_seen(model: nn.Module) -> Iterator[dict[Any, tuple[Tensor, list[Tensor]]]]:
    """The filters that layers use within the block, and the mean norms of their patches, by layer and range."""
    seen: dict[Any, tuple[Tensor, list[Tensor]]] = {}

    def look(layer: Any, arguments: Any) -> None:
        rows = ALL
        if isinstance(layer, AngularCall):
            x, weight, geometry = arguments[0].x, arguments[0].weight, arguments[0].geometry
            rows = arguments[1] if len(arguments) > 1 else rows
        else:
            x, weight, geometry = arguments[0], layer.weight, ()
            if hasattr(layer, "_padded"):
                x, padding = layer._padded(x)
                geometry = (layer.stride, padding, layer.dilation, layer.groups)
        if geometry:
            x, geometry = resolve(x, weight.shape[2:], *geometry)
        _, norms = seen.setdefault((layer, rows.start, rows.stop), (weight, []))
        norms.append(patch_norms(x, weight, geometry, layer.eps).mean())

    handles = [layer.register_forward_pre_hook(look) for layer in _layers(model) if isinstance(layer, Decoupled)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()

"""The converted layers of a network, each next to the original layer that it is fitted to."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.annotations import PLAN
from sphereify.convert.copies import copy_of
from sphereify.convert.names import relative_parameter, submodule
from sphereify.convert.plan import ConversionPlan, Decision
from sphereify.convert.rewrite import apply_plan
from sphereify.convert.sites import number_of_channels
from sphereify.nn.functional_calls import CALLS, AngularCall, Arguments, call_key


@dataclass
class LayerPair:
    """A converted layer and the original layer.

    Attributes:
        decision: the decision of the plan that made the converted layer.
        layer: an `AngularLayer`, `AngularHead` or `AngularCall` of the converted network.
        original: its counterpart in the original.
        owner: the module of the converted network whose parameters the weight and the bias are.
        norm: the normalization that follows in the original and serves this layer alone, or None.
        new_norm: what stands in its place in the converted network.
        shares_norm: True if the normalization that follows serves other layers too, so that it stays as it is.
        tied: True if something else uses the filters as well.
    """

    decision: Decision
    layer: Any
    original: nn.Module
    owner: nn.Module
    norm: Any
    new_norm: Any
    shares_norm: bool
    tied: bool

    @property
    def name(self) -> str:
        return self.decision.name

    def leave_norm(self) -> None:
        """Treat the normalization as one of the rest of the network: a pass has shown that it is not the layer's."""
        self.norm = self.new_norm = None

    @property
    def shares_k(self) -> bool:
        """True if its learnable k is that of the whole network, which one layer alone may not choose."""
        return (self.decision.share_k or "").startswith("network")


def layer_pairs(model: nn.Module, reference: nn.Module, plan: ConversionPlan) -> dict[str, LayerPair]:
    """The converted layers of `model` with their counterparts in `reference` (see `reference_of`), by name."""
    readers = Counter(decision.norm for decision in plan.converted)
    pairs = {}
    for decision in plan.converted:
        path = path_of(decision)
        norm = submodule(reference, decision.norm) if readers[decision.norm] == 1 else None
        norm = norm if number_of_channels(norm) == decision.shape[0] else None  # its channels are no filters of a layer
        pairs[decision.name] = LayerPair(
            decision,
            layer=model.get_submodule(path),
            original=reference.get_submodule(path),
            owner=model.get_submodule(decision.call.owner if decision.call is not None else decision.name),
            norm=norm,
            new_norm=submodule(model, decision.norm) if norm is not None else None,
            shares_norm=decision.norm is not None and readers[decision.norm] > 1,
            tied=_is_tied(model, decision),
        )
    return pairs


class _PlainCall(AngularCall):
    """The answer of torch to a functional call, given by a module whose input and output can be observed."""

    def forward(self, call: Arguments, rows: slice = slice(None)) -> Tensor:
        if self.kind == "linear":
            y = F.linear(call.x, call.weight)
            return y if call.bias is None else y + call.bias
        convolve = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}[self.kind]
        return convolve(call.x, call.weight, call.bias, *call.geometry)  # type: ignore[operator, no-any-return]


def reference_of(original: nn.Module, plan: ConversionPlan) -> nn.Module:
    """A network that computes what the original does, with a module for each converted layer.

    It is the original itself, unless that makes functional calls: then a copy in which modules answer them.
    """
    calls = {d.name for d in plan.converted if d.call is not None}
    if not calls:
        return original
    decisions = [
        d if d.action == "keep" or d.name in calls else replace(d, action="keep", head=None) for d in plan.decisions
    ]
    copied = copy_of(original)
    PLAN.remove(copied)
    copied = apply_plan(copied, replace(plan, decisions=decisions), inplace=True)
    for module in copied.modules():
        if type(module) is AngularCall:
            module.__class__ = _PlainCall
    return copied


def path_of(decision: Decision) -> str:
    """The qualified name of the module that stands for a converted layer, also in the result of `reference_of`."""
    if decision.call is None:
        return decision.name
    owner = decision.call.owner
    key = call_key(relative_parameter(owner, decision.call.parameter))
    return f"{owner}.{CALLS}.{key}" if owner else f"{CALLS}.{key}"


def _is_tied(model: nn.Module, decision: Decision) -> bool:
    """True if a module outside the layer holds the same weight, or if the weight is no parameter."""
    if decision.call is not None and decision.call.parameter is None:
        return True
    name = f"{decision.name}.weight" if decision.call is None else decision.call.parameter
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weight = parameters.get(str(name).removeprefix("."))
    if weight is None:
        return True
    holders = {id(module) for module in model.modules() if any(held is weight for held in module._parameters.values())}
    return len(holders) > 1

"""The converted layers of a network, next to the original ones."""

from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.convert.copies import copy_of
from sphereify.convert.names import relative_parameter
from sphereify.convert.plan import ConversionPlan, Decision
from sphereify.convert.rewrite import PLAN_ATTRIBUTE, apply_plan
from sphereify.nn.functional_calls import CALLS, AngularCall, call_key


@dataclass
class Site:
    """A converted layer in both networks."""

    decision: Decision
    layer: Any
    """AngularLayer, AngularHead or AngularCall."""
    original: nn.Module
    norm: Any
    """The normalization that follows, in the original."""
    new_norm: Any
    """Its place in the converted network."""
    shares_norm: bool
    """Whether the normalization that follows serves other layers too, so that it stays as it is."""
    tied: bool
    """Whether something else uses the filters as well."""
    owner: nn.Module
    """Whose parameters weight and bias are."""

    @property
    def name(self) -> str:
        return self.decision.name

    @property
    def shares_k(self) -> bool:
        """Whether its learnable k is that of the whole network, which one layer alone may not choose."""
        return (self.decision.share_k or "").startswith("network")


class _PlainCall(AngularCall):
    """Answers a functional call as torch does: a place to see what the original computes."""

    def forward(self, function: Any, call: Any, rows: slice = slice(None)) -> Tensor:
        x, weight, bias, geometry, _ = call
        if self.kind == "linear":
            y = F.linear(x, weight)
            return y if bias is None else y + bias
        convolve = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}[self.kind]
        return convolve(x, weight, bias, *geometry)  # type: ignore[operator, no-any-return]


def reference_of(original: nn.Module, plan: ConversionPlan) -> nn.Module:
    """The original, or where it makes functional calls a copy of it that shows them."""
    calls = {d.name for d in plan.converted if d.call is not None}
    if not calls:
        return original
    decisions = [
        d if d.action == "keep" or d.name in calls else replace(d, action="keep", head=None) for d in plan.decisions
    ]
    copied = copy_of(original)
    if hasattr(copied, PLAN_ATTRIBUTE):
        delattr(copied, PLAN_ATTRIBUTE)
    copied = apply_plan(copied, replace(plan, decisions=decisions), inplace=True)
    for module in copied.modules():
        if type(module) is AngularCall:
            module.__class__ = _PlainCall
    return copied


def path_of(decision: Decision) -> str:
    """Where the module of a site is in a converted network."""
    if decision.call is None:
        return decision.name
    owner = decision.call.owner
    key = call_key(relative_parameter(owner, decision.call.parameter))
    return f"{owner}.{CALLS}.{key}" if owner else f"{CALLS}.{key}"


def is_tied(model: nn.Module, decision: Decision) -> bool:
    """Whether a module outside the site holds the same weight."""
    if decision.call is not None and decision.call.parameter is None:
        return True
    name = f"{decision.name}.weight" if decision.call is None else decision.call.parameter
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weight = parameters.get(str(name).removeprefix("."))
    if weight is None:
        return True
    holders = set()
    for module in model.modules():
        if any(parameter is weight for parameter in module._parameters.values()):
            holders.add(id(module))
    return len(holders) > 1

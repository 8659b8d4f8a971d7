"""How an angular network is regularized."""

from typing import Any

from torch import nn

from sphereify.errors import UsageError
from sphereify.nn.calls import AngularCall, angular_weights
from sphereify.nn.heads import AngularHead
from sphereify.nn.layers import AngularLayer


def param_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """The parameters of `model` in two groups for any torch optimizer: with weight decay, and without.

    Without: filters of angular layers and class weights of angular heads (their length has no meaning, so decay only
    changes the step size), k, β, γ, and every parameter of fewer than two dimensions (biases, norms). Parameters that
    do not require a gradient are left out; a shared one is listed once.

    Raises:
        UsageError: weight_decay < 0.
    """
    if not weight_decay >= 0:
        raise UsageError(f"weight_decay: got {weight_decay!r}, expected a number ≥ 0")
    scale_free = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (AngularLayer, AngularHead, AngularCall))
        for parameter in module.parameters()
    } | {id(parameter) for module in model.modules() for parameter in angular_weights(module)}
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() >= 2 and id(p) not in scale_free]
    kept = {id(p) for p in decayed}
    plain = [p for p in trained if id(p) not in kept]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]

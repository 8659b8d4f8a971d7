"""Layers that do not train: those the user names, and at first those that a conversion did not bring."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from sphereify.nn import AngularHead
from sphereify.nn.functional_calls import AngularCall
from sphereify.nn.layers import AngularLayer
from sphereify.patterns import PatternList, Patterns


@contextmanager
def frozen(model: nn.Module, freeze: PatternList) -> Iterator[list[nn.Module]]:
    """Freeze layers within the block; afterwards each parameter requires a gradient or not, as it did before.

    Args:
        freeze: patterns over the layers' names; see `frozen_layers`, whose result is what the block receives.

    Raises:
        UsageError: as `frozen_layers`.
    """
    layers = frozen_layers(model, freeze)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for layer in layers:
            layer.requires_grad_(False)
        yield layers
    finally:
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


def frozen_layers(model: nn.Module, freeze: PatternList) -> list[nn.Module]:
    """The layers whose name matches; all that is inside one of them is frozen with it.

    Raises:
        UsageError: a pattern that matches no layer.
    """
    patterns = Patterns("freeze", freeze)
    layers = {name: module for name, module in model.named_modules() if name}
    patterns.check(layers, "layer")
    return [module for name, module in layers.items() if patterns.match([name]) is not None]


def new_parameters(model: nn.Module) -> set[int]:
    """Identities of the parameters that a conversion brings: k, ρ, β, γ, and all of the head."""
    new: set[int] = set()
    for module in model.modules():
        if isinstance(module, (AngularHead, AngularCall)):
            new |= {id(p) for p in module.parameters()}
        elif isinstance(module, AngularLayer):
            new |= {id(p) for n, p in module.named_parameters() if n not in ("weight", "bias")}
    return new

"""Models that cannot be converted, or not in their present state, whatever the options."""

import re
from typing import Any

import torch
from torch import nn

from sphereify.convert.sites import attribute_of, is_site
from sphereify.errors import UnsupportedModelError
from sphereify.nn.layers import is_folded_layer
from sphereify.nn.modules import check_module
from sphereify.nn.quantized import is_quantized

WRAPPERS = {
    "DistributedDataParallel": "torch.nn.parallel",
    "DataParallel": "torch.nn.parallel",
    "FullyShardedDataParallel": "torch.distributed.fsdp",
    "OptimizedModule": "torch.compile",
}
"""Classes that wrap a model, by name, and where they come from."""


def check_model(model: nn.Module) -> None:
    """Make sure that a model is a plain one.

    Raises:
        ArgumentTypeError: not an `nn.Module`.
        UnsupportedModelError: it is, or holds, a module that is wrapped, compiled, folded or not yet initialised; or it
            is compiled by torch.jit as a whole.
    """
    check_module(model)
    for name, module in model.named_modules():
        place = name or "the model"
        wrapper = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in WRAPPERS), None)
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if wrapper or compiled:
            what = f"{wrapper} ({WRAPPERS[wrapper]})" if wrapper else "compiled in place by .compile()"
            raise UnsupportedModelError(
                f"{place} is {what}: convert the plain model first, then wrap or compile the result"
            )
        if is_folded_layer(module):
            raise UnsupportedModelError(f"{place} is folded for inference: take the model that it was folded from")
        if isinstance(module, torch.jit.ScriptModule):
            if not name:  # the layers of a part are kept
                raise UnsupportedModelError(
                    f"{place} is compiled by torch.jit: convert the Python model that it was made from"
                )
            continue
        has_uninitialized = getattr(module, "has_uninitialized_params", None)
        if has_uninitialized is not None and has_uninitialized():
            raise UnsupportedModelError(
                f"{place} ({type(module).__name__}) is lazy and has no weights yet: run one forward pass with an "
                f"example input, then convert"
            )


def quantized_layers(model: nn.Module) -> list[str]:
    """Names of the outermost quantized convolutions and linear maps, whose weights cannot be trained."""
    names: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer + ".") for outer in names):
            continue
        cls = type(module)
        of_torch = cls.__module__.startswith(("torch.ao.nn.", "torch.nn.quantized"))
        weight = _weight(module) if is_site(module) else torch.empty(0)
        integer = not (weight.is_floating_point() or weight.is_complex())
        if integer or is_quantized(weight) or (of_torch and re.search("Conv|Linear", cls.__name__)):
            names.append(name)
    return names


def _weight(module: nn.Module) -> torch.Tensor:
    weight: Any = attribute_of(module, "weight")  # quantized modules have a method of that name
    weight = torch.empty(0) if weight is None else weight
    return weight() if callable(weight) and not isinstance(weight, torch.Tensor) else weight

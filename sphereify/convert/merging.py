"""Methods of a model that merge its layers with one another, as for deployment, and that angular layers rule out.

A BatchNorm, a parallel branch or a LoRA adapter can become part of a linear layer's weight, since the layer is linear
in it. An angular layer is not: the lengths of its filters have no effect. Such a method would run after the conversion
without an error and give a model that computes something else.
"""

import functools
import inspect
from collections.abc import Iterator
from typing import NoReturn

from torch import nn

from sphereify.convert.names import is_within, join
from sphereify.errors import UnsupportedModelError
from sphereify.wording import count

NAMES = (
    "convert_to_deploy",
    "fuse",
    "fuse_bn",
    "fuse_conv_bn",
    "fuse_convs",
    "fuse_lora",
    "fuse_model",
    "fuse_projections",
    "fuse_qkv_projections",
    "fuse_repvgg_block",
    "merge",
    "merge_adapter",
    "merge_and_unload",
    "merge_bn",
    "merge_dilated_branches",
    "merge_kernel",
    "reparam",
    "reparameterize",
    "switch_to_deploy",
)
"""The names under which libraries have such methods; they are called without arguments."""


def merging_methods(module: nn.Module) -> list[str]:
    """The names of the methods of a module's class that merge its layers."""
    return [name for name in NAMES if _takes_nothing(getattr(type(module), name, None))]


def merging_note(model: nn.Module, converted: set[str]) -> str | None:
    """A remark on the methods of a model that would merge converted layers; None if it has none.

    Args:
        converted: qualified names of the modules that become angular or make angular calls.
    """
    methods = [(name, method) for name, _, method in _methods(model, converted)]
    if not methods:
        return None
    first, *others = (join(name, method) for name, method in methods)
    more = f" and {count(len(others), 'method')} like it" if others else ""
    return (
        f"{type(model).__name__}: {first}(){more} would merge converted layers with others, which changes what they "
        f"compute, and will be refused. To merge, do it first, then convert"
    )


def refuse_merging(model: nn.Module, converted: set[str]) -> None:
    """Let those methods raise an `UnsupportedModelError`, in place."""
    for name, module, method in list(_methods(model, converted)):
        setattr(module, method, functools.partial(_refuse, join(name, method)))


def _methods(model: nn.Module, converted: set[str]) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, method) for each method that merges layers of a module with converted ones."""
    for name, module in model.named_modules():
        methods = merging_methods(module)
        if methods and any(other == name or is_within(other, name) for other in converted):
            yield from ((name, module, method) for method in methods)


def _takes_nothing(method: object) -> bool:
    """True for a method that can be called without arguments: `fuse(x, y)` adds up features."""
    if not inspect.isfunction(method):
        return False
    others = list(inspect.signature(method).parameters.values())[1:]
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in others)


def _refuse(method: str, *args: object, **kwargs: object) -> NoReturn:
    raise UnsupportedModelError(
        f"{method}(): merges layers with one another, some of which are angular, where the length of a filter has no "
        f"effect: the result would compute something else. Merge the original, then convert it; sphereify.fold "
        f"prepares a converted model for inference"
    )

"""Qualified names of modules and parameters, such as `layer1.0.conv2.weight`; "" is the model itself."""

from torch import nn


def join(prefix: str, name: str) -> str:
    """The qualified name of `name` inside the module `prefix`."""
    return f"{prefix}.{name}" if prefix else name


def is_within(name: str, outer: str) -> bool:
    """True if `name` lies inside the module `outer`; everything lies inside the model."""
    return not outer or name.startswith(outer + ".")


def relative_parameter(owner: str, parameter: str | None) -> str | None:
    """The name of a parameter as the module `owner` sees it; None stays None."""
    return parameter.removeprefix(owner + ".") if parameter is not None and owner else parameter


def submodule(model: nn.Module, name: str | None) -> nn.Module | None:
    """The module with this name; None without a name, or where the model has no such module."""
    try:
        return model.get_submodule(name) if name else None
    except AttributeError:  # a functional normalization goes by the name of a graph's node
        return None

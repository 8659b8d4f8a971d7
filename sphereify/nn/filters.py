"""The filters and the output layer of a model, angular or plain."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from sphereify.errors import UsageError, refused
from sphereify.nn.functional_calls import CALLS, answers_calls, parameter_name, weight_of_call
from sphereify.nn.heads import AngularHead
from sphereify.nn.modules import check_module
from sphereify.nn.precision import gathered
from sphereify.patterns import Patterns

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
"""torch's layers with filters."""


@dataclass(frozen=True)
class Bank:
    """Filters of a layer that look at the same input; a convolution has one bank for each of its groups."""

    layer: str
    """Qualified name."""
    filters: Tensor
    """(groups, filters, fan_in)"""
    is_output: bool


def filter_banks(model: nn.Module, output: str | None = None, *, single: bool = False) -> Iterator[Bank]:
    """The filters of each convolution and linear layer, angular or plain, once where they are shared.

    Args:
        output: name of the output layer; default as `output_layers`.
        single: include layers of one filter (a group), such as depthwise convolutions.

    Raises:
        ArgumentTypeError: not a module.
        UsageError: no layer of the name `output`, or lazy layers without weights.
    """
    check_module(model, expected="a model or a tensor of filters")
    if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
        raise UsageError(f"{type(model).__name__} has lazy layers without weights yet: run it once first")
    outputs = output_layers(model, output)
    seen: dict[int, Tensor] = {}  # kept alive: a parametrization computes its weight anew each time
    for name, module in model.named_modules():
        for own, weight, filters in _filters_of(module):
            if id(weight) not in seen and (single or filters.shape[1] > 1) and filters.shape[2] > 0:
                seen[id(weight)] = weight
                yield Bank(f"{name}.{own}".strip("."), filters, module in outputs)


def _filters_of(module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A layer's name relative to the module, its weight, and its filters of shape (groups, filters, fan_in)."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        grouped = gathered(module.weight).unflatten(0, (module.groups, -1)).transpose(1, 2)
        yield "", module.weight, grouped.flatten(2)
    elif isinstance(module, nn.modules.conv._ConvNd):
        yield "", module.weight, gathered(module.weight).flatten(1).unflatten(0, (module.groups, -1))
    elif isinstance(module, (nn.Linear, AngularHead)):
        yield "", module.weight, gathered(module.weight)[None]
    for name, weight, filters in _filters_of_calls(module):
        holder, _, own = name.rpartition(".")
        is_layer = own == "weight" and isinstance(module.get_submodule(holder), LAYERS)
        yield holder if is_layer else name, weight, filters


def _filters_of_calls(owner: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Name, weight and filters (groups, filters, fan_in) of an owner's angular calls with a whole parameter."""
    for key, call in getattr(owner, CALLS).items() if answers_calls(owner) else ():
        weight = weight_of_call(owner, key)
        if isinstance(weight, nn.Parameter):
            matrix = gathered(weight)
            rows = matrix.t() if call.columns else matrix.flatten(1)
            yield parameter_name(key), weight, rows.unflatten(0, (call.groups, -1))


def without(exclude: Patterns, banks: Iterable[Bank]) -> list[Bank]:
    """The banks whose layers match no pattern.

    Raises:
        UsageError: a pattern that matches none.
    """
    banks = list(banks)
    exclude.check([bank.layer for bank in banks], "layer")
    return [bank for bank in banks if not exclude.match([bank.layer])]


def as_filters(filters: Tensor) -> Tensor:
    """A tensor of filters (N, ...), flattened to (N, fan_in).

    Raises:
        UsageError: a tensor of another shape or dtype.
    """
    if filters.dim() < 2 or not filters.is_floating_point():
        raise UsageError(
            f"got a tensor of shape {tuple(filters.shape)} and {filters.dtype}, expected filters (N, fan_in) of floats"
        )
    return filters.flatten(1)


# ---- The output


def output_layers(model: nn.Module, output: str | None = None) -> set[nn.Module]:
    """The layer of the name `output`, else the angular heads, the model's own classifier, or the last linear layer.

    Raises:
        UsageError: no layer of that name.
    """
    modules = dict(model.named_modules())
    if output is not None:
        if output not in modules or not any(True for _ in _filters_of(modules[output])):
            raise refused("output", f"{type(model).__name__} has no layer {output!r}")
        return {modules[output]}
    heads: set[nn.Module] = {module for module in modules.values() if isinstance(module, AngularHead)}
    linear: list[nn.Module] = [module for name, module in modules.items() if name and isinstance(module, nn.Linear)]
    return heads or own_classifier(model) or set(linear[-1:])


def own_classifier(model: nn.Module) -> set[nn.Module]:
    """The modules of the classifier that a model names itself by timm's convention, `get_classifier()`."""
    try:
        classifier = model.get_classifier()  # type: ignore[operator]
    except Exception:  # absent, abstract, or in need of arguments
        return set()
    parts = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    return {module for part in parts if isinstance(part, nn.Module) for module in part.modules()}

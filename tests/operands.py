"""An independent count of what a model multiplies with its parameters, at the level of aten.

Tensors are followed by their memory: what is computed from parameters and constants alone is still a weight, and what
the inputs have a share in is data. A convolution or a matrix product of data with a weight is one place that a plan has
to account for.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS: dict[str, slice] = {
    "mm": slice(0, 2),
    "bmm": slice(0, 2),
    "mv": slice(0, 2),
    "addmm": slice(1, 3),
    "addmv": slice(1, 3),
    "baddbmm": slice(1, 3),
    "linear": slice(0, 2),
    "convolution": slice(0, 2),
    "_convolution": slice(0, 2),
    "convolution_overrideable": slice(0, 2),
    "_grouped_mm": slice(0, 2),
    "_addmm_activation": slice(1, 3),
}
"""Operations of aten that multiply, with the arguments that they multiply."""
RANDOM = ("rand", "normal", "bernoulli", "uniform", "multinomial", "dropout")


@dataclass
class Operands(TorchDispatchMode):
    """Notes the parameters behind each weight that data is multiplied with, under `with`."""

    model: nn.Module
    products: set[frozenset[str]] = field(default_factory=set)
    """For each weight that was multiplied with data the parameters, by their first names, that it is computed from."""
    multiplied: set[str] = field(default_factory=set)
    """Parameters behind what was multiplied with anything, constants too."""

    def __post_init__(self) -> None:
        super().__init__()
        self.sources: dict[int, frozenset[str]] = {}
        self.held: list[Tensor] = []  # an address is only good while its memory is held
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            self.sources[_address(tensor)] = frozenset({name} if isinstance(tensor, nn.Parameter) else ())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name = func.overloadpacket.__name__
        operands = list(_tensors((args, kwargs)))
        has_data = any(_address(t) not in self.sources for t in operands) or any(word in name for word in RANDOM)
        multiplied = list(_tensors(args[PRODUCTS[name]])) if name in PRODUCTS else []
        weights = {parameters for t in multiplied if (parameters := self.sources.get(_address(t)))}
        self.multiplied |= frozenset().union(*weights)
        if any(_address(t) not in self.sources for t in multiplied):
            self.products |= weights
        result = func(*args, **(kwargs or {}))
        written = [*_tensors(result), *(operands[:1] if func._schema.is_mutable else [])]
        behind = frozenset().union(*(self.sources.get(_address(t), ()) for t in operands))
        for tensor in written:
            if has_data:
                self.sources.pop(_address(tensor), None)
            else:
                self.sources[_address(tensor)] = behind | self.sources.get(_address(tensor), frozenset())
                self.held.append(tensor)
        return result


def products_of(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[set[frozenset[str]], set[str]]:
    """What a pass in evaluation and, if the model allows, one in training multiply: `products` and `multiplied`."""
    products: set[frozenset[str]] = set()
    multiplied: set[str] = set()
    for training in (False, True):
        with Operands(model.train(training)) as counted:
            try:
                run(model)
            except Exception:
                if not training:
                    raise
        products |= counted.products
        multiplied |= counted.multiplied
    return products, multiplied


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor))

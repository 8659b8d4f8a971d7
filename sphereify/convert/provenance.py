"""Provenance of a model's outputs: the layers that they are made of, followed tensor by tensor while the model runs.

A trace tells the same where there is one. Detection and optical flow networks have none, and end in code that decodes
boxes and picks the best of them.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sphereify.convert.model_inputs import tensors_in
from sphereify.convert.operations import ADD, KEEPS_CLASSES, PRODUCT_NAMES, SAME_VALUES, SCALE, word

NORMALIZATIONS = {
    F.batch_norm,
    F.layer_norm,
    F.group_norm,
    F.instance_norm,
    F.local_response_norm,
    F.rms_norm,
    torch.rms_norm,
}
OTHER_SITES = {
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.bilinear,
    F.multi_head_attention_forward,
    F.scaled_dot_product_attention,
    torch.lstm,
    torch.gru,
    torch.rnn_tanh,
    torch.rnn_relu,
}
"""Functions that read features rather than outputs, besides convolutions, linear maps and other products."""
POOL_BOXES = {"roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"}
"""Functions, by name, that are differentiable in their first argument alone."""
NUMBERS = {"item", "tolist", "float", "int", "bool", "numpy", "array"}
"""Methods, by name, that read a tensor as numbers."""
DETACH = {Tensor.detach, Tensor.detach_, Tensor.data.__get__}  # type: ignore[attr-defined]


class Origin(NamedTuple):
    """The weights whose products a tensor is made of."""

    weights: frozenset[str] = frozenset()
    """Weights from whose products a gradient path leads to the tensor, with no site or normalization in between."""
    keeps_classes: bool = True
    """True if all operations in between leave each channel its class."""
    detached: frozenset[str] = frozenset()
    """Weights from whose products the tensor was made without their gradient."""


NO_ORIGIN = Origin()


class End(NamedTuple):
    """The weights whose products one output of the model is made of."""

    weights: frozenset[str]
    keeps_classes: bool
    """True if all operations in between leave each channel its class."""


class Provenance:
    """The products of weights, followed through a forward pass."""

    def __init__(self) -> None:
        self.origins = WeakIdKeyDictionary()
        """Tensor -> its origin."""
        self.products = WeakIdKeyDictionary()
        """Product of a site -> the weight."""
        self.multiplied: set[str] = set()
        """Weights of all products so far."""
        self.read: set[str] = set()
        """Weights whose products another site or a normalization reads."""
        self.cut: set[str] = set()
        """Weights whose products are used without their gradient: detached, as indices, as numbers."""
        self.read_detached: set[str] = set()
        """Weights in `cut` whose products another site reads all the same: features whose gradient is stopped."""

    def note(self, function: Any, operands: list[Tensor], result: Any, weight: str) -> None:
        """Record the call of a function on these tensors; `weight` names its weight if it is a site, else it is ""."""
        name = word(function)
        if name in POOL_BOXES:
            operands, boxes = operands[:1], operands[1:]
            self._cut(map(self._origin, boxes))
        sources = [origin for origin in map(self._origin, operands) if origin is not NO_ORIGIN]
        weights = frozenset().union(*(origin.weights for origin in sources))
        detached = frozenset().union(*(origin.detached for origin in sources))
        if weight or function in NORMALIZATIONS or function in OTHER_SITES or name in PRODUCT_NAMES:
            self.read |= weights
            self.read_detached |= detached
            origin = Origin(frozenset([weight])) if weight else NO_ORIGIN
            if weight:
                self.multiplied.add(weight)
                self.products[result] = weight
        elif function in DETACH:
            self.cut |= weights
            origin = Origin(detached=weights | detached)
        else:
            differentiable = [source for source in sources if source.weights]
            keeps = name in SAME_VALUES | KEEPS_CLASSES | ADD or (name in SCALE and len(operands) == 1)
            origin = Origin(weights, keeps and all(source.keeps_classes for source in differentiable), detached)
        self._set(name, operands, result, origin)

    def _origin(self, tensor: Tensor) -> Origin:
        return self.origins.get(tensor, NO_ORIGIN)  # type: ignore[no-any-return]

    def _set(self, name: str, operands: list[Tensor], result: Any, origin: Origin) -> None:
        """Give the results of a function their origin."""
        results = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if name == "setitem":
            results = operands[:1]
        elif not results and name in NUMBERS:
            self._cut([origin])
        for tensor in results:
            if not (tensor.is_floating_point() or tensor.is_complex()):
                self._cut([origin])
                continue
            written = [tensor]
            if tensor._base is not None and (name == "setitem" or (name.endswith("_") and not name.startswith("_"))):
                written.append(tensor._base)  # what is written into a view is in the whole
            for target in written:
                before = self._origin(target) if target is not tensor else NO_ORIGIN
                if origin is not NO_ORIGIN or target in self.origins:
                    self.origins[target] = Origin(
                        before.weights | origin.weights,
                        before.keeps_classes and origin.keeps_classes,
                        before.detached | origin.detached,
                    )

    def _cut(self, origins: Iterable[Origin]) -> None:
        for origin in origins:
            self.cut |= origin.weights

    def ends(self, output: Any) -> list[End]:
        """The ends of a model: the tensors that it returns, and those that it uses without their gradient."""
        origins = [self._origin(tensor) for tensor in tensors_in(output)]
        returned = {End(o.weights - self.read, o.keeps_classes and not o.weights & self.read) for o in origins}
        named = frozenset().union(*(end.weights for end in returned))
        rest = self.cut - self.read - self.read_detached - named
        ends = [*returned, *(End(frozenset([weight]), False) for weight in rest)]
        return sorted((end for end in ends if end.weights), key=lambda end: sorted(end.weights))

    def direct(self, output: Any) -> frozenset[str]:
        """The weights whose products are outputs of the model, with nothing in between."""
        return frozenset(self.products[tensor] for tensor in tensors_in(output) if tensor in self.products)

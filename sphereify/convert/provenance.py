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
from sphereify.convert.operations import (
    ADD,
    HIDDEN_ACTIVATIONS,
    KEEPS_CLASSES,
    ONLY_SHAPES,
    SAME_VALUES,
    SCALE,
    SOFTMAX,
    word,
)

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
"""Functions that read features rather than outputs, besides the products with a learned weight."""
LOOKUPS = {F.embedding, F.embedding_bag}
"""Functions that take rows from a learned table."""
POOL_BOXES = {"roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"}
"""Functions, by name, that are differentiable in their first argument alone."""
NUMBERS = {"item", "tolist", "float", "int", "bool", "numpy", "array"}
"""Methods, by name, that read a tensor as numbers."""
DETACH = {Tensor.detach, Tensor.detach_, Tensor.data.__get__}  # type: ignore[attr-defined]


MODEL_INPUT = ""
"""The entry for the model's own input among the weights that a tensor is made of."""


class Product(NamedTuple):
    """A product that a function has just made, as far as it concerns provenance."""

    weight: str = ""
    """Name of its learned weight, if it is a convolution or a linear map; else ""."""
    filters: int = 0
    """Number of filters of that weight."""
    reads: bool = False
    """True if a learned weight takes part. A filter that is fixed, or made of features, does not read: it decodes."""


NO_PRODUCT = Product()


class Origin(NamedTuple):
    """The weights whose products a tensor is made of."""

    weights: frozenset[str] = frozenset()
    """Weights from whose products a gradient path leads to the tensor, with no site or normalization in between."""
    keeps_classes: bool = True
    """True if all operations in between leave each channel its class."""
    detached: frozenset[str] = frozenset()
    """Weights from whose products the tensor was made without their gradient."""
    summed: frozenset[str] = frozenset()
    """Weights whose products were added up, in the shape of the sum."""
    normalized: bool = False
    """True if the tensor was divided by a statistic of its own: a learned scale of each channel completes a norm."""
    activated: bool = False
    """True if an activation of hidden features was applied."""
    is_distribution: bool = False
    """True if the tensor is the result of a softmax, with nothing but moves since."""


NO_ORIGIN = Origin()


class End(NamedTuple):
    """The weights whose products one output of the model is made of."""

    weights: frozenset[str]
    keeps_classes: bool
    """True if all operations in between leave each channel its class."""
    shape: tuple[int, ...] = ()
    """Shape of the output; empty for a tensor that is not returned, and for a single number."""
    activated: bool = False
    """True if an activation of hidden features was applied."""


class Provenance:
    """The products of weights, followed through a forward pass."""

    def __init__(self, frozen: frozenset[str] = frozenset()) -> None:
        self.frozen = frozen
        """Weights that are not trained."""
        self.origins = WeakIdKeyDictionary()
        """Tensor -> its origin."""
        self.products = WeakIdKeyDictionary()
        """Product of a site -> the weight."""
        self.filters: dict[str, int] = {}
        """Weight, or lookup in a table -> number of channels of its product."""
        self.multiplied: set[str] = set()
        """Weights of all products so far."""
        self.read: set[str] = set()
        """Weights whose products another site or a normalization reads."""
        self.cut: set[str] = set()
        """Weights whose products are used without their gradient: detached, as indices, as numbers."""
        self.read_detached: set[str] = set()
        """Weights in `cut` whose products another site reads all the same: features whose gradient is stopped."""

    def note_inputs(self, inputs: Any) -> None:
        """Record the model's inputs, before a pass."""
        for tensor in tensors_in(inputs):
            if tensor.is_floating_point():
                self.origins[tensor] = Origin(frozenset([MODEL_INPUT]))

    def note_norm(self, inputs: Any, output: Any) -> None:
        """Record that a normalization has read features, whatever functions it is written with."""
        for tensor in tensors_in(inputs):
            self.read |= self._origin(tensor).weights - {MODEL_INPUT}
        for tensor in tensors_in(output):
            self.origins.pop(tensor, None)

    def note(
        self, function: Any, operands: list[Tensor], result: Any, product: Product = NO_PRODUCT, *, scales: bool = False
    ) -> None:
        """Record the call of a function on these tensors.

        Args:
            function: of torch.
            operands: all tensors among its arguments.
            result: what it returned.
            product: the product that it made.
            scales: True if one of the operands is a learned vector.
        """
        name = word(function)
        if name in POOL_BOXES:
            operands, boxes = operands[:1], operands[1:]
            self._cut(map(self._origin, boxes))
        elif name in ONLY_SHAPES:
            operands = []
        sources = [origin for origin in map(self._origin, operands) if origin is not NO_ORIGIN]
        weights = frozenset().union(*(origin.weights for origin in sources))
        detached = frozenset().union(*(origin.detached for origin in sources))
        normalizes = scales and name in SCALE and any(source.normalized for source in sources)
        decodes = product.weight in self.frozen and any(source.is_distribution for source in sources)
        if (product.reads and not decodes) or normalizes or function in NORMALIZATIONS or function in OTHER_SITES:
            self.read |= weights - {MODEL_INPUT}
            self.read_detached |= detached
            origin = Origin(frozenset([product.weight])) if product.weight else NO_ORIGIN
        elif function in DETACH:
            self.cut |= weights
            origin = Origin(detached=weights | detached)
        elif function in LOOKUPS:
            lookup = f"lookup {len(self.filters)}"
            self.filters[lookup] = operands[1].shape[-1]
            self.read.add(lookup)  # a table's rows are features, never scores
            origin = Origin(frozenset([lookup]))
        else:
            differentiable = [source for source in sources if source.weights - {MODEL_INPUT}]
            keeps = name in SAME_VALUES | KEEPS_CLASSES | ADD or (name in SCALE and len(operands) == 1)
            summed = self._summed(operands, result) if name in ADD else frozenset()
            moves = name in SAME_VALUES
            origin = Origin(
                weights | {product.weight} if product.weight else weights,
                keeps and MODEL_INPUT not in summed and all(source.keeps_classes for source in differentiable),
                detached,
                summed.union(*(source.summed for source in sources)),
                any(source.normalized for source in sources) or self._normalizes(name, operands, result),
                name in HIDDEN_ACTIVATIONS or any(source.activated for source in differentiable),
                name in SOFTMAX or (moves and any(source.is_distribution for source in sources)),
            )
        if product.weight:
            self.multiplied.add(product.weight)
            self.filters[product.weight] = product.filters
            self.products[result] = product.weight
        self._set(name, operands, result, origin)

    def _summed(self, operands: list[Tensor], result: Any) -> frozenset[str]:
        """The weights in a sum of two tensors of one shape; a single tensor, or one that is repeated, has no equal."""
        equals = [self._origin(t).weights for t in operands if isinstance(result, Tensor) and t.shape == result.shape]
        return frozenset().union(*equals) if len(equals) > 1 else frozenset()

    def _normalizes(self, name: str, operands: list[Tensor], result: Any) -> bool:
        """True for a division of features by their length or another statistic of theirs over some axes."""
        if name == "normalize":
            return True
        if name not in SCALE or len(operands) != 2 or not isinstance(result, Tensor):
            return False
        whole, statistic = sorted(operands, key=Tensor.numel, reverse=True)
        shared = self._origin(whole).weights & self._origin(statistic).weights
        return bool(shared) and whole.shape == result.shape and statistic.dim() > 1 and statistic.shape != whole.shape

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
                    self.origins[target] = origin._replace(
                        weights=before.weights | origin.weights,
                        keeps_classes=before.keeps_classes and origin.keeps_classes,
                        detached=before.detached | origin.detached,
                        summed=before.summed | origin.summed,
                    )

    def _cut(self, origins: Iterable[Origin]) -> None:
        for origin in origins:
            self.cut |= origin.weights

    def ends(self, output: Any) -> list[End]:
        """The ends of a model: the tensors that it returns, and those that it uses without their gradient."""
        returned = {self._end(self._origin(tensor), tuple(tensor.shape)) for tensor in tensors_in(output)}
        named = frozenset().union(*(end.weights for end in returned))
        rest = self.cut - self.read - self.read_detached - named - {MODEL_INPUT}
        ends = [*returned, *(End(frozenset([weight]), False) for weight in rest)]
        return sorted((end for end in ends if end.weights), key=lambda end: (sorted(end.weights), end[1:]))

    def _end(self, origin: Origin, shape: tuple[int, ...]) -> End:
        """One returned tensor. What is added to features that layers read is one more part of these features."""
        widths = {self.filters.get(weight) for weight in origin.summed & self.read}
        own = origin.weights - self.read - {MODEL_INPUT}
        weights = {weight for weight in own if self.filters.get(weight) not in widths}
        return End(frozenset(weights), origin.keeps_classes and not origin.weights & self.read, shape, origin.activated)

    def direct(self, output: Any) -> frozenset[str]:
        """The weights whose products are outputs of the model, with nothing in between."""
        return frozenset(self.products[tensor] for tensor in tensors_in(output) if tensor in self.products)

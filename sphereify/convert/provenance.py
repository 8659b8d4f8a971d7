"""Which layers the outputs of a model are made of, followed tensor by tensor while it runs.

A trace tells the same where there is one. Detection and optical flow networks have none, and end in code that decodes
boxes and picks the best of them.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sphereify.convert.operations import ADD, KEEPS_CLASSES, PRODUCTS, SAME_VALUES, SCALE, word

NORMALIZATIONS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.local_response_norm, F.rms_norm,
                  torch.rms_norm}  # fmt: skip
OTHER_SITES = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.bilinear, F.multi_head_attention_forward,
               F.scaled_dot_product_attention, torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}  # fmt: skip
"""What reads features rather than outputs, besides convolutions, linear maps and other products."""
POOL_BOXES = {"roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"}
"""Functions, by name, that are differentiable in their first argument alone."""
NUMBERS = {"item", "tolist", "float", "int", "bool", "numpy", "array"}
"""Methods, by name, that read a tensor as numbers."""
DETACH = {Tensor.detach, Tensor.detach_, Tensor.data.__get__}  # type: ignore[attr-defined]


class Origin(NamedTuple):
    """What a tensor is made of."""

    weights: frozenset[str] = frozenset()
    """Those from whose products a gradient path leads to it, with no site or normalization in between."""
    kept: bool = True
    """Whether all operations in between leave each channel its class."""
    detached: frozenset[str] = frozenset()
    """Those from whose products it was made without their gradient."""


NOTHING = Origin()


class End(NamedTuple):
    """An output, by the weights whose products it is made of."""

    weights: frozenset[str]
    kept: bool
    """As in `Origin`."""


class Flow:
    """Follows the products of weights through a forward pass."""

    def __init__(self) -> None:
        self.origins = WeakIdKeyDictionary()
        self.products = WeakIdKeyDictionary()
        """Results of sites -> the weight."""
        self.made: set[str] = set()
        self.read: set[str] = set()
        """Weights whose products another site or a normalization reads."""
        self.cut: set[str] = set()
        """Weights whose products are used without their gradient: detached, as indices, as numbers."""
        self.read_detached: set[str] = set()
        """Those of them that another site reads all the same: features whose gradient is stopped."""

    def of(self, tensor: Tensor) -> Origin:
        return self.origins.get(tensor, NOTHING)  # type: ignore[no-any-return]

    def note(self, function: Any, leaves: list[Tensor], result: Any, site: str) -> None:
        """A function was called on these tensors; `site` is the weight, if it is a site."""
        name = word(function)
        if name in POOL_BOXES:
            leaves, boxes = leaves[:1], leaves[1:]
            self._cut(map(self.of, boxes))
        found = [origin for origin in map(self.of, leaves) if origin is not NOTHING]
        weights = frozenset().union(*(origin.weights for origin in found))
        detached = frozenset().union(*(origin.detached for origin in found))
        if site or function in NORMALIZATIONS or function in OTHER_SITES or name in PRODUCTS:
            self.read |= weights
            self.read_detached |= detached
            now = Origin(frozenset([site])) if site else NOTHING
            if site:
                self.made.add(site)
                self.products[result] = site
        elif function in DETACH:
            self.cut |= weights
            now = Origin(detached=weights | detached)
        else:
            own = [origin for origin in found if origin.weights]
            keeps = name in SAME_VALUES | KEEPS_CLASSES | ADD or (name in SCALE and len(leaves) == 1)
            now = Origin(weights, keeps and all(origin.kept for origin in own), detached)
        self._set(function, name, leaves, result, now)

    def _set(self, function: Any, name: str, leaves: list[Tensor], result: Any, now: Origin) -> None:
        results = [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if name == "setitem":
            results = leaves[:1]
        elif not results and name in NUMBERS:
            self._cut([now])
        for tensor in results:
            if not (tensor.is_floating_point() or tensor.is_complex()):
                self._cut([now])
                continue
            written = [tensor]
            if tensor._base is not None and (name == "setitem" or (name.endswith("_") and not name.startswith("_"))):
                written.append(tensor._base)  # what is written into a view is in the whole
            for one in written:
                before = self.of(one) if one is not tensor else NOTHING
                if now is not NOTHING or one in self.origins:
                    self.origins[one] = Origin(before.weights | now.weights, before.kept and now.kept,
                                               before.detached | now.detached)  # fmt: skip

    def _cut(self, origins: Iterable[Origin]) -> None:
        for origin in origins:
            self.cut |= origin.weights

    def ends(self, output: Any) -> list[End]:
        """What the outputs are made of: tensors that the model returns, and those it uses without their gradient."""
        found = [self.of(tensor) for tensor in tensors_in(output)]
        returned = {End(o.weights - self.read, o.kept and not o.weights & self.read) for o in found}
        named = frozenset().union(*(end.weights for end in returned))
        rest = self.cut - self.read - self.read_detached - named
        ends = [*returned, *(End(frozenset([weight]), False) for weight in rest)]
        return sorted((end for end in ends if end.weights), key=lambda end: sorted(end.weights))

    def direct(self, output: Any) -> frozenset[str]:
        """Weights whose products are outputs as they are."""
        return frozenset(self.products[tensor] for tensor in tensors_in(output) if tensor in self.products)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in what a model returned: in containers, dataclasses and objects."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (t for value in output.values() for t in tensors_in(value))
    elif isinstance(output, (list, tuple, set)):
        yield from (t for value in output for t in tensors_in(value))
    elif hasattr(output, "__dict__") and not isinstance(output, (nn.Module, type)) and not callable(output):
        yield from (t for value in vars(output).values() for t in tensors_in(value))

"""The filter behind each element of a product, followed from there to the normalization that scales it.

A normalization takes one axis for its channels. Behind a convolution that is usually the axis of the filters; behind a
linear map over tokens, or after a transposition, it may be the axis of tokens or of positions.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sphereify.convert.operations import SAME_VALUES, SCALE, word

FIRST_AXES = {"batch_norm", "group_norm", "instance_norm"}
"""Normalizations of which the channels are axis 1."""
LAST_AXES = {"layer_norm", "rms_norm"}
"""Normalizations of which the channels are the last axes, as many as their second argument has entries."""
MOST_PAIRS = 2**24
"""Number of pairs of a channel and a filter up to which they are listed."""


class _Label(NamedTuple):
    weight: str
    filters: int
    numbers: Tensor
    """The number of the filter behind each element; it has the shape of the product, or of what was made of it."""


class ChannelWitness:
    """A record of the weights whose product is scaled by a normalization along other channels than its filters."""

    def __init__(self) -> None:
        self.foreign: set[str] = set()
        """Names of these weights."""
        self._labels = WeakIdKeyDictionary()

    def note_product(self, weight: str, filters: int, result: Any, spatial: int) -> None:
        """Note a product of a convolution with this many axes of space, or of a linear map, which has none."""
        axis = result.dim() - 1 - spatial
        if result.shape[axis] == filters:
            index = torch.arange(filters, dtype=torch.int32).view(-1, *[1] * spatial).expand(result.shape)
            self._labels[result] = _Label(weight, filters, index)

    def note(
        self, function: Any, args: tuple, kwargs: dict[str, Any], operands: list[Tensor], result: Any, *, scale: Any
    ) -> None:
        """Note what a function makes of a product; `scale` is the learned vector among its operands, or None."""
        source = next((tensor for tensor in operands if tensor in self._labels), None)
        if source is None:
            return
        label: _Label = self._labels[source]
        name = word(function)
        if name in FIRST_AXES and source.dim() > 1:
            self._check(label, _numbers(source.shape, [1]))
        elif name in LAST_AXES:
            shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
            self._check(label, _numbers(source.shape, range(source.dim() - len(shape), source.dim())))
        elif name in SCALE and scale is not None and isinstance(result, Tensor) and result.shape == source.shape:
            self._check(label, torch.arange(scale.numel()).view(scale.shape).expand(result.shape))
        elif name in SAME_VALUES and isinstance(result, (Tensor, tuple, list)):
            self._move(label, source, function, args, kwargs, result)
        elif isinstance(result, Tensor) and result.shape == source.shape:
            self._labels[result] = label

    def _move(
        self, label: _Label, source: Tensor, function: Any, args: tuple, kwargs: dict[str, Any], result: Any
    ) -> None:
        """Move the numbers of filters as the function has moved the values."""
        if isinstance(result, Tensor) and result.shape == source.shape and not _moves_axes(function):
            self._labels[result] = label
            return
        swap = {id(source): label.numbers}
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda t: swap.get(id(t), t), (args, kwargs))
        try:
            moved = function(*args, **kwargs)
        except Exception:  # a cast or an index that does not fit: what follows is not known then
            return
        results = (result,) if isinstance(result, Tensor) else result
        for tensor, index in zip(results, (moved,) if isinstance(moved, Tensor) else moved, strict=False):
            if isinstance(tensor, Tensor) and isinstance(index, Tensor) and tensor.shape == index.shape:
                self._labels[tensor] = label._replace(numbers=index)

    def _check(self, label: _Label, channels: Tensor) -> None:
        """Compare the channel of each element with its filter."""
        if label.filters > 1 and not _belong_together(label.numbers, channels, label.filters):
            self.foreign.add(label.weight)


def _numbers(shape: torch.Size, axes: Any) -> Tensor:
    """The number of the channel of each element, where some axes of a tensor are its channels."""
    wide = [size if axis in axes else 1 for axis, size in enumerate(shape)]
    return torch.arange(math.prod(wide)).view(wide).expand(shape)


def _moves_axes(function: Any) -> bool:
    return word(function) in {"transpose", "permute", "t", "movedim", "getattr"}


def _belong_together(filters: Tensor, channels: Tensor, number: int) -> bool:
    """True if each channel is that of one filter, or each filter, as one of several heads, has one channel."""
    along_filters, along_channels = _axes(filters), _axes(channels)
    if not along_channels:
        return False  # one channel for all filters
    if len(along_filters) == 1:
        return along_filters <= along_channels
    # Along the other axes, such as the batch and the positions, every pair is met again.
    changing = along_filters | along_channels
    once = tuple(slice(None) if axis in changing else 0 for axis in range(filters.dim()))
    filters, channels = filters[once].long(), channels[once].long()
    total = int(channels.max()) + 1
    if number * total > MOST_PAIRS:
        return bool(along_filters & along_channels)
    pairs = torch.zeros(total * number, dtype=torch.bool)
    pairs[(channels * number + filters).flatten()] = True
    met = pairs.view(total, number)
    return int(met.sum()) in (int(met.any(1).sum()), int(met.any(0).sum()))


def _axes(index: Tensor) -> set[int]:
    """The axes along which the numbers change."""
    return {
        axis for axis, (size, step) in enumerate(zip(index.shape, index.stride(), strict=True)) if step and size > 1
    }

"""Views of a tensor as it lies in memory, for passes that read and write each element once."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sphereify.nn.geometry import Projection
from sphereify.nn.precision import CHANNELS_LAST, accumulate_dtype, is_channels_last


class View(NamedTuple):
    """The dimensions in which the passes on a CPU see a tensor, by its layout in memory.

    In channels_last and for linear maps it is seen as (places, groups, channels), else as (B, groups, channels,
    places). Tensors with one value for each patch have one channel.
    """

    linear: bool
    channels_last: bool
    groups: int
    channels: int
    """Dimension of the channels in a view."""

    @classmethod
    def of(cls, tensor: Tensor, projection: Projection | None) -> "View":
        channels_last = projection is None or is_channels_last(tensor)
        return cls(
            projection is None, channels_last, projection.groups if projection else 1, -1 if channels_last else 2
        )

    def __call__(self, tensor: Tensor) -> Tensor:
        if not self.channels_last:
            return tensor.flatten(2).unflatten(1, (self.groups, -1))
        last = tensor if self.linear else tensor.movedim(1, -1)
        return last.reshape(-1, self.groups, last.shape[-1] // self.groups)

    def patches(self, tensor: Tensor) -> Tensor:
        """The view of a tensor with one value for each patch, (B, groups, *space) or (*, 1)."""
        return self(tensor) if self.linear or tensor.is_contiguous() else self(self.arranged(tensor))

    def arranged(self, tensor: Tensor) -> Tensor:
        """The tensor in the layout of this view, copied where it has another."""
        return tensor.contiguous(memory_format=self.memory_format(tensor.dim()))

    def memory_format(self, dim: int) -> torch.memory_format:
        return CHANNELS_LAST[dim] if self.channels_last and not self.linear else torch.contiguous_format

    def empty_patches(self, like: Tensor) -> Tensor:
        """(B, groups, *space) for a tensor (B, C, *space), or (*, 1), in fp32 at least."""
        shape = (*like.shape[:-1], 1) if self.linear else (len(like), self.groups, *like.shape[2:])
        return torch.empty(shape, dtype=accumulate_dtype(like.dtype), memory_format=self.memory_format(like.dim()))

    def of_filters(self, k: Any) -> Any:
        """One value for each filter in the shape that broadcasts over a view; numbers and None stay."""
        if not isinstance(k, Tensor) or k.numel() == 1:
            return k.reshape(1) if isinstance(k, Tensor) else k
        return k.reshape(self.groups, -1) if self.channels_last else k.reshape(self.groups, -1, 1)

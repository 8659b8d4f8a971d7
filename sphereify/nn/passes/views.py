"""Views of tensors as they lie in memory, for passes that read and write each element once."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sphereify.nn.geometry import Projection
from sphereify.nn.precision import CHANNELS_LAST, accumulate_dtype, is_channels_last


class View(NamedTuple):
    """The dimensions in which the passes on a CPU see the tensors of a layer, by their layout in memory.

    Three forms: tensors as they are, for passes over whole tensors; (places, groups, channels), for
    channels_last and for linear maps; (B, groups, channels, places) for contiguous tensors of convolutions. Tensors
    with one value for each patch have one channel.
    """

    linear: bool
    channels_last: bool
    groups: int
    whole: bool
    channels: int
    """Dimension of the channels in a view."""
    single: bool
    """True if each group has one channel: a sum over its channels is the channel itself."""

    @classmethod
    def of(cls, tensor: Tensor, projection: Projection | None, whole: bool = False) -> "View":
        """The view of a tensor and those of its shape, or its patches.

        Args:
            whole: leave the tensors as they are where there is one group, or one channel a group.
        """
        if projection is None:
            return cls(True, True, 1, whole, -1, tensor.shape[-1] == 1)
        groups, channels_last, single = (
            projection.groups,
            is_channels_last(tensor),
            tensor.shape[1] == projection.groups,
        )
        if whole and (groups == 1 or single):
            return cls(False, channels_last, groups, True, 1, single)
        return cls(False, channels_last, groups, False, -1 if channels_last else 2, single)

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.whole:
            return tensor
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
        layout = self.memory_format(like.dim())
        return torch.empty(shape, dtype=accumulate_dtype(like.dtype), device=like.device, memory_format=layout)

    def of_filters(self, values: Any, dim: int) -> Any:
        """One value for each filter in the shape that broadcasts over a view of a tensor of `dim` dimensions.

        One value for all, numbers and None stay.
        """
        if not isinstance(values, Tensor):
            return values
        if values.numel() == 1:
            return values.reshape(1)
        if self.linear or (self.channels_last and not self.whole):
            return values.reshape(-1) if self.whole else values.reshape(self.groups, -1)
        return values.reshape(-1, *[1] * (dim - 2)) if self.whole else values.reshape(self.groups, -1, 1)

    def places(self, dim: int) -> list[int]:
        """The dimensions of a view of a tensor of `dim` dimensions that are not of filters."""
        if self.whole:
            return list(range(dim - 1)) if self.linear else [0, *range(2, dim)]
        return [0] if self.channels_last else [0, 3]

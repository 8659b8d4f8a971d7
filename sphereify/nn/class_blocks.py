"""Classes whose scores a loss computes at a time: all, some after others, or a random share of them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class ClassBlock(NamedTuple):
    """Some classes, and how much each counts in a sum over all classes."""

    classes: slice | Tensor
    """A slice, or indices (classes,)."""
    weight: Tensor | None = None
    """Factor of each class in a sum, (classes,); None: 1."""

    def is_target(self, targets: Tensor) -> Tensor:
        """True where a class is a sample's target: (B,) -> (B, classes)."""
        indices = self.classes
        if isinstance(indices, slice):
            indices = torch.arange(indices.start, indices.stop, device=targets.device)
        return indices == targets[:, None]


def chunks(count: int, size: int) -> list[ClassBlock]:
    """All classes, `size` at a time."""
    return [ClassBlock(slice(start, min(start + size, count))) for start in range(0, count, size)]


def sample(count: int, share: float, targets: Tensor) -> ClassBlock:
    """The classes of the targets, and others drawn at random, which count for those that were not drawn.

    Given the targets (B,), every other class is drawn with the same probability π, without replacement, and counts 1/π
    times, so that a sum over all classes is that of the drawn ones in expectation. The block has ⌈share·count⌉ classes,
    and at least one that is no target's, where there is one.
    """
    size = min(count, max(math.ceil(share * count), len(targets) + 1))
    keys = torch.rand(count, device=targets.device).index_fill(0, targets, 2.0)  # those of targets come first
    keys, classes = keys.topk(size)
    is_target = keys == 2
    present = is_target.sum()
    weight = (count - present) / (size - present).clamp_min(1)
    return ClassBlock(classes, torch.where(is_target, 1.0, weight))

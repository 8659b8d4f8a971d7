"""Moments of patches and targets, summed up over rows that come in chunks."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Some positions of a layer's input, and the output that the layer should have there.

    Attributes:
        unit: patches divided by their norms: (groups, n, fan_in).
        target: (n, filters).
        weight: the weight of an error at each position: (n, 1).
        added: what is added to the layer's output before a ReLU, (n, filters); None if there is no such sum.
        size: the magnitude h of each patch, which multiplies g(θ): (groups, n, 1); None for 1.
    """

    unit: Tensor
    target: Tensor
    weight: Tensor
    added: Tensor | None = None
    size: Tensor | None = None

    def __getitem__(self, part: slice) -> "Rows":
        added, size = (
            None if self.added is None else self.added[part],
            None if self.size is None else self.size[:, part],
        )
        return Rows(self.unit[:, part], self.target[part], self.weight[part], added, size)

    @property
    def features(self) -> Tensor:
        """The features in which the output is linear where g = cos: unit patches times h, (groups, n, fan_in)."""
        return self.unit if self.size is None else self.unit * self.size

    def sized(self, g: Tensor) -> Tensor:
        """h·g for g of shape (n, filters)."""
        if self.size is None:
            return g
        groups = len(self.size)
        return (by_group(g, groups) * self.size).movedim(0, 1).flatten(1)

    def part(self, *, held_out: bool) -> slice:
        """The first seven eighths of the rows, or the held-out rest."""
        n = self.target.shape[0] - self.target.shape[0] // 8
        return slice(n, None) if held_out else slice(None, n)


@dataclass
class Moments:
    """Sums over rows, divided by their number, in float64.

    Attributes:
        count: number of rows.
        mean: (groups, fan_in).
        covariance: (groups, fan_in, fan_in).
        cross: covariance with the targets: (groups, fan_in, filters of one group).
    """

    count: int
    mean: Tensor
    covariance: Tensor
    cross: Tensor


class MomentSums:
    """The sums over rows of which moments are made.

    Args:
        like: filters (filters, fan_in), for the shapes and the device.
        groups: of the convolution.
    """

    def __init__(self, like: Tensor, groups: int):
        filters, fan_in = like.shape

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=like.device)

        self.groups = groups
        self.count = 0
        self._sums = [  # of w, w·x, w·x·xᵀ, w·x·yᵀ and w·y
            zeros(),
            zeros(groups, fan_in),
            zeros(groups, fan_in, fan_in),
            zeros(groups, fan_in, filters // groups),
            zeros(filters),
        ]

    def add(self, rows: Rows) -> None:
        """Add rows to the sums."""
        w = rows.weight
        self.count += len(w)
        x = rows.features
        wx = x * w
        terms = (w, wx, wx.mT @ x, wx.mT @ by_group(rows.target, self.groups), w * rows.target)
        for total, values, axis in zip(self._sums, terms, (None, 1, (), (), 0), strict=True):
            total += values if axis == () else values.sum(axis, dtype=torch.float64)

    def join(self, other: "MomentSums") -> None:
        """Add the sums over other rows."""
        self.count += other.count
        for total, term in zip(self._sums, other._sums, strict=True):
            total += term

    def moments(self) -> Moments:
        """The moments of all rows so far."""
        n, x, xx, xy, y = self._sums
        n = n.clamp_min(1e-9)
        x, y = x / n, y / n
        covariance = (xx / n).sub_(x.unsqueeze(2) * x.unsqueeze(1))
        cross = xy / n - x.unsqueeze(2) * y.unflatten(0, (self.groups, 1, -1))
        return Moments(self.count, x, covariance, cross)


def by_group(values: Tensor, groups: int) -> Tensor:
    """(n, filters) -> (groups, n, filters of one group)"""
    return values.unflatten(1, (groups, -1)).movedim(1, 0)

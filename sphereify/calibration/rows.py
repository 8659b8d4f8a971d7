"""Rows of a layer's patches and of what is wanted of them, a bounded number at a time."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sphereify.calibration.layer_pairs import Site
from sphereify.calibration.regression import Rows
from sphereify.nn.geometry import per_axis

MOST_ROWS = 65_536
"""Positions that a layer is fitted to, drawn from all of them."""
MOST_PRODUCTS = 1e12
"""Positions times fan_in²: beyond, fewer are drawn."""
CHUNK_BYTES = 64 * 2**20
"""Patches are made so many at a time."""
CACHE_BYTES = 640 * 2**20
"""Patches of one layer are kept between passes up to this size, and made anew beyond."""
LEAST = 0.3
"""Of the mean squared output: below, errors count alike."""
EVENNESS = 0.75
"""Errors are weighted by ‖output‖^(-2·this): 0 counts them as they are, 1 as shares of the output."""
HEAD_STEPS = 60
SHORTEST_FILTER = 0.3
"""A solved filter keeps the length of the one it replaces, but is not so short that ε tells."""


@dataclass
class Batch:
    """What a layer receives in one pass, and the rows that are wanted of it."""

    x: Tensor
    call: Any
    """`Arguments` of a functional call."""
    rows: slice
    """Of the filters, where a call takes some of them."""
    drawn: Tensor | None
    raw: Tensor
    """What the original layer gave."""
    wanted: Tensor
    added: Tensor | None
    rectified: bool
    normalized: Tensor | None


@dataclass(frozen=True)
class Geometry:
    """How a layer's patches lie in its input; `kernel` is empty for a linear map."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    sides: tuple[int, ...]
    """Padding as `F.pad` takes it."""
    mode: str
    groups: int
    eps: float

    @classmethod
    def of(cls, site: Site, call: Any = None) -> "Geometry":
        layer = site.layer
        if site.decision.kind == "linear":
            return cls((), (), (), (), "constant", 1, layer.eps)
        kernel = tuple(site.decision.shape[2:])
        dim = len(kernel)
        if call is None:
            stride, padding, dilation, groups = layer.stride, layer.padding, layer.dilation, layer.groups
        else:
            stride, padding, dilation, groups = call.geometry
        stride, dilation = per_axis(stride, dim), per_axis(dilation, dim)
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            sides = tuple(side for t in reversed(totals) for side in (t // 2, t - t // 2))
        elif padding == "valid":
            sides = (0,) * (2 * dim)
        else:
            sides = tuple(side for p in reversed(per_axis(padding, dim)) for side in (p, p))
        mode = getattr(layer, "padding_mode", "zeros")
        return cls(kernel, stride, dilation, sides, "constant" if mode == "zeros" else mode, groups, layer.eps)

    def patches(self, x: Tensor) -> Tensor:
        """A view of (B, C, *space) as (B, *positions, C, *kernel), or of (*, features) as (rows, features)."""
        if not self.kernel:
            return x.reshape(-1, x.shape[-1])
        dim = len(self.kernel)
        x = x.unsqueeze(0) if x.dim() == dim + 1 else x
        x = F.pad(x, self.sides, mode=self.mode) if any(self.sides) else x
        for axis in range(dim):
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            x = x.unfold(2 + axis, reach, self.stride[axis])[..., :: self.dilation[axis]]
        return x.movedim(1, 1 + dim)

    def unit(self, patches: Tensor, positions: Tensor) -> Tensor:
        """(groups, n, fan_in): the patches at some positions, over their norms."""
        if self.kernel:
            space = patches.shape[: 1 + len(self.kernel)]
            rows = patches[torch.unravel_index(positions, space)].unflatten(1, (self.groups, -1)).flatten(2)
            rows = rows.movedim(1, 0)
        else:
            rows = patches[positions].unsqueeze(0)
        rows = precise(rows)
        return rows / (rows.square().sum(2, keepdim=True) + self.eps).sqrt()


def rows_at(site: Site, output: Tensor, drawn: Tensor | None) -> Tensor:
    """(n, filters): a copy of a layer's output at some positions."""
    if site.decision.kind != "linear":
        dim = len(site.decision.shape) - 2
        output = output.unsqueeze(0) if output.dim() == dim + 1 else output
        if drawn is not None:
            output = output.movedim(1, -1)
            return precise(output[torch.unravel_index(drawn, output.shape[:-1])])
        output = output.movedim(1, -1)
    rows = output.reshape(-1, output.shape[-1])
    return precise(rows.clone() if drawn is None else rows[drawn])


def chunks(geometry: Geometry, batches: list[Batch]) -> Iterator[Rows]:
    for batch, weight in zip(batches, _importance(batches), strict=True):
        patches = geometry.patches(batch.x)
        n, width = len(batch.wanted), math.prod(geometry.kernel) * (batch.x.shape[1] if geometry.kernel else 1)
        positions = batch.drawn if batch.drawn is not None else torch.arange(n, device=batch.x.device)
        step = max(256, CHUNK_BYTES // (4 * max(width, patches.shape[-1])))
        for start in range(0, n, step):
            piece = slice(start, start + step)
            unit = geometry.unit(patches, positions[piece])
            yield Rows(unit, batch.wanted[piece], weight[piece], None if batch.added is None else batch.added[piece])


def _importance(batches: list[Batch]) -> list[Tensor]:
    """How much an error counts at each position, (n, 1): less where the layer's output is large.

    What reads the output is mostly angular as well: to it, an error matters as a share of what it is an error of.
    """
    sizes = []
    for batch in batches:
        used = batch.wanted if batch.added is None else batch.wanted + batch.added
        sizes.append((used.relu() if batch.rectified else used).square().sum(1, keepdim=True))
    if not all(batch.rectified for batch in batches):
        return [torch.ones_like(size) for size in sizes]
    level = torch.cat(sizes).mean().clamp_min(1e-12)
    return [(size / level + LEAST) ** -EVENNESS for size in sizes]


def cached(make: Callable[[], Iterator[Rows]], batches: list[Batch], width: int) -> Callable[[], Iterator[Rows]]:
    """The rows kept in memory, if they are few enough."""
    if 4 * width * sum(len(batch.wanted) for batch in batches) > CACHE_BYTES:
        return make
    kept = list(make())
    return lambda: iter(kept)


def precise(tensor: Tensor) -> Tensor:
    """In fp32 at least."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()

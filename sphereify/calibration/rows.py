"""Rows of a layer's patches, and of the outputs that it should give, a bounded number at a time."""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphereify.calibration.layer_pairs import LayerPair
from sphereify.calibration.moments import Rows
from sphereify.calibration.patches import Geometry
from sphereify.nn.precision import accumulated

MOST_ROWS = 65_536
"""Positions that a layer is fitted to by default, drawn from all of them."""
MOST_PRODUCTS = 1e12
"""Largest number of positions times fan_in²; where more would be needed, fewer positions are drawn."""
CHUNK_BYTES = 64 * 2**20
"""Size of the patches that are made at a time."""
CACHE_BYTES = 640 * 2**20
"""Size up to which the patches of a layer are cached between passes; larger ones are made anew in each pass."""
LEAST_SHARE = 0.3
"""Share of the mean squared output below which all errors weigh alike."""
EVENNESS = 0.75
"""Exponent p in the weight ‖output‖^(-2p) of an error: 0 weighs errors by their size, 1 as shares of the output."""


@dataclass
class Batch:
    """A layer's input in one pass, and the output that it should give.

    Attributes:
        x: the input.
        call: the arguments of a functional call; None for a module.
        filters: the filters that a functional call takes, if it takes some of them only.
        positions: the sampled positions of the output; None for all.
        raw: rows of the original layer's output.
        target: rows of the output that the layer should have.
        added: rows of what is added to the output before a ReLU; None if there is no such sum.
        rectified: True if a ReLU follows.
        normalized: rows after the normalization that follows in the original.
    """

    x: Tensor
    call: Any
    filters: slice
    positions: Tensor | None
    raw: Tensor
    target: Tensor
    added: Tensor | None
    rectified: bool
    normalized: Tensor | None


def sampled_positions(
    pair: LayerPair, output: Tensor, *, share: int, most: int = MOST_ROWS, seed: int, call: int, batch: int
) -> Tensor | None:
    """The positions of an output that the fit looks at, in order; None for all of them.

    Args:
        pair: the layer.
        output: the original layer's output.
        share: number of batches among which the positions of a fit are divided.
        most: number of positions of a fit, unless its filters need more.
        seed, call, batch: what the draw depends on, besides the layer's name.
    """
    fan_in, groups = pair.decision.shape[1:], getattr(pair.layer, "groups", 1)
    unknowns = max(1, math.prod(fan_in))
    available = output.numel() // (output.shape[-1] if pair.decision.kind == "linear" else pair.decision.shape[0])
    needed = max(4 * unknowns, min(most, int(MOST_PRODUCTS / (unknowns**2 * groups))))
    number = math.ceil(needed / share)
    if available <= number:
        return None
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {pair.name} {call} {batch}".encode()))
    return torch.randperm(available, generator=generator)[:number].sort().values.to(output.device)


def rows_at(pair: LayerPair, output: Tensor, positions: Tensor | None) -> Tensor:
    """A copy of a layer's output at some positions: (n, filters)."""
    if pair.decision.kind != "linear":
        dim = len(pair.decision.shape) - 2
        output = output.unsqueeze(0) if output.dim() == dim + 1 else output
        if positions is not None:
            output = output.movedim(1, -1)
            return accumulated(output[torch.unravel_index(positions, output.shape[:-1])])
        output = output.movedim(1, -1)
    rows = output.reshape(-1, output.shape[-1])
    return accumulated(rows.clone() if positions is None else rows[positions])


def chunks(geometry: Geometry, batches: list[Batch]) -> Iterator[Rows]:
    """The rows of all batches, in chunks of bounded size."""
    for batch, weight in zip(batches, _importance(batches), strict=True):
        patches, norms, sizes = geometry.patches(batch.x), geometry.norms(batch.x), geometry.sizes(batch.x)
        n, width = len(batch.target), math.prod(geometry.kernel) * (batch.x.shape[1] if geometry.kernel else 1)
        positions = batch.positions if batch.positions is not None else torch.arange(n, device=batch.x.device)
        step = max(256, CHUNK_BYTES // (4 * max(width, patches.shape[-1])))
        for start in range(0, n, step):
            piece = slice(start, start + step)
            unit = geometry.unit(patches, positions[piece], norms)
            added = None if batch.added is None else batch.added[piece]
            size = None if sizes is None else geometry.at(sizes, positions[piece]).unsqueeze(2)
            yield Rows(unit, batch.target[piece], weight[piece], added, size)


def _importance(batches: list[Batch]) -> list[Tensor]:
    """The weight of an error at each position, (n, 1): smaller where the layer's output is large.

    The layers that read the output are mostly angular as well: to them, an error matters as a share of the output.
    """
    sizes = []
    for batch in batches:
        used = batch.target if batch.added is None else batch.target + batch.added
        sizes.append((used.relu() if batch.rectified else used).square().sum(1, keepdim=True))
    if not all(batch.rectified for batch in batches):
        return [torch.ones_like(size) for size in sizes]
    level = torch.cat(sizes).mean().clamp_min(1e-12)
    return [(size / level + LEAST_SHARE) ** -EVENNESS for size in sizes]


def cached(make: Callable[[], Iterator[Rows]], batches: list[Batch], width: int) -> Callable[[], Iterator[Rows]]:
    """A maker of the same rows, which keeps them in memory if they are few enough."""
    if 4 * width * sum(len(batch.target) for batch in batches) > CACHE_BYTES:
        return make
    rows = list(make())
    return lambda: iter(rows)

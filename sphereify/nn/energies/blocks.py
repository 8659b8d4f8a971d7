"""Pairs of filters, a bounded number at a time."""

import torch
from torch import Tensor

ROOM = 1 << 22
"""Numbers in a temporary tensor, such as pairs of filters: 16 MiB in fp32."""


def whole_banks(unit: Tensor) -> tuple[Tensor, ...]:
    """Banks (groups, N, fan_in) in parts, each of as many as have room for all their pairs, at least one."""
    return unit.split(max(1, ROOM // max(1, unit.shape[1] ** 2)))


def row_blocks(unit: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """Indices of filters in parts, each of as many as have room for their pairs with all N filters, at least one."""
    return rows.split(max(1, ROOM // max(1, len(unit) * unit.shape[1])))


def cosines(unit: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines of some filters with all: (groups, N, fan_in), (R,) -> (groups, R, N), and where a filter meets
    itself: (R, N)."""
    itself = torch.arange(unit.shape[1], device=unit.device) == rows[:, None]
    return unit[:, rows] @ unit.mT, itself

"""Slow answers that share no code with the package: one patch and one filter at a time, float64, math.acos."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BORDERS = {
    # Where the value at place i comes from; `size` stands for the zero that is appended behind the last place.
    "zeros": lambda i, size: i if 0 <= i < size else size,
    "reflect": lambda i, size: -i if i < 0 else 2 * (size - 1) - i if i >= size else i,
    "replicate": lambda i, size: min(max(i, 0), size - 1),
    "circular": lambda i, size: i % size,
}


def g(name: str, theta: float, k: float = 0.3) -> float:
    if name == "linear":
        return 1 - 2 * theta / math.pi
    if name == "cosine":
        return math.cos(theta)
    return math.tanh((math.pi / 2 - theta) / (2 * k)) / math.tanh(math.pi / (4 * k))


def slope(name: str, theta: float, k: float = 0.3) -> float:
    """dg/dθ by the rules of calculus."""
    if name == "linear":
        return -2 / math.pi
    if name == "cosine":
        return -math.sin(theta)
    return -(1 / math.cosh((math.pi / 2 - theta) / (2 * k)) ** 2) / (2 * k * math.tanh(math.pi / (4 * k)))


def g_of_angles(name: str, theta: Tensor, k: float | Sequence[float] = 0.3, filters: int = 1) -> Tensor:
    """g of a tensor of angles; k is a number, or one for each place of dimension `filters`."""
    ks = k if isinstance(k, Sequence) else [k] * theta.shape[filters]
    columns = [
        column.clone().apply_(lambda t, k=k: g(name, t, k)) for column, k in zip(theta.unbind(filters), ks, strict=True)
    ]
    return torch.stack(columns, filters)


def angle(x: Sequence[float], w: Sequence[float], eps: float) -> float:
    dot = sum(a * b for a, b in zip(x, w, strict=True))
    root_x = math.sqrt(sum(a * a for a in x) + eps)
    root_w = math.sqrt(sum(b * b for b in w) + eps)
    return math.acos(min(1.0, max(-1.0, dot / (root_w * root_x))))


def linear_angles(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(*, in), (out, in) -> θ of shape (*, out)"""
    rows = x.detach().double().reshape(-1, weight.shape[1]).tolist()
    filters = weight.detach().double().tolist()
    theta = [[angle(row, w, eps) for w in filters] for row in rows]
    return torch.tensor(theta, dtype=torch.float64).reshape(*x.shape[:-1], len(filters))


def conv_angles(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int = 1,
    border: str = "zeros",
    radius: float = 0.0,
) -> Tensor:
    """(B, C, …), (O, C / groups, …) -> θ of shape (B, O, …)

    With a radius ρ each patch gets a coordinate more, ρ times the root of the mean squared length of the patches of its
    sample and group, and each filter a 0.
    """
    kernel = weight.shape[2:]
    padded = _pad(x.detach().double().numpy(), _sides(padding, kernel, dilation), border)
    filters = weight.detach().double().flatten(1).tolist()
    sizes = [
        (n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    ]
    theta = torch.zeros(len(padded), len(filters), *sizes, dtype=torch.float64)
    per_group = len(filters) // groups
    for b, group in itertools.product(range(len(padded)), range(groups)):
        channels = range(group * weight.shape[1], (group + 1) * weight.shape[1])
        patches = {}
        for place in itertools.product(*map(range, sizes)):
            taps = itertools.product(*map(range, kernel))
            spots = [
                tuple(p * s + t * d for p, s, t, d in zip(place, stride, tap, dilation, strict=True)) for tap in taps
            ]
            patches[place] = [float(padded[(b, c, *at)]) for c in channels for at in spots]
        squares = [sum(value * value for value in patch) for patch in patches.values()]
        lift = radius * math.sqrt(sum(squares) / len(squares)) if squares else 0.0
        for place, o in itertools.product(patches, range(group * per_group, (group + 1) * per_group)):
            theta[(b, o, *place)] = angle([*patches[place], lift], [*filters[o], 0.0], eps)
    return theta


def _sides(padding: Sequence[int] | str, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """How much to pad in front of and behind each dimension."""
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(r // 2, r - r // 2) for r in reach]
    return [(p, p) for p in padding]


def _pad(x: np.ndarray, sides: list[tuple[int, int]], border: str) -> np.ndarray:
    for axis, (front, behind) in enumerate(sides, start=2):
        size = x.shape[axis]
        sources = [BORDERS[border](i, size) for i in range(-front, size + behind)]
        with_zero = np.concatenate([x, np.zeros_like(x.take([0], axis))], axis)
        x = with_zero.take(sources, axis)
    return x


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on nothing but the arguments."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

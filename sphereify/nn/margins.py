"""Margins: what takes the place of g(θ) at the target class in training.

    ga-softmax, a-softmax     g(mθ)       the angle times m
    arcface                   g(θ + m)    the angle plus m (arXiv 1801.07698)
    cosface, sphereface2      s - m       the score less m (arXiv 1801.09414, 2108.01513)

Beyond π, where g would rise again, each goes on falling: see `falling`.
"""

import math
from collections.abc import Callable

from torch import Tensor

MULTIPLES = ("ga-softmax", "a-softmax")
SHIFTS = ("arcface",)
DIFFERENCES = ("cosface", "sphereface2")


def angle_with_margin(kind: str, theta: Tensor, margin: float) -> Tensor:
    """The angle at which a head of this kind evaluates g for the target class."""
    if kind in MULTIPLES:
        return margin * theta
    return theta + margin if kind in SHIFTS else theta


def falling(g: Callable[[Tensor], Tensor], phi: Tensor) -> Tensor:
    """ψ(φ) = g(φ - jπ) - 2j with j = ⌊φ/π⌋: g, continued beyond π so that it falls for all φ ≥ 0."""
    turns = (phi.detach() / math.pi).floor()
    return g(phi - turns * math.pi) - 2 * turns

"""SphereFace2 (ICLR 2022, arXiv 2108.01513): one binary task for each class, in place of one choice among all.

    G(g) = 2·((g + 1)/2)^t - 1                               the similarity, spread out by the power t
    L = λ/r·log(1 + exp(-r·(G(g_y) - m) - b)) + (1 - λ)/r·Σ_{j≠y} log(1 + exp(r·(G(g_j) + m) + b))

The margin is on both sides: positives must lie m above the threshold, negatives m below it. b is one learned number,
the threshold that all classes share.
"""

import math

from torch import Tensor


def similarity(g: Tensor, power: float) -> Tensor:
    """G(g) of scores in [-1, 1]."""
    return 2 * ((g + 1) / 2).clamp_min(0).pow(power) - 1


def balanced_bias(num_classes: int, scale: float, margin: float, power: float, positive_weight: float) -> float:
    """The b that balances positives and negatives where all features are at right angles to all classes.

    There ∂L/∂b = 0: λ·σ(-p) = (1 - λ)·(C - 1)·σ(n), with p and n the scores of positives and negatives. It is the b of
    the least initial loss. With z = λ/((1 - λ)(C - 1)) and u = exp(p) that is u² + (1 - z)·u - z·exp(-2rm) = 0.
    """
    z = positive_weight / ((1 - positive_weight) * (num_classes - 1))
    right_angle = 2 * 0.5**power - 1
    p, n = scale * (right_angle - margin), scale * (right_angle + margin)
    root = math.sqrt((1 - z) ** 2 + 4 * z * math.exp(p - n))
    if z > 1:
        return math.log((z - 1 + root) / 2) - p
    # For z < 1 that would be the difference of two numbers that are almost the same.
    return math.log(2 * z / (1 - z + root)) - n if root else (p - n) / 2 - p

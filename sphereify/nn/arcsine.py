"""arcsin as a polynomial: the coefficients, and what they mean.

On [0, 1], arccos c = √(1-c)·P(c) with a smooth P; the root takes the pole at c = 1. For c of both signs, with m = |c|,

    arcsin c    = sign(c)·(π/2 - √(1-m)·P(m))
    2/π·arcsin c = sign(c)·(m + s·((s - 1) - m·Q(m)))         s = √(1-m),  2/π·P(m) = 1 + m·Q(m)

Both are exact at 0 and at ±1. In fp32 the first errs by 1.9e-7 at most, since numbers near π/2 are 1.2e-7 apart; the
second, whose terms are small wherever its result is, by 1.03e-7 in units of arcsin.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

COEFFICIENTS = (
    math.pi / 2,
    -0.2146015622,
    0.08903932101,
    -0.05067014554,
    0.03288705088,
    -0.0214383052,
    0.01191435667,
    -0.004549114929,
    0.0008356733006,
)
"""Those of P, in ascending powers.

They are the minimax polynomial of degree 8 for the error of arcsin, √(1-m)·(P - arccos m / √(1-m)), with P(0) = π/2, by
Remez' exchange in float64, 2.0e-9. Their last digits were then moved by a random search for the smallest error of the
second form in fp32 (which makes it 8e-9 in float64), over the numbers in [1/4, 1] and three million below.
"""


def arcsin(cos: float) -> float:
    """arcsin of a number in [-1, 1], to 1e-8.

    >>> abs(arcsin(0.5) - math.pi / 6) < 2e-8, arcsin(0.0), arcsin(-1.0) == -math.pi / 2
    (True, 0.0, True)
    """
    size = abs(cos)
    p = 0.0
    for coefficient in reversed(COEFFICIENTS):
        p = p * size + coefficient
    return math.copysign(math.pi / 2 - math.sqrt(1 - size) * p, cos)


def is_fused(tensor: Tensor) -> bool:
    """True where torch.compile makes one loop of the operations on a tensor, so that polynomials cost least.

    In eager mode each term is a pass of its own, and torch's own functions are faster; GPUs have fast ones, and an
    exported program keeps the functions' names.
    """
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
    )


def arcsin_in_right_angles(cos: Tensor) -> Tensor:
    """2/π·arcsin cos, to 1e-7, by the second form above; cos in [-1, 1], fp32."""
    size = cos.abs()
    root = (1 - size).sqrt()
    q = _polynomial(ARCSINE_IN_RIGHT_ANGLES, size)
    return torch.copysign(size + root * ((root - 1) - size * q), cos)


def sine_of_right_angles(share: Tensor) -> Tensor:
    """sin(π/2·share), to 2e-7; share in [-1, 1], fp32."""
    return share * _polynomial(SINE_OF_RIGHT_ANGLES, share * share)


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """Σ coefficients[i]·x^i, by Horner's rule."""
    *others, value = coefficients
    total = x * value
    for coefficient in reversed(others[1:]):
        total = (total + coefficient) * x
    return total + others[0]


ARCSINE_IN_RIGHT_ANGLES = tuple(2 / math.pi * coefficient for coefficient in COEFFICIENTS[1:])
"""Those of Q."""
SINE_OF_RIGHT_ANGLES = tuple((-1) ** i * (math.pi / 2) ** (2 * i + 1) / math.factorial(2 * i + 1) for i in range(7))
"""Taylor's series of sin(π/2·x)/x in x²; the first term left out is below 1e-9."""

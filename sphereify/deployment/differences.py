"""Difference of outputs from those of the model that they should repeat, where some values are not finite."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

MASK = 1e4
"""The smallest absolute value that is usual for numbers that mask something out."""


def difference(output: Tensor, expected: Tensor) -> float:
    """The largest difference of two outputs, relative to the largest value expected, infinities and masks apart.

    NaN agrees with NaN and an infinity with the same infinity, as where classes are masked out with −∞. It is infinite
    where only one of the two is finite, or where the shapes differ.
    """
    if output.shape != expected.shape:
        return math.inf
    output, expected = _real(output), _real(expected)
    apart = ~((output == expected) | (output.isnan() & expected.isnan()))
    if not apart.any():
        return 0.0
    if not (output[apart].isfinite() & expected[apart].isfinite()).all():
        return math.inf
    scale = _scale(expected[~apart & expected.isfinite()], expected[apart])
    return float((output[apart] - expected[apart]).abs().max() / scale)


def _scale(equal: Tensor, unequal: Tensor) -> Tensor:
    """The largest value, without those equal ones that mask something out as −∞ would, such as the smallest number."""
    own = unequal.abs().max().clamp_min(1e-12)
    others = equal.abs()
    return torch.cat([own[None], others[(others < MASK) | (others < 1e3 * own)]]).max()


def _real(values: Tensor) -> Tensor:
    values = torch.view_as_real(values) if values.is_complex() else values
    return values.detach().cpu().double()


def is_number(output: Tensor) -> bool:
    """True for real and complex floating-point numbers, which round."""
    return output.is_floating_point() or output.is_complex()


def has_numbers(outputs: Iterable[Tensor]) -> bool:
    """True if there is a finite value among outputs, or if they are no floating-point numbers at all."""
    values = [one for one in outputs if is_number(one)]
    return not values or any(bool(one.isfinite().any()) for one in values)


def not_finite(outputs: Iterable[Tensor]) -> str:
    """A phrase on the values in outputs that are not finite; empty if all are."""
    values = [one for one in outputs if is_number(one)]
    odd, total = sum(int((~one.isfinite()).sum()) for one in values), sum(one.numel() for one in values)
    return f"{odd:,} of {total:,} output values are not finite" if odd else ""

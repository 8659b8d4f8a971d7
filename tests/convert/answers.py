"""Slow answers of functional calls, one angle at a time."""

from typing import Any

import torch
from torch import Tensor, nn

from sphereify.choices import DEFAULT_EPS
from sphereify.nn.functional_calls import AngularCall
from tests.nn.oracle import conv_angles, g_of_angles, linear_angles, normal


def the_call(model: nn.Module) -> AngularCall:
    [call] = [module for module in model.modules() if isinstance(module, AngularCall)]
    return call


def scaled_and_shifted(g: Tensor, beta: Tensor | None, *shifts: Tensor | None, axis: int = -1) -> Tensor:
    """β·g + shift by hand, with the channels along `axis`."""
    view = [1] * g.dim()
    view[axis] = -1
    if beta is not None:
        g = g * beta.detach().double().view(view)
    for shift in shifts:
        g = g if shift is None else g + shift.detach().double().view(view)
    return g


def linear_answer(x: Tensor, weight: Tensor, beta: Tensor | None, *shifts: Tensor | None) -> Tensor:
    return scaled_and_shifted(g_of_angles("sigmoid", linear_angles(x, weight, DEFAULT_EPS)), beta, *shifts)


def conv_answer(x: Tensor, weight: Tensor, beta: Tensor | None, *shifts: Tensor | None, **geometry: Any) -> Tensor:
    dims = weight.dim() - 2
    whole = {"stride": [1] * dims, "padding": [0] * dims, "dilation": [1] * dims, **geometry}
    theta = conv_angles(x, weight, DEFAULT_EPS, **whole)
    return scaled_and_shifted(g_of_angles("sigmoid", theta), beta, *shifts, axis=1)


def shake(call: AngularCall) -> AngularCall:
    """β and γ that differ from channel to channel, so that a mistaken order shows."""
    with torch.no_grad():
        for i, parameter in enumerate(call.parameters(recurse=False)):
            parameter.copy_(normal(len(parameter), seed=70 + i, dtype=parameter.dtype))
    return call

"""Filters at length 1, in a dtype that holds their angles."""

import torch
from torch import Tensor

from sphereify.nn.precision import LARGEST_HALF, accumulated


def unit(filters: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The filters at length 1, in fp32 or above, or in `dtype`: (..., fan_in) -> (..., fan_in).

    One of length 0 stays where it is, and no gradient pushes it in a random direction.
    """
    filters = precise(filters)
    filters = filters if dtype is None else filters.to(dtype)
    largest = filters.detach().abs().amax(-1, keepdim=True)
    is_zero = largest == 0
    # Divided by their largest value first: squares of 1e-30 are 0 in fp32, and those of 1e30 infinite.
    scaled = torch.where(is_zero, 1, filters) / torch.where(is_zero, 1, largest)
    return torch.where(is_zero, 0, torch.nn.functional.normalize(scaled, dim=-1, eps=0))


def precise(filters: Tensor) -> Tensor:
    """The filters in fp32 or above, with a gradient that their own dtype can hold."""
    wide = accumulated(filters)
    if filters.dtype is torch.float16 and wide.requires_grad:
        wide.register_hook(lambda grad: grad.clamp(-LARGEST_HALF, LARGEST_HALF))  # fp16 would make it infinite
    return wide

"""Results that are computed again in the backward pass, so that what they need in between is not kept."""

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint

from sphereify.nn.precision import in_transform


def recomputed(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`, of which only the arguments and the result are kept until the backward pass.

    The function must draw no random numbers. In a transformation of torch.func, which knows no checkpoints, it is
    called as it is.
    """
    if in_transform():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)

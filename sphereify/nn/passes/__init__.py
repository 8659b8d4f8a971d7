"""The passes around the products of an angular map, which `protocol` defines and three modules make.

`reference` works everywhere, `cpu` is faster in eager mode on a CPU, and `triton` on CUDA.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from sphereify.nn.geometry import Projection
from sphereify.nn.passes import cpu, reference, self_check, triton
from sphereify.nn.passes.protocol import Passes
from sphereify.nn.precision import runs_eagerly

Result = TypeVar("Result")


def with_passes(
    method: Callable[..., Result], x: Tensor, weight: Tensor, projection: Projection | None, *arguments: Any
) -> Result:
    """method(passes, x, weight, projection, *arguments) with the fastest passes for these tensors.

    Where a Triton kernel cannot be compiled or launched, or disagrees with the reference, a warning says so once, and
    the other passes serve from then on.
    """
    if not runs_eagerly(x, weight, *(value for value in arguments if isinstance(value, Tensor))):
        return method(reference, x, weight, projection, *arguments)
    if triton.usable(x, weight, projection):
        try:
            if self_check.is_trusted(x, weight, projection):
                return method(triton, x, weight, projection, *arguments)
        except triton.KernelFailure as failure:
            triton.give_up(failure)
    passes: Passes = cpu if cpu.usable(x, weight, projection) else reference
    return method(passes, x, weight, projection, *arguments)

"""What surrounds the products of an angular map: `protocol` says what it is, and three modules make it.

`reference` works everywhere, `cpu` is faster in eager mode on a CPU, and `triton` on CUDA.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from sphereify.nn.geometry import Projection
from sphereify.nn.passes import cpu, reference, triton
from sphereify.nn.passes.protocol import Passes

Result = TypeVar("Result")


def with_passes(
    method: Callable[..., Result], x: Tensor, weight: Tensor, projection: Projection | None, *arguments: Any
) -> Result:
    """method(passes, x, weight, projection, *arguments) with the fastest passes for these tensors.

    A Triton kernel that cannot be compiled or launched is told once in a warning, and the other passes do the work from
    then on.
    """
    if triton.usable(x, weight, projection):
        try:
            return method(triton, x, weight, projection, *arguments)
        except triton.KernelFailure as failure:
            triton.give_up(failure)
    passes: Passes = cpu if cpu.usable(x, weight, projection) else reference
    return method(passes, x, weight, projection, *arguments)

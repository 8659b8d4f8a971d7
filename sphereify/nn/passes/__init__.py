"""The passes around the products of an angular map, which `protocol` defines and four modules make.

`reference` works everywhere; in eager mode `cpu` is faster on a CPU, `compiled` in training on one, `triton` on CUDA.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from sphereify.nn.geometry import Projection
from sphereify.nn.passes import compiled, cpu, reference, self_check, triton
from sphereify.nn.passes.protocol import Passes
from sphereify.nn.precision import runs_eagerly

Result = TypeVar("Result")


def with_passes(
    method: Callable[..., Result],
    x: Tensor,
    weight: Tensor,
    projection: Projection | None,
    *arguments: Any,
    training: bool = False,
) -> Result:
    """method(passes, x, weight, projection, *arguments) with the fastest passes for these tensors.

    Where a pass cannot be compiled or launched, or a kernel disagrees with the reference, a warning says so once, and
    the other passes serve from then on.

    Args:
        training: a gradient is recorded or computed, so that it may pay to compile passes.
    """
    if not runs_eagerly(x, weight, *(value for value in arguments if isinstance(value, Tensor))):
        return method(reference, x, weight, projection, *arguments)
    if triton.usable(x, weight, projection):
        try:
            if self_check.is_trusted(x, weight, projection):
                return method(triton, x, weight, projection, *arguments)
        except triton.KernelFailure as failure:
            triton.give_up(failure)
    if training and compiled.usable(x, weight, projection):
        try:
            return method(compiled, x, weight, projection, *arguments)
        except compiled.CompilerFailure as failure:
            compiled.give_up(failure)
    passes: Passes = cpu if cpu.usable(x, weight, projection) else reference
    return method(passes, x, weight, projection, *arguments)

"""The passes around the products of an angular map, which `protocol` defines and four modules make.

`reference` works everywhere; in eager mode `triton` serves on CUDA, and on a CPU `compiled`, or `cpu` where there is no
compiler.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from sphereify.nn.geometry import Projection
from sphereify.nn.passes import compiled, cpu, reference, self_check, triton
from sphereify.nn.passes.protocol import AngularMap, Passes
from sphereify.nn.passes.switch import KernelFailure
from sphereify.nn.precision import runs_eagerly

Result = TypeVar("Result")


def with_passes(method: Callable[..., Result], x: Tensor, weight: Tensor, form: AngularMap, *arguments: Any) -> Result:
    """method(passes, x, weight, form, *arguments) with the fastest passes for these tensors.

    Where kernels cannot be compiled or launched, or disagree with the reference, a warning says so once, and the other
    passes serve from then on.
    """
    if not runs_eagerly(x, weight, *(value for value in arguments if isinstance(value, Tensor))):
        return method(reference, x, weight, form, *arguments)
    projection, curve, _ = form
    for maker in (triton, compiled):
        if serves(maker, x, weight, projection, curve):
            try:
                return method(maker, x, weight, form, *arguments)
            except KernelFailure as failure:
                maker.give_up(failure)
    passes: Passes = cpu if cpu.usable(x, weight, projection) else reference
    return method(passes, x, weight, form, *arguments)


def serves(maker: Any, x: Tensor, weight: Tensor, projection: Projection | None, curve: str) -> bool:
    """True if kernels can serve an angular map of x and weight, where operations run eagerly, and are right."""
    if not maker.usable(x, weight, projection):
        return False
    try:
        return self_check.is_trusted(maker, x, weight, projection, curve)
    except KernelFailure as failure:
        maker.give_up(failure)
        return False

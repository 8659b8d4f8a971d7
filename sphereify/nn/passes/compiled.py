"""The passes of operators with angles in training on a CPU, with their curve compiled by Inductor.

Angles cost more than all other passes together in ATen, where each function (arcsin, sine, cosine, logistic) is a pass
of its own and a slow one. Compiled, the curve and its backward are one loop each, over polynomials. The other passes
are those of `cpu`, and so are all of the cosine, which has no angle and gains nothing.

A curve is compiled at its first use, once a process for each operator, layout and dtype and for any size: 2 to 5
seconds, or some tenths of a second where Inductor finds it in its cache on disk. That pays in training only, and for
large tensors, so inference and small layers are served by `cpu`.

SPHEREIFY_COMPILED_PASSES=0 in the environment, or `enabled(False)`, switches them off; without a C++ compiler they are
off, and where torch.compile is (TORCH_COMPILE_DISABLE=1, `torch.compiler.set_stance`). When one cannot be compiled, the
process warns once and stays with `cpu`.
"""

import itertools
import os
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from sphereify.errors import first_line
from sphereify.nn.geometry import Projection
from sphereify.nn.operators import CURVES, SIN_FLOOR, CosineOperator
from sphereify.nn.passes import cpu
from sphereify.nn.passes.cpu import filter_gradient as filter_gradient
from sphereify.nn.passes.cpu import normalize_filters as normalize_filters
from sphereify.nn.passes.cpu import patch_norm as patch_norm
from sphereify.nn.passes.cpu import subtract_radial as subtract_radial
from sphereify.nn.passes.protocol import CurveGradients
from sphereify.nn.passes.reference import rescaled
from sphereify.nn.passes.switch import Switch
from sphereify.nn.passes.views import View

SMALLEST = 2**16
"""Fewest elements of an output for which a compiled curve gains more than its call costs."""


class CompilerFailure(RuntimeError):
    """A pass could not be compiled; the cause is attached."""


# ---- When they are used


_switch = Switch("SPHEREIFY_COMPILED_PASSES")
enabled = _switch.enabled


def usable(x: Tensor, weight: Tensor, projection: Projection | None) -> bool:
    """True if these passes can serve an angular map of x and weight in training, where operations run eagerly."""
    return (
        _switch.on
        and not _switch.failed
        and cpu.usable(x, weight, projection)
        and not _is_watched()
        and _has_compiler()
    )


def _is_watched() -> bool:
    """True inside a mode that counts, records or fakes operations: it would see none of these, or be compiled itself.

    A default device is a mode, too, which does not matter: no tensor is made in what is compiled.
    """
    modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
    return torch._C._len_torch_dispatch_stack() > 0 or any(not isinstance(mode, DeviceContext) for mode in modes)


def state() -> str:
    """Whether curves are compiled in this process, in words."""
    if not _switch.on:
        return "switched off (SPHEREIFY_COMPILED_PASSES)"
    if _switch.failed:
        return "given up, since a curve could not be compiled"
    if not _has_compiler():
        return "not used without the C++ compiler that torch.compile takes (CXX, or g++)"
    return "in use in training on the CPU"


def give_up(failure: CompilerFailure) -> None:
    """Warn that a pass could not be compiled, after which none is `usable` in this process."""
    _switch.failed = True
    cause = failure.__cause__ or failure
    warnings.warn(
        f"The pass {failure} could not be compiled, so this process trains on the CPU with the slower passes in ATen "
        f"({first_line(cause)}). SPHEREIFY_COMPILED_PASSES=0 in the environment leaves the attempt out.",
        RuntimeWarning,
        stacklevel=2,
    )


@cache
def _has_compiler() -> bool:
    """True if Inductor can be expected to find a C++ compiler."""
    usual = "clang++" if sys.platform == "darwin" else "g++"
    return sys.platform != "win32" and shutil.which(os.environ.get("CXX") or usual) is not None


# ---- The passes


def curve(
    dot: Tensor,
    norm: Tensor,
    curve: str,
    k: float | Tensor | None,
    projection: Projection | None,
    beta: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """g of dot / norm, which takes the place of `dot`, and β·g + shift, None where there is neither of them."""
    if not _pays(dot, curve):
        return cpu.curve(dot, norm, curve, k, projection, beta, shift)
    view = View.of(dot, projection)
    dot = view.arranged(dot)
    y = None if beta is None and shift is None else torch.empty_like(dot)
    of_filters = [view.of_filters(_detached(values), dot.dim()) for values in (k, beta, shift)]
    _run(_curve, view(dot), view.patches(norm), *of_filters, None if y is None else view(y), curve=curve)
    return dot, y


def curve_backward(
    grad: Tensor,
    g: Tensor,
    norm: Tensor,
    curve: str,
    k: float | Tensor | None,
    projection: Projection | None,
    beta: Tensor | None,
    shift_dtype: torch.dtype | None,
    needed: Sequence[bool],
) -> CurveGradients:
    """What becomes of the gradient of β·g + shift, all recovered from g."""
    if not _pays(g, curve):
        return cpu.curve_backward(grad, g, norm, curve, k, projection, beta, shift_dtype, needed)
    view = View.of(g, projection)
    g, grad = view.arranged(g.detach()), view.arranged(grad.detach())
    filters_k, filters_beta = (view.of_filters(_detached(values), g.dim()) for values in (k, beta))
    values = view(g)
    d_dot, radial = torch.empty_like(g), view.empty_patches(g) if needed[0] else None
    filters = values.shape[1:3]
    by_k = torch.empty_like(filters_k) if isinstance(k, Tensor) and needed[2] else None
    by_beta = None if beta is None else g.new_empty(filters, dtype=beta.dtype)
    by_shift = None if shift_dtype is None else g.new_empty(filters, dtype=shift_dtype)
    _run(
        _curve_backward, view(grad), values, view.patches(norm), filters_k, filters_beta, view(d_dot),
        None if radial is None else view.patches(radial), by_k, by_beta, by_shift,
        curve=curve, channels=view.channels,
    )  # fmt: skip
    return CurveGradients(
        d_dot,
        radial,
        None if by_k is None else by_k.view(k.shape),  # type: ignore[union-attr]
        None if by_beta is None else by_beta.flatten(),
        None if by_shift is None else by_shift.flatten(),
    )


def _pays(outputs: Tensor, curve: str) -> bool:
    """True if it pays to compile the curve for a layer with these outputs.

    Without its compilation, which a user can forbid, a curve runs as it is written, slower than the blocks of `cpu`.
    """
    return curve != CosineOperator.name and outputs.numel() >= SMALLEST and _may_compile()


def _may_compile() -> bool:
    """False under TORCH_COMPILE_DISABLE=1, or inside any stance of `torch.compiler.set_stance` but the default one."""
    try:
        from torch._dynamo import config, eval_frame  # takes seconds to import, which only compiling is worth
    except Exception as error:  # it makes the folder of Inductor's cache, for example
        raise CompilerFailure("curve") from error
    return not config.disable and eval_frame._stance.stance == "default"


def _detached(values: Any) -> Any:
    """A tensor without a graph, which torch.compile would warn about; numbers and None stay."""
    return values.detach() if isinstance(values, Tensor) else values


# ---- What is compiled: functions of views that write to tensors which exist


def _curve(
    dot: Tensor,
    norm: Tensor,
    k: float | Tensor | None,
    beta: Tensor | None,
    shift: Tensor | None,
    y: Tensor | None,
    *,
    curve: str = "",
) -> None:
    g = CURVES[curve].value((dot.to(norm.dtype) / norm).clamp(-1, 1), k)
    dot.copy_(g)
    if y is not None:
        beta, shift = (None if values is None else values.to(norm.dtype) for values in (beta, shift))
        y.copy_(rescaled(g, beta, shift))


def _curve_backward(
    grad: Tensor,
    g: Tensor,
    norm: Tensor,
    k: float | Tensor | None,
    beta: Tensor | None,
    d_dot: Tensor,
    radial: Tensor | None,
    by_k: Tensor | None,
    by_beta: Tensor | None,
    by_shift: Tensor | None,
    *,
    curve: str = "",
    channels: int = -1,
) -> None:
    upstream, value = grad.to(norm.dtype), g.to(norm.dtype)
    places = [0] if channels == -1 else [0, 3]
    if by_shift is not None:
        by_shift.copy_(upstream.sum(places))
    if beta is not None and by_beta is not None:
        by_beta.copy_((upstream * value).sum(places))
        upstream = upstream * beta.to(norm.dtype)
    slope = CURVES[curve].slope(value, k, SIN_FLOOR[g.dtype])
    if by_k is not None and slope.by_k is not None:
        by_k.copy_((upstream * slope.by_k).sum_to_size(by_k.shape))
    d = upstream if slope.by_cos is None else upstream * slope.by_cos
    if radial is not None:
        radial.copy_((d * slope.cos).sum(channels, keepdim=True) / (norm * norm))
    d_dot.copy_(d / norm)


# ---- Compiling


def _run(function: Callable[..., None], *arguments: Any, **constants: Any) -> None:
    """function(*arguments, **constants), compiled; numbers among the arguments are constants, too.

    A form is compiled for each pattern of tensors and their dtypes and each layout, so that torch's limit of forms of
    one function is not met, and then for any size.
    """
    form = tuple(
        (argument.dtype, *(size == 1 for size in argument.shape)) if isinstance(argument, Tensor) else argument
        for argument in arguments
    )
    try:
        _compiled(function, form, **constants)(*arguments)
    except Exception as error:
        raise CompilerFailure(function.__name__.strip("_")) from error


@cache
def _compiled(function: Any, form: tuple, **constants: Any) -> Callable[..., None]:
    """The function with these constants, which torch compiles for any size when it is called with a form."""
    del form  # makes another entry of the cache
    name = f"{function.__name__}_{next(_numbers)}"
    twin = types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    twin.__kwdefaults__ = {**function.__kwdefaults__, **constants}
    return torch.compile(twin, dynamic=True, fullgraph=True)  # type: ignore[no-any-return]


_numbers = itertools.count()

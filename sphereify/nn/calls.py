"""Convolutions and linear maps that a forward calls as functions, made angular where they are called.

`F.linear(x, self.qkv.weight, bias)` has no layer to swap. The module whose forward makes the call is given a subclass
of its own class, with the same name after "Angular", that runs the inherited forward and answers those calls, known by
the weight they pass, with an `AngularCall`. Nothing is traced or frozen: control flow, training mode and functional
dropout stay the module's own.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sphereify.nn.functional import Operator, sphere_conv1d, sphere_conv2d, sphere_conv3d, sphere_linear

CALLS = "angular_calls"
"""Where a module keeps its `AngularCall`s, by key."""


class Arguments(NamedTuple):
    """What a functional convolution or linear map was called with; filters are the rows of `weight`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: tuple[Any, ...]
    """Stride, padding, dilation, groups; empty for a linear map."""
    source: Tensor
    """The tensor that was passed as the weight, before any transposition."""


def _conv_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
                    dilation: Any = 1, groups: int = 1) -> Arguments:  # fmt: skip
    return Arguments(input, weight, bias, (stride, padding, dilation, groups), weight)


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Arguments:
    return Arguments(input, weight, bias, (), weight)


def _addmm_arguments(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Arguments:
    return Arguments(mat1, mat2.t(), input if beta == 1 else input * beta, (), mat2)


class Function(NamedTuple):
    kind: str
    arguments: Callable[..., Arguments]
    angular: Callable[..., Tensor]


FUNCTIONS: dict[Any, Function] = {
    F.linear: Function("linear", _linear_arguments, sphere_linear),
    torch.addmm: Function("linear", _addmm_arguments, sphere_linear),
    Tensor.addmm: Function("linear", _addmm_arguments, sphere_linear),
    **{f: Function("conv1d", _conv_arguments, sphere_conv1d) for f in (F.conv1d, torch.conv1d)},
    **{f: Function("conv2d", _conv_arguments, sphere_conv2d) for f in (F.conv2d, torch.conv2d)},
    **{f: Function("conv3d", _conv_arguments, sphere_conv3d) for f in (F.conv3d, torch.conv3d)},
}
"""The functions that count as sites, with how to read their arguments."""


class AngularCall(nn.Module):
    """The operator, β and γ of one functional call.

    Args:
        kind: conv1d, conv2d, conv3d or linear.
        filters: number of rows of the weight.
        operator: an operator object.
        rescale: learn `beta` and, unless the call passes a bias, `gamma`.
        has_bias: whether the call passes a bias, which then is γ.
        eps: as `SphereConv2d`.
    """

    beta: nn.Parameter | None
    gamma: nn.Parameter | None

    def __init__(
        self,
        kind: str,
        filters: int,
        operator: Operator,
        *,
        rescale: bool,
        has_bias: bool,
        eps: float,
        device: Any,
        dtype: Any,
    ):
        super().__init__()
        self.kind = kind
        self.operator = operator
        self.eps = eps
        ones = torch.ones(filters, device=device, dtype=dtype)
        self.register_parameter("beta", nn.Parameter(ones) if rescale else None)
        self.register_parameter("gamma", nn.Parameter(torch.zeros_like(ones)) if rescale and not has_bias else None)

    def forward(self, function: Function, call: Arguments) -> Tensor:
        x, weight, bias, geometry, _ = call
        g = function.angular(x, weight, self.operator, None, *geometry, eps=self.eps)
        channels = (-1, *[1] * (weight.dim() - 2))
        if self.beta is not None:
            g = g * self.beta.to(g.dtype).view(channels)
        for shift in (self.gamma, bias):
            if shift is not None:
                g = g + shift.to(g.dtype).view(channels)
        return g

    def extra_repr(self) -> str:
        return f"{self.kind}, rescale={self.beta is not None}, eps={self.eps:g}"


class _Answer(TorchFunctionMode):
    """While active, answers the calls that a module's `AngularCall`s stand for; all others pass."""

    def __init__(self, owner: nn.Module):
        super().__init__()
        self.calls: Any = getattr(owner, CALLS)
        self.weights = [(key, _resolve(owner, key)) for key in self.calls]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        function = FUNCTIONS.get(func)
        if function is not None:
            call = function.arguments(*args, **(kwargs or {}))
            for key, weight in self.weights:
                if call.source is weight or (weight is None and not isinstance(call.source, nn.Parameter)):
                    return self.calls[key](function, call)
                if weight is not None and call.source._base is weight:
                    return self.calls[key](function, call)
        return func(*args, **(kwargs or {}))


COMPUTED = "computed"
"""The key of a call whose weight is no parameter but computed from some, as in weight standardization."""


def _resolve(owner: nn.Module, key: str) -> Tensor | None:
    """The parameter that a key stands for; None for a computed weight."""
    if key == COMPUTED:
        return None
    path, _, name = parameter_name(key).rpartition(".")
    return getattr(owner.get_submodule(path), name)  # type: ignore[no-any-return]


class _AnswersCalls:
    """Mixed in front of the class of a module whose functional calls are angular."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Answer(self):  # type: ignore[arg-type]
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time, so pickle is told how to make it again.
        function, arguments, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        if function.__name__ == "__newobj__" and arguments[0] is type(self):
            return _new, (_base(type(self)), *arguments[1:]), *rest
        return function, arguments, *rest


@functools.cache
def angular_class(base: Hashable) -> Any:
    """The subclass of `base` whose functional calls are answered; one for each base."""
    assert isinstance(base, type)
    about = {"__module__": base.__module__, "__doc__": base.__doc__}
    return type(f"Angular{base.__name__}", (_AnswersCalls, base), about)


def _new(base: type[nn.Module], *arguments: Any) -> nn.Module:
    cls = angular_class(cast(Hashable, base))
    return cls.__new__(cls, *arguments)


def _base(cls: type) -> type:
    return cls.__mro__[2]  # behind the class itself and the mixin


def make_plain(module: nn.Module) -> None:
    """Let a module make its functional calls as its own class does, in place. Its `AngularCall`s stay."""
    if answers_calls(module):
        module.__class__ = _base(type(module))


def answers_calls(module: nn.Module) -> bool:
    return isinstance(module, _AnswersCalls)


def answer_call(owner: nn.Module, parameter: str | None, call: AngularCall) -> None:
    """Make the owner's functional call with that parameter angular, in place; None is a computed weight.

    Args:
        owner: the module whose forward makes the call.
        parameter: qualified name of the weight, relative to the owner.
        call: what answers.
    """
    if not answers_calls(owner):
        owner.__class__ = angular_class(cast(Hashable, type(owner)))
        owner.add_module(CALLS, nn.ModuleDict())
    getattr(owner, CALLS)[call_key(parameter)] = call


def call_key(parameter: str | None) -> str:
    """The key of a parameter's call: a ModuleDict's keys hold no dots."""
    return COMPUTED if parameter is None else parameter.replace(".", "/")


def parameter_name(key: str) -> str:
    """The parameter that a key stands for, as `call_key` made it."""
    return key.replace("/", ".")

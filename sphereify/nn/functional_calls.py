"""Convolutions and linear maps that a forward calls as functions, made angular where they are called.

`F.linear(x, self.qkv.weight, bias)` has no layer to swap. The module whose forward makes the call is given a subclass
of its own class, with the same name after "Angular", that runs the inherited forward and answers those calls, known by
the weight they pass, with an `AngularCall`. Nothing is traced or frozen: control flow, training mode and functional
dropout stay the module's own.
"""

import functools
import sys
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sphereify.errors import UnsupportedModelError
from sphereify.nn.functional import Operator, gathered, sphere_conv1d, sphere_conv2d, sphere_conv3d, sphere_linear

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


def _matmul_arguments(input: Tensor, other: Tensor | None = None, *, mat2: Tensor | None = None) -> Arguments:
    matrix = cast(Tensor, mat2 if other is None else other)
    return Arguments(input, matrix.t() if matrix.dim() == 2 else matrix, None, (), matrix)


class Function(NamedTuple):
    kind: str
    arguments: Callable[..., Arguments]
    angular: Callable[..., Tensor]
    columns: bool = False
    """Whether the filters are the columns of the matrix that it takes."""
    any_product: bool = False
    """Whether it multiplies all sorts of things, and is a linear map only with a learned matrix on the right."""

    def read(self, args: tuple, kwargs: dict[str, Any]) -> Arguments | None:
        """The arguments of a call, or None if it is made in a way that has no angular answer, such as with `out`."""
        try:
            return self.arguments(*args, **kwargs)
        except (TypeError, AttributeError):
            return None


FUNCTIONS: dict[Any, Function] = {
    F.linear: Function("linear", _linear_arguments, sphere_linear),
    torch.addmm: Function("linear", _addmm_arguments, sphere_linear, columns=True),
    Tensor.addmm: Function("linear", _addmm_arguments, sphere_linear, columns=True),
    **{
        f: Function("linear", _matmul_arguments, sphere_linear, columns=True, any_product=True)
        for f in (torch.matmul, torch.linalg.matmul, Tensor.matmul, torch.mm, Tensor.mm)
    },
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
        columns: whether the filters are the columns of the weight that is passed.
        groups: of the convolution.
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
        columns: bool = False,
        groups: int = 1,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        self.kind = kind
        self.columns = columns
        self.groups = groups
        self.of_parametrization = False
        """Whether torch computes the weight, until its parametrization is removed."""
        self.operator = operator
        self.eps = eps
        ones = torch.ones(filters, device=device, dtype=dtype)
        self.register_parameter("beta", nn.Parameter(ones) if rescale else None)
        self.register_parameter("gamma", nn.Parameter(torch.zeros_like(ones)) if rescale and not has_bias else None)

    def forward(self, function: Function, call: Arguments, rows: slice = slice(None)) -> Tensor:
        """The angular answer to a call; `rows` are the filters that take part, where it is one of several."""
        x, weight, bias, geometry, _ = call
        g = function.angular(x, weight, self.operator, None, *geometry, eps=self.eps)
        channels = (-1, *[1] * (weight.dim() - 2))
        if self.beta is not None:
            g = g * self.beta[rows].to(g.dtype).view(channels)
        for shift in (self.gamma[rows] if self.gamma is not None else None, bias):
            if shift is not None:
                whole = shift.dim() > 1  # the addend of an addmm may be a matrix
                g = g + (shift.to(g.dtype) if whole else shift.to(g.dtype).view(channels))
        unchanged = self.beta is None and self.gamma is None and bias is None
        return g.clone() if unchanged and g.requires_grad else g  # backward needs g as it is; see AngularLayer

    def extra_repr(self) -> str:
        return f"{self.kind}, rescale={self.beta is not None}, eps={self.eps:g}"


class _Answer(TorchFunctionMode):
    """While active, answers the calls that a module's `AngularCall`s stand for; all others pass."""

    def __init__(self, owner: nn.Module):
        super().__init__()
        self.owner = owner
        self.with_gradient = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self.calls: Any = getattr(owner, CALLS)
        self.weights = [(key, _resolve(owner, key)) for key in self.calls]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.multi_head_attention_forward:
            return _attend(self, *args, **(kwargs or {}))
        function = FUNCTIONS.get(func)
        if function is not None:
            call = function.read(args, kwargs or {})
            source = call.source if call is not None else None
            answer = self.answer_to(source, may_be_computed=not function.any_product)
            if call is not None and answer is not None and call.source.dim() >= 2:
                if self.with_gradient:
                    _refuse_checkpoint(self.owner)
                return answer(function, call)
        return func(*args, **(kwargs or {}))

    def answer_to(self, weight: Tensor | None, *, may_be_computed: bool = True) -> "AngularCall | None":
        """The call that stands for this weight: a parameter, a view of one, or something computed."""
        if weight is None:
            return None
        for key, known in self.weights:
            if known is not None and (weight is known or weight._base is known):
                if weight.numel() != known.numel():
                    if COMPUTED in self.calls:
                        continue
                    raise UnsupportedModelError(
                        f"{_base(type(self.owner)).__name__} uses a part of {parameter_name(key)}, of shape "
                        f"{tuple(weight.shape)}, as a weight, and was planned with all of it: keep it with exclude"
                    )
                return self.calls[key]  # type: ignore[no-any-return]
        for key, _ in self.weights:
            if self.calls[key].of_parametrization and weight is self.owner._parameters.get("weight"):
                return self.calls[key]  # type: ignore[no-any-return]  # the parametrization has been removed
        for key, known in self.weights:
            fits = may_be_computed if known is None else _is_cast(weight, known)
            if fits and not isinstance(weight, nn.Parameter) and not self._holds(weight):
                return self.calls[key]  # type: ignore[no-any-return]
        return None

    def _holds(self, tensor: Tensor) -> bool:
        """Whether this is a parameter or buffer of the owner's as it is, plain where `torch.func` put it there."""
        return any(tensor is one for one in (*self.owner.parameters(), *self.owner.buffers()))


def _refuse_checkpoint(owner: nn.Module) -> None:
    """In the backward pass, a checkpoint would repeat the owner's calls without their answers."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not _AnswersCalls.forward.__code__:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            raise UnsupportedModelError(
                f"{_base(type(owner)).__name__} makes its angular call inside torch.utils.checkpoint, which would "
                f"repeat it as a plain one. Put the checkpoint around the whole module, switch it off, or keep the "
                f"call with exclude."
            )
        frame = frame.f_back  # type: ignore[assignment]


def _is_cast(weight: Tensor, parameter: Tensor) -> bool:
    """Whether this is most likely the parameter in another dtype, as of `self.weight.to(x.dtype)`."""
    other = weight.dtype is not parameter.dtype and not isinstance(weight, nn.Parameter)
    return other and weight.shape == parameter.shape


def _attend(answers: _Answer, query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
            in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None,
            add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Tensor | None,
            **options: Any) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`F.multi_head_attention_forward` with angular projections.

    Queries, keys and values are projected here, the attention itself is torch's, with the identity for its projections:
    masks, added keys and weights stay what they are, at the price of four products with an identity matrix.
    """
    separate = [options.pop(name, None) for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    options.pop("use_separate_proj_weight", None)
    together = answers.answer_to(in_proj_weight)
    weights: Any = in_proj_weight.chunk(3) if in_proj_weight is not None else separate
    biases: Any = in_proj_bias.chunk(3) if in_proj_bias is not None else (None,) * 3
    projected = []
    for place, (x, weight, bias) in enumerate(zip((query, key, value), weights, biases, strict=True)):
        rows = slice(place * len(weight), (place + 1) * len(weight)) if together else slice(None)
        projected.append(_project(together or answers.answer_to(weight), x, weight, bias, rows))
    identity = torch.eye(embed_dim_to_check, device=query.device, dtype=projected[0].dtype)
    output, attention = cast(Any, F.multi_head_attention_forward)(
        *projected, embed_dim_to_check, num_heads, None, None, bias_k, bias_v, add_zero_attn, dropout_p, identity, None,
        use_separate_proj_weight=True, q_proj_weight=identity, k_proj_weight=identity, v_proj_weight=identity,
        **options,
    )  # fmt: skip
    output = _project(answers.answer_to(out_proj_weight), output, out_proj_weight, out_proj_bias, slice(None))
    return output, attention


def _project(answer: "AngularCall | None", x: Tensor, weight: Any, bias: Tensor | None, rows: slice) -> Tensor:
    if answer is None:
        return F.linear(x, weight, bias)
    return answer(FUNCTIONS[F.linear], Arguments(x, weight, bias, (), weight), rows)  # type: ignore[no-any-return]


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
    about = {"__module__": base.__module__, "__doc__": base.__doc__, "_plain_class": base}
    if _is_parametrized(base):
        # torch takes the first base when the last parametrization is removed, so its class has to stay in front.
        inner = angular_class(cast(Hashable, base.__bases__[0]))
        own = {name: value for name, value in vars(base).items() if name not in ("__dict__", "__weakref__")}
        return type(f"Parametrized{inner.__name__}", (inner,), {**own, **about})
    return type(f"Angular{base.__name__}", (_AnswersCalls, base), about)


def _is_parametrized(cls: type) -> bool:
    """Whether this is a class that torch makes for a module with parametrizations."""
    return getattr(vars(cls).get("__getstate__"), "__module__", "") == "torch.nn.utils.parametrize"


def _new(base: type[nn.Module], *arguments: Any) -> nn.Module:
    cls = angular_class(cast(Hashable, base))
    return cls.__new__(cls, *arguments)


def _base(cls: type) -> type:
    return cls._plain_class  # type: ignore[attr-defined, no-any-return]


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
    call.of_parametrization = _is_parametrized(type(owner))
    if not answers_calls(owner):
        owner.__class__ = angular_class(cast(Hashable, type(owner)))
        owner.add_module(CALLS, nn.ModuleDict().train(owner.training))
    getattr(owner, CALLS)[call_key(parameter)] = call


def angular_weights(owner: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters whose direction alone matters, because an owner's angular calls use them as filters."""
    for key in getattr(owner, CALLS) if answers_calls(owner) else ():
        weight = _resolve(owner, key)
        if isinstance(weight, nn.Parameter):
            yield weight
        else:  # computed from what the owner and its parametrizations hold
            yield from owner.parameters(recurse=False)
            yield from (p for n, p in owner.named_parameters() if n.startswith("parametrizations."))


def filters_of_calls(owner: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Name, weight and filters (groups, N, fan_in) of an owner's angular calls on a whole parameter."""
    for key, call in getattr(owner, CALLS).items() if answers_calls(owner) else ():
        weight = _resolve(owner, key)
        if isinstance(weight, nn.Parameter):
            matrix = gathered(weight)
            rows = matrix.t() if call.columns else matrix.flatten(1)
            yield parameter_name(key), weight, rows.unflatten(0, (call.groups, -1))


def call_key(parameter: str | None) -> str:
    """The key of a parameter's call: a ModuleDict's keys hold no dots."""
    return COMPUTED if parameter is None else parameter.replace(".", "/")


def parameter_name(key: str) -> str:
    """The parameter that a key stands for, as `call_key` made it."""
    return key.replace("/", ".")

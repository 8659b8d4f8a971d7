"""Angular answers to the convolutions and linear maps that a forward calls as functions.

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
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from sphereify.errors import UnsupportedModelError, option
from sphereify.nn.attention import Project, attend
from sphereify.nn.decoupled import Decoupled, decoupled
from sphereify.nn.functional import Operator, sphere_conv1d, sphere_conv2d, sphere_conv3d, sphere_linear, writable
from sphereify.nn.magnitudes import SPHERE, Magnitude
from sphereify.nn.operators import operator_repr
from sphereify.nn.radius import HasRadius
from sphereify.nn.tracing import node_of, one_node, tracer_of

CALLS = "angular_calls"
"""Name of the attribute in which a module holds its `AngularCall`s, by key."""


class Arguments(NamedTuple):
    """The arguments of a functional convolution or linear map."""

    x: Tensor
    source: Tensor
    """The tensor that was passed as the weight."""
    bias: Tensor | None
    geometry: tuple[Any, ...] = ()
    """Stride, padding, dilation, groups; empty for a linear map."""
    columns: bool = False
    """True if the filters are the columns of `source`."""

    @property
    def weight(self) -> Tensor:
        """The weight with filters as rows."""
        return self.source.t() if self.columns else self.source


# Their parameters have the names that torch's have, so that Python itself reads a call's arguments.


def _conv_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Arguments:
    return Arguments(input, weight, bias, (stride, padding, dilation, groups))


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Arguments:
    return Arguments(input, weight, bias)


def _addmm_arguments(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Arguments:
    return Arguments(mat1, mat2, input if beta == 1 else input * beta, columns=True)


def _matmul_arguments(input: Tensor, other: Tensor | None = None, *, mat2: Tensor | None = None) -> Arguments:
    matrix = cast(Tensor, mat2 if other is None else other)
    return Arguments(input, matrix, None, columns=matrix.dim() == 2)


class Function(NamedTuple):
    """A function of torch's that multiplies with filters."""

    kind: str
    arguments: Callable[..., Arguments]
    columns: bool = False
    """True if the filters are the columns of the matrix that it takes."""
    any_product: bool = False
    """True if it multiplies any two tensors, and is a linear map only with a learned matrix on the right."""

    def read(self, args: tuple, kwargs: dict[str, Any]) -> Arguments | None:
        """The arguments of a call, or None for arguments without an angular answer, such as `out`."""
        try:
            return self.arguments(*args, **kwargs)
        except (TypeError, AttributeError):
            return None


FUNCTIONS: dict[Any, Function] = {
    F.linear: Function("linear", _linear_arguments),
    torch.addmm: Function("linear", _addmm_arguments, columns=True),
    Tensor.addmm: Function("linear", _addmm_arguments, columns=True),
    **{
        f: Function("linear", _matmul_arguments, columns=True, any_product=True)
        for f in (torch.matmul, torch.linalg.matmul, Tensor.matmul, torch.mm, Tensor.mm)
    },
    **{f: Function("conv1d", _conv_arguments) for f in (F.conv1d, torch.conv1d)},
    **{f: Function("conv2d", _conv_arguments) for f in (F.conv2d, torch.conv2d)},
    **{f: Function("conv3d", _conv_arguments) for f in (F.conv3d, torch.conv3d)},
}
"""The functions whose calls are sites."""

ANGULAR: dict[str, Callable[..., Tensor]] = {
    "linear": sphere_linear,
    "conv1d": sphere_conv1d,
    "conv2d": sphere_conv2d,
    "conv3d": sphere_conv3d,
}
"""The angular function of each kind, which takes the place of torch's."""


class AngularCall(HasRadius, Decoupled):
    """The operator, β and γ of one functional call.

    Args:
        kind: conv1d, conv2d, conv3d or linear.
        filters: number of rows of the weight.
        operator: an operator object.
        rescale: learn `beta` and, unless the call passes a bias, `gamma`.
        has_bias: the call passes a bias, which then is γ.
        eps, radius, learn_radius, magnitude: as `SphereConv2d`; a linear map has no radius.
        columns: the filters are the columns of the weight that is passed.
        groups: number of groups of the convolution.
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
        radius: float = 0.0,
        learn_radius: bool = False,
        magnitude: Magnitude = SPHERE,
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
        """True if torch computes the weight, until its parametrization is removed."""
        self.operator = operator
        self.eps = eps
        ones = torch.ones(filters, device=device, dtype=dtype)
        self._set_radius(radius, learn_radius, ones)
        self._set_magnitude(magnitude, filters, ones)
        self.register_parameter("beta", nn.Parameter(ones) if rescale else None)
        self.register_parameter("gamma", nn.Parameter(torch.zeros_like(ones)) if rescale and not has_bias else None)

    @one_node
    def forward(self, call: Arguments, rows: slice = slice(None)) -> Tensor:
        """The angular answer to a call; `rows` are the filters that take part, where it is one of several."""
        beta, gamma = (None if values is None else values[rows] for values in (self.beta, self.gamma))
        # A call may pass a bias where none was passed when the model was converted.
        shift = call.bias if gamma is None else gamma if call.bias is None else gamma + call.bias
        if self.is_decoupled:
            return decoupled(self, call.x, call.weight, shift, call.geometry, beta, rows)
        pooled = {"radius": self.radius} if call.geometry else {}
        y = ANGULAR[self.kind](
            call.x, call.weight, self.operator, shift, *call.geometry, eps=self.eps, beta=beta, **pooled
        )
        return writable(y, beta, shift)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
        """The angular answer to F.linear(x, weight, bias)."""
        return self(Arguments(x, weight, bias), rows)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        own = f"{self.kind}{operator_repr(self.operator)}, rescale={self.beta is not None}, eps={self.eps:g}"
        return own + self._radius_repr() + self._magnitude_repr()


class _Answer(TorchFunctionMode):
    """A mode that answers those calls of a module for which it has an `AngularCall`; all others pass."""

    ignores_passes = True  # it looks for calls of the model's own

    def __init__(self, owner: nn.Module):
        super().__init__()
        self.owner = owner
        self.with_gradient = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        self.calls: Any = getattr(owner, CALLS)
        self.weights = [(key, weight_of_call(owner, key)) for key in self.calls]
        self.answered: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.multi_head_attention_forward:
            return attend(self.projection_of, *args, **(kwargs or {}))
        function = FUNCTIONS.get(func)
        if function is not None:
            call = function.read(args, kwargs or {})
            source = call.source if call is not None else None
            answer = self.answer_to(source, may_be_computed=not function.any_product)
            if call is not None and answer is not None and (isinstance(source, fx.Proxy) or call.source.dim() >= 2):
                if self.with_gradient:
                    _refuse_checkpoint(self.owner)
                return answer(call)
        return func(*args, **(kwargs or {}))

    def projection_of(self, weight: Tensor | None) -> Project | None:
        """The angular map in place of a linear projection by this weight."""
        answer = self.answer_to(weight)
        return None if answer is None else answer.linear

    def answer_to(self, weight: Tensor | None, *, may_be_computed: bool = True) -> AngularCall | None:
        """The `AngularCall` for this weight: a parameter, a view of one, or a computed tensor."""
        key = None if weight is None else self._key_of(weight, may_be_computed)
        if key is None:
            return None
        self.answered.add(key)
        return self.calls[key]  # type: ignore[no-any-return]

    def _key_of(self, weight: Tensor, may_be_computed: bool) -> str | None:
        for key, parameter in self.weights:
            if parameter is not None and (weight is parameter or weight._base is parameter):
                if weight is not parameter and weight.numel() != parameter.numel():
                    if COMPUTED in self.calls:
                        continue
                    raise UnsupportedModelError(
                        f"{_base(type(self.owner)).__name__} uses a part of {parameter_name(key)}, of shape "
                        f"{tuple(weight.shape)}, as a weight, and was planned with all of it: keep it with "
                        f"{option('exclude')}"
                    )
                return key
        for key, _ in self.weights:
            if self.calls[key].of_parametrization and weight is self.owner._parameters.get("weight"):
                return key  # the parametrization has been removed
        if isinstance(weight, fx.Proxy):
            return None  # it has no dtype and shape to be known by
        for key, parameter in self.weights:
            fits = may_be_computed if parameter is None else _is_cast(weight, parameter)
            if fits and not isinstance(weight, nn.Parameter) and not self._holds(weight):
                return key
        return None

    def _holds(self, tensor: Tensor) -> bool:
        """True for a parameter or buffer of the owner itself, a plain tensor where `torch.func` put it there."""
        return any(tensor is own for own in (*self.owner.parameters(), *self.owner.buffers()))


def _refuse_checkpoint(owner: nn.Module) -> None:
    """Raise where a checkpoint runs the owner's calls, which it would repeat in the backward without their answers."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not type(owner).forward.__code__:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            raise UnsupportedModelError(
                f"{_base(type(owner)).__name__} makes its angular call inside torch.utils.checkpoint, which would "
                f"repeat it as a plain one. Put the checkpoint around the whole module, switch it off, or keep the "
                f"call with {option('exclude')}."
            )
        frame = frame.f_back  # type: ignore[assignment]


def _is_cast(weight: Tensor, parameter: Tensor) -> bool:
    """True for what is most likely the parameter in another dtype, such as `self.weight.to(x.dtype)`."""
    differs = weight.dtype is not parameter.dtype and not isinstance(weight, nn.Parameter)
    return differs and weight.shape == parameter.shape


COMPUTED = "computed"
"""The key of a call whose weight is computed from parameters, as in weight standardization."""


def weight_of_call(owner: nn.Module, key: str) -> Tensor | None:
    """The parameter that a key stands for; None for a computed weight."""
    if key == COMPUTED:
        return None
    path, _, name = parameter_name(key).rpartition(".")
    return getattr(owner.get_submodule(path), name)  # type: ignore[no-any-return]


class _AnswersCalls:
    """Mixed in front of the class of a module whose functional calls are angular."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time, so pickle is told how to make it again.
        function, arguments, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        if function.__name__ == "__newobj__" and arguments[0] is type(self):
            return _new, (_base(type(self)), *arguments[1:]), *rest
        return function, arguments, *rest


def _shows_its_calls(owner: nn.Module) -> bool:
    """True if a graph of the owner by torch.fx shows each of its angular calls; else the owner has to be one node."""
    try:
        fx.Tracer().trace(owner)
    except Exception:  # a traced forward may raise anything
        return False
    return True


def _check_graph(owner: nn.Module, graph: fx.Graph, answered: set[str]) -> None:
    """Raise where a graph hands the weight of an angular call to a function that is not traced: its call is plain."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for name in (parameter_name(key) for key in getattr(owner, CALLS) if key not in answered):
        if name in read:
            raise UnsupportedModelError(
                f"{_base(type(owner)).__name__} makes its angular call with {name} where torch.fx does not show it: "
                f"inside a function that is not traced, or as x @ weight. The graph would make a plain one; trace a "
                f"model that holds the module, which then is one node of the graph"
            )


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
    return type(f"Angular{base.__name__}", (_AnswersCalls, base), {**about, "forward": _answering(base)})


def _answering(base: Any) -> Callable:
    """The forward of a class with its calls answered; it has the signature of its own, by which tracers go."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        tracer = tracer_of(args, kwargs)
        if tracer is not None and tracer.root is not self and not _shows_its_calls(self):
            return node_of(self, tracer, args, kwargs)
        with _Answer(self) as mode:
            output = base.forward(self, *args, **kwargs)
        if tracer is not None and tracer.root is self:
            _check_graph(self, tracer.graph, mode.answered)
        return output

    return forward


def _is_parametrized(cls: type) -> bool:
    """True for a class that torch makes for a module with parametrizations."""
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
    """True if functional calls of the module's forward are answered by its `AngularCall`s."""
    return isinstance(module, _AnswersCalls)


def answer_call(owner: nn.Module, parameter: str | None, call: AngularCall) -> None:
    """Make the owner's functional call with that parameter angular, in place; None is a computed weight.

    Args:
        owner: the module whose forward makes the call.
        parameter: qualified name of the weight, relative to the owner.
        call: the module that answers.
    """
    call.of_parametrization = _is_parametrized(type(owner))
    if not answers_calls(owner):
        owner.__class__ = angular_class(cast(Hashable, type(owner)))
        owner.add_module(CALLS, nn.ModuleDict().train(owner.training))
    getattr(owner, CALLS)[call_key(parameter)] = call


def angular_weights(owner: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that an owner's angular calls use as filters of which only the direction matters."""
    for key, call in getattr(owner, CALLS).items() if answers_calls(owner) else ():
        weight = weight_of_call(owner, key)
        if call.magnitude.weighted:
            continue
        if isinstance(weight, nn.Parameter):
            yield weight
        else:  # computed from what the owner and its parametrizations hold
            yield from owner.parameters(recurse=False)
            yield from (p for n, p in owner.named_parameters() if n.startswith("parametrizations."))


def call_key(parameter: str | None) -> str:
    """The key of the call with a parameter: the keys of a ModuleDict hold no dots."""
    return COMPUTED if parameter is None else parameter.replace(".", "/")


def parameter_name(key: str) -> str:
    """The name of the parameter from the key of its call."""
    return key.replace("/", ".")

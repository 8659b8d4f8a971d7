"""The functions g(θ) that replace the inner product (Deep Hyperspherical Learning, section 3.2).

Every operator maps the cosine of the angle θ ∈ [0, π] between filter and patch to g(θ), with g(0) = 1,
g(π/2) = 0, g(π) = -1, falling in between. Written with a = π/2 - θ = arcsin(cos θ):

    cosine              g = cos θ                      eq. (3)
    linear              g = 2a/π = 1 - 2θ/π            eq. (2)
    sigmoid             g = tanh(a/2k) / tanh(π/4k)    eq. (4), in the form that does not overflow
    learnable sigmoid   the same, k a parameter        section 3.3

Each `Curve` also answers what its gradient needs from the value g alone, so that a layer keeps its output for
the backward pass and nothing else of that size.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify import choices
from sphereify.errors import UsageError, choose, invalid, option
from sphereify.nn.arcsine import arcsin_in_right_angles, is_fused, sine_of_right_angles
from sphereify.nn.precision import in_forward_mode, runs_eagerly

# Below this value of sin θ the slope of arcsin is held constant. In fp32 it is the band |cos θ| > 1 - 1e-6. bf16
# cannot tell g from 1 closer than that, so its band is as wide as its rounding.
SIN_FLOOR = {torch.float64: 1.5e-7, torch.float32: 1.5e-3, torch.float16: 1.5e-3, torch.bfloat16: 3e-3}


class Slope(NamedTuple):
    """The derivatives of g, recovered from its value. `by_cos` is None where it is 1, `by_k` where there is no k."""

    cos: Tensor
    by_cos: Tensor | None
    by_k: Tensor | None


class Curve(NamedTuple):
    """One g as two pure functions of a tensor and, for the sigmoid, of k (a float or a broadcastable tensor)."""

    value: Callable[[Tensor, Any], Tensor]
    """cos θ in [-1, 1] (may be overwritten) -> g"""
    slope: Callable[[Tensor, Any, float], Slope]
    """g, k and the floor of sin θ -> the derivatives"""
    at: Callable[[Tensor, Any], Tensor]
    """θ in [0, π] -> g, for callers that have the angle itself"""


def overwrite(tensor: Tensor, operation: str, *arguments: Any) -> Tensor:
    """The elementwise operation of that name, in place where nobody else sees the tensor.

    torch.compile fuses such passes by itself, and in torch 2.11 loses the gradient of a result written in place; where
    gradients are recorded, a second derivative may need what would be overwritten.
    """
    in_place = runs_eagerly(tensor, *(value for value in arguments if isinstance(value, Tensor)))
    return getattr(tensor, operation + "_" if in_place else operation)(*arguments)


def clip(tensor: Tensor, low: float, high: float) -> Tensor:
    """The tensor held between two numbers, likewise; clamp_ has no rule for vmap."""
    return F.hardtanh(tensor, low, high, inplace=runs_eagerly(tensor))


def _cosine_value(cos: Tensor, k: None) -> Tensor:
    return cos


def _cosine_slope(g: Tensor, k: None, sin_floor: float) -> Slope:
    return Slope(g, None, None)


def _cosine_at(theta: Tensor, k: None) -> Tensor:
    return theta.cos()


def _linear_value(cos: Tensor, k: None) -> Tensor:
    if is_fused(cos):
        return arcsin_in_right_angles(cos)
    return overwrite(overwrite(cos, "asin"), "mul", 2 / math.pi)


def _linear_slope(g: Tensor, k: None, sin_floor: float) -> Slope:
    sine, cosine = _sine_and_cosine(g)
    by_cos = overwrite(clip(cosine, sin_floor, 1), "reciprocal")
    return Slope(sine, overwrite(by_cos, "mul", 2 / math.pi), None)


def _sine_and_cosine(share: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of π/2·share, for a share in [-1, 1]."""
    if is_fused(share):
        # The cosine as a sine of the other angle, whose distance from the pole is exact.
        return sine_of_right_angles(share), sine_of_right_angles(1 - share.abs())
    a = share * (math.pi / 2)
    return a.sin(), overwrite(a, "cos")


def _linear_at(theta: Tensor, k: None) -> Tensor:
    return 1 - theta * (2 / math.pi)


def _tanh(x: Any) -> Any:
    return x.tanh() if isinstance(x, Tensor) else math.tanh(x)


def _sigmoid_value(cos: Tensor, k: Any) -> Tensor:
    # tanh(a/2k) as 2·logistic(a/k) - 1: on a CPU six times as fast, and as exact in the units of g.
    a = arcsin_in_right_angles(cos) * (math.pi / 2) if is_fused(cos) else overwrite(cos, "asin")
    logistic = overwrite(overwrite(a, "div", k), "sigmoid")
    stretch = 1 / _tanh(math.pi / (4 * k))
    g = overwrite(overwrite(logistic, "mul", 2 * stretch), "sub", stretch)
    return clip(g, -1, 1)


def _sigmoid_slope(g: Tensor, k: Any, sin_floor: float) -> Slope:
    top = _tanh(math.pi / (4 * k))
    t = g * top
    # For small k rounding takes t to 1 and atanh to infinity: the angle is then the pole.
    share = clip(overwrite(t.atanh(), "mul", 4 / math.pi * k), -1, 1)
    flat = overwrite(overwrite(overwrite(t, "mul", t), "neg"), "add", 1)  # 1 - t²
    by_k = None
    if isinstance(k, Tensor):
        by_k = (g * (1 - top * top) / k - flat * share / k) * (math.pi / 4) / (k * top)
    sine, cosine = _sine_and_cosine(share)
    by_a = overwrite(flat, "div", 2 * k * top)
    return Slope(sine, overwrite(by_a, "div", clip(cosine, sin_floor, 1)), by_k)


def _sigmoid_at(theta: Tensor, k: Any) -> Tensor:
    return ((math.pi / 2 - theta) / (2 * k)).tanh() / _tanh(math.pi / (4 * k))


_SIGMOID = Curve(_sigmoid_value, _sigmoid_slope, _sigmoid_at)
CURVES: dict[str, Curve] = {
    "linear": Curve(_linear_value, _linear_slope, _linear_at),
    "cosine": Curve(_cosine_value, _cosine_slope, _cosine_at),
    "sigmoid": _SIGMOID,
    "learnable-sigmoid": _SIGMOID,
}


def inner_acos(cos: Tensor) -> Tensor:
    """θ of cos θ, kept a little away from 0 and π, so that value and slope are finite where those of arccos are not."""
    limit = math.cos(SIN_FLOOR[cos.dtype])
    return (cos + (cos.clamp(-limit, limit) - cos).detach()).acos()  # the gradient passes the clamp


def with_value(carrier: Tensor, value: Tensor) -> Tensor:
    """The value of one tensor with the gradient of another."""
    return value.detach() + (carrier - carrier.detach())


class _Apply(torch.autograd.Function):
    """g(cos) with the derivative recovered from g: finite at the poles, where that of arcsin is not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(cos: Tensor, k: Any, name: str) -> Tensor:
        return CURVES[name].value(cos.clamp(-1, 1), k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, k, ctx.name = inputs
        ctx.k = None if isinstance(k, Tensor) else k
        ctx.save_for_backward(output, *([k] if isinstance(k, Tensor) else []))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        g, *rest = ctx.saved_tensors
        slope = CURVES[ctx.name].slope(g, rest[0] if rest else ctx.k, SIN_FLOOR[g.dtype])
        grad_cos = grad if slope.by_cos is None else grad * slope.by_cos
        grad_k = (grad * slope.by_k).sum_to_size(rest[0].shape) if rest and slope.by_k is not None else None
        return grad_cos, grad_k, None


def g_of(cos: Tensor, k: Any, name: str) -> Tensor:
    """g(cos) of one of the curves, with a finite derivative everywhere, in backward and in forward mode."""
    if not in_forward_mode():
        return _Apply.apply(cos, k, name)  # type: ignore[no-any-return]
    exact = cos.detach().clamp(-1, 1)
    if name == CosineOperator.name:
        return with_value(cos, exact)
    return with_value(CURVES[name].at(inner_acos(cos), k), CURVES[name].value(exact, k))


class AngularOperator(nn.Module):
    """Base of the four operators: `op(cos) -> g(θ)`, elementwise, of the same shape and dtype.

    `cos` is clamped to [-1, 1]; value and gradient are finite everywhere, the poles included. An operator of your
    own is any callable with that signature, best an `nn.Module`; only these four use the fused backward.
    """

    name: ClassVar[str]

    @property
    def k(self) -> float | Tensor | None:
        """The sigmoid's k: a float, a tensor of shape (filters,) or (1,), or None where the operator has none."""
        return None

    def forward(self, cos: Tensor) -> Tensor:
        """cos θ, channels in dimension 1 where k is per filter -> g(θ)"""
        return self.with_k(cos, self.k)

    def slope_at_right_angles(self) -> float | Tensor:
        """dg/dcos at θ = π/2, without gradient: a number, or a tensor of the shape of k where k is learned."""
        k = self.k.detach().float() if isinstance(self.k, Tensor) else self.k
        g = torch.zeros_like(k) if isinstance(k, Tensor) else torch.zeros((), device="cpu")
        by_cos = CURVES[self.name].slope(g, k, SIN_FLOOR[g.dtype]).by_cos
        if by_cos is None:
            return 1.0
        return by_cos if isinstance(k, Tensor) else float(by_cos)

    def with_k(self, cos: Tensor, k: float | Tensor | None) -> Tensor:
        """`forward` for a subset of channels, given their k."""
        return g_of(cos, broadcast_k(k, cos.dim(), cos.dtype), self.name)


def broadcast_k(k: float | Tensor | None, dim: int, dtype: torch.dtype) -> float | Tensor | None:
    """k of shape (filters,) made to broadcast over the channel dimension 1 of a tensor of `dim` dimensions."""
    return k.to(dtype).view(-1, *[1] * max(dim - 2, 0)) if isinstance(k, Tensor) else k


class LinearOperator(AngularOperator):
    """g(θ) = 1 - 2θ/π, eq. (2) with a = -2/π and b = 1; in [-1, 1]. Its gradient has the same length at every angle."""

    name = "linear"


class CosineOperator(AngularOperator):
    """g(θ) = cos θ, eq. (3). The cheapest of the four."""

    name = "cosine"


class SigmoidOperator(AngularOperator):
    """g(θ) = tanh((π/2 - θ)/2k) / tanh(π/4k), eq. (4).

    Args:
        k: curvature, > 0. Small is a step at π/2, large tends to the linear operator. Usual: 0.1 to 0.7.

    Raises:
        UsageError: k is not a positive number.

    >>> import math, torch
    >>> round(SigmoidOperator(k=0.3)(torch.tensor(math.cos(math.pi / 3), dtype=torch.float64)).item(), 10)
    0.7102446431
    """

    name = "sigmoid"

    def __init__(self, k: float = 0.3):
        super().__init__()
        self._k = positive_k(k)

    @property
    def k(self) -> float:
        return self._k

    def extra_repr(self) -> str:
        return f"k={self._k:g}"


K_FLOOR = 0.05


class LearnableSigmoidOperator(AngularOperator):
    """The sigmoid with a learned k = |p| + 0.05, which keeps k positive as in the authors' code (section 3.3).

    Args:
        filters: how many values of k: the number of filters, or 1 to share one.
        k: where every k starts, > 0.05. The paper starts at 0.5.

    The parameter is `p`, of shape (filters,); it wants no weight decay. `k` is the value in use.

    Raises:
        UsageError: k is not above 0.05, or filters < 1.
    """

    name = "learnable-sigmoid"

    def __init__(self, filters: int = 1, k: float = 0.5):
        super().__init__()
        if positive_k(k) <= K_FLOOR:
            raise UsageError(
                f"learnable sigmoid: k starts at {k:g}, expected a value above {K_FLOOR:g}, since it is learned as "
                f"|p| + {K_FLOOR:g}. Try k=0.5."
            )
        if filters < 1:
            raise UsageError(f"learnable sigmoid: got filters={filters}, expected at least 1")
        self.p = nn.Parameter(torch.full((filters,), float(k) - K_FLOOR))

    @property
    def k(self) -> Tensor:
        return self.p.abs() + K_FLOOR

    def extra_repr(self) -> str:
        return f"filters={self.p.numel()}"


def positive_k(k: float) -> float:
    """k as a float, or the error that says what it must be."""
    if isinstance(k, bool) or not isinstance(k, (int, float)) or not (k > 0 and math.isfinite(k)):
        raise invalid("k", k, "a positive finite number", "Usual values are 0.1 to 0.7")
    return float(k)


CLASSES: dict[str, type[AngularOperator]] = {
    cls.name: cls for cls in (LinearOperator, CosineOperator, SigmoidOperator, LearnableSigmoidOperator)
}


def is_built_in(operator: object) -> TypeGuard[AngularOperator]:
    """True for the four operators here, whose backward is fused; a subclass may compute something else."""
    return type(operator) in CLASSES.values()


def operator_repr(operator: Any) -> str:
    """The operator for `extra_repr`; empty for a module, which torch lists as a child.

    An address is no part of it, since two networks with equal layers have equal descriptions.
    """
    if isinstance(operator, nn.Module):
        return ""
    kind: Any = type(operator)
    name = kind.__qualname__ if kind.__repr__ is object.__repr__ else getattr(operator, "__qualname__", None)
    return f", operator={name or repr(operator)}"


def make_operator(
    operator: str | Callable[[Tensor], Tensor],
    *,
    k: float | None = None,
    filters: int = 1,
    option_name: str = "operator",
) -> Any:
    """An operator from its name; an operator object is returned as it is.

    Args:
        operator: one of `sphereify.choices.OPERATORS`, `_` and `-` alike, or a callable cos -> g.
        k: for the sigmoids; None is their default (0.3, or a start of 0.5).
        filters: how many k a learnable sigmoid has.
        option_name: the option that the operator was given to, for errors.

    Raises:
        UsageError: an unknown name, or a k that the operator does not take.
    """
    if not isinstance(operator, str):
        if not callable(operator):
            raise invalid(option_name, operator, "a name or a callable that maps cos θ to g(θ)")
        return operator
    name = choices.canonical(operator)
    if name not in CLASSES:
        raise choose(option_name, operator, choices.OPERATORS)
    keywords = {} if k is None else {"k": k}
    if name == LearnableSigmoidOperator.name:
        return LearnableSigmoidOperator(filters, **keywords)
    if name == SigmoidOperator.name:
        return SigmoidOperator(**keywords)
    if k is not None:
        raise UsageError(
            f"{option('k')}: got {k!r} for the {name} operator, which has none. Leave it out or take a sigmoid.",
            option="k",
            value=k,
        )
    return CLASSES[name]()

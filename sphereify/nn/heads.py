"""The angular classifier (NIPS 2017, section 3.4): class weights have a direction and no length."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from sphereify import choices
from sphereify.errors import UsageError, choose
from sphereify.nn.decoupled import mixed
from sphereify.nn.functional import Operator, sphere_linear
from sphereify.nn.layers import adopted
from sphereify.nn.merged_filters import HasDirections
from sphereify.nn.operators import (
    CURVES,
    AngularOperator,
    CosineOperator,
    inner_acos,
    is_built_in,
    make_operator,
    with_value,
)
from sphereify.nn.outputs import AngularOutput, made_by
from sphereify.nn.precision import accumulate_dtype, no_autocast
from sphereify.nn.tracing import one_node

HEAD_EPS = 1e-12
"""Inside both norms: the losses are defined on exact angles, and features of a classifier are rarely near zero."""
HALF_EPS = 1e-5
"""For features in half precision, which could not hold the gradient 1/sqrt(1e-12) of a zero feature."""


class AngularHead(HasDirections):
    """Class scores from the angles θ_j between a feature x and the class weights w_j.

        w-softmax    ‖x‖·g(θ_j)
        ga-softmax   the same; in training the target class y scores ‖x‖·ψ(θ_y), ψ the margin curve of g
        a-softmax    ga-softmax with g = cos, as SphereFace
        s-softmax    s·g(θ_j)

    Args:
        in_features, num_classes: sizes, ≥ 1.
        kind: one of `sphereify.choices.HEAD_KINDS`.
        operator: a name from `sphereify.choices.OPERATORS`, or an operator object; a-softmax takes cosine only.
        margin: m of ga-softmax and a-softmax, any real number ≥ 1; 1 is w-softmax. Usual: 2 to 4.
        scale: s of s-softmax, > 0.
        bias: add a learned bias to each class, as for imbalanced data.

    Shape:
        (*, in_features) -> (*, num_classes): logits. In training, the two margin heads return an `AngularOutput` for
        `AngularLoss`; all else is a plain tensor for `F.cross_entropy`. Logits are fp32 under autocast.

    Attributes:
        morph: t of `sphereify.nn.decoupled`, in [0, 1]; below 1 the scores are still partly those of the plain layer.
        training_logits: True if a margin head computes logits in training. Without, `AngularLoss(..., chunk_size=…)`
            never needs all of them at once: for very many classes.

    Raises:
        UsageError: an unknown kind or operator, a scale that is not positive, a margin below 1.

    >>> AngularHead(4, 10)(torch.randn(2, 4)).shape
    torch.Size([2, 10])
    """

    weight: Any
    bias: Any
    morph: float = 1.0
    training_logits: bool

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        kind: str = "w-softmax",
        operator: str | Operator = "cosine",
        margin: float = 4.0,
        scale: float = 30.0,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_parameter("weight", linear.weight)  # type: ignore[arg-type]
        self.register_parameter("bias", linear.bias)
        self._configure(kind, operator, margin, scale)

    def _configure(self, kind: str, operator: str | Operator, margin: float, scale: float) -> None:
        if choices.canonical(kind) not in choices.HEAD_KINDS:
            raise choose("head", kind, choices.HEAD_KINDS)
        if not (scale > 0 and math.isfinite(scale)):
            raise UsageError(f"scale: got {scale!r}, expected a positive number; the default is 30")
        if not (margin >= 1 and math.isfinite(margin)):
            raise UsageError(f"margin: got {margin!r}, expected a number of at least 1; the default is 4")
        self.kind = choices.canonical(kind)
        self.margin = float(margin)
        self.scale = float(scale)
        self.training_logits = True
        g = make_operator(operator, filters=self.weight.shape[0])
        if self.kind == "a-softmax" and type(g) is not CosineOperator:
            raise UsageError(f"a-softmax: got the operator {operator!r}, expected cosine; ga-softmax takes any")
        if isinstance(g, nn.Module) and g is not operator:
            g.to(device=self.weight.device, dtype=self.weight.dtype)
        self.operator = g

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        kind: str = "w-softmax",
        operator: str | Operator = "cosine",
        margin: float = 4.0,
        scale: float = 30.0,
    ) -> "AngularHead":
        """The angular classifier on the weights of a linear one, with its bias, hooks and mode; nothing is copied."""
        head = cls.__new__(cls)
        head.__dict__.update(adopted(linear))
        head._configure(kind, operator, margin, scale)
        return head

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    out_features = num_classes

    @property
    def has_margin(self) -> bool:
        """True if this head returns an `AngularOutput` in training."""
        return self.kind in choices.MARGIN_HEADS

    @one_node
    def forward(self, input: Tensor) -> Tensor | AngularOutput:
        if not (self.training and self.has_margin):
            return self.logits(input)
        return made_by(self, self.logits(input) if self.training_logits else None, input)

    def logits(self, x: Tensor, classes: slice | None = None) -> Tensor:
        """The scores without a margin, of all classes or some: (*, in_features) -> (*, classes)."""
        weight, bias, operator = self.weight, self.bias, self.operator
        if classes is not None:
            weight, bias = weight[classes], None if bias is None else bias[classes]
            operator = self._operator_of(classes)
        # In fp32 under autocast and for half precision: class weights keep their digits, ‖x‖ its range.
        eps = head_eps(x)
        precise = accumulate_dtype(x.dtype)
        with no_autocast(x.device.type):
            features = x.to(precise)
            weight = weight.to(precise)
            logits = sphere_linear(features, weight, operator, None, eps)
            scale = self.scale if self.kind == "s-softmax" else length_of(features, eps)
            if self.morph < 1:
                logits, scale = self._between(logits, scale, features, weight, eps)
            logits = logits * scale
            if bias is not None:
                shift = bias.to(precise)  # in place, since logits of very many classes are large
                logits = logits + shift if torch.compiler.is_compiling() else logits.add_(shift)
        return logits if x.dtype is not self.weight.dtype else logits.to(x.dtype)

    def _between(self, g: Tensor, scale: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Any]:
        """g and the scale on the way from the plain layer, whose scores are ‖w‖·‖x‖·cos θ."""
        t = self.morph
        g = mixed(g, lambda: sphere_linear(x, weight, CosineOperator(), None, eps), self)
        lengths = length_of(weight, eps).squeeze(-1)
        return g * lengths.pow(1 - t), length_of(x, eps).pow(1 - t) * scale**t

    def target_logit(self, x: Tensor, targets: Tensor, annealing: Tensor | float = 0.0) -> Tensor:
        """The score of each sample's own class, in training: with the margin, if this head has one.

        Args:
            x: (B, in_features).
            targets: (B,), in [0, num_classes).
            annealing: λ ≥ 0 of SphereFace: (λ·‖x‖·g(θ) + ‖x‖·ψ(θ)) / (1 + λ).

        Returns:
            (B,), at least in fp32.
        """
        eps = head_eps(x)
        precise = accumulate_dtype(x.dtype)
        with no_autocast(x.device.type):
            features, weight = x.to(precise), self.weight[targets].to(precise)
            length = length_of(features, eps)
            cos = ((features / length) * (weight / length_of(weight, eps))).sum(-1)
            g = self._curve(cos, targets, 1.0)
            if self.has_margin:
                g = (annealing * g + self._curve(cos, targets, self.margin)) / (1 + annealing)
            logit = g * (self.scale if self.kind == "s-softmax" else length.squeeze(-1))
            return logit if self.bias is None else logit + self.bias[targets].to(precise)

    def _operator_of(self, classes: slice) -> Any:
        """The operator for some classes; a learnable k may be one of each class."""
        k = getattr(self.operator, "k", None)
        if not isinstance(k, Tensor) or k.numel() == 1:
            return self.operator
        return lambda cos: self.operator.with_k(cos, k[classes])

    def _curve(self, cos: Tensor, targets: Tensor, margin: float) -> Tensor:
        """ψ(θ) for cos θ of shape (B,), with the slope held constant next to the poles as elsewhere."""
        k = getattr(self.operator, "k", None)
        if isinstance(k, Tensor):
            k = (k if k.numel() == 1 else k[targets]).to(cos.dtype)
        exact = cos.detach().clamp(-1, 1).acos()
        return with_value(self._psi(inner_acos(cos), k, margin), self._psi(exact, k, margin))

    def _psi(self, theta: Tensor, k: Any, margin: float) -> Tensor:
        """ψ(θ) = g(mθ - jπ) - 2j with j = ⌊mθ/π⌋: g(mθ), made to fall over all of [0, π]."""
        turns = (margin * theta.detach() / math.pi).floor()
        phi = margin * theta - turns * math.pi
        operator = self.operator
        if is_built_in(operator):
            g = CURVES[operator.name].at(phi, k)
        elif getattr(type(operator), "forward", None) is AngularOperator.forward:  # a subclass, with k of these classes
            g = operator.with_k(phi.cos(), k)
        else:
            g = operator(phi.cos())
        return g - 2 * turns

    def extra_repr(self) -> str:
        scale = f", scale={self.scale:g}" if self.kind == "s-softmax" else ""
        margin = f", margin={self.margin:g}" if self.has_margin else ""
        sizes = f"in_features={self.in_features}, num_classes={self.num_classes}, kind={self.kind}"
        return f"{sizes}{margin}{scale}, bias={self.bias is not None}"


def head_eps(x: Tensor) -> float:
    """ε inside both norms, for features of that dtype."""
    return HALF_EPS if x.dtype in (torch.float16, torch.bfloat16) else HEAD_EPS


def length_of(x: Tensor, eps: float) -> Tensor:
    """‖x‖ over the last dimension, with a finite gradient at 0."""
    return (x.square().sum(-1, keepdim=True) + eps).sqrt()

"""The angular classifier (NIPS 2017, section 3.4): class weights have a direction and no length."""

from typing import Any

import torch
from torch import Tensor, nn

from sphereify import choices
from sphereify.errors import UsageError, choose
from sphereify.head_numbers import HEAD_NUMBERS, head_number
from sphereify.nn import margins
from sphereify.nn.decoupled import mixed
from sphereify.nn.functional import Operator, sphere_linear
from sphereify.nn.layers import twin_of
from sphereify.nn.merged_filters import HasDirections
from sphereify.nn.operators import (
    CURVES,
    AngularOperator,
    CosineOperator,
    inner_acos,
    is_built_in,
    make_operator,
    operator_repr,
    with_value,
)
from sphereify.nn.outputs import AngularOutput, made_by
from sphereify.nn.precision import accumulate_dtype, no_autocast
from sphereify.nn.sphereface2 import balanced_bias, similarity
from sphereify.nn.tracing import one_node

HEAD_EPS = 1e-12
"""ε inside both norms: the losses are defined on exact angles, and features of a classifier are rarely near zero."""
HALF_EPS = 1e-5
"""ε for features in half precision, which could not hold the gradient 1/sqrt(1e-12) of a zero feature."""


class AngularHead(HasDirections):
    """Class scores from the angles θ_j between a feature x and the class weights w_j.

        kind          score of class j      score of the target y in training
        w-softmax     ‖x‖·g(θ_j)            the same
        ga-softmax    ‖x‖·g(θ_j)            ‖x‖·ψ(mθ_y), ψ being g, continued so that it falls beyond π, too
        a-softmax     ‖x‖·cos θ_j           the same with g = cos, as SphereFace
        s-softmax     s·g(θ_j)              the same
        arcface       s·g(θ_j)              s·ψ(θ_y + m)
        cosface       s·g(θ_j)              s·(g(θ_y) - m)
        sphereface2   s·G(g(θ_j)) + b       s·(G(g(θ_y)) - m) + b, and s·(G(g(θ_j)) + m) + b of the others: one binary
                                            task for each class, G(g) = 2·((g + 1)/2)^t - 1; b is learned

    ArcFace, CosFace and SphereFace2 are those of the papers with g = cos.

    Args:
        in_features, num_classes: sizes, ≥ 1; sphereface2 takes two classes or more.
        kind: one of `sphereify.choices.HEAD_KINDS`.
        operator: a name from `sphereify.choices.OPERATORS`, or an operator object; a-softmax takes cosine only.
        margin: m. Of ga-softmax and a-softmax any real number ≥ 1, where 1 is w-softmax (default 4; usual: 2 to 4); of
            arcface an angle in radians from 0 to 1.5 (default 0.5); of cosface and sphereface2 a number from 0 to 1
            (default 0.35 and 0.4).
        scale: s > 0 of s-softmax (default 30), arcface and cosface (default 64) and sphereface2 (default 40).
        bias: add a learned bias to each class, as for imbalanced data.
        margin_gradient: "true", or "detached": the target's score then has the gradient that it would have without a
            margin, as if the margin were a constant; of sphereface2, that of g in place of G.
        similarity_power: t ≥ 1 of sphereface2 (default 3).
        positive_weight: λ in (0, 1) of sphereface2 (default 0.7): the weight of the target's task, 1 - λ being that of
            each other class.

    Shape:
        (*, in_features) -> (*, num_classes): logits. In training, the heads with a margin return an `AngularOutput` for
        `AngularLoss`; all else is a plain tensor for `F.cross_entropy`. Logits are fp32 under autocast.

    Attributes:
        morph: t of `sphereify.nn.decoupled`, in [0, 1]; below 1 the scores are still partly those of the plain layer.
        training_logits: True if a margin head computes logits in training. Without, `AngularLoss(..., chunk_size=…)` or
            `sampled_classes=…` never needs all of them at once: for very many classes.
        common_bias: b of sphereface2, of shape (1,), else None. It starts where positives and negatives are in balance.

    Raises:
        UsageError: an unknown kind, operator or margin_gradient, or a number that is out of range.

    >>> AngularHead(4, 10)(torch.randn(2, 4)).shape
    torch.Size([2, 10])
    """

    weight: Any
    bias: Any
    common_bias: Any
    morph: float = 1.0
    training_logits: bool
    margin: float
    scale: float
    similarity_power: float
    positive_weight: float
    margin_gradient: str = "true"  # heads that were pickled before there was a choice have none of their own

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        kind: str = "w-softmax",
        operator: str | Operator = "cosine",
        margin: float | None = None,
        scale: float | None = None,
        bias: bool = False,
        margin_gradient: str = "true",
        similarity_power: float | None = None,
        positive_weight: float | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_parameter("weight", linear.weight)  # type: ignore[arg-type]
        self.register_parameter("bias", linear.bias)
        numbers = {"similarity_power": similarity_power, "positive_weight": positive_weight}
        self._configure(kind, operator, margin_gradient, margin=margin, scale=scale, **numbers)

    def _configure(self, kind: str, operator: str | Operator, margin_gradient: str, **numbers: float | None) -> None:
        if choices.canonical(kind) not in choices.HEAD_KINDS:
            raise choose("head", kind, choices.HEAD_KINDS)
        if margin_gradient not in choices.MARGIN_GRADIENTS:
            raise choose("margin_gradient", margin_gradient, choices.MARGIN_GRADIENTS)
        self.kind = choices.canonical(kind)
        self.margin_gradient = margin_gradient
        for name, value in numbers.items():
            setattr(self, name, head_number(name, self.kind, value))
        self.training_logits = True
        g = make_operator(operator, filters=self.weight.shape[0])
        if self.kind == "a-softmax" and type(g) is not CosineOperator:
            raise UsageError(f"a-softmax: got the operator {operator!r}, expected cosine; ga-softmax takes any")
        if isinstance(g, nn.Module) and g is not operator:
            g.to(device=self.weight.device, dtype=self.weight.dtype)
        self.operator = g
        self.register_parameter("common_bias", None)
        if self.kind == "sphereface2":
            if self.num_classes < 2:
                raise UsageError(f"sphereface2: got {self.num_classes} class, expected two or more")
            start = balanced_bias(
                self.num_classes, self.scale, self.margin, self.similarity_power, self.positive_weight
            )
            self.common_bias = nn.Parameter(self.weight.new_full((1,), start).detach())

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        kind: str = "w-softmax",
        operator: str | Operator = "cosine",
        margin: float | None = None,
        scale: float | None = None,
        margin_gradient: str = "true",
        similarity_power: float | None = None,
        positive_weight: float | None = None,
    ) -> "AngularHead":
        """The angular classifier on the weights of a linear one, with its bias, hooks and mode; nothing is copied.

        Raises:
            UsageError: as the class.
            ArgumentTypeError: not a linear layer.
        """
        head = twin_of(linear, cls, nn.Linear)
        numbers = {"similarity_power": similarity_power, "positive_weight": positive_weight}
        head._configure(kind, operator, margin_gradient, margin=margin, scale=scale, **numbers)
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

    @property
    def has_scale(self) -> bool:
        """True if scores are scaled by s, and False if by the length of the feature."""
        return self.kind in HEAD_NUMBERS["scale"]

    @property
    def is_detached(self) -> bool:
        """True if the margin is a constant to the gradient."""
        return self.has_margin and self.margin_gradient == "detached"

    @one_node
    def forward(self, input: Tensor) -> Tensor | AngularOutput:
        if not (self.training and self.has_margin):
            return self.logits(input)
        return made_by(self, self.logits(input) if self.training_logits else None, input)

    def logits(self, x: Tensor, classes: slice | Tensor | None = None, *, detached: bool = False) -> Tensor:
        """The scores without a margin, of all classes or some: (*, in_features) -> (*, classes).

        Args:
            classes: a slice, or indices (classes,).
            detached: give the scores of sphereface2 the gradient of g in place of G.
        """
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
            g = sphere_linear(features, weight, operator, None, eps)
            if self.kind == "sphereface2":
                spread = similarity(g, self.similarity_power)
                logits = (with_value(g, spread) if detached else spread) * self.scale + self.common_bias.to(precise)
            else:
                scale = self.scale if self.has_scale else length_of(features, eps)
                if self.morph < 1:
                    g, scale = self._between(g, scale, features, weight, eps)
                logits = g * scale
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
            annealing: λ ≥ 0 of SphereFace: (λ·score without margin + score with margin) / (1 + λ).

        Returns:
            (B,), at least in fp32.
        """
        eps = head_eps(x)
        precise = accumulate_dtype(x.dtype)
        with no_autocast(x.device.type):
            features, weight = x.to(precise), self.weight[targets].to(precise)
            length = length_of(features, eps)
            cos = ((features / length) * (weight / length_of(weight, eps))).sum(-1)
            g = self._curve(cos, targets, has_margin=False)
            score = similarity(g, self.similarity_power) if self.kind == "sphereface2" else g
            if self.has_margin:
                is_difference = self.kind in margins.DIFFERENCES
                with_margin = score - self.margin if is_difference else self._curve(cos, targets, has_margin=True)
                score = (annealing * score + with_margin) / (1 + annealing)
                score = with_value(g, score) if self.is_detached else score
            logit = score * (self.scale if self.has_scale else length.squeeze(-1))
            if self.kind == "sphereface2":
                logit = logit + self.common_bias.to(precise)
            return logit if self.bias is None else logit + self.bias[targets].to(precise)

    def _operator_of(self, classes: slice | Tensor) -> Any:
        """The operator for some classes; a learnable k may be one of each class."""
        k = getattr(self.operator, "k", None)
        if not isinstance(k, Tensor) or k.numel() == 1:
            return self.operator
        return lambda cos: self.operator.with_k(cos, k[classes])

    def _curve(self, cos: Tensor, targets: Tensor, *, has_margin: bool) -> Tensor:
        """g(θ), or ψ of the angle with its margin, for cos θ of shape (B,).

        Next to the poles the slope is held constant as elsewhere.
        """
        k = getattr(self.operator, "k", None)
        if isinstance(k, Tensor):
            k = (k if k.numel() == 1 else k[targets]).to(cos.dtype)

        def curve(theta: Tensor) -> Tensor:
            angle = margins.angle_with_margin(self.kind, theta, self.margin) if has_margin else theta
            return margins.falling(lambda phi: self._g(phi, k), angle)

        return with_value(curve(inner_acos(cos)), curve(cos.detach().clamp(-1, 1).acos()))

    def _g(self, phi: Tensor, k: Any) -> Tensor:
        """g(φ) for φ in [0, π] of shape (B,), with a k for each of them."""
        operator = self.operator
        if is_built_in(operator):
            return CURVES[operator.name].at(phi, k)
        if getattr(type(operator), "forward", None) is AngularOperator.forward:  # a subclass, with k of these classes
            return operator.with_k(phi.cos(), k)
        return operator(phi.cos())  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        scale = f", scale={self.scale:g}" if self.has_scale else ""
        margin = f", margin={self.margin:g}" if self.has_margin else ""
        margin += ", margin_gradient=detached" if self.is_detached else ""
        sizes = f"in_features={self.in_features}, num_classes={self.num_classes}, kind={self.kind}"
        return f"{sizes}{operator_repr(self.operator)}{margin}{scale}, bias={self.bias is not None}"


def head_eps(x: Tensor) -> float:
    """ε inside both norms, for features of that dtype."""
    return HALF_EPS if x.dtype in (torch.float16, torch.bfloat16) else HEAD_EPS


def length_of(x: Tensor, eps: float) -> Tensor:
    """‖x‖ over the last dimension, with a finite gradient at 0."""
    return (x.square().sum(-1, keepdim=True) + eps).sqrt()

"""The angular classifier (NIPS 2017, section 3.4): class weights have a direction and no length."""

from typing import Any

import torch
from torch import Tensor, nn

from sphereify import choices
from sphereify.errors import UsageError, choose
from sphereify.nn.functional import Operator, no_autocast, sphere_linear
from sphereify.nn.layers import adopted
from sphereify.nn.operators import make_operator

HEAD_EPS = 1e-12
"""Inside both norms: the losses are defined on exact angles, and features of a classifier are rarely near zero."""
HALF_EPS = 1e-5
"""For features in half precision, which could not hold the gradient 1/sqrt(1e-12) of a zero feature."""


class AngularHead(nn.Module):
    """Class scores from the angles θ_j between a feature x and the class weights w_j.

        w-softmax   ‖x‖·g(θ_j)
        s-softmax   s·g(θ_j)

    Args:
        in_features, num_classes: sizes, ≥ 1.
        kind: one of `sphereify.choices.HEAD_KINDS`.
        operator: a name from `sphereify.choices.OPERATORS`, or an operator object.
        scale: s of s-softmax, > 0.
        bias: add a learned bias to each class, as for imbalanced data.

    Shape:
        (*, in_features) -> (*, num_classes): plain logits for `F.cross_entropy`, in training and in evaluation.
        They are fp32 under autocast.

    Raises:
        UsageError: an unknown kind or operator, or a scale that is not positive.

    >>> AngularHead(4, 10)(torch.randn(2, 4)).shape
    torch.Size([2, 10])
    """

    weight: Any
    bias: Any

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        kind: str = "w-softmax",
        operator: str | Operator = "cosine",
        scale: float = 30.0,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_parameter("weight", linear.weight)  # type: ignore[arg-type]
        self.register_parameter("bias", linear.bias)
        self._configure(kind, operator, scale)

    def _configure(self, kind: str, operator: str | Operator, scale: float) -> None:
        if choices.canonical(kind) not in choices.HEAD_KINDS:
            raise choose("head", kind, choices.HEAD_KINDS)
        if not scale > 0:
            raise UsageError(f"scale: got {scale!r}, expected a positive number; the default is 30")
        self.kind = choices.canonical(kind)
        self.scale = float(scale)
        made = make_operator(operator, filters=self.weight.shape[0])
        if isinstance(made, nn.Module) and made is not operator:
            made.to(device=self.weight.device, dtype=self.weight.dtype)
        self.operator = made

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        kind: str = "w-softmax",
        operator: str | Operator = "cosine",
        scale: float = 30.0,
    ) -> "AngularHead":
        """The angular classifier on the weights of a linear one, with its bias, hooks and mode; nothing is copied."""
        head = cls.__new__(cls)
        head.__dict__.update(adopted(linear))
        head._configure(kind, operator, scale)
        return head

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    out_features = num_classes

    def forward(self, x: Tensor) -> Tensor:
        # In fp32 under autocast and for half precision: class weights keep their digits, ‖x‖ its range.
        eps = HALF_EPS if x.dtype in (torch.float16, torch.bfloat16) else HEAD_EPS
        precise = torch.promote_types(x.dtype, torch.float32)
        with no_autocast(x.device.type):
            features = x.to(precise)
            logits = sphere_linear(features, self.weight.to(precise), self.operator, None, eps)
            logits = logits * (self.scale if self.kind == "s-softmax" else _length(features, eps))
            if self.bias is not None:
                logits = logits + self.bias.to(precise)
        return logits if x.dtype is not self.weight.dtype else logits.to(x.dtype)

    def extra_repr(self) -> str:
        scale = f", scale={self.scale:g}" if self.kind == "s-softmax" else ""
        bias = self.bias is not None
        return f"in_features={self.in_features}, num_classes={self.num_classes}, kind={self.kind}{scale}, bias={bias}"


def _length(x: Tensor, eps: float) -> Tensor:
    """‖x‖ over the last dimension, with a finite gradient at 0."""
    return (x.square().sum(-1, keepdim=True) + eps).sqrt()

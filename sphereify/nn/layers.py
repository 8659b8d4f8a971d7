"""Angular layers that take the place of torch's convolutions and linear maps.

Each is a subclass of the layer it replaces: the arguments, the `weight` and `bias` keys, padding modes, unbatched
input and `isinstance` checks stay. With `rescale=True` it is SphereNorm (section 3.5): β·g(θ) + γ with β, γ learned
per output channel.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.errors import UsageError
from sphereify.nn.functional import (
    DEFAULT_EPS,
    Operator,
    sphere_conv1d,
    sphere_conv2d,
    sphere_conv3d,
    sphere_linear,
)
from sphereify.nn.operators import make_operator

Layer = TypeVar("Layer", bound="AngularLayer")


class AngularLayer(nn.Module):
    """What the angular layers share: the operator, ε, and SphereNorm's β and γ."""

    operator: Any
    beta: nn.Parameter | None
    gamma: nn.Parameter | None
    weight: Any
    bias: Any

    def _make_angular(self, operator: str | Operator, rescale: bool, eps: float) -> None:
        if not eps > 0:
            raise UsageError(f"eps: got {eps!r}, expected a positive number; the default is {DEFAULT_EPS:g}")
        filters = self.weight.shape[0]
        made = make_operator(operator, filters=filters)
        if isinstance(made, nn.Module) and made is not operator:
            made.to(device=self.weight.device, dtype=self.weight.dtype)
        self.operator = made
        self.eps = eps
        # Backward recovers what it needs from g itself, which an operation in place (ReLU, +=) would destroy. A layer
        # that adds or multiplies returns another tensor; one that does not returns a copy, unless it is known that only
        # a normalization reads it.
        self.output_read_only = False
        ones = torch.ones(filters, device=self.weight.device, dtype=self.weight.dtype)
        self.register_parameter("beta", nn.Parameter(ones) if rescale else None)
        # A bias is γ already; a second number added to the same channel would be trained twice as fast.
        own_gamma = rescale and self.bias is None
        self.register_parameter("gamma", nn.Parameter(torch.zeros_like(ones)) if own_gamma else None)

    @property
    def rescale(self) -> bool:
        """Whether SphereNorm's β and γ are part of this layer."""
        return self.beta is not None

    @classmethod
    def _adopt(cls: type[Layer], plain: nn.Module, operator: str | Operator, rescale: bool, eps: float) -> Layer:
        """An angular layer with the parameters, hooks, flags and attributes of a plain one.

        The state is taken over whole rather than listed, so that what a user hung on the layer comes along.
        """
        layer = cls.__new__(cls)
        layer.__dict__.update(adopted(plain))
        layer._make_angular(operator, rescale, eps)
        return layer

    @property
    def _shift(self) -> Any:
        """γ, for which the bias stands if there is one."""
        return self.bias if self.bias is not None else self.gamma

    def _own(self, y: Tensor) -> Tensor:
        """A tensor that whoever receives it may write to."""
        kept = self.beta is None and self._shift is None and y.requires_grad
        return y.clone() if kept and (not self.output_read_only or self._forward_hooks) else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rescale={self.rescale}, eps={self.eps:g}"


def adopted(plain: nn.Module) -> dict[str, Any]:
    """The attributes of a module for its twin: the same parameters and hooks, in containers of its own."""
    return {key: value.copy() if isinstance(value, (dict, set, list)) else value for key, value in vars(plain).items()}


def is_folded_layer(module: nn.Module) -> bool:
    """Whether this is a layer for inference, whose constants are folded into its filters (`sphereify.deployment`)."""
    return getattr(type(module), "folded", False)


class _ConvLayer(AngularLayer):
    """Shared by the three convolutions: they differ in the function they call."""

    _sphere_conv: Callable[..., Tensor]
    padding_mode: Any
    padding: Any
    stride: Any
    dilation: Any
    groups: int
    _reversed_padding_repeated_twice: list[int]

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        function = type(self)._sphere_conv
        geometry = (self.stride, padding, self.dilation, self.groups)
        return self._own(function(input, weight, self.operator, self._shift, *geometry, self.eps, self.beta))


class SphereConv1d(_ConvLayer, nn.Conv1d):
    """SphereConv over (B, C, L) or (C, L); otherwise as `SphereConv2d`."""

    _sphere_conv = staticmethod(sphere_conv1d)

    def __init__(self, *args: Any, operator: str | Operator = "cosine", rescale: bool = False,
                 eps: float = DEFAULT_EPS, **kwargs: Any):  # fmt: skip
        nn.Conv1d.__init__(self, *args, **kwargs)
        self._make_angular(operator, rescale, eps)

    @classmethod
    def from_conv(cls, conv: nn.Conv1d, *, operator: str | Operator = "cosine", rescale: bool = False,
                  eps: float = DEFAULT_EPS) -> "SphereConv1d":  # fmt: skip
        """The angular twin of `conv`; see `SphereConv2d.from_conv`."""
        return cls._adopt(conv, operator, rescale, eps)


class SphereConv2d(_ConvLayer, nn.Conv2d):
    """A convolution that returns g(θ) of the angle between filter and patch (NIPS 2017, eq. 1).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as `torch.nn.Conv2d`.
        operator: a name from `sphereify.choices.OPERATORS`, or an operator object.
        rescale: SphereNorm: multiply by a learned `beta` (starts at 1) and add a learned `gamma` (starts at 0), both
            of shape (out_channels,). Where there is a bias it is γ, and `gamma` is None.
        eps: > 0, added to both squared norms.

    Shape:
        (B, C, H, W) or (C, H, W) -> as `torch.nn.Conv2d`. Values lie in [-1, 1] before bias and rescaling.

    Raises:
        UsageError: an unknown operator or eps ≤ 0.

    >>> SphereConv2d(3, 8, 3, padding=1, operator="linear")(torch.zeros(1, 3, 5, 5)).shape
    torch.Size([1, 8, 5, 5])
    """

    _sphere_conv = staticmethod(sphere_conv2d)

    def __init__(self, *args: Any, operator: str | Operator = "cosine", rescale: bool = False,
                 eps: float = DEFAULT_EPS, **kwargs: Any):  # fmt: skip
        nn.Conv2d.__init__(self, *args, **kwargs)
        self._make_angular(operator, rescale, eps)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, *, operator: str | Operator = "cosine", rescale: bool = False,
                  eps: float = DEFAULT_EPS) -> "SphereConv2d":  # fmt: skip
        """The angular twin of `conv`: it holds the same `weight` and `bias` objects, hooks, mode and attributes.

        Nothing is copied, so an optimizer that knows `conv` knows the twin, up to k, β and γ.
        """
        return cls._adopt(conv, operator, rescale, eps)


class SphereConv3d(_ConvLayer, nn.Conv3d):
    """SphereConv over (B, C, D, H, W) or (C, D, H, W); otherwise as `SphereConv2d`."""

    _sphere_conv = staticmethod(sphere_conv3d)

    def __init__(self, *args: Any, operator: str | Operator = "cosine", rescale: bool = False,
                 eps: float = DEFAULT_EPS, **kwargs: Any):  # fmt: skip
        nn.Conv3d.__init__(self, *args, **kwargs)
        self._make_angular(operator, rescale, eps)

    @classmethod
    def from_conv(cls, conv: nn.Conv3d, *, operator: str | Operator = "cosine", rescale: bool = False,
                  eps: float = DEFAULT_EPS) -> "SphereConv3d":  # fmt: skip
        """The angular twin of `conv`; see `SphereConv2d.from_conv`."""
        return cls._adopt(conv, operator, rescale, eps)


class SphereLinear(AngularLayer, nn.Linear):
    """A linear map that returns g(θ) of the angle between its input and each row of its weight.

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear`.
        operator, rescale, eps: as `SphereConv2d`, with β, γ of shape (out_features,).

    Shape:
        (*, in_features) -> (*, out_features)

    Raises:
        UsageError: an unknown operator or eps ≤ 0.
    """

    def __init__(self, *args: Any, operator: str | Operator = "cosine", rescale: bool = False,
                 eps: float = DEFAULT_EPS, **kwargs: Any):  # fmt: skip
        nn.Linear.__init__(self, *args, **kwargs)
        self._make_angular(operator, rescale, eps)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, operator: str | Operator = "cosine", rescale: bool = False,
                    eps: float = DEFAULT_EPS) -> "SphereLinear":  # fmt: skip
        """The angular twin of `linear`; see `SphereConv2d.from_conv`."""
        return cls._adopt(linear, operator, rescale, eps)

    def forward(self, input: Tensor) -> Tensor:
        return self._own(sphere_linear(input, self.weight, self.operator, self._shift, self.eps, self.beta))

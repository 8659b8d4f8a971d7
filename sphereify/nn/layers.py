"""Angular layers that take the place of torch's convolutions and linear maps.

Each is a subclass of the layer it replaces: the arguments, the `weight` and `bias` keys, padding modes, unbatched
input and `isinstance` checks stay. With `rescale=True` it is SphereNorm (section 3.5): β·g(θ) + γ with β, γ learned
per output channel.
"""

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.choices import DEFAULT_EPS
from sphereify.errors import invalid, option, refused, wrong_type
from sphereify.nn.decoupled import Decoupled, decoupled
from sphereify.nn.functional import (
    Operator,
    sphere_conv1d,
    sphere_conv2d,
    sphere_conv3d,
    sphere_linear,
    writable,
)
from sphereify.nn.magnitudes import Magnitude, make_magnitude
from sphereify.nn.merged_filters import HasDirections
from sphereify.nn.operators import make_operator, operator_repr
from sphereify.nn.radius import HasRadius, check_radius
from sphereify.nn.tracing import one_node

Layer = TypeVar("Layer", bound="AngularLayer")
Twin = TypeVar("Twin", bound=nn.Module)
Ints = int | tuple[int, ...]
"""One number for all dimensions of space, or one for each."""


class AngularLayer(HasDirections, Decoupled):
    """The operator, ε, the magnitude, and SphereNorm's β and γ of an angular layer."""

    plain_class: ClassVar[type[nn.Module]]
    """torch's layer that it replaces."""
    beta: nn.Parameter | None
    gamma: nn.Parameter | None
    bias: Any
    output_read_only: bool
    """True if nothing changes the output in place, because a normalization alone reads it; it is then not copied."""

    def _make_angular(self, operator: str | Operator, rescale: bool, eps: float, magnitude: Magnitude) -> None:
        if not eps > 0:
            raise invalid("eps", eps, "a positive number", default=DEFAULT_EPS)
        filters = self.weight.shape[0]
        g = make_operator(operator, filters=filters)
        if isinstance(g, nn.Module) and g is not operator:
            g.to(device=self.weight.device, dtype=self.weight.dtype)
        self.operator = g
        self.eps = eps
        self.output_read_only = False
        self._set_magnitude(magnitude, filters, self.weight)
        ones = torch.ones(filters, device=self.weight.device, dtype=self.weight.dtype)
        self.register_parameter("beta", nn.Parameter(ones) if rescale else None)
        # A bias is γ already; a second number added to the same channel would be trained twice as fast.
        own_gamma = rescale and self.bias is None
        self.register_parameter("gamma", nn.Parameter(torch.zeros_like(ones)) if own_gamma else None)

    @property
    def rescale(self) -> bool:
        """True if SphereNorm's β and γ are part of this layer."""
        return self.beta is not None

    @classmethod
    def _adopt(
        cls: type[Layer],
        plain: nn.Module,
        operator: str | Operator,
        rescale: bool,
        eps: float,
        magnitude: Magnitude,
    ) -> Layer:
        """An angular layer with the parameters, hooks, flags and attributes of a plain one.

        The whole state is taken over rather than a list of names, so that attributes of the user's come along.
        """
        layer = twin_of(plain, cls, cls.plain_class)
        layer._make_angular(operator, rescale, eps, magnitude)
        return layer

    @property
    def _shift(self) -> Any:
        """γ, or the bias in its place where there is one."""
        return self.bias if self.bias is not None else self.gamma

    def _own(self, y: Tensor) -> Tensor:
        """The output as a tensor that whoever receives it may write to."""
        read_only = self.output_read_only and not self._forward_hooks
        return y if read_only else writable(y, self.beta, self._shift)

    def extra_repr(self) -> str:
        operator = operator_repr(self.operator)
        return f"{super().extra_repr()}{operator}, rescale={self.rescale}, eps={self.eps:g}{self._magnitude_repr()}"


def twin_of(plain: nn.Module, cls: type[Twin], plain_class: type[nn.Module]) -> Twin:
    """A module of the class `cls` with the whole state of the layer of torch's that it is to replace.

    Raises:
        ArgumentTypeError: `plain` is not of the class `plain_class`.
    """
    if not isinstance(plain, plain_class):
        raise wrong_type(cls.__name__, plain, f"a torch.nn.{plain_class.__name__}")
    twin = cls.__new__(cls)
    twin.__dict__.update(adopted(plain))
    return twin


def adopted(plain: nn.Module) -> dict[str, Any]:
    """The attributes of a module for its twin: the same parameters and hooks, in containers of its own."""
    return {key: value.copy() if isinstance(value, (dict, set, list)) else value for key, value in vars(plain).items()}


def is_folded_layer(module: nn.Module) -> bool:
    """True for a layer for inference, whose constants are folded into its filters (`sphereify.deployment`)."""
    return getattr(type(module), "folded", False)


class ConvGeometry(nn.Module):
    """The geometry of torch's convolutions, for layers that call another function in their place."""

    stride: Any
    padding: Any
    dilation: Any
    groups: int
    padding_mode: Any
    _reversed_padding_repeated_twice: list[int]

    def _padded(self, input: Tensor) -> tuple[Tensor, Any]:
        """The input, padded here where the padding mode is not zeros, and the padding that is left to do."""
        if self.padding_mode == "zeros":
            return input, self.padding
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0


class _SphereConv(AngularLayer, HasRadius, ConvGeometry):
    """Base of the three convolutions, which differ in the function that they call."""

    _sphere_conv: ClassVar[Callable[..., Tensor]]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints | str = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        operator: str | Operator = "cosine",
        rescale: bool = False,
        radius: float = 0.0,
        learn_radius: bool = False,
        magnitude: str | Magnitude = "sphere",
        weighted: bool = False,
        eps: float = DEFAULT_EPS,
    ):
        geometry: tuple[Any, ...] = (kernel_size, stride, padding, dilation, groups)
        super().__init__(in_channels, out_channels, *geometry, bias, padding_mode, device, dtype)
        self._make_angular(operator, rescale, eps, make_magnitude(magnitude, weighted))
        self._set_radius(radius, learn_radius, self.weight)

    @classmethod
    def from_conv(
        cls: type[Layer],
        conv: nn.Module,
        *,
        operator: str | Operator = "cosine",
        rescale: bool = False,
        radius: float = 0.0,
        learn_radius: bool = False,
        magnitude: str | Magnitude = "sphere",
        weighted: bool = False,
        eps: float = DEFAULT_EPS,
    ) -> Layer:
        """The angular twin of torch's convolution `conv`, with the same parameters, hooks, mode and attributes.

        Nothing is copied, so an optimizer of `conv` trains the twin, except for its k, β, γ, ρ and that of its
        magnitude.

        Raises:
            UsageError: an unknown operator or magnitude, eps ≤ 0, or a radius that is not valid.
            ArgumentTypeError: not a convolution of as many dimensions.
        """
        check_radius(radius, learn_radius)
        layer: Any = cls._adopt(conv, operator, rescale, eps, make_magnitude(magnitude, weighted))
        layer._set_radius(radius, learn_radius, layer.weight)
        return layer  # type: ignore[no-any-return]

    @one_node
    def forward(self, input: Tensor) -> Tensor:
        input, padding = self._padded(input)
        geometry = (self.stride, padding, self.dilation, self.groups)
        if self.is_decoupled:
            return decoupled(self, input, self.weight, self._shift, geometry, self.beta)
        y = type(self)._sphere_conv(
            input, self.weight, self.operator, self._shift, *geometry, self.eps, self.beta, self.radius
        )
        return self._own(y)

    def extra_repr(self) -> str:
        return super().extra_repr() + self._radius_repr()


class SphereConv1d(_SphereConv, nn.Conv1d):
    """SphereConv over (B, C, L) or (C, L); see `SphereConv2d`."""

    plain_class = nn.Conv1d
    _sphere_conv = staticmethod(sphere_conv1d)


class SphereConv2d(_SphereConv, nn.Conv2d):
    """A convolution that returns g(θ) of the angle between filter and patch (NIPS 2017, eq. 1).

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as `torch.nn.Conv2d`.
        operator: a name from `sphereify.choices.OPERATORS`, or an operator object.
        rescale: SphereNorm: multiply by a learned `beta` (starts at 1) and add a learned `gamma` (starts at 0), both
            of shape (out_channels,). Where there is a bias it is γ, and `gamma` is None.
        radius: ρ ≥ 0, the pooled radius (see `sphereify.nn.radius`). 0 is the paper's operator; with a larger ρ patches
            keep their relative lengths within an input. Usual: 1 to 4.
        learn_radius: learn ρ, starting at `radius`, as `log_radius`.
        magnitude: h(‖x‖), which multiplies g(θ): a name from `sphereify.choices.MAGNITUDES`, or a
            `sphereify.nn.Magnitude` with numbers of your own. "sphere" is 1.
        weighted: multiply by ‖w‖ as well. With "linear" and the cosine operator that is a plain convolution.
        eps: > 0, added to both squared norms.

    Shape:
        (B, C, H, W) or (C, H, W) -> as `torch.nn.Conv2d`. Values of g lie in [-1, 1] before magnitude, bias and
        rescaling.

    Raises:
        UsageError: an unknown operator or magnitude, eps ≤ 0, or a radius that is not valid.

    >>> SphereConv2d(3, 8, 3, padding=1, operator="linear")(torch.zeros(1, 3, 5, 5)).shape
    torch.Size([1, 8, 5, 5])
    """

    plain_class = nn.Conv2d
    _sphere_conv = staticmethod(sphere_conv2d)


class SphereConv3d(_SphereConv, nn.Conv3d):
    """SphereConv over (B, C, D, H, W) or (C, D, H, W); see `SphereConv2d`."""

    plain_class = nn.Conv3d
    _sphere_conv = staticmethod(sphere_conv3d)


class SphereLinear(AngularLayer, nn.Linear):
    """A linear map that returns g(θ) of the angle between its input and each row of its weight.

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear`.
        operator, rescale, weighted, eps: as `SphereConv2d`, with β, γ of shape (out_features,).
        magnitude: as `SphereConv2d`. An input is a single row, so a ρ is relative to the running mean of the data.

    Shape:
        (*, in_features) -> (*, out_features)

    Raises:
        UsageError: an unknown operator or magnitude, or eps ≤ 0.
    """

    plain_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        operator: str | Operator = "cosine",
        rescale: bool = False,
        magnitude: str | Magnitude = "sphere",
        weighted: bool = False,
        eps: float = DEFAULT_EPS,
    ):
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._make_angular(operator, rescale, eps, _of_rows(magnitude, weighted))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        operator: str | Operator = "cosine",
        rescale: bool = False,
        magnitude: str | Magnitude = "sphere",
        weighted: bool = False,
        eps: float = DEFAULT_EPS,
    ) -> "SphereLinear":
        """The angular twin of `linear`, with the same parameters; see `SphereConv2d.from_conv`.

        Raises:
            UsageError: as the class.
            ArgumentTypeError: not a linear layer.
        """
        return cls._adopt(linear, operator, rescale, eps, _of_rows(magnitude, weighted))

    @one_node
    def forward(self, input: Tensor) -> Tensor:
        if self.is_decoupled:
            return decoupled(self, input, self.weight, self._shift, (), self.beta)
        return self._own(sphere_linear(input, self.weight, self.operator, self._shift, self.eps, self.beta))


def _of_rows(magnitude: str | Magnitude, weighted: bool) -> Magnitude:
    """The magnitude of a linear map: by name it is relative to the data."""
    if isinstance(magnitude, str):
        return make_magnitude(magnitude, weighted).of_rows()
    made = make_magnitude(magnitude, weighted)
    if made != made.of_rows():
        raise refused(
            "magnitude",
            f"ρ is relative to the mean norm of each input, but an input of a linear map is one row; take "
            f"{option('mean', 'data')}",
        )
    return made

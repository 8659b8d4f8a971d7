"""The passes: everything that surrounds the products of an angular map, forward and backward.

    unit, n_w = normalize_filters(w)                    ŵ = w / n_w
    dot       = project(x, unit)                        the products, which are torch's own
    n_x       = patch_norm(x)                           pooled where there is a radius
    g, y      = curve(dot, n_x)                         cos θ = dot / n_x, g(θ), and y = β·g + γ

    d, radial = curve_backward(∂L/∂y, g, n_x)           d = ∂L/∂cos / n_x, radial = Σ_filters ∂L/∂cos · cos / n_x²,
                                                        and the gradients of k, β and γ
    radial    = pool_backward(radial)                   where there is a radius
    ∂L/∂x, v  = project_backward(d)                     the adjoints of the products, torch's own again
    ∂L/∂x     = subtract_radial(∂L/∂x, x, radial)       patches have a direction and no length
    ∂L/∂w     = filter_gradient(v, w, n_w)              and so have filters

A norm per patch is computed in one place of each maker, `patch_norm`, and its adjoint in `subtract_radial`.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sphereify.nn.geometry import Projection
from sphereify.nn.radius import Radius


class AngularMap(NamedTuple):
    """The constants of an angular map."""

    projection: Projection | None
    """None for a linear map."""
    curve: str
    """Name of `operators.CURVES`."""
    eps: float
    """ε > 0, added to the squared norms of patches and filters."""


class CurveGradients(NamedTuple):
    """The gradients that lie between an output β·g + shift and the products, with d = ∂L/∂cos."""

    d_dot: Tensor
    """d / norm, the gradient of the products, in the dtype of g."""
    radial: Tensor | None
    """Σ_filters d·cos / norm² in the shape of `norm`; may be None where the gradient of x is not needed."""
    k: Tensor | None
    """None where k is no tensor or its gradient is not needed."""
    beta: Tensor | None
    shift: Tensor | None


class Passes(Protocol):
    """The passes around the products of an angular map; four of the modules beside this one are its makers.

    Norms and sums are in fp32, or float64 for tensors in float64. Where `projection` is None, a tensor of filters'
    outputs is (*, O) and one of patches (*, 1); for a convolution they are (B, O, H', W') and (B, groups, H', W').
    Arguments named "may be overwritten" belong to the maker: it may return its result in their memory.
    """

    def normalize_filters(self, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(w / N in `dtype`, N) with N = sqrt(‖w‖² + ε) of shape (O, 1, …)."""

    def patch_norm(
        self, x: Tensor, kernel: Sequence[int], eps: float, projection: Projection | None, radius: Radius = 0.0
    ) -> Tensor:
        """sqrt(‖patch‖² + ρ²·m + ε) of each patch: (B, groups, H', W') for a convolution, (*, 1) for a linear map.

        m is the mean of ‖patch‖² over the patches of one sample and group; a linear map has no radius.
        """

    def curve(
        self,
        dot: Tensor,
        norm: Tensor,
        curve: str,
        k: float | Tensor | None,
        projection: Projection | None,
        beta: Tensor | None,
        shift: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """(g, β·g + shift) of cos θ = dot / norm, in the dtype of `dot`, which may be overwritten.

        Args:
            dot: the inner products of patches and unit filters.
            norm: of `patch_norm`.
            curve: a name of `operators.CURVES`.
            k: a number, or a tensor that broadcasts: one k for each filter or for all.
            beta, shift: (O,) or None. Without both the second result is None.
        """

    def curve_backward(
        self,
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
        """The gradients that follow from that of β·g + shift, with cos and the slopes recovered from g.

        Args:
            grad: the gradient of β·g + shift.
            beta, shift_dtype: β and the dtype of the shift; None where there is none.
            needed: True for each of the gradients of x, of the weight and of k that is needed.
        """

    def subtract_radial(
        self, grad_x: Tensor, x: Tensor, radial: Tensor, kernel: Sequence[int], projection: Projection | None
    ) -> Tensor:
        """grad_x - x · (the sum of `radial` over the patches of each element); grad_x may be overwritten."""

    def filter_gradient(self, v: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
        """(v - ŵ (ŵ·v)) / N in the dtype of the weight, N of `normalize_filters`; v may be overwritten."""

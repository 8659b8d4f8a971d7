"""SphereNorm's rescaling β·g + γ (NIPS 2017, section 3.5) and its gradients, over whole tensors."""

import torch
from torch import Tensor

from sphereify.nn.geometry import Projection
from sphereify.nn.operators import accumulate_dtype


def of_channels(values: Tensor | None, of_filters: Tensor, projection: Projection | None) -> Tensor | None:
    """(O,) in the shape and dtype in which it broadcasts over (B, O, …) or (*, O)."""
    if values is None:
        return None
    dim = of_filters.dim() - 2 if projection else 0
    return values.to(of_filters.dtype).view(-1, *[1] * dim)


def rescaled(g: Tensor, beta: Tensor | None, shift: Tensor | None) -> Tensor:
    """β·g + shift, either of which may be missing."""
    if beta is None:
        return g if shift is None else g + shift
    return g * beta if shift is None else torch.addcmul(shift, g, beta)


def unscaled(
    grad: Tensor, g: Tensor, beta: Tensor | None, shift_dtype: torch.dtype | None, projection: Projection | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of g, β and the shift from that of β·g + shift."""
    if beta is None and shift_dtype is None:
        return grad, None, None  # without a copy in another precision
    others = [d for d in range(g.dim()) if d != (g.dim() - 1 if projection is None else 1)]
    upstream = grad.to(accumulate_dtype(g.dtype))
    grad_shift = None if shift_dtype is None else upstream.sum(others).to(shift_dtype)
    if beta is None:
        return grad, None, grad_shift
    grad_beta = (upstream * g).sum(others).to(beta.dtype)
    factor = of_channels(beta, upstream, projection)
    assert factor is not None
    return upstream * factor, grad_beta, grad_shift

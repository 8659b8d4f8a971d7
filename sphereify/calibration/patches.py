"""Patches of a layer's input: what its filters are multiplied with at each position."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sphereify.calibration.layer_pairs import LayerPair
from sphereify.nn.geometry import Projection, per_axis
from sphereify.nn.magnitudes import SPHERE
from sphereify.nn.passes.reference import patch_norm
from sphereify.nn.precision import accumulated


@dataclass(frozen=True)
class Geometry:
    """The arrangement of a layer's patches in its input.

    Attributes:
        kernel: the kernel's size; empty for a linear map.
        sides: the padding, as `F.pad` takes it.
        mode: the padding mode, as `F.pad` takes it.
        size: the magnitude h of patches with given norms; None for 1.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    sides: tuple[int, ...]
    mode: str
    groups: int
    eps: float
    radius: float = 0.0
    size: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, pair: LayerPair, call: Any = None) -> "Geometry":
        """The geometry of a module, or of a functional call with these arguments."""
        layer = pair.layer
        size = None if getattr(layer, "magnitude", SPHERE).form == "sphere" else layer.usual_size
        if pair.decision.kind == "linear":
            return cls((), (), (), (), "constant", 1, layer.eps, size=size)
        kernel = tuple(pair.decision.shape[2:])
        dim = len(kernel)
        if call is None:
            stride, padding, dilation, groups = layer.stride, layer.padding, layer.dilation, layer.groups
        else:
            stride, padding, dilation, groups = call.geometry
        stride, dilation = per_axis(stride, dim), per_axis(dilation, dim)
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            sides = tuple(side for t in reversed(totals) for side in (t // 2, t - t // 2))
        elif padding == "valid":
            sides = (0,) * (2 * dim)
        else:
            sides = tuple(side for p in reversed(per_axis(padding, dim)) for side in (p, p))
        mode = getattr(layer, "padding_mode", "zeros")
        return cls(
            kernel,
            stride,
            dilation,
            sides,
            "constant" if mode == "zeros" else mode,
            groups,
            layer.eps,
            layer.radius_value,
            size,
        )

    def norms(self, x: Tensor) -> Tensor | None:
        """The pooled norm of each patch, (B, *positions, groups); None without a radius, where a patch is enough."""
        if not self.radius:
            return None
        return self._norms(x, self.radius).movedim(1, -1)

    def sizes(self, x: Tensor) -> Tensor | None:
        """The magnitude h of each patch, (B, *positions, groups) or (rows, 1); None without one."""
        if self.size is None:
            return None
        sizes = self.size(self._norms(x, 0.0))
        return sizes.movedim(1, -1) if self.kernel else sizes

    def mean_norm(self, x: Tensor) -> Tensor:
        """The mean norm of all patches."""
        return self._norms(x, 0.0).mean()

    def _norms(self, x: Tensor, radius: float) -> Tensor:
        if not self.kernel:
            return patch_norm(x.reshape(-1, x.shape[-1]), (), self.eps, None)
        unpadded = Projection(self.stride, (0,) * len(self.kernel), self.dilation, self.groups)
        return patch_norm(self._padded(x), self.kernel, self.eps, unpadded, radius)

    def at(self, values: Tensor, positions: Tensor) -> Tensor:
        """The values of `norms` or `sizes` at some positions: (groups, n)."""
        if not self.kernel:
            return values[positions].t()
        return values[torch.unravel_index(positions, values.shape[:-1])].t()

    def _padded(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(0) if x.dim() == len(self.kernel) + 1 else x
        return F.pad(x, self.sides, mode=self.mode) if any(self.sides) else x

    def patches(self, x: Tensor) -> Tensor:
        """A view of the input's patches.

        (B, C, *space) -> (B, *positions, C, *kernel) for a convolution, (*, features) -> (rows, features) otherwise.
        """
        if not self.kernel:
            return x.reshape(-1, x.shape[-1])
        dim = len(self.kernel)
        x = self._padded(x)
        for axis in range(dim):
            reach = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            x = x.unfold(2 + axis, reach, self.stride[axis])[..., :: self.dilation[axis]]
        return x.movedim(1, 1 + dim)

    def unit(self, patches: Tensor, positions: Tensor, norms: Tensor | None = None) -> Tensor:
        """The patches at some positions, each divided by its norm: (groups, n, fan_in).

        `norms` are those of `norms`; without them each patch has its own.
        """
        if self.kernel:
            places = torch.unravel_index(positions, patches.shape[: 1 + len(self.kernel)])
            rows = patches[places].unflatten(1, (self.groups, -1)).flatten(2)
            rows = accumulated(rows.movedim(1, 0))
            if norms is not None:
                return rows / self.at(norms, positions).unsqueeze(2)
        else:
            rows = accumulated(patches[positions].unsqueeze(0))
        return rows / (rows.square().sum(2, keepdim=True) + self.eps).sqrt()

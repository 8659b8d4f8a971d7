"""Minimum Gram determinant (MGD, AISTATS 2021, arXiv 2103.01649): the volume of the filters in a kernel space."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sphereify.nn.energies import blocks
from sphereify.nn.energies.unit import unit
from sphereify.nn.precision import no_autocast
from sphereify.nn.recomputation import recomputed

RIDGE = 1e-6
"""Added to the diagonal of the kernel matrix, which has no inverse where two filters coincide."""


@dataclass(frozen=True)
class GramDeterminant:
    """E = -log det(K + 1e-6·I), with K_ij = exp(-γ‖ŵ_i - ŵ_j‖²).

    For half space K_ij = cosh(2γ·cos θ_ij) / cosh(2γ), the kernel of lines. Of more than 2,048 filters the determinants
    of random parts are summed, for the matrix of all would have no room; the parts are drawn anew in each call.
    """

    gamma: float

    def __call__(self, filters: Tensor, half_space: bool) -> Tensor:
        """The energy of each bank: (groups, N, fan_in) -> (groups,)."""
        count, most = filters.shape[1], max(2, math.isqrt(blocks.ROOM))
        with no_autocast(filters.device.type):
            directions = unit(filters, torch.float64)  # fp32 would lose the small eigenvalues
            if count > most:
                parts = torch.randperm(count, device=filters.device).tensor_split(math.ceil(count / most))
                matrices = [directions[:, part] for part in parts]
            else:
                matrices = [directions]
            pieces = [blocks.whole_banks(matrix) for matrix in matrices]
            function = self._of if sum(map(len, pieces)) == 1 else self._recomputed
            energies = [torch.cat([function(banks, half_space) for banks in piece]) for piece in pieces]
            total = torch.stack(energies).sum(0)
        return total if filters.dtype is torch.float64 else total.float()

    def _recomputed(self, directions: Tensor, half_space: bool) -> Tensor:
        return recomputed(self._of, directions, half_space)  # type: ignore[no-any-return]

    def _of(self, directions: Tensor, half_space: bool) -> Tensor:
        cos = directions @ directions.mT
        kernel = (2 * self.gamma * (cos - 1)).exp()
        if half_space:
            kernel = (kernel + (-2 * self.gamma * (cos + 1)).exp()) / (1 + math.exp(-4 * self.gamma))
        itself = torch.eye(cos.shape[1], dtype=torch.bool, device=cos.device)
        return -torch.linalg.slogdet(kernel.masked_fill(itself, 1 + RIDGE)).logabsdet

    def least(self, count: int, fan_in: int, half_space: bool) -> float | None:
        """The value of a simplex: the minimum for up to fan_in + 1 filters in the full space."""
        if half_space or count > fan_in + 1 or count > math.isqrt(blocks.ROOM):
            return None
        other = math.exp(-2 * self.gamma * (1 + 1 / (count - 1)))
        return -(count - 1) * math.log(1 + RIDGE - other) - math.log(1 + RIDGE + (count - 1) * other)

    def __str__(self) -> str:
        return f"determinant, γ={self.gamma:g}"

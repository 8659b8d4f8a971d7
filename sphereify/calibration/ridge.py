"""Ridge regression of targets on unit patches, drawn towards given filters."""

import torch
from torch import Tensor

from sphereify.calibration.moments import Moments

RIDGES = (1e-4, 1e-2, 1.0, 100.0)
"""Candidates for the ridge, as shares of the mean eigenvalue of the Gram matrix; few rows choose among them."""


class RidgeSolver:
    """The solution of a ridge regression, and the factorized matrix for the steps that follow.

    Args:
        moments: of the rows to fit.
        judge: moments of held-out rows, which choose the ridge; None takes the smallest.
        copied: filters of length 1 (filters, fan_in) to which the solution is drawn as far as the rows allow it.

    Attributes:
        slopes: the solution (filters, fan_in), in the dtype of `copied`.
        mean: mean of the patches (groups, fan_in).
    """

    def __init__(self, moments: Moments, judge: Moments | None, copied: Tensor):
        groups = len(moments.mean)
        unit = copied.double().unflatten(0, (groups, -1)).mT  # (groups, fan_in, filters of one group)
        response = moments.covariance @ unit
        scale = (unit * moments.cross).sum(1, keepdim=True) / (unit * response).sum(1, keepdim=True).clamp_min(1e-12)
        prior = unit * scale
        residual = moments.cross - moments.covariance @ prior
        spread = moments.covariance.diagonal(dim1=1, dim2=2).mean(1)
        size = torch.maximum(spread, 1e-5 * moments.mean.square().mean(1)).clamp_min(1e-12)  # above rounding in fp32
        best = None
        for ridge in RIDGES if judge is not None else RIDGES[:1]:
            factor = _cholesky(moments.covariance, ridge * size)
            slopes = prior + torch.cholesky_solve(residual, factor)
            error = 0.0
            if judge is not None:
                error = float(((slopes * (judge.covariance @ slopes - 2 * judge.cross)).sum(1)).sum())
            if best is not None and error >= best[0]:
                break  # a larger ridge does not help
            best = error, slopes, factor
        assert best is not None
        self._factor = best[2].to(copied.dtype)  # of steps towards the solution, which need not be exact
        self.mean = moments.mean.to(copied.dtype)
        self.slopes = best[1].mT.flatten(0, 1).to(copied.dtype)

    def solve(self, gradient: Tensor) -> Tensor:
        """The step for a gradient: (groups, fan_in, filters of one group) -> (filters, fan_in)."""
        return torch.cholesky_solve(gradient, self._factor).mT.flatten(0, 1)


def _cholesky(covariance: Tensor, ridge: Tensor) -> Tensor:
    """The Cholesky factor of covariance + ridge, with a larger ridge where rounding has made the matrix indefinite."""
    for _ in range(8):
        raised = covariance.clone()
        raised.diagonal(dim1=1, dim2=2).add_(ridge.unsqueeze(1))
        factor, failed = torch.linalg.cholesky_ex(raised)
        if not failed.any():
            break
        ridge = torch.where(failed > 0, ridge * 10, ridge)
    return factor

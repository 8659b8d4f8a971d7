"""The targets of a loss: classes, two classes and a share for mixed samples, or probabilities."""

from typing import Any

import torch
from torch import Tensor

from sphereify.errors import UsageError, wrong_type
from sphereify.nn.precision import has_values

Targets = Tensor | tuple[Tensor, Tensor, float | Tensor]


def as_targets(targets: Any) -> Any:
    """Targets as a loss takes them: int64 for any integers, a tuple for mixup.

    Raises:
        UsageError: a tuple of another length.
        ArgumentTypeError: neither a tensor nor a tuple.
    """
    if isinstance(targets, (tuple, list)) and len(targets) == 3 and isinstance(targets[0], Tensor):
        return as_targets(targets[0]), as_targets(targets[1]), targets[2]
    if isinstance(targets, tuple):
        raise UsageError(f"targets: got a tuple of {len(targets)}, expected (y_a, y_b, share)")
    if not isinstance(targets, Tensor):
        raise wrong_type("targets", targets, "a tensor, or (y_a, y_b, share) for mixup")
    is_index = targets.dtype != torch.bool and not targets.is_floating_point() and not targets.is_complex()
    return targets.long() if is_index else targets


def share_of_first(share: Any, size: int, device: torch.device) -> Tensor:
    """The share of (y_a, y_b, share) as a tensor, without dimensions or (size,).

    Raises:
        UsageError: another shape, or a share that is not in [0, 1].
    """
    share = torch.as_tensor(share, device=device, dtype=None if isinstance(share, Tensor) else torch.float64)
    if share.shape not in ((), (size,)):
        raise UsageError(f"targets: got a share of shape {tuple(share.shape)}, expected a number or ({size},)")
    if has_values(share) and not bool(((share >= 0) & (share <= 1)).all()):
        raise UsageError("targets: the share of (y_a, y_b, share) must lie in [0, 1]")
    return share  # type: ignore[no-any-return]


def check_shape(targets: Tensor, size: int) -> None:
    """Make sure that targets are one class for each of `size` samples.

    Raises:
        UsageError: another dtype or shape.
    """
    if targets.dtype == torch.bool or targets.is_floating_point():
        raise UsageError(f"targets: got {targets.dtype}, expected class indices (int64)")
    if targets.shape != (size,):
        raise UsageError(f"targets: got shape {tuple(targets.shape)}, expected ({size},), one class a sample")


def check_range(targets: Tensor, classes: int, ignore_index: int) -> None:
    """Make sure that each target is a class, or the one that does not count.

    Raises:
        UsageError: one is not.
    """
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= classes))]
    if len(wrong):
        raise UsageError(f"targets: got class {int(wrong[0])}, expected 0 to {classes - 1}")

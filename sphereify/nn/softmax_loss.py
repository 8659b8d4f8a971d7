"""Cross entropy of logits in which the score of the target class is replaced by another."""

import math
from typing import Any

import torch
from torch import Tensor

from sphereify.nn.class_blocks import ClassBlock
from sphereify.nn.heads import AngularHead
from sphereify.nn.precision import accumulated, in_forward_mode
from sphereify.nn.recomputation import recomputed

ROOM = 1 << 22
"""Elements of a temporary copy of logits: 16 MiB in fp32."""


def cross_entropy(
    logits: Tensor, targets: Tensor, new: Tensor, class_weight: Tensor | None, smoothing: float
) -> Tensor:
    """The loss of each sample, times its weight: (B,).

    Args:
        logits: (B, C).
        targets: (B,) in [0, C).
        new: (B,), the score of the target in training.
    """
    logits = accumulated(logits)
    total = _log_sum_exp(logits, targets, new)
    average = _weighted_mean(logits, targets, new, class_weight) if smoothing else None
    return _smoothed(total, average, targets, new, class_weight, smoothing)


def cross_entropy_in_blocks(
    head: AngularHead,
    features: Tensor,
    blocks: list[ClassBlock],
    targets: Tensor,
    new: Tensor,
    class_weight: Tensor | None,
    smoothing: float,
) -> Tensor:
    """`cross_entropy` from the features (B, F), without all logits at once."""
    parts, averages = [], []
    for block in blocks:
        part, average = recomputed(_block, head, features, targets, block, class_weight)
        parts.append(part)
        averages.append(average)
    total = torch.logsumexp(torch.stack([*parts, new]), 0)
    own = new if class_weight is None else new * class_weight.to(new.dtype)[targets]
    average = (torch.stack(averages).sum(0) + own) / head.num_classes
    return _smoothed(total, average, targets, new, class_weight, smoothing)


def _smoothed(
    total: Tensor, average: Tensor | None, targets: Tensor, new: Tensor, class_weight: Tensor | None, smoothing: float
) -> Tensor:
    """The loss, from log Σ exp and the weighted mean of the logits, (B,) each."""
    weight = torch.ones_like(new) if class_weight is None else class_weight.to(new.dtype)[targets]
    loss = weight * (total - new)
    if not smoothing or average is None:
        return loss
    scale = 1.0 if class_weight is None else class_weight.to(new.dtype).mean()
    return (1 - smoothing) * loss + smoothing * (scale * total - average)


def _block(
    head: AngularHead, features: Tensor, targets: Tensor, block: ClassBlock, class_weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """log Σ exp and weighted sum of the logits of some classes, each sample's target left out."""
    logits = accumulated(head.logits(features, block.classes))
    is_target = block.is_target(targets)
    weighted = logits if class_weight is None else logits * class_weight.to(logits.dtype)[block.classes]
    if block.weight is not None:
        weighted = weighted * block.weight.to(logits.dtype)
        logits = logits + block.weight.to(logits.dtype).log()
    empty = is_target.all(1)  # a block of one class that is the target: log 0, whose gradient is not a number
    total = torch.logsumexp(logits.masked_fill(is_target & ~empty[:, None], -math.inf), 1)
    return torch.where(empty, -math.inf, total), weighted.masked_fill(is_target, 0).sum(1)


def _log_sum_exp(logits: Tensor, targets: Tensor, new: Tensor) -> Tensor:
    """log Σ_j exp z_j of each row, with the logit of the target replaced: (B, C), (B,), (B,) -> (B,)."""
    if in_forward_mode():
        return torch.logsumexp(logits.scatter(1, targets[:, None], new[:, None]), 1)
    return _LogSumExp.apply(logits, targets, new)  # type: ignore[no-any-return]


class _LogSumExp(torch.autograd.Function):
    """`_log_sum_exp`, which saves the logits and nothing else of their size.

    The copy with the replaced logits lives for some rows at a time.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, targets: Tensor, new: Tensor) -> Tensor:
        rows = max(1, ROOM // max(1, logits.shape[1]))
        if torch.compiler.is_compiling() or len(logits) <= rows:
            return torch.logsumexp(logits.scatter(1, targets[:, None], new[:, None]), 1)
        parts = zip(logits.split(rows), targets.split(rows), new.split(rows), strict=True)
        return torch.cat([torch.logsumexp(z.scatter(1, y[:, None], t[:, None]), 1) for z, y, t in parts])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]
        logits, targets, new, total = ctx.saved_tensors
        shares = (logits - total[:, None]).exp().scatter(1, targets[:, None], 0)
        return shares * grad[:, None], None, grad * (new - total).exp()


def _weighted_mean(logits: Tensor, targets: Tensor, new: Tensor, class_weight: Tensor | None) -> Tensor:
    """Mean over the classes of weight · logit, with the logit of the target replaced, (B,)."""
    old = logits.gather(1, targets[:, None]).squeeze(1)
    if class_weight is None:
        return logits.mean(1) + (new - old) / logits.shape[1]
    weight = class_weight.to(logits.dtype)
    return (logits @ weight + (new - old) * weight[targets]) / logits.shape[1]

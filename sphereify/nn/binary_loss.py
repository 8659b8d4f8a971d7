"""The loss of SphereFace2: a binary task for each class, weighed against each other."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from sphereify.nn.class_blocks import ClassBlock, chunks
from sphereify.nn.heads import AngularHead
from sphereify.nn.precision import accumulated
from sphereify.nn.recomputation import recomputed


class BinaryTasks(NamedTuple):
    """The scores z_j of each sample's binary tasks, and the margin M between them and the threshold 0.

    The positive of class j costs λ/r·log(1 + exp(M - z_j)), its negative (1 - λ)/r·log(1 + exp(M + z_j)).
    """

    head: AngularHead
    logits: Tensor | None = None
    """(B, C); None: computed from the features."""
    features: Tensor | None = None
    blocks: tuple[ClassBlock, ...] = ()
    """The classes whose scores are computed at a time, where there are no logits."""
    margin: Tensor | float = 0.0


def binary_loss(tasks: BinaryTasks, targets: Tensor, class_weight: Tensor | None, smoothing: float) -> Tensor:
    """The loss of each sample: its positive, and the negatives of all other classes.

    It is linear in the targets: of shares it is the mean over the classes that a sample may be of.

    Args:
        targets: classes (B,), or shares of each class (B, C).
        class_weight: (C,), the weight of a sample of each class.
        smoothing: share of the target that is spread over all classes.

    Returns:
        (B,), times the weight of the target.
    """
    head = tasks.head
    weight = None if class_weight is None else class_weight.to(head.weight.device)
    if tasks.logits is not None:
        (every,) = chunks(head.num_classes, head.num_classes)
        return _of(accumulated(tasks.logits), head, every, targets, weight, smoothing, tasks.margin)
    arguments = (targets, weight, smoothing, tasks.margin)
    parts = [recomputed(_of_features, tasks.features, head, block, *arguments) for block in tasks.blocks]
    return sum(parts[1:], start=parts[0])  # type: ignore[no-any-return]


def _of_features(features: Tensor, head: AngularHead, block: ClassBlock, *arguments: object) -> Tensor:
    logits = head.logits(features, block.classes, detached=head.is_detached)
    return _of(accumulated(logits), head, block, *arguments)  # type: ignore[arg-type]


def _of(
    logits: Tensor,
    head: AngularHead,
    block: ClassBlock,
    targets: Tensor,
    class_weight: Tensor | None,
    smoothing: float,
    margin: Tensor | float,
) -> Tensor:
    """The contribution of some classes to the loss: (B, classes) -> (B,)."""
    positive = F.softplus(margin - logits) * (head.positive_weight / head.scale)
    negative = F.softplus(margin + logits) * ((1 - head.positive_weight) / head.scale)
    share, total = _shares(block, targets, class_weight, smoothing, head.num_classes, logits)
    parts = share * (positive - negative) + total[:, None] * negative
    return (parts if block.weight is None else parts * block.weight.to(parts.dtype)).sum(1)


def _shares(
    block: ClassBlock, targets: Tensor, class_weight: Tensor | None, smoothing: float, count: int, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """The weight of each class as the target of a sample, (B, classes), and its sum over all classes, (B,)."""
    weight = logits.new_ones(count) if class_weight is None else class_weight.to(logits.dtype)
    if targets.is_floating_point():
        shares = targets.to(logits.dtype)
        own, total = shares[:, block.classes], shares @ weight
    else:
        own, total = block.is_target(targets).to(logits.dtype), weight[targets]
    own = ((1 - smoothing) * own + smoothing / count) * weight[block.classes]
    return own, (1 - smoothing) * total + smoothing * weight.mean()

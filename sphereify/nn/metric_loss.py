"""An angular head as a loss over embeddings, in the convention of metric-learning libraries."""

from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor, nn

from sphereify.errors import UsageError, wrong_type
from sphereify.nn.annealing import MarginAnnealing
from sphereify.nn.heads import AngularHead
from sphereify.nn.losses import AngularLoss
from sphereify.nn.outputs import made_by
from sphereify.nn.precision import accumulate_dtype
from sphereify.nn.targets import Targets

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LossKeywords(TypedDict, total=False):
    """The options of `AngularLoss` as keyword arguments, for type checkers."""

    label_smoothing: float
    class_weight: Tensor | None
    ignore_index: int
    reduction: str
    annealing: MarginAnnealing | None
    separation: float
    separation_s: float
    chunk_size: int | None
    sampled_classes: float | None


class MetricLoss(nn.Module):
    """The loss that `as_metric_loss` returns.

    The class weights are parameters of this module: hand them to an optimizer.
    """

    def __init__(self, head: AngularHead, **options: "Unpack[LossKeywords]"):
        super().__init__()
        self.head = head
        self.loss = AngularLoss(head, **options)

    def forward(self, embeddings: Tensor, labels: Targets, indices_tuple: tuple[Tensor, ...] | None = None) -> Tensor:
        """The loss of embeddings (B, in_features) with targets as for `AngularLoss`.

        Args:
            embeddings: the features that the head classifies.
            labels: their classes.
            indices_tuple: what a miner of pytorch-metric-learning found, the pairs or triplets of samples as tensors of
                their numbers in the batch. A sample then counts as often as it occurs in them, relative to the most
                frequent one, as it does in that library's own classification losses. None, or no pairs: all alike.
        """
        self._check(embeddings)
        weight = None if indices_tuple is None else occurrences(indices_tuple, embeddings)
        if self.loss.needs_features or self.head.has_margin:
            logits = None if self.loss.needs_features else self.head.logits(embeddings)
            return self.loss(made_by(self.head, logits, embeddings), labels, weight)  # type: ignore[no-any-return]
        return self.loss(self.head.logits(embeddings), labels, weight)  # type: ignore[no-any-return]

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(B, in_features) -> (B, num_classes), without a margin."""
        self._check(embeddings)
        return self.head.logits(embeddings)

    def _check(self, embeddings: Tensor) -> None:
        if embeddings.dim() != 2 or embeddings.shape[1] != self.head.in_features:
            raise UsageError(
                f"embeddings: got shape {tuple(embeddings.shape)}, expected (batch, {self.head.in_features})"
            )


def occurrences(indices_tuple: tuple[Tensor, ...], embeddings: Tensor) -> Tensor:
    """The frequency of each sample of a batch in mined pairs or triplets, relative to the most frequent one; (B,)."""
    counts = torch.bincount(torch.cat(indices_tuple), minlength=len(embeddings)).to(accumulate_dtype(embeddings.dtype))
    if len(counts) > len(embeddings):
        raise UsageError(f"indices_tuple: names sample {len(counts) - 1} of a batch of {len(embeddings)}")
    return counts / counts.max() if counts.any() else torch.ones_like(counts)


def as_metric_loss(head: AngularHead, **options: "Unpack[LossKeywords]") -> MetricLoss:
    """`loss(embeddings, labels, indices_tuple=None)` and `loss.get_logits(embeddings)` of an angular head.

    Args:
        head: its weights become parameters of the loss.
        options: as `AngularLoss`.

    >>> import torch
    >>> loss = as_metric_loss(AngularHead(8, 3, kind="a-softmax"))
    >>> loss(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).shape
    torch.Size([])
    """
    if not isinstance(head, AngularHead):
        raise wrong_type("as_metric_loss", head, "an AngularHead")
    return MetricLoss(head, **options)

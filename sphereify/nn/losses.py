"""The loss of angular heads: the margin at the target class, and the separation of classes."""

import copy
import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.errors import UsageError, choose, invalid, option, refused, wrong_type
from sphereify.nn.annealing import MarginAnnealing
from sphereify.nn.binary_loss import BinaryTasks, binary_loss
from sphereify.nn.class_blocks import ClassBlock, chunks, sample
from sphereify.nn.energies.pairs import pair_energy
from sphereify.nn.heads import AngularHead
from sphereify.nn.modules import check_module
from sphereify.nn.outputs import AngularOutput, scores_of
from sphereify.nn.precision import accumulate_dtype, accumulated, has_values, in_transform, no_autocast
from sphereify.nn.softmax_loss import cross_entropy, cross_entropy_in_blocks
from sphereify.nn.targets import Targets, as_targets, check_range, check_shape, share_of_first
from sphereify.shared_options import LossOptions

REDUCTIONS = ("mean", "sum", "none")
OTHER_WEIGHTS = 0.03
"""Smallest difference of scores, relative to the largest one, that no rounding explains."""


class _Scores(NamedTuple):
    """The inputs of a loss: at least one of logits (B, C) and features (B, F), and the head that made them."""

    logits: Tensor | None
    features: Tensor | None
    head: AngularHead | None

    @property
    def size(self) -> int:
        """The number of samples."""
        return len(cast(Tensor, self.features if self.logits is None else self.logits))

    @property
    def classes(self) -> int:
        """The number of classes."""
        return cast(AngularHead, self.head).num_classes if self.logits is None else self.logits.shape[1]


class AngularLoss(nn.Module):
    """Loss of a model with an angular head, with the head's margin at the target class (NIPS 2017, 3.4).

    It is the cross entropy of the scores; of a sphereface2 head, the sum of its binary tasks (see `AngularHead`).

    Args:
        model_or_head: an `AngularHead`, or a model (wrapped or compiled, too) that holds one. A model without one
            may be trained on its plain logits. Outputs may come from a copy of the model, an average or
            `torch.func.functional_call`: the margin follows the class weights that made them.
        label_smoothing: share of the target that is spread over all classes, in [0, 1].
        class_weight: of shape (num_classes,), as the `weight` of `F.cross_entropy`.
        ignore_index: samples of this target do not count.
        reduction: "mean" (weighted by `class_weight`; 0 if nothing counts), "sum" or "none".
        annealing: a `MarginAnnealing`; None: the full margin from the start.
        separation: λ_M ≥ 0 of SphereFace+, which adds λ_M · mean over samples i and classes j ≠ y_i of
            f(‖ŵ_{y_i} - ŵ_j‖), f(z) = z^(-separation_s), or -log z for separation_s = 0. Samples are weighted as in
            the rest of the loss. Beside plain logits the class weights are those of `model_or_head`.
        chunk_size: classes at a time. The loss is then computed from the features, and again in the backward pass, so
            that no tensor of batch × classes is needed: for very many classes. See `AngularHead.training_logits`.
        sampled_classes: share of the classes in (0, 1) whose scores are computed from the features in a step of
            training: those of the targets, and others drawn at random. Each of these counts 1/π times, π being the
            probability with which it was drawn, so that in expectation sums over the other classes are those over all:
            Σ exp of a softmax, and the loss of sphereface2 itself. Usual: 0.1 to 0.3, for very many classes. In eval
            mode all classes count.

    Shape:
        output: what the model returns: an `AngularOutput`, or logits (B, num_classes), or an object or dict that holds
            either as `logits`.
        targets: (B,) int64; or (y_a, y_b, share) for mixup, which is share·loss(y_a) + (1 - share)·loss(y_b), the share
            in [0, 1] a float or (B,); or probabilities (B, num_classes), for plain logits and for sphereface2: the
            margin of a softmax has one target.
        sample_weight: (B,), by which the losses of samples are multiplied, or None; the mean still divides by the
            number of samples (with `class_weight`, by the sum of these).
        -> a scalar, or (B,) for "none"; at least in fp32, under autocast too.

    Raises:
        UsageError: options or targets out of range, sizes that do not fit, a margin output without a head.
        ArgumentTypeError: something that is no model, or an output or targets that are no tensors.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        model_or_head: nn.Module,
        label_smoothing: float = LossOptions.label_smoothing,
        class_weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        annealing: MarginAnnealing | None = None,
        separation: float = 0.0,
        separation_s: float = 1.0,
        chunk_size: int | None = None,
        sampled_classes: float | None = LossOptions.sampled_classes,
    ):
        super().__init__()
        LossOptions(label_smoothing, sampled_classes)  # checks them
        if reduction not in REDUCTIONS:
            raise choose("reduction", reduction, REDUCTIONS)
        for name, value in {"separation": separation, "separation_s": separation_s}.items():
            if not (value >= 0 and math.isfinite(value)):
                raise invalid(name, value, "a number ≥ 0")
        if annealing is not None and not isinstance(annealing, MarginAnnealing):
            raise wrong_type("annealing", annealing, "a MarginAnnealing, or None")
        if type(ignore_index) is not int:
            raise invalid("ignore_index", ignore_index, "a class index; -100 ignores none")
        if chunk_size is not None and not (type(chunk_size) is int and chunk_size >= 1):
            raise invalid("chunk_size", chunk_size, "at least 1 class, or None")
        if sampled_classes is not None and chunk_size is not None:
            raise refused("sampled_classes", f"does not go with {option('chunk_size')}; take one of them")
        # Kept out of the submodules: its parameters and state belong to the model.
        self._head = (_head_of(model_or_head),)
        if self.head is None and (separation or chunk_size or sampled_classes or annealing is not None):
            raise UsageError(
                f"AngularLoss: {type(model_or_head).__name__} has no AngularHead, which annealing, separation and "
                f"chunk_size need, and sampled_classes too; convert it with head='w-softmax' or another kind"
            )
        if annealing is not None and not self.head.has_margin:  # type: ignore[union-attr]
            raise refused("annealing", f"the head is a {self.head.kind}, which has no margin")  # type: ignore[union-attr]
        if class_weight is not None:
            class_weight = torch.as_tensor(class_weight)
        self.register_buffer("class_weight", class_weight, persistent=False)
        if self.head is not None:
            self._check_weight(self.head.num_classes)
        self.label_smoothing, self.ignore_index, self.reduction = label_smoothing, ignore_index, reduction
        self.annealing = annealing
        self.separation, self.separation_s = separation, separation_s
        self.chunk_size, self.sampled_classes = chunk_size, sampled_classes
        self._checked = self._checked_head = False

    @property
    def head(self) -> AngularHead | None:
        """The head of the model that this loss was made for; an `AngularOutput` brings the one that made it."""
        return self._head[0]

    @property
    def samples(self) -> bool:
        """True if this loss computes the scores of a random share of the classes."""
        return self.training and self.sampled_classes is not None

    @property
    def needs_features(self) -> bool:
        """True if this loss computes scores from the features, and needs no logits."""
        return self.chunk_size is not None or self.sampled_classes is not None

    def forward(self, output: Any, targets: Targets, sample_weight: Tensor | None = None) -> Tensor:
        scores = self._unpacked(scores_of(output))
        targets = as_targets(targets)
        if not isinstance(sample_weight, (Tensor, type(None))):
            raise wrong_type("sample_weight", sample_weight, f"a tensor of shape ({scores.size},)")
        if sample_weight is not None and sample_weight.shape != (scores.size,):
            raise UsageError(f"sample_weight: got shape {tuple(sample_weight.shape)}, expected ({scores.size},)")
        with no_autocast((targets if isinstance(targets, Tensor) else targets[0]).device.type):
            if isinstance(targets, tuple):
                loss = self._mixed(scores, targets, sample_weight)
            elif targets.is_floating_point():
                loss = self._soft(scores, targets, sample_weight)
            else:
                loss = self._hard(scores, targets, sample_weight)
            if self.training and self.annealing is not None:
                self.annealing.calls += 1
        return loss

    def _unpacked(self, output: Any) -> _Scores:
        """The scores in an output, and the head that made them."""
        if isinstance(output, AngularOutput):
            if self.head is None:
                raise UsageError("AngularLoss: got an AngularOutput, but was made from a model without an AngularHead")
            if output.logits is None and not self.needs_features:
                raise UsageError(
                    "AngularLoss: the head has training_logits off, so chunk_size is needed, or sampled_classes"
                )
            if output.features.dim() != 2:
                shape = tuple(output.features.shape)
                raise UsageError(f"AngularLoss: got features of shape {shape}, expected (batch, features)")
            return _Scores(output.logits, output.features, self._maker_of(output))
        if not isinstance(output, Tensor):
            raise wrong_type("AngularLoss", output, "an AngularOutput or logits")
        if output.dim() != 2:
            raise UsageError(f"AngularLoss: got logits of shape {tuple(output.shape)}, expected (batch, classes)")
        if self.chunk_size is not None:
            raise UsageError("AngularLoss: chunk_size needs the features: take a margin head, or as_metric_loss(head)")
        if self.samples and not self.head.has_margin:  # type: ignore[union-attr]
            raise UsageError(
                f"AngularLoss: {option('sampled_classes')} needs the features: take a margin head, or "
                f"as_metric_loss(head)"
            )
        if self.separation and in_transform():
            raise UsageError(
                "AngularLoss: separation reads the class weights of the model, and plain logits in a transformation of "
                "torch.func do not say with which they were made. Take a margin head, or leave separation out."
            )
        return _Scores(output, None, self.head)

    def _maker_of(self, output: AngularOutput) -> AngularHead:
        """The head that made an output, with the weights it had: of the model, a copy, an average, a functional call.

        An output that has lost it is taken for one of the loss's own head, which is checked where values can be seen.
        """
        if output.head is not None:
            return output.head  # type: ignore[return-value]
        head = cast(AngularHead, self.head)
        if in_transform():
            raise UsageError(
                "AngularLoss: the output came out of a transformation, such as torch.vmap, that took it apart, and no "
                "longer says with which weights it was made. Call the loss inside, where the model is called."
            )
        is_checked = self._checked_head and output.features.device.type != "cpu"
        if output.logits is not None and len(output.features) and has_values(output.features) and not is_checked:
            self._checked_head = True
            with torch.no_grad():
                difference = float((head.logits(output.features[:1]) - output.logits[:1]).abs().max())
                largest = float(output.logits[:1].abs().max())
            if difference > OTHER_WEIGHTS * max(largest, 1.0):
                raise UsageError(
                    f"AngularLoss: the output was made with other weights than those of the model that this loss was "
                    f"made for: scores differ by {difference:.2g}. Make a loss for the model that is called."
                )
        return head

    # ---------------------------------------------------------------------------------------------- kinds of targets

    def _hard(self, scores: _Scores, targets: Tensor, sample_weight: Tensor | None) -> Tensor:
        loss, weight = self._per_sample(scores, targets)
        return self._reduced(loss, weight, sample_weight)

    def _mixed(self, scores: _Scores, targets: tuple, sample_weight: Tensor | None) -> Tensor:
        first, second, share = targets
        share = share_of_first(share, scores.size, first.device)
        losses = [self._per_sample(scores, y) for y in (first, second)]
        shares = [s.to(losses[0][0].dtype) for s in (share, 1 - share)]
        parts = [
            self._reduced(loss * s, weight, sample_weight) for (loss, weight), s in zip(losses, shares, strict=True)
        ]
        return parts[0] + parts[1]

    def _soft(self, scores: _Scores, targets: Tensor, sample_weight: Tensor | None) -> Tensor:
        logits, size = scores.logits, (scores.size, scores.classes)
        if targets.dim() == 1:
            raise UsageError(
                f"targets: got {targets.dtype} of shape {tuple(targets.shape)}, expected class indices (int64)"
            )
        is_binary = scores.head is not None and scores.head.kind == "sphereface2"
        if scores.features is not None and not is_binary:
            raise UsageError(
                "targets: got probabilities, but a margin belongs to one target class. Give class indices, or for "
                "mixup (y_a, y_b, share)"
            )
        if logits is not None and not len(logits):
            return logits.sum() * 0 if self.reduction != "none" else logits.sum(1)
        if self.samples:
            raise UsageError(
                f"targets: got probabilities, but {option('sampled_classes')} draws the classes that are no target. "
                f"Give class indices, or for mixup (y_a, y_b, share)"
            )
        if targets.shape != size:
            raise UsageError(f"targets: got probabilities {tuple(targets.shape)}, expected {size}")
        self._check_weight(scores.classes)
        if is_binary:
            loss = binary_loss(self._tasks(scores, None), targets, self.class_weight, self.label_smoothing)
        else:
            options: Any = {"reduction": "none", "label_smoothing": self.label_smoothing}
            loss = F.cross_entropy(accumulated(cast(Tensor, logits)), targets, self.class_weight, **options)
        if self.separation and scores.head is not None:
            every = torch.arange(scores.classes, device=targets.device)
            energy = self._separation(scores.head, every).to(loss.dtype)
            weight = energy if self.class_weight is None else energy * self.class_weight.to(loss.dtype)
            loss = loss + self.separation * (targets.to(loss.dtype) @ weight)
        return self._reduced(loss, torch.ones_like(loss), sample_weight)

    # --------------------------------------------------------------------------------------------------- one sample

    def _per_sample(self, scores: _Scores, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and weight of each sample, both (B,); both are 0 where it is ignored."""
        logits, features, head = scores
        classes = scores.classes
        checked = self._check(targets, scores.size, classes)
        self._check_weight(classes)
        counts = targets != self.ignore_index
        safe = targets.clamp(0, classes - 1)
        if head is not None and head.kind == "sphereface2":
            loss = binary_loss(self._tasks(scores, safe), safe, self.class_weight, self.label_smoothing)
        elif features is None:
            own = accumulated(logits).gather(1, safe[:, None]).squeeze(1)  # type: ignore[arg-type]
            loss = cross_entropy(logits, safe, own, self.class_weight, self.label_smoothing)  # type: ignore[arg-type]
        else:
            assert head is not None
            loss = self._softmax(head, features, logits, safe)
        weight = torch.ones_like(loss) if self.class_weight is None else self.class_weight.to(loss.dtype)[safe]
        if self.separation and head is not None:
            # Times the weight, since the reduction divides by the sum of the weights.
            loss = loss + self.separation * self._separation(head, safe) * weight
        zero = torch.zeros((), dtype=loss.dtype, device=loss.device)
        if not checked:  # a class out of range makes the loss NaN
            loss = torch.where(targets == safe, loss, math.nan)
        return torch.where(counts, loss, zero), torch.where(counts, weight, zero)

    def _softmax(self, head: AngularHead, features: Tensor, logits: Tensor | None, targets: Tensor) -> Tensor:
        """The cross entropy of each sample with the margin at its target, times its weight."""
        options = (head.target_logit(features, targets, self._lambda(head)), self.class_weight, self.label_smoothing)
        if blocks := self._blocks(head, targets, logits):
            return cross_entropy_in_blocks(head, features, blocks, targets, *options)
        return cross_entropy(cast(Tensor, logits), targets, *options)

    def _lambda(self, head: AngularHead) -> Tensor | float:
        """λ of the margin's annealing at the present step."""
        return self.annealing() if self.annealing is not None and head.has_margin else 0.0

    def _blocks(self, head: AngularHead, targets: Tensor | None, logits: Tensor | None) -> list[ClassBlock]:
        """The classes whose scores are computed from the features; none where all logits are there."""
        if self.chunk_size is not None:
            return chunks(head.num_classes, self.chunk_size)
        if self.samples and targets is not None:
            return [sample(head.num_classes, cast(float, self.sampled_classes), targets)]
        return chunks(head.num_classes, head.num_classes) if logits is None else []

    def _tasks(self, scores: _Scores, targets: Tensor | None) -> BinaryTasks:
        """The binary tasks of a SphereFace2 head; with a margin where the output is one of training."""
        logits, features, head = scores
        assert head is not None
        if features is None:
            return BinaryTasks(head, logits=logits)
        annealing = torch.as_tensor(self._lambda(head)).to(accumulate_dtype(features.dtype))
        margin = head.scale * head.margin / (1 + annealing)
        blocks = self._blocks(head, targets, None if head.is_detached else logits)
        return BinaryTasks(head, None if blocks else logits, features, tuple(blocks), margin)

    def _separation(self, head: AngularHead, targets: Tensor) -> Tensor:
        """The mean energy between the class of each sample and the others, (B,)."""
        classes = head.weight[None]
        if not has_values(targets):  # the number of classes in a batch is unknown then
            return pair_energy(classes, s=self.separation_s, rows=targets)[0]
        unique, place = torch.unique(targets, return_inverse=True)
        return pair_energy(classes, s=self.separation_s, rows=unique)[0, place]

    # ---------------------------------------------------------------------------------------------------- the border

    def _check(self, targets: Tensor, size: int, classes: int) -> bool:
        """Check dtype, shape and, where that is cheap, values of the targets; True if the values were checked."""
        check_shape(targets, size)
        if not has_values(targets) or (self._checked and targets.device.type != "cpu") or not size:
            return False  # looking at values holds a GPU up; the first batch tells
        self._checked = True
        check_range(targets, classes, self.ignore_index)
        return True

    def _check_weight(self, classes: int) -> None:
        if self.class_weight is not None and self.class_weight.shape != (classes,):
            raise UsageError(f"class_weight: got shape {tuple(self.class_weight.shape)}, expected ({classes},)")

    def _reduced(self, loss: Tensor, weight: Tensor, sample_weight: Tensor | None) -> Tensor:
        if sample_weight is not None:
            loss = loss * sample_weight.to(loss)
        if self.reduction == "none":
            return loss
        total = loss.sum()
        if self.reduction == "sum":
            return total
        weights = weight.sum()
        return total / torch.where(weights > 0, weights, torch.ones_like(weights))

    def __deepcopy__(self, memo: dict[int, Any]) -> "AngularLoss":
        """A copy that works with the same head, unless that is being copied with it."""
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        for name, value in vars(self).items():
            head = (memo.get(id(self.head), self.head),)
            vars(copied)[name] = head if name == "_head" else copy.deepcopy(value, memo)
        return copied

    def extra_repr(self) -> str:
        head = "none" if self.head is None else self.head.kind
        return f"head={head}, label_smoothing={self.label_smoothing:g}, separation={self.separation:g}"


def _head_of(model: nn.Module) -> AngularHead | None:
    check_module(model, "AngularLoss", "a model or an AngularHead")
    heads = [module for module in model.modules() if isinstance(module, AngularHead)]
    if len(heads) > 1 and any(head.has_margin for head in heads):
        raise UsageError(
            f"AngularLoss: {type(model).__name__} has {len(heads)} angular heads; make one AngularLoss for each head"
        )
    return heads[0] if len(heads) == 1 else None

"""The objective of training: the loss of the head, plus regularizers that keep filters apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sphereify.choices import ANNEALED_HEADS
from sphereify.errors import DataError
from sphereify.nn import (
    AngularHead,
    AngularLoss,
    AngularOutput,
    HypersphericalEnergy,
    MarginAnnealing,
    OrthogonalityPenalty,
)
from sphereify.nn.outputs import scores_of
from sphereify.nn.targets import Targets
from sphereify.training.terms import Terms

AUXILIARY = 0.3
"""Weight of the losses of auxiliary classifiers, as GoogLeNet was trained."""


class Objective(nn.Module):
    """Loss of a model's training output and the targets, plus the regularizers of its filters.

    The count of the margin's annealing is its only state.

    Args:
        model: whose filters are regularized; it does not become a part of this module.
        terms: weights and kinds of the terms.
        accumulate: batches that make one optimizer step, by which the annealing counts.
    """

    def __init__(self, model: nn.Module, terms: Terms, accumulate: int = 1):
        super().__init__()
        self._model = (model,)  # a tuple, so that its parameters do not become this module's
        head = margin_head(model)
        anneals = head is not None and head.kind in ANNEALED_HEADS and terms.margin_anneal
        annealing = MarginAnnealing(every=accumulate) if anneals else None
        smoothing, sampled = terms.label_smoothing, terms.sampled_classes
        self.loss = AngularLoss(model, smoothing, annealing=annealing, sampled_classes=sampled)
        self.auxiliary_loss = AngularLoss(nn.Identity(), smoothing)
        self.energy = energy_of(terms) if terms.mhe else None
        self.penalty = OrthogonalityPenalty() if terms.orthogonality else None
        self.terms = terms

    def forward(self, output: Any, targets: Targets) -> Tensor:
        """The loss of an output; targets as `AngularLoss` takes them."""
        main, auxiliary = _parts(output)
        total: Tensor = self.loss(main, targets)
        for logits in auxiliary:
            total = total + AUXILIARY * self.auxiliary_loss(logits, targets)
        if self.energy is not None:
            total = total + self.terms.mhe * self.energy(self._model[0])
        if self.penalty is not None:
            total = total + self.terms.orthogonality * self.penalty(self._model[0])
        return total


def margin_head(model: nn.Module) -> AngularHead | None:
    """The head with a margin in a model, if it has one."""
    return next((m for m in model.modules() if isinstance(m, AngularHead) and m.has_margin), None)


@contextmanager
def without_logits(model: nn.Module, terms: Terms) -> Iterator[None]:
    """Let the head leave out the logits of training within the block, where only some classes are to be computed."""
    head = margin_head(model) if terms.sampled_classes is not None else None
    if head is None:
        yield
        return
    before, head.training_logits = head.training_logits, False
    try:
        yield
    finally:
        head.training_logits = before


def energy_of(terms: Terms) -> HypersphericalEnergy:
    """The energy of the filters that the terms describe."""
    return HypersphericalEnergy(
        terms.mhe_s,
        terms.mhe_distance,
        terms.mhe_half_space,
        terms.mhe_hidden,
        terms.mhe_output,
        energy=terms.mhe_energy,
        dimensions=terms.mhe_dimensions,
        projections=terms.mhe_projections,
        gamma=terms.mhe_gamma,
    )


def logits_of(output: Any) -> Tensor:
    """The logits in the output of a model, without a margin.

    Raises:
        DataError: there are none.
    """
    main, _ = _parts(output)
    return main.logits if isinstance(main, AngularOutput) else main  # type: ignore[return-value]


def _parts(output: Any) -> tuple[Tensor | AngularOutput, list[Tensor]]:
    """The output of the classifier, and the outputs of auxiliary classifiers."""
    output = scores_of(output)
    if isinstance(output, (Tensor, AngularOutput)):
        return output, []
    parts = [part for part in output if part is not None] if isinstance(output, (tuple, list)) else []
    if not parts or not all(isinstance(part, (Tensor, AngularOutput)) for part in parts):
        raise DataError(
            f"the model returns {type(output).__name__}, expected logits of shape (batch, classes), or an output that "
            f"has them as `logits`"
        )
    return parts[0], parts[1:]

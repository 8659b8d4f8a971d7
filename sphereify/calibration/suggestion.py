"""Which layers to leave as they are, so that a converted network keeps what the original knows."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sphereify.calibration.batches import batches_of
from sphereify.calibration.layer import LayerFit
from sphereify.calibration.least_squares import calibrate
from sphereify.convert.model_inputs import evaluating, fresh, tensors_in
from sphereify.convert.options import ConversionKeywords, ConversionOptions
from sphereify.convert.planner import plan_conversion
from sphereify.convert.rewrite import apply_plan
from sphereify.errors import UsageError
from sphereify.options import with_keywords_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Suggestion:
    """What each layer costs, and which to exclude."""

    layers: list[LayerFit]
    """With all of them converted and calibrated, the least explained first."""
    tried: dict[int, float]
    """How many of these, from the first, were excluded -> agreement with the original."""
    exclude: list[str]
    """The fewest that were found to be enough; all that were tried where none was."""
    wanted: float
    """The agreement that was asked for."""

    @property
    def agreement(self) -> float:
        """With the suggested layers excluded: the share of held-out inputs to which both networks give one class; for
        outputs that are no class scores, the share of their variance that is explained."""
        return self.tried[len(self.exclude)]

    @property
    def reached(self) -> bool:
        """Whether that is what was asked for."""
        return self.agreement >= self.wanted


@with_keywords_of(ConversionOptions)
def suggest(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[Any, ...]],
    *,
    loss: float = 0.02,
    on_trial: Callable[[int, float], None] = lambda excluded, agreement: None,
    **options: "Unpack[ConversionKeywords]",
) -> Suggestion:
    """Find the fewest layers to exclude for a converted, calibrated network to agree with the original.

    All layers are converted and calibrated; then those that the calibration explains least are excluded, as many as
    bisection finds to be needed, each time with a calibration of its own. No labels are needed: an accuracy cannot
    fall by more than the share of inputs on which the networks disagree.

    Args:
        model: the trained network. It is not changed.
        batches: as for `calibrate`; the last quarter is held out to measure the agreement on.
        loss: the disagreement that is accepted, in (0, 1).
        on_trial: called after each trial with the number of excluded layers and the agreement.
        {options}

    Raises:
        UsageError: a loss outside (0, 1), fewer than 8 inputs, or options that `plan_conversion` does not take.
    """
    if not 0 < loss < 1:
        raise UsageError(f"suggest: got loss={loss!r}, expected a share between 0 and 1, such as 0.02")
    fitted, held_out = _parted(batches_of(batches))
    given = options.pop("overrides", None) or {}
    tried: dict[int, float] = {}
    layers: list[LayerFit] = []

    def trial(number: int) -> float:
        if number not in tried:
            kept = {pattern_of(layer.name): "keep" for layer in layers[:number]}
            keywords: ConversionKeywords = {**options, "overrides": {**kept, **given} or None}
            plan = plan_conversion(model, **keywords)
            converted = apply_plan(model, plan)
            calibration = calibrate(converted, model, fitted)
            if not layers:
                layers.extend(calibration.worst())
            tried[number] = _agreement(converted, model, held_out)
            on_trial(number, tried[number])
        return tried[number]

    trial(0)
    low, high = 0, max(0, len(layers) - 1)
    if tried[0] < 1 - loss and high and trial(high) >= 1 - loss:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if trial(middle) >= 1 - loss else (middle, high)
    enough = [number for number, agreement in tried.items() if agreement >= 1 - loss]
    number = min(enough) if enough else max(tried)
    return Suggestion(layers, dict(sorted(tried.items())), [pattern_of(x.name) for x in layers[:number]], 1 - loss)


def pattern_of(name: str) -> str:
    """What `exclude` takes for one layer: its name, with what would be read as a glob escaped."""
    return f"re:{re.escape(name)}" if set(name) & set("*?[]") else name


def _parted(inputs: list[tuple[Any, ...]]) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """The first three quarters and the rest, of the batches or of the rows of a few batches."""
    lengths = [{len(value) for value in batch if isinstance(value, Tensor) and value.dim()} for batch in inputs]
    if sum(min(found, default=1) for found in lengths) < 8:
        raise UsageError("suggest: got fewer than 8 inputs, expected some hundred, to fit and to measure on")
    if len(inputs) < 4:
        if any(len(found) != 1 or min(found) < 4 for found in lengths):
            raise UsageError("suggest: got fewer than 4 batches, and they cannot be parted; give more, smaller ones")
        pieces = [zip(*(value.chunk(4) for value in batch), strict=True) for batch in inputs]
        inputs = [piece for batch in pieces for piece in batch]
    cut = len(inputs) - len(inputs) // 4
    return inputs[:cut], inputs[cut:]


@torch.no_grad()
def _agreement(converted: nn.Module, original: nn.Module, inputs: list[tuple[Any, ...]]) -> float:
    same = count = 0
    error = variance = 0.0
    with evaluating(converted, original):
        for arguments in inputs:
            pair = [
                next((t for t in tensors_in(network(*fresh(arguments))) if t.is_floating_point()), None)
                for network in (converted, original)
            ]
            got, wanted = pair
            if got is None or wanted is None:
                raise UsageError("suggest: the network returns no numbers on which the two could agree")
            if wanted.dim() == 2 and wanted.shape[1] > 1:
                same += int((got.argmax(1) == wanted.argmax(1)).sum())
                count += len(wanted)
            else:
                error += float((got - wanted).double().square().sum())
                variance += float((wanted - wanted.mean()).double().square().sum())
    return same / count if count else 1 - error / max(variance, 1e-12)

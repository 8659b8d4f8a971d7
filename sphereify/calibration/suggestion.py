"""Suggests which layers to leave as they are, so that a converted network gives the original's answers."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from sphereify.calibration.batches import Arguments, checked_batches
from sphereify.calibration.least_squares import calibrate
from sphereify.calibration.results import LayerFit
from sphereify.convert.model_inputs import Inputs, evaluating, fresh, tensors_in
from sphereify.convert.options import ConversionKeywords, ConversionOptions
from sphereify.convert.planner import plan_conversion
from sphereify.convert.rewrite import apply_plan
from sphereify.errors import UsageError, invalid
from sphereify.options import with_keywords_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

FEWEST_INPUTS = 8
FEWEST_BATCHES = 4


@dataclass(frozen=True)
class Suggestion:
    """The layers to keep, and what conversions with fewer or more of them kept would give.

    Attributes:
        layers: the fit of each layer with all of them converted, the least explained first.
        trials: the agreement with the original by the number of layers kept, counted from the first in `layers`.
        exclude: a pattern for each layer to keep: the fewest with which the goal was reached; if it was not, all that
            were tried.
        goal: the agreement asked for.
        given: the conversion options that were passed to `suggest`.

    The agreement is the share of held-out inputs to which both networks give one class; for outputs that are no class
    scores, the share of their variance that the converted network explains.
    """

    layers: list[LayerFit]
    trials: dict[int, float]
    exclude: list[str]
    goal: float
    given: ConversionKeywords = field(default_factory=lambda: ConversionKeywords())

    @property
    def agreement(self) -> float:
        """The agreement with the suggested layers kept."""
        return self.trials[len(self.exclude)]

    @property
    def reached(self) -> bool:
        """True if that is what was asked for."""
        return self.agreement >= self.goal

    @property
    def overrides(self) -> dict[str, Any]:
        """The suggested layers as overrides, followed by the given ones, of which the first match wins.

        Overrides win over `exclude`: where some were given, `exclude` alone may have no effect.
        """
        given = self.given.get("overrides") or {}
        return {**dict.fromkeys(self.exclude, "keep"), **{p: v for p, v in given.items() if p not in self.exclude}}

    @property
    def options(self) -> ConversionKeywords:
        """Conversion options that keep the suggested layers: `sphereify(model, **suggestion.options)`."""
        return cast(ConversionKeywords, {**self.given, "overrides": self.overrides} if self.exclude else self.given)


@with_keywords_of(ConversionOptions)
def suggest(
    model: nn.Module,
    batches: Iterable[Tensor | tuple[Any, ...]],
    *,
    loss: float = 0.02,
    example_inputs: Inputs = None,
    on_trial: Callable[[int, float], None] = lambda excluded, agreement: None,
    **options: "Unpack[ConversionKeywords]",
) -> Suggestion:
    """Find the fewest layers to exclude for a converted, calibrated network to agree with the original.

    All layers are converted and calibrated; then those that the calibration explains least are excluded, as many as
    bisection shows to be needed, each time with a calibration of its own. No labels are needed: the accuracy cannot
    fall by more than the share of inputs on which the networks disagree.

    Args:
        model: the trained network. It is not changed.
        batches: as for `calibrate`; the last quarter is held out to measure the agreement on.
        loss: largest accepted share of disagreement, in (0, 1).
        example_inputs: as for `plan_conversion`.
        on_trial: called after each trial with the number of excluded layers and the agreement.
        {options}

    Raises:
        UsageError: a loss outside (0, 1), fewer than 8 inputs, or options that `plan_conversion` does not take.
    """
    if not 0 < loss < 1:
        raise invalid("loss", loss, "a share between 0 and 1, such as 0.02")
    to_fit, held_out = _split(checked_batches(batches))
    trials: dict[int, float] = {}
    layers: list[LayerFit] = []

    def suggestion(number: int) -> Suggestion:
        patterns = [pattern_of(layer.name) for layer in layers[:number]]
        return Suggestion(layers, dict(sorted(trials.items())), patterns, 1 - loss, options)

    def agreement_without(number: int) -> float:
        if number not in trials:
            plan = plan_conversion(model, example_inputs=example_inputs, **suggestion(number).options)
            converted = apply_plan(model, plan)
            calibration = calibrate(converted, model, to_fit)
            if not layers:
                layers.extend(calibration.worst())
            trials[number] = _agreement(converted, model, held_out)
            on_trial(number, trials[number])
        return trials[number]

    goal = 1 - loss
    if agreement_without(0) < goal:
        low, high = 0, len(layers) - 1
        if high > low and agreement_without(high) >= goal:
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if agreement_without(middle) >= goal else (middle, high)
    enough = [number for number, agreement in trials.items() if agreement >= goal]
    return suggestion(min(enough) if enough else max(trials))


def pattern_of(name: str) -> str:
    """A pattern for one layer: its name, or a regular expression where the name would be read as a glob."""
    return f"re:{re.escape(name)}" if set(name) & set("*?[]") else name


def _split(inputs: list[Arguments]) -> tuple[list[Arguments], list[Arguments]]:
    """The first three quarters and the rest, of the batches or of the rows of a few batches."""
    lengths = [{len(value) for value in batch if isinstance(value, Tensor) and value.dim()} for batch in inputs]
    if sum(min(sizes, default=1) for sizes in lengths) < FEWEST_INPUTS:
        raise UsageError(
            f"suggest: got fewer than {FEWEST_INPUTS} inputs, expected some hundred, to fit and to measure on"
        )
    if len(inputs) < FEWEST_BATCHES:
        if any(len(sizes) != 1 or min(sizes) < FEWEST_BATCHES for sizes in lengths):
            raise UsageError(
                f"suggest: got fewer than {FEWEST_BATCHES} batches, which cannot be split by rows; give more, smaller "
                f"ones"
            )
        pieces = [zip(*(value.chunk(FEWEST_BATCHES) for value in batch), strict=True) for batch in inputs]
        inputs = [piece for batch in pieces for piece in batch]
    cut = len(inputs) - len(inputs) // 4
    return inputs[:cut], inputs[cut:]


@torch.no_grad()
def _agreement(converted: nn.Module, original: nn.Module, inputs: list[Arguments]) -> float:
    same = count = 0
    error = variance = 0.0
    with evaluating(converted, original):
        for arguments in inputs:
            output, target = (_first_output(network, arguments) for network in (converted, original))
            if output is None or target is None:
                raise UsageError("suggest: the network returns no numbers on which the two could agree")
            if target.dim() == 2 and target.shape[1] > 1:
                same += int((output.argmax(1) == target.argmax(1)).sum())
                count += len(target)
            else:
                error += float((output - target).double().square().sum())
                variance += float((target - target.mean()).double().square().sum())
    return same / count if count else 1 - error / max(variance, 1e-12)


def _first_output(network: nn.Module, arguments: Arguments) -> Tensor | None:
    return next((t for t in tensors_in(network(*fresh(arguments))) if t.is_floating_point()), None)

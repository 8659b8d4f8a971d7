"""Calibration inputs that are held out of a fit: how far a converted network agrees with the original on them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sphereify.convert.arguments import ModelArguments
from sphereify.convert.finite import answers_of
from sphereify.convert.model_inputs import evaluating, tensors_in
from sphereify.errors import UsageError

FEWEST_INPUTS = 8
FEWEST_BATCHES = 8
"""Batches needed to divide by whole batches; fewer are cut by rows."""
LOW_CONTRAST = 0.3
"""Factor on the deviations from each channel's mean in the low-contrast copies of the inputs."""


@dataclass(frozen=True)
class Division:
    """Inputs in three parts, without an input in common.

    Attributes:
        fit: three quarters, for calibrations.
        choice: an eighth, to choose among calibrated networks.
        report: an eighth, to report how well the chosen network does. Nothing is chosen by it.
    """

    fit: list[ModelArguments]
    choice: list[ModelArguments]
    report: list[ModelArguments]


def divide(inputs: list[ModelArguments], caller: str) -> Division:
    """Divide batches, or the rows of a few batches: the first three quarters to fit, the rest held out in two halves.

    Args:
        inputs: from `checked_batches`.
        caller: the name that errors begin with.

    Raises:
        UsageError: fewer than 8 inputs, or a few batches that cannot be cut by rows.
    """
    lengths = [{len(value) for value in batch.tensors() if value.dim()} for batch in inputs]
    if sum(min(sizes, default=1) for sizes in lengths) < FEWEST_INPUTS:
        raise UsageError(
            f"{caller}: got fewer than {FEWEST_INPUTS} inputs, expected some hundred, to fit and to measure on"
        )
    if len(inputs) < FEWEST_BATCHES:
        pieces = -(-FEWEST_BATCHES // len(inputs))
        whole = all(isinstance(value, Tensor) and value.dim() for batch in inputs for value in batch.values())
        if not whole or any(len(sizes) != 1 or min(sizes) < pieces for sizes in lengths):
            raise UsageError(
                f"{caller}: got fewer than {FEWEST_BATCHES} batches, which cannot be split by rows; give more, smaller "
                f"ones"
            )
        inputs = [piece for batch in inputs for piece in batch.cut(lambda value: value.tensor_split(pieces))]
    held_out = len(inputs) // 4
    cut, middle = len(inputs) - held_out, len(inputs) - held_out // 2
    return Division(inputs[:cut], inputs[cut:middle], inputs[middle:])


class HeldOut:
    """Inputs held out of a fit, with the original's outputs for them.

    Args:
        original: the network before the conversion.
        inputs: a part of a `Division`.
        caller: the name that errors begin with.

    Attributes:
        has_classes: True if the original returns class scores, of shape (B, K) with K > 1.
        count: the number of inputs.

    Raises:
        UsageError: the original returns no floating-point tensor.
    """

    def __init__(self, original: nn.Module, inputs: list[ModelArguments], caller: str):
        self._inputs = inputs
        self._caller = caller
        self._targets = [self._output(original, arguments) for arguments in inputs]
        self.has_classes = all(target.dim() == 2 and target.shape[1] > 1 for target in self._targets)
        self.count = sum(len(target) if target.dim() else 1 for target in self._targets)

    def agreement(self, converted: nn.Module) -> float:
        """The share of inputs to which both networks give one class.

        For outputs that are no class scores, the share of their variance that the converted network explains.
        """
        outputs = [self._output(converted, arguments) for arguments in self._inputs]
        if self.has_classes:
            return _same_classes(outputs, self._targets)
        pairs = list(zip(outputs, self._targets, strict=True))
        error = sum(float((output - target).double().square().sum()) for output, target in pairs)
        variance = sum(float((target - target.mean()).double().square().sum()) for target in self._targets)
        return 1 - error / max(variance, 1e-12)

    def contrast_agreement(self, converted: nn.Module) -> float:
        """The share of inputs that keep the class that the converted network gives them when their contrast is low."""
        plain = [self._output(converted, arguments) for arguments in self._inputs]
        low = [self._output(converted, arguments.map(lower_contrast)) for arguments in self._inputs]
        return _same_classes(low, plain)

    @torch.no_grad()
    def _output(self, network: nn.Module, arguments: ModelArguments) -> Tensor:
        with evaluating(network):
            tensors = tensors_in(arguments.run(network))
            output = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
        if output is None:
            raise UsageError(f"{self._caller}: the network returns no numbers on which the two could agree")
        return output


def _same_classes(outputs: list[Tensor], targets: list[Tensor]) -> float:
    pairs = list(zip(outputs, targets, strict=True))
    answers = [(answers_of(output), answers_of(target)) for output, target in pairs]
    return sum(int(((a == b) & (b >= 0)).sum()) for a, b in answers) / sum(len(b) for _, b in pairs)


def lower_contrast(value: object, factor: float | Tensor = LOW_CONTRAST) -> object:
    """An input (B, C, *space) with the deviations from each channel's mean times a factor; others as they are."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 3:
        return value
    mean = value.mean(list(range(2, value.dim())), keepdim=True)
    return mean + (value - mean) * factor

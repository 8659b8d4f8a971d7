"""Comparison of a model with its folded form, on inputs of the user's."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sphereify.convert.arguments import Inputs, ModelArguments, does_not_run
from sphereify.convert.copies import copy_of
from sphereify.convert.finite import first_bad_layer
from sphereify.convert.input_values import filled
from sphereify.convert.model_inputs import evaluating, seeded, tensors_in
from sphereify.deployment.differences import difference, has_numbers, is_number
from sphereify.errors import UnsupportedModelError, first_line, option

TOLERANCE = 3e-2
"""Largest difference of outputs, relative to the largest output, that rounding in any precision explains."""


@torch.no_grad()
def check_outputs(model: nn.Module, fold: Callable[[nn.Module], nn.Module], example_inputs: Inputs) -> None:
    """Compare the outputs of a model with those of its folded form.

    A forward may read the weight of a folded layer itself, and nothing else would show that. The passes are in float64,
    so that a network which amplifies the rounding of fp32 is not taken for one.

    Args:
        model: a converted model; copies of it run.
        fold: folds a model in place and returns it.

    Raises:
        UsageError: the model does not run with these inputs.
        UnsupportedModelError: the outputs differ, or none of them is a finite number.
    """
    arguments = filled(ModelArguments.of(example_inputs), model)
    try:
        outputs = _both(copy_of(model).double(), fold, arguments.map(_double))
    except Exception:  # no float64 on this device, or a forward that fixes a dtype
        outputs = _both(copy_of(model), fold, arguments)
    if not has_numbers(outputs[0]):
        raise UnsupportedModelError(
            f"fold: the outputs of {type(model).__name__} on example_inputs are not finite, so there is nothing to "
            f"compare; the first layer with a value that is not finite is {first_bad_layer(model, arguments)}"
        )
    if all(map(_agree, *outputs)):
        return
    with evaluating(model):
        twice = _outputs(model, arguments), _outputs(model, arguments)
    if not all(map(_agree, *twice)):
        raise UnsupportedModelError(
            f"fold: the outputs of {type(model).__name__} differ from pass to pass, so there is nothing to compare; "
            f"without example_inputs it is folded and not compared"
        )
    raise UnsupportedModelError(
        f"fold: the outputs of {type(model).__name__} would change; its forward seems to read the weights of a "
        f"layer that would be folded. Use it unfolded"
    )


def _agree(expected: Tensor, output: Tensor) -> bool:
    """True if two outputs are equal up to rounding; what is not finite has to be equal."""
    if not is_number(expected):
        return torch.equal(output, expected)
    return difference(output, expected) <= TOLERANCE


def _both(
    network: nn.Module, fold: Callable[[nn.Module], nn.Module], arguments: ModelArguments
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of a network and, after it has been folded, those of its folded form."""
    with evaluating(network):
        try:
            expected = _outputs(network, arguments)
        except Exception as error:  # a forward may raise anything
            raise does_not_run(option("example_inputs"), network, arguments, first_line(error)) from error
    return expected, _outputs(fold(network), arguments)


def _outputs(network: nn.Module, arguments: ModelArguments) -> list[Tensor]:
    with seeded(network):  # it may be random in evaluation, too
        return list(tensors_in(arguments.run(network)))


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value

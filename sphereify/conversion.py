"""The whole path in one function: plan, apply, calibrate."""

import copy
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from sphereify.calibration.agreement import choose_radius
from sphereify.calibration.batches import checked_batches
from sphereify.calibration.distillation import check_steps
from sphereify.calibration.least_squares import calibrate
from sphereify.convert.arguments import Inputs
from sphereify.convert.options import ConversionKeywords, ConversionOptions
from sphereify.convert.planner import plan_conversion
from sphereify.convert.rewrite import apply_plan
from sphereify.errors import SphereifyWarning, no_effect, option
from sphereify.options import with_keywords_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_keywords_of(ConversionOptions)
def sphereify(
    model: nn.Module,
    *,
    calibration: Iterable[Any] | None = None,
    calibration_steps: int = 0,
    agreement: float | None = None,
    example_inputs: Inputs = None,
    inplace: bool = False,
    **options: "Unpack[ConversionKeywords]",
) -> nn.Module:
    """Make a network hyperspherical: each convolution and linear map becomes g(θ) of the angle to its filter.

    Args:
        model: any `nn.Module`. It is copied unless `inplace=True`.
        {options}
        calibration: batches of inputs (each as `example_inputs`) for a closed-form start from what a trained
            `model` knows; see `sphereify.calibrate`, which also returns how well each layer did.
        calibration_steps: number of optimizer steps towards the original's outputs on these batches afterwards, without
            labels.
        agreement: with `calibration`, a share in (0, 1): the smallest radius is chosen whose network gives this share
            of inputs that were held out the original's class. Where none does, it is the one that agrees best, with a
            warning. `sphereify.calibration.agreement.choose_radius` also returns what was tried and how well it did.
        example_inputs: inputs to run what a trace cannot follow: a tensor, a tuple of arguments, a dict of keywords
            (such as a tokenizer returns), or a pair (tuple, dict). A tensor on the meta device stands for its shape.
            Default: the usual ones that the model's signature and first layers suggest; `plan.inputs` says which.
        inplace: change `model` itself.

    Returns:
        A model of the same class. Parameters `weight` and `bias` keep their names and values.

    Raises:
        ArgumentTypeError, UsageError, UnsupportedModelError: see `plan_conversion`. Nothing has been changed then.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10))
    >>> print(sphereify(net).conversion_plan.summary())
    1 convolution converted, the head swapped for w-softmax
    """
    if calibration is None and calibration_steps:
        raise no_effect("calibration_steps", f"without {option('calibration')}, which brings the inputs")
    check_steps(calibration_steps, "calibration_steps")
    if agreement is not None:
        if calibration is None:
            raise no_effect("agreement", f"without {option('calibration')}, which brings the inputs")
        return _converted_to_agree(model, calibration, calibration_steps, agreement, example_inputs, inplace, options)
    plan = plan_conversion(model, example_inputs=example_inputs, **options)
    batches = checked_batches(calibration) if calibration is not None else None  # refused before anything is changed
    original = copy.deepcopy(model) if batches is not None and inplace else model
    converted = apply_plan(model, plan, inplace=inplace)
    if batches is not None:
        calibrate(converted, original, batches, steps=calibration_steps)
    return converted


def _converted_to_agree(
    model: nn.Module,
    batches: Iterable[Any],
    steps: int,
    agreement: float,
    example_inputs: Inputs,
    inplace: bool,
    options: ConversionKeywords,
) -> nn.Module:
    """The network with the smallest radius that agrees with the original; a warning if it does so less than asked."""
    choice = choose_radius(model, batches, agreement=agreement, steps=steps, example_inputs=example_inputs, **options)
    if not choice.reached:
        warnings.warn(SphereifyWarning(choice.summary()), stacklevel=3)
    if not inplace:
        return choice.network
    converted = apply_plan(model, choice.plan, inplace=True)
    converted.load_state_dict(choice.network.state_dict())
    return converted

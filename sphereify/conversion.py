"""The whole path in one function: plan, apply, calibrate."""

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from sphereify.calibration.batches import checked_batches
from sphereify.calibration.distillation import check_steps
from sphereify.calibration.least_squares import calibrate
from sphereify.choices import DEFAULT_EPS
from sphereify.convert.observe import Inputs
from sphereify.convert.options import OperatorLike, Overrides
from sphereify.convert.planner import plan_conversion
from sphereify.convert.rewrite import apply_plan
from sphereify.errors import UsageError
from sphereify.patterns import PatternList


def sphereify(
    model: nn.Module,
    *,
    operator: OperatorLike = "cosine",
    k: float | None = None,
    share_k: str = "filter",
    skip_shortcuts: bool = False,
    head: str = "auto",
    head_operator: OperatorLike | None = None,
    margin: float = 4.0,
    scale: float = 30.0,
    rescale: str = "auto",
    norm: str = "keep",
    attention: str = "keep",
    include: PatternList = None,
    exclude: PatternList = None,
    overrides: Overrides = None,
    eps: float = DEFAULT_EPS,
    calibration: Iterable[Any] | None = None,
    calibration_steps: int = 0,
    example_inputs: Inputs = None,
    inplace: bool = False,
) -> nn.Module:
    """Make a network hyperspherical: each convolution and linear map becomes g(θ) of the angle to its filter.

    Args:
        model: any `nn.Module`. It is copied unless `inplace=True`.
        operator: g(θ): "linear", "cosine", "sigmoid", "learnable-sigmoid", or an operator object.
        k: of the sigmoid (default 0.3), or where a learnable one starts (default 0.5); > 0.
        share_k: who shares a learnable k: "filter" (none), "layer" or "network".
        skip_shortcuts: keep 1×1 convolutions on residual shortcuts, as SphereResNet-v2 does.
        head: "auto" (w-softmax where a linear classifier is found, else kept), "keep", or a kind of `AngularHead`.
        head_operator: default: the same as `operator`.
        margin, scale: of the head kinds that take them.
        rescale: SphereNorm's β and γ: "auto" (where no affine normalization follows), "always", "never".
        norm: "keep", or "replace": drop the BatchNorm after a converted convolution, SphereNorm in its place.
        attention: of nn.MultiheadAttention's projections: "keep" or "convert".
        include, exclude: globs over qualified names, or "re:…"; a string or a list.
        overrides: {pattern: {"operator": …, "k": …, "rescale": …} or "keep"}; the first match wins, and wins over
            `include`, `exclude` and `skip_shortcuts`.
        eps: > 0, added to both squared norms.
        calibration: batches of inputs (tensors, or tuples of arguments) for a closed-form start from what a trained
            `model` knows; see `sphereify.calibrate`, which also returns how well each layer did.
        calibration_steps: of an optimizer towards the original's outputs on these batches, without labels, afterwards.
        example_inputs: a tensor or a tuple of arguments, to run what a trace cannot follow; default: from the model's
            `pretrained_cfg`, if it has one.
        inplace: change `model` itself.

    Returns:
        A model of the same class. Parameters `weight` and `bias` keep their names and values.

    Raises:
        UsageError, UnsupportedModelError: see `plan_conversion`. Nothing has been changed then.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10))
    >>> print(sphereify(net).conversion_plan.summary())
    1 convolution converted, the head swapped for w-softmax
    """
    if calibration is None and calibration_steps:
        raise UsageError("calibration_steps: has no effect without calibration, which brings the inputs")
    check_steps(calibration_steps, "calibration_steps")
    plan = plan_conversion(
        model,
        operator=operator,
        k=k,
        share_k=share_k,
        skip_shortcuts=skip_shortcuts,
        head=head,
        head_operator=head_operator,
        margin=margin,
        scale=scale,
        rescale=rescale,
        norm=norm,
        attention=attention,
        include=include,
        exclude=exclude,
        overrides=overrides,
        eps=eps,
        example_inputs=example_inputs,
    )
    if calibration is not None:
        calibration = checked_batches(calibration)  # refused before anything is changed
    original = copy.deepcopy(model) if calibration is not None and inplace else model
    converted = apply_plan(model, plan, inplace=inplace)
    if calibration is not None:
        calibrate(converted, original, calibration, steps=calibration_steps)
    return converted

"""Application of a plan to a model. Everything has been decided before; here layers become angular, in place.

A layer keeps its identity and takes on the class and the state of its twin. So whatever refers to it, by another name,
in a list of the user's own or from a function, refers to the angular layer.
"""

import copy
from collections.abc import Hashable, Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from sphereify.annotations import CALIBRATED, CALIBRATION_FIT, PLAN
from sphereify.choices import DEFAULT_EPS
from sphereify.convert.copies import copy_of
from sphereify.convert.merging import refuse_merging
from sphereify.convert.names import relative_parameter, submodule
from sphereify.convert.plan import ConversionPlan, Decision
from sphereify.convert.pretrained_models import guard_methods
from sphereify.convert.sites import Call, is_site, kind_of, weight_of
from sphereify.convert.start import Filters, Statistics, start_beta, start_classes, statistics_behind, take_over_norm
from sphereify.errors import PlanMismatchError, UnsupportedModelError, UsageError, first_line, option, wrong_type
from sphereify.head_numbers import HEAD_NUMBERS
from sphereify.nn import AngularHead, LearnableSigmoidOperator, SphereConv1d, SphereConv2d, SphereConv3d, SphereLinear
from sphereify.nn.functional_calls import AngularCall, angular_class, answer_call, answers_calls
from sphereify.nn.layers import AngularLayer
from sphereify.nn.magnitudes import SPHERE
from sphereify.nn.modules import check_module
from sphereify.nn.operators import CLASSES, make_operator

TWINS: dict[str, Any] = {
    "conv1d": SphereConv1d.from_conv,
    "conv2d": SphereConv2d.from_conv,
    "conv3d": SphereConv3d.from_conv,
    "linear": SphereLinear.from_linear,
}


def apply_plan(model: nn.Module, plan: ConversionPlan, inplace: bool = False) -> nn.Module:
    """Convert every site that the plan says; the model's own class, methods, hooks and flags stay.

    Args:
        model: a model of the architecture that was planned; its weights may differ.
        plan: the result of `plan_conversion`, or of `ConversionPlan.from_json`.
        inplace: change `model` itself. Otherwise it is copied and not touched.

    Returns:
        The converted model, which carries the plan as `conversion_plan`. An optimizer made before the conversion does
        not know the new parameters (k, β, γ): make it afterwards.

    Raises:
        PlanMismatchError: the plan belongs to another architecture. Nothing has been changed then.
        UsageError: the plan names an operator object that it does not carry, as after `from_json`.
        ArgumentTypeError: a model that is no module, or a plan that is none.
    """
    check_module(model)
    if not isinstance(plan, ConversionPlan):
        raise wrong_type("plan", plan, "a ConversionPlan, as plan_conversion and ConversionPlan.from_json return it")
    check_fit(model, plan)
    if not inplace:
        model = copy_of(model)
    operators = _Operators(plan)
    calls = {d.name: _make_call(model, d, operators) for d in plan.converted if d.call}
    swaps = [d for d in plan.converted if not d.call]
    plain = {d.name: model.get_submodule(d.name) for d in swaps}
    twins = {d.name: _make_twin(plain[d.name], d, operators) for d in swaps}
    norms = {d.norm: model.get_submodule(d.norm) for d in swaps if d.drops_norm and d.norm}
    rests = {name: without_norm(norm) for name, norm in norms.items()}
    for decision in swaps:
        if decision.drops_norm and decision.norm:
            twin: Any = twins[decision.name]
            take_over_norm(twin.beta, twin._shift, norms[decision.norm], _filters_of(twin))
    statistics = {id(norm): (norm, start) for norm, start in _statistics(model, plan, twins, calls)}
    for name in {d.call.owner for d in plan.converted if d.call}:
        _check_class(name, model.get_submodule(name))
    # All parts exist; from here on nothing can fail half-way.
    for name, twin in twins.items():
        become(plain[name], twin)
        if isinstance(twin, AngularHead):
            start_classes(twin.weight)
    for name, rest in rests.items():
        become(norms[name], rest)
    for decision in (d for d in plan.converted if d.call):
        owner, parameter = decision.call.owner, decision.call.parameter  # type: ignore[union-attr]
        answer_call(model.get_submodule(owner), relative_parameter(owner, parameter), calls[decision.name])
    for norm, start in statistics.values():
        start.hand_to(norm)
    _leave_fast_paths(model)
    refuse_merging(model, {d.module for d in plan.converted})
    guard_methods(model)
    if PLAN.is_on(model) and plan.converted:  # a calibration before did not know these layers
        CALIBRATED.remove(model)
        CALIBRATION_FIT.remove(model)
    PLAN.write(model, _merged(PLAN.of(model), plan))
    return model


def check_fit(model: nn.Module, plan: ConversionPlan) -> None:
    """Make sure that the model has exactly the sites of the plan, in the same shapes."""
    sites = {name: module for name, module in model.named_modules() if is_site(module)}
    planned = {decision.name: decision for decision in plan.decisions}
    for name, decision in planned.items():
        if not decision.type:  # a functional call, which only its weight stands for
            if decision.call is not None:
                _check_parameter(model, decision.call, decision.name, plan)
            continue
        if name not in sites:
            raise PlanMismatchError(f"{name}: the plan for {plan.model} has this layer, {type(model).__name__} has not")
        module = sites[name]
        shape = tuple(weight_of(module).shape)
        if kind_of(module) != decision.kind or shape != decision.shape:
            raise PlanMismatchError(
                f"{name}: the plan expects a {decision.kind} with weight {decision.shape}, {type(model).__name__} has "
                f"a {kind_of(module)} with weight {shape}"
            )
        if decision.action == "convert" and isinstance(module, (AngularLayer, AngularHead)):
            raise PlanMismatchError(f"{name}: the plan converts this layer, but it is angular already")
    for name in sites:
        if name not in planned:
            raise PlanMismatchError(f"{name}: {type(model).__name__} has this layer, the plan for {plan.model} has not")


def _check_parameter(model: nn.Module, call: Call, name: str, plan: ConversionPlan) -> None:
    try:
        model.get_submodule(call.owner)
        if call.parameter:
            model.get_parameter(call.parameter)
    except AttributeError as error:
        raise PlanMismatchError(
            f"{name}: the plan for {plan.model} has this call, {type(model).__name__} has not ({error})"
        ) from None


class _Operators:
    """Operators for the decisions of one plan, shared as far as the plan says."""

    def __init__(self, plan: ConversionPlan):
        self.objects = plan.objects
        self.network_wide: dict[tuple, nn.Module] = {}

    def of(self, decision: Decision) -> Any:
        if decision.operator in self.objects:
            return copy.deepcopy(self.objects[decision.operator])
        if decision.operator not in CLASSES:
            raise UsageError(
                f"{decision.name}: the plan uses the operator object {decision.operator}, which JSON cannot hold. Put "
                f"it back with plan.objects[{decision.operator!r}] = … before applying the plan."
            )
        if decision.operator != LearnableSigmoidOperator.name:
            return make_operator(decision.operator, k=decision.k)
        if not (decision.share_k or "").startswith("network"):
            filters = decision.shape[0] if decision.share_k == "filter" else 1
            return make_operator(decision.operator, k=decision.k, filters=filters)
        key = (decision.operator, decision.k, decision.share_k)
        return self.network_wide.setdefault(key, make_operator(decision.operator, k=decision.k))


def _make_twin(plain: nn.Module, decision: Decision, operators: _Operators) -> nn.Module:
    operator = operators.of(decision)
    weight: torch.Tensor = plain.weight  # type: ignore[assignment]
    if isinstance(operator, nn.Module):
        operator.to(device=weight.device, dtype=weight.dtype)
    if decision.head:
        names = (*HEAD_NUMBERS, "margin_gradient")
        values = {name: getattr(decision, name) for name in names if getattr(decision, name) is not None}
        return AngularHead.from_linear(plain, kind=decision.head, operator=operator, **values)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"operator": operator, "rescale": decision.rescale, "eps": decision.eps}
    if decision.magnitude is not None:
        settings["magnitude"] = decision.magnitude
    if decision.kind != "linear":
        settings |= {"radius": decision.radius, "learn_radius": decision.learn_radius}
    twin: AngularLayer = TWINS[decision.kind](plain, **settings)
    twin.output_read_only = decision.output_read_only
    if twin.beta is not None:
        start_beta(twin.beta, _filters_of(twin))
    twin.train(plain.training)
    return twin


def _make_call(model: nn.Module, decision: Decision, operators: _Operators) -> AngularCall:
    """The answer to a functional call, with a β that starts as a layer's does."""
    assert decision.call is not None
    operator = operators.of(decision)
    owner = model.get_submodule(decision.call.owner)
    weight = model.get_parameter(decision.call.parameter) if decision.call.parameter else next(owner.parameters())
    if isinstance(operator, nn.Module):
        operator.to(device=weight.device, dtype=weight.dtype)
    call = AngularCall(
        decision.kind,
        decision.shape[0],
        operator,
        rescale=decision.rescale,
        has_bias=decision.call.has_bias,
        eps=decision.eps or DEFAULT_EPS,
        radius=decision.radius,
        learn_radius=decision.learn_radius,
        magnitude=decision.magnitude or SPHERE,
        columns=decision.call.transposed,
        groups=decision.call.groups,
        device=weight.device,
        dtype=weight.dtype,
    )
    call.train(owner.training)
    filters = weight.detach().t() if decision.call.transposed else weight
    if call.beta is not None and tuple(filters.shape) == decision.shape:
        start_beta(
            call.beta,
            Filters(
                decision.shape,
                filters,
                None,
                operator,
                radius=call.radius_value,
                magnitude=call.magnitude,
                eps=call.eps,
            ),
        )
    return call


def _filters_of(twin: Any) -> Filters:
    radius, groups = getattr(twin, "radius_value", 0.0), getattr(twin, "groups", 1)
    shape = tuple(twin.weight.shape)
    return Filters(shape, twin.weight, twin.bias, twin.operator, groups, radius, twin.magnitude, twin.eps)


def _filters_of_call(model: nn.Module, decision: Decision, call: AngularCall) -> Filters | None:
    """The filters of a functional call; None where it is not clear which bias it adds."""
    assert decision.call is not None
    weight: torch.Tensor | None = None
    bias: Any = None
    if decision.call.parameter:
        weight = model.get_parameter(decision.call.parameter)
        weight = weight.t() if decision.call.transposed else weight
    if decision.call.has_bias:
        bias = getattr(submodule(model, decision.name), "bias", None)
        if not isinstance(bias, torch.Tensor) or len(bias) != decision.shape[0]:
            return None
    return Filters(
        decision.shape, weight, bias, call.operator, call.groups, call.radius_value, call.magnitude, call.eps
    )


def _statistics(
    model: nn.Module, plan: ConversionPlan, twins: dict[str, Any], calls: dict[str, AngularCall]
) -> Iterator[tuple[nn.Module, Statistics]]:
    """The running statistics that BatchNorms behind converted layers start with.

    A BatchNorm that serves other layers as well, or that is frozen in a model in training, keeps its own.
    """
    for decision in plan.converted:
        norm = submodule(model, decision.norm)
        if norm is None or not decision.owns_norm or decision.drops_norm or decision.head:
            continue
        part: Any = calls[decision.name] if decision.call else twins[decision.name]
        filters = _filters_of_call(model, decision, part) if decision.call else _filters_of(part)
        if filters is not None and norm.training == part.training:
            start = statistics_behind(norm, filters, part.beta)
            if start is not None:
                yield norm, start


def become(module: nn.Module, twin: nn.Module) -> None:
    """Give a module the class and the state of its twin; a handle that was given out before still removes its hook."""
    hooks = {name: table for name, table in vars(module).items() if name.endswith("_hooks") and vars(twin).get(name)}
    module.__class__ = type(twin)  # type: ignore[assignment]
    vars(module).clear()
    vars(module).update({**vars(twin), **hooks})


def _check_class(name: str, owner: nn.Module) -> None:
    """Make sure that the class of a module can answer calls."""
    try:
        if not answers_calls(owner):
            angular_class(cast(Hashable, type(owner)))
    except Exception as error:  # a class may forbid subclasses in its own way
        raise UnsupportedModelError(
            f"{name or 'the model'}: {type(owner).__name__} allows no subclass, which its angular calls need "
            f"({type(error).__name__}: {first_line(error)}). Keep its calls with {option('exclude')}."
        ) from error


def without_norm(norm: nn.Module) -> nn.Module:
    """The rest of a normalization that is dropped: nothing, or the activation that timm fuses into it."""
    parts = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    parts = [part for part in parts if not isinstance(part, nn.Identity)]
    return nn.Sequential(*parts) if parts else nn.Identity()


def _leave_fast_paths(model: nn.Module) -> None:
    """Turn off the paths of nn.TransformerEncoder that hand all weights to one kernel and call no layer."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            angular = any(isinstance(part, (AngularLayer, AngularCall)) for part in module.modules())
            module.activation_relu_or_gelu = 0 if angular else module.activation_relu_or_gelu
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # nested tensors are for that kernel alone


def _merged(earlier: ConversionPlan | None, plan: ConversionPlan) -> ConversionPlan:
    """The plan that leads from the plain model to the present one, after a second conversion."""
    if earlier is None:
        return plan
    rounds = {d.share_k for d in earlier.converted if (d.share_k or "").startswith("network")}
    own_k = f"network-{len(rounds) + 1}" if rounds else "network"  # an operator of each conversion's own
    now = {d.name: replace(d, share_k=own_k) if d.share_k == "network" else d for d in plan.converted}
    decisions = [now.get(decision.name, decision) for decision in earlier.decisions]
    return replace(earlier, decisions=decisions, objects={**earlier.objects, **plan.objects})

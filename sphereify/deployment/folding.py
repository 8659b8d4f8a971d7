"""Folding for inference: constants become part of the filters, and so does the BatchNorm behind a converted layer.

The conversion plan says which normalization follows a layer; a model built of angular layers by hand is traced.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from sphereify.annotations import FOLDING, PLAN
from sphereify.convert.arguments import Inputs, ModelArguments
from sphereify.convert.copies import copy_of
from sphereify.convert.graph import read_graph
from sphereify.convert.input_values import filled
from sphereify.convert.model_checks import check_model
from sphereify.convert.model_inputs import evaluating
from sphereify.convert.names import submodule
from sphereify.convert.rewrite import become, without_norm
from sphereify.convert.sites import class_name
from sphereify.deployment.comparison import check_outputs
from sphereify.deployment.folded_layers import (
    ACTIVATIONS,
    PLAIN,
    FoldedConv1d,
    FoldedConv2d,
    FoldedConv3d,
    FoldedHead,
    FoldedLayer,
    FoldedLinear,
    constant,
)
from sphereify.errors import PlanMismatchError, UsageError
from sphereify.nn import AngularHead
from sphereify.nn.decoupled import Decoupled, check_complete, filter_norms
from sphereify.nn.functional_calls import CALLS, answers_calls, parameter_name
from sphereify.nn.heads import HEAD_EPS
from sphereify.nn.layers import AngularLayer, SphereConv1d, SphereConv2d, SphereConv3d, SphereLinear, adopted
from sphereify.nn.radius import HasRadius
from sphereify.wording import count

BATCH_NORMS = {
    "torch.nn.modules.batchnorm.BatchNorm1d",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.batchnorm.BatchNorm3d",
    "torch.nn.modules.batchnorm.SyncBatchNorm",
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.norm_act.FrozenBatchNormAct2d",
    "torchvision.ops.misc.FrozenBatchNorm2d",
}
"""Classes, by qualified name, that in evaluation apply one affine map to each channel, then perhaps an activation."""


class Affine(NamedTuple):
    """y -> scale·y + shift for each channel; both of shape (channels,), in float64."""

    scale: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Folding:
    """The layers of a model that were folded, by name, and those that were not. Plain data.

    Attributes:
        layers: each folded layer, with the BatchNorm that became part of it, or None.
        left: angular layers, functional calls, and BatchNorms behind folded layers that stay as they were, each with
            the reason.
    """

    layers: dict[str, str | None]
    left: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The folding as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{name}: with {norm}" if norm else name for name, norm in self.layers.items()]
        return "\n".join([self.summary(), *lines, *(f"{name}: left, {why}" for name, why in self.left.items())])

    def summary(self) -> str:
        """One line with the numbers of folded layers, of their BatchNorms, and of the layers that are left."""
        norms = sum(norm is not None for norm in self.layers.values())
        left = f", {len(self.left)} left as they are" if self.left else ""
        return f"{count(len(self.layers), 'layer')} folded, {norms} of them with their BatchNorm{left}"


def fold(model: nn.Module, example_inputs: Inputs = None, *, inplace: bool = False) -> nn.Module:
    """Fold a model for inference: the same outputs up to rounding, at about the cost of the network before conversion.

    Filter norms, β, γ, a learnable k and a following BatchNorm in evaluation become constants of the layer. Whatever
    cannot be folded soundly (weights that are computed, functional calls, magnitudes, normalizations that something
    else reads) stays as it is and is named in `model.folding.left`.

    How far rounding reaches is a matter of the network: one that amplifies the rounding of fp32, as networks with many
    depthwise convolutions do, differs as much from its own result in float64 as the folded one differs from it.

    Args:
        model: a converted model, on any device, in any mode.
        example_inputs: as for `sphereify`; needed to trace a model that carries no conversion plan. If they are given,
            the folded model's outputs are compared with the model's, in float64 where both run in it.
        inplace: change `model` itself. Otherwise it is copied and not touched.

    Returns:
        A model of the same class, in eval mode, without parameters that require a gradient. It saves, loads, moves and
        exports; `train()` and a second conversion are refused.

    Raises:
        ArgumentTypeError: the model is no `nn.Module`.
        UsageError: nothing in the model is angular, or it is folded already.
        UnsupportedModelError: a wrapped or compiled model, or one whose forward reads a layer's weights by itself, so
            that its outputs on `example_inputs` become others, or whose outputs on them are all not finite.

    >>> import torch
    >>> from sphereify import sphereify
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 10))
    >>> model = sphereify(net).eval()
    >>> x = torch.randn(2, 3, 3, 3)
    >>> torch.testing.assert_close(fold(model)(x), model(x), rtol=1e-5, atol=1e-5)
    >>> print(fold(model).folding)
    2 layers folded, 1 of them with their BatchNorm
    0: with 1
    4
    """
    if is_folded(model):
        raise UsageError(f"fold: this {type(model).__name__} is folded already")
    check_model(model)
    check_complete(model, "fold")
    folding = _plan_folding(model, example_inputs)
    if example_inputs is not None:
        check_outputs(model, lambda network: apply_folding(network, folding), example_inputs)
    return apply_folding(model if inplace else copy_of(model), folding)


def is_folded(model: object) -> bool:
    """True if a model holds a folded layer."""
    return isinstance(model, nn.Module) and any(isinstance(module, FoldedLayer) for module in model.modules())


def apply_folding(model: nn.Module, folding: Folding) -> nn.Module:
    """Fold exactly these layers of a model, in place, and return it.

    Raises:
        PlanMismatchError: the model has no such angular layer or BatchNorm. Nothing has been changed then.
    """
    layers = {name: _module(model, name, tuple(FOLDED)) for name in folding.layers}
    norms = {norm: _module(model, norm, (nn.Module,)) for norm in folding.layers.values() if norm is not None}
    with torch.no_grad():
        twins = {
            name: folded(layer, _affine_of(norms.get(folding.layers[name] or ""))) for name, layer in layers.items()
        }
    for name, twin in twins.items():
        norm = norms.get(folding.layers[name] or "")
        behind = None if norm is None else without_norm(norm)
        if behind is not None and (activation := _activation(behind)):
            twin.activation, behind = activation, nn.Identity()
        become(layers[name], twin)
        if norm is not None and behind is not None:
            become(norm, behind)
    model.eval().requires_grad_(False)
    FOLDING.write(model, folding)
    return model


def _activation(behind: nn.Module) -> str | None:
    """The name of the activation that is all that is left of a normalization, if a folded layer can have it."""
    parts = list(behind.children())
    if len(parts) != 1 or parts[0]._forward_hooks or parts[0]._forward_pre_hooks or "forward" in vars(parts[0]):
        return None
    return next((name for name, activation in ACTIVATIONS.items() if type(parts[0]) is activation.module), None)


def _module(model: nn.Module, name: str, kinds: tuple[type, ...]) -> nn.Module:
    """The module of this name, which is of one of these classes."""
    module = submodule(model, name) if name else model
    if not isinstance(module, kinds):
        what = "nothing" if module is None else f"a {class_name(module)}"
        raise PlanMismatchError(f"{name}: was folded, and {type(model).__name__} has {what} there")
    return cast(nn.Module, module)


def _plan_folding(model: nn.Module, example_inputs: Inputs) -> Folding:
    """Decide what can be folded, with the reasons why the rest cannot."""
    angular = {name: m for name, m in model.named_modules() if isinstance(m, (AngularLayer, AngularHead))}
    calls = [(name, m) for name, m in model.named_modules() if answers_calls(m)]
    if not angular and not calls:
        raise UsageError(f"fold: nothing in {type(model).__name__} is angular; convert it first with sphereify(model)")
    left = {name: why for name, layer in angular.items() if (why := _reason_to_leave(layer))}
    norms = _owned_norms(model, example_inputs) if len(left) < len(angular) else {}
    foreign = _norms_of_other_axes(model, norms, example_inputs)
    layers: dict[str, str | None] = {}
    for name in (name for name in angular if name not in left):
        # A head is no affine map of g: its logits are multiplied by the length of the features.
        layers[name] = norm = None if isinstance(angular[name], AngularHead) else norms.get(name)
        if norm in foreign:
            layers[name], left[norm] = None, "its channels are not the filters of the linear map before it"
        elif norm is not None and (why := _reason_to_leave_norm(angular[name], submodule(model, norm))):
            layers[name], left[norm] = None, why
    for name, owner in calls:
        keys = (f"{name}.{parameter_name(key)}".lstrip(".") for key in getattr(owner, CALLS))
        left.update(dict.fromkeys(keys, "a functional call, whose weight is passed anew each time"))
    return Folding(layers, left)


def _reason_to_leave(layer: nn.Module) -> str:
    """The reason why an angular layer cannot be folded; empty if it can."""
    if type(layer) not in FOLDED:
        return f"{class_name(layer)} is a subclass and may compute something else"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance"
    if isinstance(layer, Decoupled) and layer.magnitude.form != "sphere" and not layer.is_plain:
        return f"its magnitude ({layer.magnitude.form}) depends on the length of each patch"
    if "weight" not in layer._parameters or _computes_weights(layer):
        return "its weight is computed in each pass"
    return ""


def _computes_weights(layer: nn.Module) -> bool:
    """True if a hook of torch's computes the weight, as older weight and spectral norms do."""
    return any(type(hook).__module__.startswith("torch.nn.utils") for hook in layer._forward_pre_hooks.values())


def _owned_norms(model: nn.Module, example_inputs: Inputs) -> dict[str, str]:
    """The BatchNorm that follows each layer and serves that layer alone, by the layer's name."""
    plan = PLAN.of(model)
    sites: Any = plan.decisions if plan is not None else read_graph(model, example_inputs).sites
    owned = {site.name: site.norm for site in sites if site.owns_norm and site.norm is not None}
    return {name: norm for name, norm in owned.items() if _is_batch_norm(submodule(model, norm))}


@torch.no_grad()
def _norms_of_other_axes(model: nn.Module, norms: dict[str, str], example_inputs: Inputs) -> set[str]:
    """The BatchNorms behind linear maps that take tokens, whose channels are axis 1 and not the filters."""
    behind = [norm for name, norm in norms.items() if isinstance(submodule(model, name), nn.Linear)]
    foreign: set[str] = set()
    if example_inputs is None or not behind:
        return foreign

    def watch(norm: str) -> Any:
        def note(module: nn.Module, args: Any) -> None:
            if args and args[0].dim() != 2:
                foreign.add(norm)

        return model.get_submodule(norm).register_forward_pre_hook(note)

    handles = [watch(norm) for norm in behind]
    try:
        with evaluating(model):
            filled(ModelArguments.of(example_inputs), model).run(model)
    finally:
        for handle in handles:
            handle.remove()
    return foreign


def _is_batch_norm(norm: Any) -> bool:
    return isinstance(norm, nn.modules.batchnorm._BatchNorm) or class_name(norm) in BATCH_NORMS


def _reason_to_leave_norm(layer: nn.Module, norm: Any) -> str:
    """The reason why a normalization is no constant affine map of a layer's output; empty if it is one."""
    if class_name(norm) not in BATCH_NORMS:
        return f"{class_name(norm)} is a subclass and may compute something else"
    if getattr(norm, "running_mean", None) is None:
        return "it has no running statistics"
    if layer._forward_hooks or norm._forward_pre_hooks or norm._forward_hooks or "forward" in vars(norm):
        return "a hook reads what lies between the layer and it, or behind it"
    if "weight" not in {**norm._parameters, **norm._buffers}:
        return "its weight is computed in each pass"
    filters = cast(Any, layer).weight.shape[0]
    return (
        "" if len(norm.running_mean) == filters else f"it has {len(norm.running_mean)} channels for {filters} filters"
    )


def _affine_of(norm: Any) -> Affine | None:
    """The affine map that a BatchNorm applies to each channel in evaluation."""
    if norm is None:
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return Affine(scale, shift if norm.bias is None else shift + norm.bias.double())


# ---- One layer


FOLDED: dict[type[nn.Module], type[FoldedLayer]] = {
    SphereConv1d: FoldedConv1d,
    SphereConv2d: FoldedConv2d,
    SphereConv3d: FoldedConv3d,
    SphereLinear: FoldedLinear,
    AngularHead: FoldedHead,
}
"""The folded class of each angular class; not of subclasses, which may compute something else."""


def folded(layer: nn.Module, affine: Affine | None = None) -> FoldedLayer:
    """The inference form of an angular layer or head; the layer is not changed.

    Args:
        layer: of one of the types in `FOLDED`.
        affine: the affine map of each channel that a BatchNorm behind it is in evaluation.
    """
    twin = FOLDED[type(layer)].__new__(FOLDED[type(layer)])
    twin.__dict__.update(adopted(layer))
    twin.training = False
    if isinstance(layer, AngularHead):
        vars(twin).update(eps=HEAD_EPS, in_features=layer.in_features, out_features=layer.num_classes)
        shift = _double(layer.bias)
        if layer.kind == "sphereface2":
            common = _double(layer.common_bias).expand(layer.num_classes)  # type: ignore[union-attr]
            del twin._parameters["common_bias"]
            twin.take_constants(layer.operator, None, None)
            twin._parameters["shift"] = constant(common if shift is None else common + shift, layer.weight)
            vars(twin)["spread"] = (layer.scale, layer.similarity_power)
            return twin
        scale = layer.weight.new_full((layer.num_classes,), layer.scale).double() if layer.has_scale else None
        twin.take_constants(layer.operator, scale, shift)
        return twin
    if isinstance(twin, FoldedLinear):
        twin.rows_only = affine is not None
    if isinstance(layer, HasRadius):
        twin._parameters.pop("log_radius")
        del twin._radius
        vars(twin)["radius"] = layer.radius_value
    assert isinstance(layer, AngularLayer)
    scale, shift = _double(layer.beta), _double(layer.bias if layer.bias is not None else layer.gamma)
    if affine is not None:
        shift = affine.shift if shift is None else affine.scale * shift + affine.shift
        scale = affine.scale if scale is None else affine.scale * scale
    if layer.magnitude.weighted:
        lengths = filter_norms(layer.weight.detach().double(), layer.eps)
        scale = lengths if scale is None else lengths * scale
    twin.take_constants(layer.operator, scale, shift)
    if layer.is_plain:
        twin.curve = PLAIN
    return twin


def _double(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().double()

"""The optimizer and its schedule: which parameters decay, how fast each layer learns, and when the rate changes."""

import fnmatch
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sphereify.errors import first_line, invalid, option, refused, wrong_type
from sphereify.nn import AngularHead
from sphereify.nn.decoupled import Decoupled
from sphereify.nn.functional_calls import AngularCall, angular_weights
from sphereify.nn.layers import AngularLayer
from sphereify.nn.modules import check_module
from sphereify.options import checked_option
from sphereify.training.recipe import recipe
from sphereify.training.settings import Settings


def param_groups(
    model: nn.Module, weight_decay: float = 0.0, *, layer_decay: float | None = None, lr: float | None = None
) -> list[dict[str, Any]]:
    """The parameters of `model` in groups for any torch optimizer: with weight decay, and without.

    Without: filters of angular layers and class weights of angular heads (their length has no meaning, so decay only
    changes the step size), k, ρ, β, γ, every parameter of fewer than two dimensions (biases, norms), and what the
    model's own `no_weight_decay()` names, as timm's transformers do. Filters of layers with a weighted magnitude, which
    multiply by their length, decay as those of plain layers do. Parameters that do not require a gradient are left out;
    a shared one is listed once.

    Args:
        weight_decay: ≥ 0, of the decayed group.
        layer_decay: in (0, 1]: factor of the learning rate from each layer to the one before it, by timm's grouping of
            layers. Each group then has the "lr_scale" that timm's schedulers read.
        lr: with `layer_decay`, also set each group's "lr" to lr · lr_scale, for optimizers and schedulers of torch.

    Raises:
        ArgumentTypeError: `model` is no module.
        UsageError: weight_decay < 0, a layer_decay outside (0, 1] or for a model that does not say what its layers
            are, lr without layer_decay.
    """
    check_module(model)
    if weight_decay is None:  # of settings it means: whatever the optimizer has
        raise wrong_type("weight_decay", weight_decay, "a number of at least 0")
    checked_option(Settings, "weight_decay", weight_decay)
    checked_option(Settings, "layer_decay", layer_decay)
    if lr is not None and layer_decay is None:
        raise refused("lr", f"goes with {option('layer_decay')}; without it, give the learning rate to the optimizer")
    undecayed = _undecayed(model)
    if layer_decay is not None:
        return _by_layer(model, weight_decay, undecayed, layer_decay, lr)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if name not in undecayed]
    plain = [p for name, p in trained if name in undecayed]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _undecayed(model: nn.Module) -> set[str]:
    """Names of the parameters without weight decay."""
    scale_free = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (AngularLayer, AngularHead, AngularCall))
        for parameter in _scale_free(module)
    } | {id(parameter) for module in model.modules() for parameter in angular_weights(module)}
    named = {id(p) for p in _named_by(model)}
    return {n for n, p in model.named_parameters() if p.dim() < 2 or id(p) in scale_free | named}


def _scale_free(module: Any) -> Iterable[nn.Parameter]:
    """The parameters of an angular module, without the filters whose lengths its magnitude multiplies by."""
    if not (isinstance(module, Decoupled) and module.magnitude.weighted):
        return module.parameters()
    return module.operator.parameters() if isinstance(module.operator, nn.Module) else ()


def _named_by(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a model, or else the models that are parts of it or wrapped, want without weight decay."""
    if not callable(getattr(type(module), "no_weight_decay", None)):
        return [p for child in module.children() for p in _named_by(child)]
    patterns = list(module.no_weight_decay())  # type: ignore[operator]  # timm takes them as globs
    named = module.named_parameters(remove_duplicate=False)
    return [p for name, p in named if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def _by_layer(
    model: nn.Module, weight_decay: float, undecayed: set[str], layer_decay: float, lr: float | None
) -> list[dict[str, Any]]:
    from timm.optim import param_groups_layer_decay

    if not any(p.requires_grad for p in model.parameters()):
        return []
    grouped = _unwrapped(model)
    if layer_decay < 1 and not hasattr(grouped, "group_matcher"):
        raise refused(
            "layer_decay",
            f"{type(grouped).__name__} does not say what its layers are, as models of timm do (group_matcher); leave "
            f"it out",
        )
    prefix = next((n for n, p in model.named_parameters()), "").removesuffix(
        next((n for n, p in grouped.named_parameters()), "")
    )
    undecayed = {name.removeprefix(prefix) for name in undecayed}
    groups = param_groups_layer_decay(grouped, weight_decay, tuple(undecayed), layer_decay=layer_decay)
    for group in groups:
        group.pop("param_names", None)  # torch allows names for all groups of an optimizer or for none
        if lr is not None:
            group["lr"] = lr * group["lr_scale"]
    return groups  # type: ignore[no-any-return]


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model in torch.compile's or DDP's wrapping."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer of timm that the settings name, over the parameters that require a gradient.

    Raises:
        UsageError: no parameter to train, an optimizer that timm does not know or that needs second derivatives.
    """
    from timm.optim import create_optimizer_v2

    chosen = recipe(settings)
    groups = param_groups(model, chosen.weight_decay, layer_decay=settings.layer_decay)
    if not groups:
        raise refused("freeze", "nothing is left to train")
    if chosen.opt.lower() == "adahessian":
        raise refused("opt", "adahessian needs second derivatives, which this loop does not compute")
    try:
        return create_optimizer_v2(groups, opt=chosen.opt, lr=chosen.lr, weight_decay=0.0)
    except Exception as error:  # timm asserts
        raise invalid("opt", chosen.opt, f"an optimizer of timm ({first_line(error)})") from None


def make_schedule(optimizer: torch.optim.Optimizer, settings: Settings, steps_per_epoch: int) -> Any:
    """The schedule of timm that the settings name; it is updated after each optimizer step.

    Raises:
        UsageError: a schedule that timm does not know, or that does not work with these epochs.
    """
    from timm.scheduler import create_scheduler_v2

    warmup: Any = settings.epochs / 10 if settings.warmup_epochs is None else settings.warmup_epochs
    decay: dict[str, Any] = {"decay_rate": settings.decay_rate, "decay_milestones": settings.milestones}
    if settings.decay_epochs is not None:
        decay["decay_epochs"] = settings.decay_epochs
    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            settings.sched,
            num_epochs=settings.epochs,
            warmup_epochs=warmup,
            warmup_lr=0.0,
            warmup_prefix=False,
            min_lr=settings.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
            **decay,
        )
    except Exception as error:
        raise refused("sched", f"{settings.sched!r} with these epochs does not work ({first_line(error)})") from None
    if schedule is None:
        raise invalid("sched", settings.sched, "a schedule of timm, such as cosine or step")
    return schedule

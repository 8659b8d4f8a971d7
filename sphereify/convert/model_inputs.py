"""The inputs that a model takes, and ways to run it that leave no trace in it."""

import copy
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.convert.sites import is_site, weight_of
from sphereify.errors import UsageError, first_line

Inputs = Tensor | tuple[Any, ...] | None
"""Example inputs as a user gives them: one tensor, a tuple of arguments, or none."""

IMAGENET = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
}
"""Preparation of the images of torchvision's classifiers."""


# --------------------------------------------------------------------------------------------------- what a model takes


def input_channels(model: nn.Module) -> int:
    """The number of channels that the first convolution of a model takes; 3 for a model without one."""
    convolutions = (m for m in model.modules() if is_site(m) and getattr(weight_of(m), "ndim", 0) > 2)
    first: Any = next(convolutions, None)
    return 3 if first is None else int(first.weight.shape[1]) * int(getattr(first, "groups", 1))


def data_config(model: nn.Module) -> dict[str, Any]:
    """The preparation of a model's images: size, mean, standard deviation, crop and interpolation, as far as known.

    A timm model carries its own configuration; for a torchvision model it is the usual one of ImageNet.
    """
    config = getattr(model, "pretrained_cfg", None)
    if config is None and type(model).__module__.startswith("torchvision.models."):
        return dict(IMAGENET)
    return config or {}


def assumed_inputs(model: nn.Module) -> list[tuple[Any, ...]]:
    """Candidates for the arguments of a model, the likeliest first, as tensors on the meta device.

    Two images of the size in `pretrained_cfg`, else of 224×224 pixels and of the 299×299 that an Inception needs in
    training; two sequences, volumes or rows if the first layer takes those, and then images if the model names a size.
    """
    named = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    config = named or (3, 224, 224)
    first: Any = next((m for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))), None)
    if isinstance(first, nn.Linear):
        images = [(torch.empty(2, *named, device="meta"),)] if named else []  # patches may be cut and fed to the layer
        return [(torch.empty(2, first.in_features, device="meta"),), *images]
    sizes = [tuple(config[1:])] if named else [(224, 224), (299, 299)]
    if isinstance(first, nn.Conv1d):
        sizes = [(config[-1],)]
    elif isinstance(first, nn.Conv3d):
        sizes = [(16, 112, 112), (16, 224, 224)]
    elif isinstance(own := getattr(getattr(model, "patch_embed", None), "img_size", None), tuple):
        sizes.insert(0, own)
    channels = dict.fromkeys((first.in_channels if first is not None else config[0], config[0]))
    images = [torch.empty(2, c, *size, device="meta") for c in channels for size in dict.fromkeys(sizes)]
    return [(image,) * _required_arguments(model) for image in images]


def _required_arguments(model: nn.Module) -> int:
    """The number of arguments that a forward cannot do without: optical flow takes a pair of images."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in positional and p.default is p.empty for p in parameters))


def runnable_inputs(model: nn.Module, batch: int = 2) -> tuple[Tensor, ...]:
    """Random inputs of the first usual shape with which a model runs, on its device and in its dtype.

    Raises:
        UsageError: the model runs with none of them.
    """
    like = next(model.parameters(), torch.empty(0))
    errors = []
    for candidate in assumed_inputs(model):
        inputs = tuple(noise([batch, *one.shape[1:]]).to(like) for one in candidate)
        try:
            model(*inputs)
        except Exception as error:  # a forward may raise anything
            errors.append(first_line(error))
        else:
            return inputs
    raise UsageError(f"{type(model).__name__} does not run on inputs of a usual shape ({errors[0]})")


def noise(shape: Iterable[int]) -> Tensor:
    """Normal noise that is the same in each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------- arguments in, tensors out


def arguments_of(inputs: Any) -> tuple[Any, ...]:
    """Example inputs as a tuple of arguments."""
    return inputs if isinstance(inputs, tuple) else (inputs,)


def fresh(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with a copy of each tensor, for a network that may write to its input."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in arguments)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in the output of a model: in containers, dataclasses and objects."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (t for value in output.values() for t in tensors_in(value))
    elif isinstance(output, (list, tuple, set)):
        yield from (t for value in output for t in tensors_in(value))
    elif hasattr(output, "__dict__") and not isinstance(output, (nn.Module, type)) and not callable(output):
        yield from (t for value in vars(output).values() for t in tensors_in(value))


# ---------------------------------------------------------------------------------------------- running without a trace


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Put networks into eval mode, and each of their modules back into its own mode at the end."""
    modules = [module for network in networks for module in network.modules()]
    modes = [(module, module.training) for module in modules if hasattr(module, "training")]  # not so if it is frozen
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of each module at the end: masks, caches and proxies that a forward pass leaves there.

    Containers are restored in place, since hooks may hold on to them.
    """
    states = [(module, dict(vars(module))) for module in model.modules()]
    contents: list[tuple[Any, Any]] = []
    for _, state in states:
        for name, value in state.items():
            if type(value) in (dict, OrderedDict, defaultdict, list, set):
                contents.append((value, copy.copy(value)))
            elif isinstance(value, (dict, list, set)):  # a class of its own may forbid changes
                state[name] = copy.copy(value)
    try:
        yield
    finally:
        for module, state in states:
            vars(module).clear()
            vars(module).update(state)
        for container, before in contents:
            container.clear()
            container.extend(before) if isinstance(container, list) else container.update(before)

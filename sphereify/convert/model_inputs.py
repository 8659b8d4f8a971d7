"""The preparation of a model's images, the tensors in its output, and ways to run it that leave no trace in it."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

IMAGENET = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
}
"""Preparation of the images of torchvision's classifiers."""


def data_config(model: nn.Module) -> dict[str, Any]:
    """The preparation of a model's images: size, mean, standard deviation, crop and interpolation, as far as known.

    A timm model carries its own configuration; for a torchvision model it is the usual one of ImageNet.
    """
    config = getattr(model, "pretrained_cfg", None)
    if config is None and type(model).__module__.startswith("torchvision.models."):
        return dict(IMAGENET)
    return config or {}


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
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of each module at the end: masks, caches and proxies that a forward pass leaves there."""
    states = [(module, _attributes(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, state in states:
            vars(module).clear()
            vars(module).update(state)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, with copies of its containers."""
    return {
        name: copy.copy(value) if isinstance(value, (dict, list, set)) else value
        for name, value in vars(module).items()
    }

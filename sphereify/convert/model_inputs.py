"""The preparation of a model's images, the tensors in its output, and ways to run it that leave no trace in it."""

import copy
import random
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sphereify.annotations import IMAGE_CONFIG

IMAGENET = {
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
}
"""Preparation of the images of torchvision's classifiers."""


def data_config(model: nn.Module) -> dict[str, Any]:
    """The preparation of a model's images: size, mean, standard deviation, crop and interpolation, as far as known.

    A timm model carries its own configuration; a torchvision model that was built by name has that of its default
    weights, and any other one the usual one of ImageNet.
    """
    config = getattr(model, "pretrained_cfg", None) or IMAGE_CONFIG.of(model)
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
def seeded(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Seed the generators of Python, NumPy and torch, and give each its state back at the end."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


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

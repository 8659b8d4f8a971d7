"""What is said about a network: how it is built, what it takes, and which labels it takes in training."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 60


@dataclass(frozen=True)
class Architecture:
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    """A tuple of arguments, or a dict of keywords."""
    labels: Callable[[], Mapping[str, Any]] | None = None
    """Keywords with which the model returns its own loss."""


def get(module: str, name: str) -> Any:
    """An attribute of a module that is imported only now."""
    return getattr(importlib.import_module(module), name)


def image(*shape: int) -> Callable[[], tuple[Tensor]]:
    """Random images, volumes, signals or features of this shape, as the only argument."""
    return lambda: (torch.randn(shape),)


def ids(*shape: int, high: int = VOCABULARY) -> Tensor:
    return torch.randint(5, high, shape)

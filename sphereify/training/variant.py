"""Variants: the networks of a comparison, made from one plain network by different conversions, or none."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sphereify.conversion import sphereify
from sphereify.nn.modules import check_module
from sphereify.training.checks import check_model
from sphereify.training.settings import Settings


@dataclass(frozen=True)
class Variant:
    """One network of a comparison."""

    name: str
    options: Mapping[str, Any] | None = field(default_factory=dict)
    """Keyword arguments of `sphereify`; None: the network is left as it is."""


def build_variant(build: Callable[[], nn.Module], variant: Variant, settings: Settings) -> nn.Module:
    """The network of a variant before training, with the weights that settings.seed draws.

    Raises:
        UsageError: it cannot be converted, or not be trained with these settings.
        ArgumentTypeError: `build` returns no module.
    """
    torch.manual_seed(settings.seed)
    model = build()
    check_module(model, "build()")
    if variant.options is not None:
        model = sphereify(model, inplace=True, **variant.options)
    check_model(model, settings_for(variant, settings))
    return model


def settings_for(variant: Variant, settings: Settings) -> Settings:
    """The settings of a variant: the original stays what it is, and its classifier computes all scores."""
    if variant.options is not None:
        return settings
    return dataclasses.replace(settings, morph=0.0, terms=dataclasses.replace(settings.terms, sampled_classes=None))

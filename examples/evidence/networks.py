"""The networks of the programs in this folder, and what takes the place of their BatchNorm."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from examples.papers.plain_cnn import cnn, wide
from sphereify.training.robustness import ContrastStandardized

FILTERS, FEATURES = (64, 96, 128), 256
"""Filters in each stage and features of the papers' networks."""
GROUPS = 8
"""Largest number of groups of a GroupNorm."""
CIFAR10_CONTRAST = 0.41
"""Mean standard deviation of a training image of CIFAR-10, normalized to [-1, 1], around the means of its channels."""
ANGULAR: dict[str, Any] = {"operator": "cosine", "head": "keep"}
"""Options of a conversion to the cosine operator that keeps the softmax."""


def plain_cnn(width: float, *, depth: int = 9, norm: bool = True) -> Callable[[int], nn.Module]:
    """Builder of the papers' network with a share of its filters, for a number of classes; it can be pickled."""
    return partial(cnn, depth=depth, filters=wide(FILTERS, width), features=wide((FEATURES,), width)[0], norm=norm)


def normalized(build: Callable[[int], nn.Module], norm: str) -> Callable[[int], nn.Module]:
    """The builder with another normalization in place of BatchNorm: a key of `NORMS`; it can be pickled."""
    return partial(_normalized, build=build, norm=norm)


def _normalized(classes: int, *, build: Callable[[int], nn.Module], norm: str) -> nn.Module:
    network = build(classes)
    for name, module in list(network.named_modules()):
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            network.set_submodule(name, NORMS[norm](module))
    return network


def _group_norm(norm: Any) -> nn.Module:
    return nn.GroupNorm(math.gcd(GROUPS, norm.num_features), norm.num_features, eps=norm.eps)


def _instance_norm(norm: Any) -> nn.Module:
    """InstanceNorm of maps; features, which have no positions, are normalized over the features."""
    if isinstance(norm, nn.BatchNorm1d):
        return nn.LayerNorm(norm.num_features, eps=norm.eps)
    return nn.InstanceNorm2d(norm.num_features, eps=norm.eps, affine=True)


NORMS: dict[str, Callable[[Any], nn.Module]] = {"GroupNorm": _group_norm, "InstanceNorm": _instance_norm}


def standardized(build: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """The builder with per-image contrast standardisation in front of the network; it can be pickled."""
    return partial(_standardized, build=build)


def _standardized(classes: int, *, build: Callable[[int], nn.Module]) -> nn.Module:
    return ContrastStandardized(build(classes), CIFAR10_CONTRAST)

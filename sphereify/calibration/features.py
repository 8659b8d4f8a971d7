"""Features inside a network that a converted one is trained to give as well, and variations of its inputs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.calibration.held_out import lower_contrast
from sphereify.convert.arguments import ModelArguments
from sphereify.convert.names import submodule
from sphereify.convert.plan import ConversionPlan

DEPTHS = (1 / 3, 2 / 3)
"""Depths at which features are compared, as shares of the converted layers."""
LARGEST_SHIFT = 8
"""The size of an image over its largest shift."""
LEAST_CONTRAST = 0.2
"""The smallest factor of the contrast jitter."""


def feature_modules(plan: ConversionPlan | None, *networks: nn.Module) -> list[str]:
    """The names of modules at one and two thirds of the depth, of which all `networks` have one.

    It is the block of the converted layer that lies there, such as a residual block, where there is one; else the
    normalization that follows it; else the layer itself.
    """
    hidden = [d for d in (plan.converted if plan is not None else []) if d.head is None and d.call is None]
    if len(hidden) < len(DEPTHS) + 1:
        return []
    names = [decision.name for decision in hidden]
    chosen = []
    for depth in DEPTHS:
        decision = hidden[round(depth * (len(hidden) - 1))]
        chosen.append(_block(decision.name, names, networks[0]) or decision.norm or decision.name)
    return [name for name in dict.fromkeys(chosen) if all(_has(network, name) for network in networks)]


def _block(name: str, converted: list[str], network: nn.Module) -> str | None:
    """The innermost module around a layer that is one of a sequence and holds several converted layers, not all."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:length])
        parent = network.get_submodule(path.rpartition(".")[0])
        inside = sum(one.startswith(path + ".") for one in converted)
        if isinstance(parent, (nn.Sequential, nn.ModuleList)) and 1 < inside < len(converted):
            return path
    return None


def _has(network: nn.Module, name: str) -> bool:
    return submodule(network, name) is not None


@contextmanager
def recorded(network: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Record the newest output of some modules in the dict that this yields."""
    features: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                features[name] = output

        return hook

    handles = [network.get_submodule(name).register_forward_hook(record(name)) for name in names]
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def are_images(arguments: ModelArguments) -> bool:
    """True if the first argument is a batch of images: (B, 1 or 3, H, W) in floating point."""
    x = arguments.first
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 4 and x.shape[1] in (1, 3)


def moved(arguments: ModelArguments, generator: torch.Generator) -> ModelArguments:
    """The arguments with the images mirrored, half of them, and shifted alike by up to an eighth of their size."""
    x = arguments.first
    flips = (torch.rand(len(x), generator=generator) < 0.5).to(x.device)
    x = torch.where(flips[:, None, None, None], x.flip(3), x)
    height, width = x.shape[2:]
    reach = [height // LARGEST_SHIFT, width // LARGEST_SHIFT]
    down, right = (int(torch.randint(0, 2 * r + 1, (), generator=generator)) for r in reach)
    padded = F.pad(x, (reach[1], reach[1], reach[0], reach[0]), mode="replicate")
    return arguments.with_first(padded[:, :, down : down + height, right : right + width])


def jittered(arguments: ModelArguments, generator: torch.Generator) -> ModelArguments:
    """The arguments with the contrast of each image times a factor from 0.2 to 1, its mean kept."""
    x = arguments.first
    factor = LEAST_CONTRAST + (1 - LEAST_CONTRAST) * torch.rand(len(x), 1, 1, 1, generator=generator)
    return arguments.with_first(lower_contrast(x, factor.to(x)))

"""Bytes that a network must move for its angles, beyond its products: what the hardware allows at best.

Counted once each, as if all operations between two products were one pass. An angular layer reads x for the norms of
the patches, reads the products and writes g; in the backward it reads the gradient and g and writes their product, and
reads x and reads and writes its gradient. With β or γ it writes another output. A BatchNorm reads its input twice and
writes once, in the backward reads the gradient and the input twice and writes once; SphereNorm in its place saves that.
"""

import statistics
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.bench import Bench
from sphereify.nn import SphereConv2d, SphereLinear


class Traffic(NamedTuple):
    """Elements that are moved beside the products."""

    forward: int
    training: int
    """In a forward and a backward."""


def traffic(network: nn.Module, x: Tensor) -> Traffic:
    """The traffic of one batch, which runs once."""
    counts = []

    def angular(layer: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
        has_output_of_its_own = layer.beta is not None or layer.gamma is not None or layer.bias is not None
        forward = args[0].numel() + (3 if has_output_of_its_own else 2) * y.numel()
        counts.append((forward, forward + 3 * y.numel() + 3 * args[0].numel()))

    def batch_norm(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        counts.append((3 * y.numel(), 8 * y.numel()))

    hooks = []
    for module in network.modules():
        if isinstance(module, (SphereConv2d, SphereLinear)):
            hooks.append(module.register_forward_hook(angular))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_hook(batch_norm))
    with torch.no_grad():
        network(x)
    for hook in hooks:
        hook.remove()
    return Traffic(sum(forward for forward, _ in counts), sum(training for _, training in counts))


def bandwidth(bench: Bench, elements: int = 2**26) -> float:
    """Bytes a second that a copy reads and writes, of a tensor that no cache holds."""
    block = torch.empty(elements, device=bench.device)
    other = torch.empty_like(block)
    copies = bench.race({"copy": lambda: other.copy_(block)}, 5)["copy"]  # type: ignore[dict-item]
    return 2 * block.nbytes / statistics.median(copies)

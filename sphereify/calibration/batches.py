"""The inputs of a calibration: batches of arguments, checked."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.errors import DataError, UsageError, wrong_type

Arguments = tuple[Any, ...]
"""The positional arguments of one forward pass."""


def checked_batches(batches: Iterable[Any]) -> list[Arguments]:
    """The batches as tuples of arguments.

    Raises:
        ArgumentTypeError: something else than tensors or tuples.
        UsageError: no batches.
        DataError: a batch that is empty or holds values that are not finite.
    """
    if not isinstance(batches, Iterable):
        raise wrong_type("calibration", batches, "batches: tensors of inputs")
    inputs = [_arguments(batch) for batch in ([batches] if isinstance(batches, Tensor) else batches)]
    if not inputs:
        raise UsageError("calibration: got no batches, expected tensors of inputs; a few hundred images are enough")
    for number, batch in enumerate(inputs):
        for value in batch:
            if isinstance(value, Tensor) and not value.numel():
                raise DataError(f"calibration: batch {number} is empty, of shape {tuple(value.shape)}; leave it out")
            if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                bad = int((~value.isfinite()).sum())
                raise DataError(f"calibration: batch {number} holds {bad} values that are not finite; leave them out")
    return inputs


def _arguments(batch: object) -> Arguments:
    if isinstance(batch, tuple):
        return batch
    if isinstance(batch, Tensor):
        return (batch,)
    raise wrong_type(
        "calibration",
        batch,
        "a tensor for each batch, or a tuple of the model's arguments. From a loader of images and labels, pass the "
        "images: [images for images, _ in loader]",
    )


def joined(inputs: list[Arguments]) -> Arguments:
    """All batches as one, for a network that stores values in its modules while it runs.

    Raises:
        UsageError: arguments that are no tensors and cannot be joined.
    """
    if not all(isinstance(value, Tensor) for batch in inputs for value in batch):
        raise UsageError(
            "calibration: the network stores values in its modules while it runs, so that several batches cannot run "
            "side by side, and their arguments are no tensors that could be joined. Give one batch."
        )
    return tuple(torch.cat(values) for values in zip(*inputs, strict=True))


def range_warning(model: nn.Module, inputs: list[Arguments]) -> str | None:
    """A sentence about images outside the range that the model's configuration expects; None if there is none."""
    config = getattr(model, "pretrained_cfg", None)
    x = inputs[0][0] if inputs[0] else None
    if not isinstance(config, dict) or not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        return None
    mean, deviation = config.get("mean"), config.get("std")
    if not mean or not deviation:
        return None
    low = min((0 - m) / d for m, d in zip(mean, deviation, strict=True)) - 0.1
    high = max((1 - m) / d for m, d in zip(mean, deviation, strict=True)) + 0.1
    least, most = float(x.min()), float(x.max())
    if low <= least and most <= high and not (low < -0.5 and least >= 0):
        return None
    return (
        f"calibration: the images lie in [{least:.2f}, {most:.2f}]; the model's configuration (mean {tuple(mean)}, std "
        f"{tuple(deviation)}) expects [{low + 0.1:.2f}, {high - 0.1:.2f}]. Normalize them as for the original."
    )

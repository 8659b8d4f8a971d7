"""The inputs of a calibration: batches of arguments, checked."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.convert.arguments import ModelArguments
from sphereify.errors import DataError, UsageError, wrong_type


def checked_batches(batches: Iterable[Any]) -> list[ModelArguments]:
    """The batches as arguments of the model.

    Raises:
        ArgumentTypeError: something else than tensors, tuples or mappings.
        UsageError: no batches.
        DataError: a batch that is empty or holds values that are not finite.
    """
    if not isinstance(batches, (Iterable, ModelArguments)):
        raise wrong_type("calibration", batches, "batches: tensors of inputs")
    is_one = isinstance(batches, (Tensor, Mapping, ModelArguments))
    inputs = [_arguments(batch) for batch in ([batches] if is_one else batches)]
    if not inputs:
        raise UsageError("calibration: got no batches, expected tensors of inputs; a few hundred images are enough")
    for number, batch in enumerate(inputs):
        for value in batch.tensors():
            if not value.numel():
                raise DataError(f"calibration: batch {number} is empty, of shape {tuple(value.shape)}; leave it out")
            if value.is_floating_point() and not value.isfinite().all():
                bad = int((~value.isfinite()).sum())
                raise DataError(f"calibration: batch {number} holds {bad} values that are not finite; leave them out")
    return inputs


def _arguments(batch: Any) -> ModelArguments:
    if isinstance(batch, (tuple, Tensor, Mapping, ModelArguments)):
        return ModelArguments.of(batch)
    raise wrong_type(
        "calibration",
        batch,
        "a tensor for each batch, a tuple of the model's arguments, or a dict of keywords. From a loader of images and "
        "labels, pass the images: [images for images, _ in loader]",
    )


def joined(inputs: list[ModelArguments]) -> ModelArguments:
    """All batches as one, for a network that stores values in its modules while it runs.

    Raises:
        UsageError: arguments that are no tensors and cannot be joined.
    """
    first = inputs[0]
    alike = all((len(one.args), one.kwargs.keys()) == (len(first.args), first.kwargs.keys()) for one in inputs)
    if not alike or not all(isinstance(value, Tensor) for batch in inputs for value in batch.values()):
        raise UsageError(
            "calibration: the network stores values in its modules while it runs, so that several batches cannot run "
            "side by side, and their arguments are not tensors under the same names, which could be joined. Give one."
        )
    return ModelArguments(
        tuple(torch.cat(values) for values in zip(*(batch.args for batch in inputs), strict=True)),
        {name: torch.cat([batch.kwargs[name] for batch in inputs]) for name in first.kwargs},
    )


def range_warning(model: nn.Module, inputs: list[ModelArguments]) -> str | None:
    """A sentence about images outside the range that the model's configuration expects; None if there is none."""
    config = getattr(model, "pretrained_cfg", None)
    x = inputs[0].first
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

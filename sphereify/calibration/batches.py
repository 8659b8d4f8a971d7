"""The inputs of a calibration, and the state of the networks while it runs."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.errors import DataError, UsageError


@contextlib.contextmanager
def unless_raised(model: nn.Module) -> Iterator[None]:
    """After an error the model's tensors are what they were."""
    kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(kept[name])
        raise


def check_steps(steps: int) -> None:
    """A number of optimizer steps, 0 for none."""
    if not isinstance(steps, int) or steps < 0:
        raise UsageError(f"calibration: got {steps!r} steps, expected 0 or more; usual: 200 to 500")
    if torch.is_inference_mode_enabled():
        raise UsageError("calibration: inside torch.inference_mode, where no gradient can be had; call it outside")


def joined(inputs: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """All batches as one, for a network that keeps a state of its own while it runs."""
    if not all(isinstance(value, Tensor) for batch in inputs for value in batch):
        raise UsageError(
            "calibration: the network keeps something of its own between its layers, so that several batches cannot "
            "run side by side, and their arguments are no tensors that could be joined. Give one batch."
        )
    return tuple(torch.cat(values) for values in zip(*inputs, strict=True))


def batches_of(batches: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Batches as tuples of arguments, or the error that says what is wrong with them."""
    if not isinstance(batches, Iterable):
        raise UsageError(f"calibration: got {type(batches).__name__}, expected batches: tensors of inputs")
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


def _arguments(batch: object) -> tuple[Any, ...]:
    if isinstance(batch, tuple):
        return batch
    if isinstance(batch, Tensor):
        return (batch,)
    raise UsageError(
        f"calibration: got a batch of type {type(batch).__name__}, expected a tensor or a tuple of the model's "
        f"arguments. From a loader of images and labels, pass the images: [images for images, _ in loader]."
    )


def out_of_range(model: nn.Module, inputs: list[tuple[Any, ...]]) -> str | None:
    """What the model's own configuration says against these images."""
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

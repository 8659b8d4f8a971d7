"""Networks that predict: a module, or an exported file, each from images to scores."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sphereify.convert.arguments import ModelArguments
from sphereify.convert.input_channels import input_channels
from sphereify.convert.model_inputs import evaluating, tensors_in
from sphereify.deployment.formats import FORMATS, is_installed
from sphereify.deployment.options import SUFFIXES
from sphereify.devices import find_device
from sphereify.errors import ArtifactError, UsageError, first_line, invalid, option
from sphereify.hub import is_hub_name
from sphereify.model_images import preparation_of
from sphereify.preparation import Preparation, preparation_in


@dataclass(frozen=True)
class Network:
    """A network on its device, whatever it was opened from."""

    name: str
    """Name of the network in messages."""
    scores: Callable[[Tensor], Tensor]
    """The scores (B, classes) of a batch of images (B, C, H, W), both on the CPU."""
    preparation: Preparation | None
    """Preparation of its images; None where the network does not say it."""
    channels: int | None
    """Channels of its images; None where only `preparation` says it."""
    batch: int | None = None
    """The only number of images that it takes at once; None: any."""


def is_exported(spec: object) -> bool:
    """True for the name of an exported file, by its end.

    >>> is_exported("net.onnx"), is_exported("net")
    (True, False)
    """
    return isinstance(spec, (str, Path)) and not is_hub_name(spec) and Path(spec).suffix in SUFFIXES.values()


def of_module(model: nn.Module, device: str = "auto") -> Network:
    """The network of a module, which is moved to the device.

    Raises:
        UsageError: torch does not have the device.
    """
    place = _with_values(device)
    model.to(place)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def scores(images: Tensor) -> Tensor:
        with torch.no_grad(), evaluating(model):
            return _scores(tensors_in(model(images.to(place, dtype))))

    return Network(type(model).__name__, scores, preparation_of(model), input_channels(model))


def of_file(path: str | Path, device: str = "auto") -> Network:
    """The network of an exported file, on the CPU.

    Raises:
        ArtifactError: there is no such file, or it cannot be read.
        UsageError: its runtime is not installed, or another device than the CPU.
    """
    file = Path(path)
    name = next(name for name, suffix in SUFFIXES.items() if suffix == file.suffix)
    chosen = FORMATS[name]
    if not file.is_file():
        raise ArtifactError(f"{path}: there is no such file")
    if device not in ("auto", "cpu"):
        raise UsageError(
            f"{option('device')}: got {device!r}, but {path} is an exported file, which runs on the CPU here",
            option="device",
            value=device,
        )
    if not is_installed(chosen.runtime):
        raise UsageError(f"{path}: {chosen.runtime} must be installed to run it: pip install 'sphereify[export]'")
    try:
        opened = chosen.open(file)
    except Exception as error:  # a runtime may raise anything
        raise ArtifactError(f"{path}: {chosen.runtime} cannot read it ({first_line(error)})") from error
    try:
        preparation = preparation_in(opened.metadata)
    except (ValueError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path}: its entry on the preparation of images is damaged ({error})") from None

    def scores(images: Tensor) -> Tensor:
        return _scores(opened.run(ModelArguments((images,))))

    return Network(str(path), scores, preparation, None, opened.batch)


def _scores(outputs: Iterable[Tensor]) -> Tensor:
    scores = next(iter(outputs), None)
    return torch.empty(0) if scores is None else scores.detach().float().cpu()


def _with_values(device: str) -> torch.device:
    place = find_device(device)
    if place.type == "meta":
        raise invalid("device", device, "a device that holds values", "Take 'cpu' or 'cuda'")
    return place

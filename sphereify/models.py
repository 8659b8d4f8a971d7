"""Opening a network: of timm, of torchvision, of your own, or a saved artifact.

Imports torch only when it opens one, so that `--help` answers at once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sphereify.annotations import UNTRAINED
from sphereify.errors import UsageError, exclusive, option, refused
from sphereify.options import check_options, option_field

if TYPE_CHECKING:
    from torch import nn

MODEL = "The model"

SPECIFICATION = (
    "A timm name, hf-hub:USER/NAME, local-dir:FOLDER, torchvision:NAME, package.module:factory, "
    "path/to/file.py:factory, or a saved artifact."
)
"""A sentence that lists the forms in which `open_model` takes a model."""


@dataclass(frozen=True)
class SourceOptions:
    """The options with which a plain model is built, or a saved one is loaded.

    Raises:
        UsageError: a value that is not valid, or two sources of weights.
    """

    pretrained: bool = option_field(False, "Start from the pretrained weights of the library.", panel=MODEL)
    weights: Path | None = option_field(
        None, "Start from a checkpoint: a safetensors file, or a torch file of tensors.", panel=MODEL
    )
    num_classes: int | None = option_field(None, "Build the model for this number of classes.", panel=MODEL, at_least=1)
    in_chans: int | None = option_field(
        None, "Build the model for this number of input channels.", panel=MODEL, at_least=1
    )
    factory: str | None = option_field(
        None,
        "Builder of the plain model that an artifact was made of, if it is not of timm or torchvision: "
        "package.module:factory or path/to/file.py:factory.",
        panel=MODEL,
    )
    seed: int | None = option_field(0, "Random seed for newly initialised weights.", panel=MODEL)

    def __post_init__(self) -> None:
        check_options(self)
        if self.pretrained and self.weights is not None:
            raise exclusive("pretrained", "weights", "one source of weights")


def open_model(spec: str, options: SourceOptions | None = None) -> "nn.Module":
    """The model of a name, of a factory or of an artifact, on the CPU.

    Args:
        spec: a timm name, "torchvision:NAME", "package.module:factory", "path/to/file.py:factory", or the folder of an
            artifact; or "hf-hub:user/name", with "@revision" if one likes, for an artifact or a model of timm on the
            hub; or "local-dir:folder" for a model that timm saved.
        options: how to build or load it. A `seed` of None leaves torch's generator as it is.

    With `num_classes`, a checkpoint or pretrained weights for other classes fill all but the classifier, which is new;
    `untrained_part` says so.

    Raises:
        UsageError: no such model, an argument that its builder does not take, or an option that does not go with an
            artifact.
        ArtifactError: the artifact, the checkpoint or the pretrained weights cannot be had, or do not fit.
    """
    import torch

    from sphereify.artifact import load
    from sphereify.sources import build_model, find_model
    from sphereify.weights.loading import fill_from

    options = options or SourceOptions()
    if is_saved(spec):
        for name in ("pretrained", "weights", "num_classes", "in_chans"):
            if getattr(options, name):
                raise refused(name, f"does not go with the saved artifact {spec}, which has its own weights")
        return load(spec, factory=_factory_of(spec, options.factory) if options.factory else None)
    if options.factory:
        raise UsageError(
            f"{option('factory')}: got {options.factory!r}, but {spec!r} is not a saved artifact; give the factory as "
            f"the model",
            option="factory",
            value=options.factory,
        )
    if options.seed is not None:
        torch.manual_seed(options.seed)
    source = find_model(spec, num_classes=options.num_classes, in_chans=options.in_chans)
    model = build_model(source, pretrained=options.pretrained)
    if options.weights is not None:
        fill_from(model, options.weights, options.num_classes)
    return model


def _factory_of(artifact: str, factory: str) -> "Callable[[], nn.Module]":
    """A builder of the plain model of an artifact, with the arguments of the first one, as far as it takes them."""
    from sphereify.artifact import read_document
    from sphereify.sources import accepts, build_model, find_model

    before = read_document(artifact)["source"] or {}
    own_arguments = before.get("arguments", {}) if before.get("library") == "factory" else {}
    arguments = {name: value for name, value in own_arguments.items() if accepts(factory, name)}
    return functools.partial(build_model, replace(find_model(factory), arguments=arguments))


def untrained_part(model: "nn.Module") -> str:
    """A sentence on the part of a model for which its weights brought nothing; empty if there is none."""

    return UNTRAINED.of(model) or ""


def is_saved(spec: str) -> bool:
    """True if this names an artifact, sound or damaged, in a folder or on the hub, and not a model to build.

    Raises:
        ArtifactError: the hub cannot be asked.
    """
    from sphereify.artifact import is_artifact

    return bool(spec) and (Path(spec).is_dir() or is_artifact(spec))

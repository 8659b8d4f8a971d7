"""The classes of images in files, with probabilities."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sphereify.annotations import SOURCE
from sphereify.errors import DataError, SphereifyError, UsageError, first_line, option, wrong_type
from sphereify.images.folders import images_below
from sphereify.images.pictures import open_image
from sphereify.models import SourceOptions, is_saved, open_model, untrained_part
from sphereify.options import from_keywords, with_keywords_of
from sphereify.prediction.networks import Network, is_exported, of_file, of_module
from sphereify.prediction.options import PredictKeywords, PredictOptions
from sphereify.preparation import Preparation, PreparationOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class Guess:
    """A class of a network, and how likely it is."""

    number: int
    """Place of the class among the network's scores, from 0."""
    name: str | None
    """Name of the class; None where it is not known."""
    probability: float
    """Softmax of the scores, in [0, 1]."""

    def __str__(self) -> str:
        return self.name if self.name is not None else f"class {self.number}"


@dataclass(frozen=True)
class Prediction:
    """The prediction of a network for one image."""

    image: str
    """Path of the file."""
    guesses: tuple[Guess, ...] = ()
    """The likeliest classes, the first one first; empty if there is an error."""
    error: str | None = None
    """Reason for no prediction: the file cannot be read, or the scores are not finite; None if there is one."""

    def to_json(self) -> dict[str, Any]:
        """The prediction as plain JSON values."""
        if self.error is not None:
            return {"image": self.image, "error": self.error}
        guesses = [{"class": g.number, "name": g.name, "probability": g.probability} for g in self.guesses]
        return {"image": self.image, "predictions": guesses}


@with_keywords_of(PredictOptions)
def predict(
    model: "nn.Module | str | os.PathLike[str]",
    images: "str | os.PathLike[str] | Iterable[str | os.PathLike[str]]",
    *,
    preparation: Preparation | PreparationOptions | None = None,
    source: SourceOptions | None = None,
    on_images: Callable[[int, int], None] = lambda done, total: None,
    **options: "Unpack[PredictKeywords]",
) -> list[Prediction]:
    """The likeliest classes of images in files, each prepared as the network takes them.

    A file that cannot be read does not stop the others: its `Prediction` has an `error` and no guesses.

    Args:
        model: a model, which is moved to the device; or the name of one, as for `sphereify.models.open_model`; or a
            file that was exported, NAME.onnx or NAME.pt2. A .pt2 file is opened by torch: take it from those whom you
            trust only.
        images: files and folders, which are searched at any depth.
        {options}
        preparation: how an image becomes an input, whole or in part; default: what the network says itself.
        source: how to build or load a model by name.
        on_images: called after each batch with the number of images so far and of all.

    Returns:
        One prediction for each image, in the order of `images`, those of a folder by name.

    Raises:
        UsageError: the network does not say how its images are prepared, has another number of classes than there are
            names, or takes no such images.
        DataError: there are no images.
        ArtifactError: the network cannot be read.
    """
    chosen = from_keywords(PredictOptions, options, "predict")
    files = image_paths(images)
    network = open_network(model, chosen.device, source)
    prepared = _preparation(network, preparation)
    transform = prepared.transform()
    predictions: list[Prediction] = []
    size = network.batch or chosen.batch_size
    for start in range(0, len(files), size):
        predictions += _of_batch(network, prepared, transform, files[start : start + size], chosen.top)
        on_images(len(predictions), len(files))
    return predictions


def open_network(
    model: "nn.Module | str | os.PathLike[str]", device: str = "auto", source: SourceOptions | None = None
) -> Network:
    """The network that `predict` was given.

    Raises:
        UsageError, ArtifactError: as `predict`.
        ArgumentTypeError: something else.
    """
    if isinstance(model, nn.Module):
        return of_module(model, device)
    if not isinstance(model, (str, os.PathLike)):
        raise wrong_type("model", model, "a torch.nn.Module, or the name of one")
    name = os.fspath(model)
    if is_exported(name):
        return of_file(name, device)
    opened = open_model(name, source)
    _check_trained(name, opened, source or SourceOptions())
    return replace(of_module(opened, device), name=name)


def _check_trained(name: str, model: nn.Module, source: SourceOptions) -> None:
    """Refuse a model that was built by name, and knows nothing."""
    if untrained := untrained_part(model):
        raise UsageError(f"{name}: {untrained}, so that it can predict nothing")
    built = SOURCE.of(model)
    has_weights = source.pretrained or source.weights is not None or is_saved(name)
    if not has_weights and built is not None and built.library != "factory":
        raise UsageError(
            f"{name}: was built with random weights; give {option('pretrained')} or {option('weights')}, or an artifact"
        )


def image_paths(images: "str | os.PathLike[str] | Iterable[str | os.PathLike[str]]") -> list[Path]:
    """The files that are meant, those in folders included.

    Raises:
        DataError: a file or a folder that is not there, or no images.
    """
    paths: Iterable[Any] = [images] if isinstance(images, (str, os.PathLike)) else images
    files: list[Path] = []
    for one in paths:
        path = Path(one)
        if not path.exists():
            raise DataError(f"{path}: there is no such file or folder")
        files += images_below(path) if path.is_dir() else [path]
    if not files:
        raise DataError("images: got none, expected files or folders of images")
    return files


def _preparation(network: Network, preparation: Preparation | PreparationOptions | None) -> Preparation:
    if isinstance(preparation, Preparation):
        return preparation
    options = preparation or PreparationOptions()
    prepared = options.over(network.preparation, network.channels)
    if prepared is None:
        raise UsageError(
            f"{network.name}: does not say how its images are prepared; give {options.missing()} (training and tests "
            f"take 0.5 for the mean and the standard deviation where nothing says them)"
        )
    return prepared


def _of_batch(
    network: Network, prepared: Preparation, transform: Any, files: Sequence[Path], top: int
) -> list[Prediction]:
    """Predictions for some files; those that can be read go through the network together."""
    inputs: dict[int, Tensor] = {}
    errors: dict[int, str] = {}
    for place, file in enumerate(files):
        try:
            inputs[place] = transform(open_image(file))
        except DataError as error:
            errors[place] = str(error)
    guesses: dict[int, tuple[Guess, ...]] = {}
    if inputs:
        scores = _checked_scores(network, prepared, torch.stack([*inputs.values()]))
        for place, row in zip(inputs, scores, strict=True):
            if row.isfinite().all():
                guesses[place] = _likeliest(row, prepared.classes, top)
            else:
                errors[place] = f"{files[place]}: the scores of the network are not finite"
    return [Prediction(str(file), guesses.get(n, ()), errors.get(n)) for n, file in enumerate(files)]


def _checked_scores(network: Network, prepared: Preparation, images: Tensor) -> Tensor:
    """Scores of shape (B, classes) for these images."""
    count = len(images)
    if network.batch is not None and count < network.batch:  # a file for a fixed number of images gets them
        images = torch.cat([images, images[-1:].expand(network.batch - count, -1, -1, -1)])
    try:
        scores = network.scores(images)
    except SphereifyError:
        raise
    except Exception as error:  # a network may refuse images in its own way
        shape = " × ".join(map(str, images.shape[1:]))
        raise UsageError(
            f"{network.name}: does not take images of {shape} (channels, height, width): {first_line(error)}. Try "
            f"another {option('img_size')}."
        ) from error
    if scores.dim() != 2 or len(scores) != len(images):
        raise UsageError(
            f"{network.name}: returns Tensor of shape {tuple(scores.shape)} for {len(images)} images, expected one "
            f"score for each class, of shape ({len(images)}, classes)"
        )
    if prepared.classes and len(prepared.classes) != scores.shape[1]:
        raise UsageError(
            f"{network.name}: has {scores.shape[1]} classes, and there are {len(prepared.classes)} names; give "
            f"{option('class_names')} with one name for each"
        )
    return scores[:count]


def _likeliest(scores: Tensor, classes: tuple[str, ...], top: int) -> tuple[Guess, ...]:
    probabilities = scores.double().softmax(0)
    best = probabilities.topk(min(top, len(probabilities)))
    return tuple(
        Guess(number, classes[number] if classes else None, value)
        for value, number in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )

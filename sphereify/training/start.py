"""The start of a training: a network by name, converted if it is not yet, with the images that it is trained on."""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sphereify.conversion import sphereify
from sphereify.convert.options import ConversionOptions
from sphereify.datasets import Data
from sphereify.errors import UsageError, invalid, option
from sphereify.models import SourceOptions, is_saved, open_model
from sphereify.sources import accepts, find_model
from sphereify.training.checks import check_classes
from sphereify.training.data_options import DataOptions
from sphereify.training.knowledge import FEATURES, IMAGES, NOTHING, keep_knowledge, open_plain, summary
from sphereify.training.teacher import Original, open_teacher


@dataclass(frozen=True)
class Start:
    """A converted network, its images and its teacher."""

    model: nn.Module
    data: Data
    teacher: nn.Module | None = None
    """The network whose scores are followed; None without one."""
    kept: str | None = None
    """A line on the calibration; None without one."""
    trained: bool = False
    """True if the network was converted from trained weights."""


def start(
    spec: str,
    images: DataOptions,
    *,
    source: SourceOptions | None = None,
    conversion: ConversionOptions | None = None,
    teacher: str | None = None,
    teacher_weights: str | Path | None = None,
    calibration_images: int = IMAGES,
    device: str | torch.device | None = None,
) -> Start:
    """Open a network and its images for `finetune`.

    A plain model with trained weights is converted with a calibration on training images, without their labels, so that
    it keeps what it has learned; where its classes are not those of the data, the features are kept and the head is
    new.

    Args:
        spec: an artifact, which is taken as it is; or a plain model, which is built for the classes of the data and
            converted.
        images: the data set.
        source: how to build or load the network.
        conversion: how to convert a plain model.
        teacher, teacher_weights: as for `open_teacher`.
        calibration_images: number of these images, ≥ 0; 0: the weights are copied, without a calibration.
        device: where the calibration runs; default: on the CPU.

    Raises:
        UsageError: no such model, a teacher that knows nothing, or options of a conversion for an artifact.
        DataError: no such data, or images that the model does not take.
        ArtifactError: a file that cannot be read or does not fit.
    """
    source, conversion = source or SourceOptions(), conversion or ConversionOptions()
    if is_saved(spec):
        usual = ConversionOptions()
        for name, value in vars(conversion).items():
            if value != getattr(usual, name):
                raise UsageError(f"{option(name)}: does not go with the artifact {spec}, which is converted already")
        model = open_model(spec, source)
        data = images.open(model)
        return Start(model, data, open_teacher(teacher, len(data.classes), weights=teacher_weights))
    if calibration_images < 0:
        raise invalid("calibration_images", calibration_images, "a number of at least 0", "Usual: 500 to 2,000")
    plain, learned = open_plain(spec, for_classes_of(images, spec, source), images.class_count())
    data = images.open(plain)
    original = Original(copy.deepcopy(plain), source.pretrained, source.weights, learned == FEATURES)
    followed = open_teacher(teacher, len(data.classes), weights=teacher_weights, original=original)
    model = sphereify(plain, inplace=True, **conversion.keywords())
    kept = None
    if learned != NOTHING and calibration_images:
        check_classes(model, data)  # refused before a calibration, which takes its time
        result = keep_knowledge(model, original.model, data, learned, images=calibration_images, device=device)
        kept = summary(result, learned, data, calibration_images)
    return Start(model, data, followed, kept, learned != NOTHING)


def for_classes_of(images: DataOptions, spec: str, source: SourceOptions) -> SourceOptions:
    """The options of a plain model with the number of classes of the data, unless they name another one.

    A builder of your own without `num_classes` makes the model as it does.
    """
    find_model(spec)  # an unknown name fails before the data is read
    if source.num_classes is not None or not accepts(spec, "num_classes"):
        return source
    return dataclasses.replace(source, num_classes=images.class_count())

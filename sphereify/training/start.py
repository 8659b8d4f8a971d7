"""The start of a training: a network by name, converted if it is not yet, with the images that it is trained on."""

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sphereify.conversion import sphereify
from sphereify.convert.options import ConversionOptions
from sphereify.convert.rewrite import CALIBRATED_ATTRIBUTE
from sphereify.datasets import Data, training_images
from sphereify.errors import DataError, UsageError, invalid, option
from sphereify.models import SourceOptions, is_saved, open_model, untrained_part
from sphereify.sources import RECORD_ATTRIBUTE, accepts, find_model
from sphereify.training.checks import check_classes, check_trained
from sphereify.training.data_options import DataOptions
from sphereify.training.knowledge import FEATURES, IMAGES, NOTHING, keep_knowledge, open_plain, summary
from sphereify.training.morph import LENGTH_IMAGES, start_as_original
from sphereify.training.recipe import with_radius
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
    """True if the network keeps what a trained one knew: converted from its weights, calibrated, or trained before."""
    untrained: str = ""
    """A line on a classifier that its weights left new; empty without one."""


def start(
    spec: str,
    images: DataOptions,
    *,
    source: SourceOptions | None = None,
    conversion: ConversionOptions | None = None,
    teacher: str | None = None,
    teacher_weights: str | Path | None = None,
    calibration_images: int = IMAGES,
    morph: bool = False,
    device: str | torch.device | None = None,
) -> Start:
    """Open a network and its images for `finetune`.

    A plain model with trained weights is converted with a pooled radius, unless `conversion` says otherwise, and with a
    calibration on training images, without their labels, so that it keeps what it has learned; where its classes are
    not those of the data, the features are kept and the head is new.

    Args:
        spec: an artifact, which is taken as it is; or a plain model, which is built for the classes of the data and
            converted.
        images: the data set.
        source: how to build or load the network.
        conversion: how to convert a plain model.
        teacher, teacher_weights: as for `open_teacher`.
        calibration_images: number of these images, ≥ 0; 0: the weights are copied, without a calibration.
        morph: True to start as the original instead, for `Settings.morph`.
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
        if morph:
            raise UsageError(
                f"{option('morph')}: starts from the original network, and the artifact {spec} is converted already; "
                f"give the plain model, with {option('pretrained')} or {option('weights')}"
            )
        model = open_model(spec, source)
        data = images.open(model)
        followed = open_teacher(teacher, len(data.classes), weights=teacher_weights)
        return Start(model, data, followed, trained=_is_trained(model))
    if calibration_images < 0:
        raise invalid("calibration_images", calibration_images, "a number of at least 0", "Usual: 500 to 2,000")
    plain, learned = open_plain(spec, for_classes_of(images, spec, source), images.class_count())
    data = images.open(plain)
    original = Original(copy.deepcopy(plain), source.pretrained, source.weights, learned == FEATURES)
    followed = open_teacher(teacher, len(data.classes), weights=teacher_weights, original=original)
    keywords = dict(conversion.keywords())
    model = sphereify(plain, inplace=True, **(keywords if learned == NOTHING else with_radius(plain, keywords)))
    kept, untrained = None, untrained_part(plain)
    if morph:
        check_classes(model, data)
        start_as_original(model, original.model, training_images(data, LENGTH_IMAGES))
    elif learned != NOTHING and calibration_images:
        check_classes(model, data)  # refused before a calibration, which takes its time
        result = keep_knowledge(model, original.model, data, learned, images=calibration_images, device=device)
        kept = summary(result, learned, data, calibration_images)
    return Start(model, data, followed, kept, learned != NOTHING, untrained)


def _is_trained(model: nn.Module) -> bool:
    """True if an artifact was calibrated to a trained network, or trained itself."""
    return bool(getattr(model, CALIBRATED_ATTRIBUTE, False) or getattr(model, RECORD_ATTRIBUTE, None))


def for_classes_of(images: DataOptions, spec: str, source: SourceOptions, *, test_only: bool = False) -> SourceOptions:
    """The options of a plain model with the number of classes of the data.

    A builder of your own without `num_classes` makes the model as it does.

    Raises:
        DataError: the options name another number.
    """
    find_model(spec)  # an unknown name fails before the data is read
    count = images.class_count(test_only=test_only)
    if source.num_classes not in (None, count):
        raise DataError(
            f"the model has {source.num_classes} classes, {images.data} has {count}: leave out "
            f"{option('num_classes')}, and it is built for those of the data"
        )
    return dataclasses.replace(source, num_classes=count) if accepts(spec, "num_classes") else source


def open_to_test(spec: str, images: DataOptions, source: SourceOptions | None = None) -> tuple[nn.Module, Data]:
    """A trained network and the images to test it on, for `evaluate`.

    Args:
        spec: an artifact, or a plain model; with weights from a file it is built for the classes of the data.
        images: the data set, of which the test images are enough.
        source: how to build or load the network.

    Raises:
        UsageError: no such model, or weights for other classes than those of the data.
        DataError: no such data.
        ArtifactError: a file that cannot be read or does not fit.
    """
    source = source or SourceOptions()
    if not is_saved(spec) and source.weights is not None and source.num_classes is None:
        source = for_classes_of(images, spec, source, test_only=True)
    model = open_model(spec, source)
    data = images.open(model, as_trained=True, test_only=True)
    check_trained(model, data, "weights", "weights")
    return model, data

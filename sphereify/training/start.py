"""The start of a training: a network by name, converted if it is not yet, with the images that it is trained on."""

import copy
import dataclasses
from dataclasses import dataclass

from torch import nn

from sphereify.conversion import sphereify
from sphereify.convert.options import ConversionOptions
from sphereify.datasets import Data, class_count
from sphereify.errors import UsageError, option
from sphereify.models import SourceOptions, is_saved, open_model
from sphereify.sources import accepts, find_model
from sphereify.training.data_options import DataOptions
from sphereify.training.teacher import Original


@dataclass(frozen=True)
class Start:
    """A converted network, what it was made of, and its images."""

    model: nn.Module
    data: Data
    original: Original | None
    """The network before its conversion; None for an artifact, which does not hold it."""


def start(
    spec: str,
    images: DataOptions,
    *,
    source: SourceOptions | None = None,
    conversion: ConversionOptions | None = None,
) -> Start:
    """Open a network and its images for `finetune`.

    Args:
        spec: an artifact, which is taken as it is; or a plain model, which is built for the classes of the data and
            converted.
        images: the data set.
        source: how to build or load the network.
        conversion: how to convert a plain model.

    Raises:
        UsageError: no such model, or options of a conversion for an artifact.
        DataError: no such data.
        ArtifactError: a file that cannot be read or does not fit.
    """
    source, conversion = source or SourceOptions(), conversion or ConversionOptions()
    if is_saved(spec):
        usual = ConversionOptions()
        for name, value in vars(conversion).items():
            if value != getattr(usual, name):
                raise UsageError(f"{option(name)}: does not go with the artifact {spec}, which is converted already")
        model = open_model(spec, source)
        return Start(model, images.open(model), None)
    plain = open_model(spec, for_classes_of(images, spec, source))
    data = images.open(plain)
    original = Original(copy.deepcopy(plain), source.pretrained, source.weights)
    return Start(sphereify(plain, inplace=True, **conversion.keywords()), data, original)


def for_classes_of(images: DataOptions, spec: str, source: SourceOptions) -> SourceOptions:
    """The options of a plain model with the number of classes of the data, unless they name another one.

    A builder of your own without `num_classes` makes the model as it does.
    """
    find_model(spec)  # an unknown name fails before the data is read
    if source.num_classes is not None or not accepts(spec, "num_classes"):
        return source
    return dataclasses.replace(source, num_classes=class_count(images.data or "", data_root=images.data_root))

"""A model's own facts about its images: their preparation, and the names of its classes.

They come from the training that a model went through, from the artifact that it was loaded from, or from the
configuration that its library gives it, in this order.
"""

import re
from dataclasses import replace
from typing import Any

from torch import nn

from sphereify.annotations import PREPARATION, TRAINING_RECORD
from sphereify.convert.input_channels import input_channels
from sphereify.convert.model_inputs import data_config
from sphereify.errors import UsageError, refused
from sphereify.nn import SphereConv2d
from sphereify.preparation import CHANNELS, Preparation, PreparationOptions


def preparation_of(model: nn.Module, record: dict[str, Any] | None = None) -> Preparation | None:
    """The preparation of a model's images with the names of its classes; None where nothing says it.

    Args:
        model: plain or converted.
        record: of its training, with `image_size` and `classes`; default: that of the artifact that it was loaded from.
    """
    if PREPARATION.is_on(model):
        return PREPARATION.of(model)
    config = _library_config(model)
    channels = input_channels(model)
    if channels not in CHANNELS or not config.get("mean") or not config.get("std"):
        return None
    record = record or TRAINING_RECORD.of(model) or {}
    try:
        size = record["image_size"][-1] if record.get("image_size") else usual_size(config)
        return Preparation.of(size, channels, config, class_names(model, record))
    except (ValueError, TypeError):  # a configuration of the user's own may hold anything
        return None


def set_preparation(model: nn.Module, preparation: Preparation | None) -> None:
    """Let a model carry the preparation of its images; None: that it is not known."""
    PREPARATION.write(model, preparation)


def prepare_as(model: nn.Module, options: PreparationOptions, *, size_is_used: bool = False) -> None:
    """Let a model carry the preparation that options describe, over what it knows itself; nothing where none is given.

    Args:
        model: plain or converted.
        options: what is said of its images.
        size_is_used: True if `img_size` has an effect of its own, so that it need not make a preparation.

    Raises:
        UsageError: too little to know how an image is prepared, or numbers for other channels than the model has, or
            names for another number of classes.
        DataError: a file of class names that cannot be read.
    """
    if not options.given:
        return
    preparation = options.over(preparation_of(model), input_channels(model))
    if preparation is None and options == PreparationOptions(img_size=options.img_size) and size_is_used:
        return
    if preparation is None:
        raise UsageError(
            f"{type(model).__name__} does not say how its images are prepared; give {options.missing()}, or leave the "
            f"options of the preparation out"
        )
    classes = getattr(model, "num_classes", None)
    if options.class_names is not None and isinstance(classes, int) and classes != len(preparation.classes):
        raise refused(
            "class_names",
            f"{options.class_names} has {len(preparation.classes)} names, the model has {classes} classes",
        )
    set_preparation(model, preparation)


def unknown_preparation(model: nn.Module) -> str:
    """A sentence on a network of images that does not say how these are prepared; empty if it does.

    It is also empty for a network whose images have more channels than those in files have.
    """
    takes_images = any(isinstance(module, (nn.Conv2d, SphereConv2d)) for module in model.modules())
    if not takes_images or preparation_of(model) is not None or input_channels(model) not in CHANNELS:
        return ""
    return "how images are prepared for this network is not known, so predict will ask"


def image_config(model: nn.Module) -> dict[str, Any]:
    """The preparation with which a model's training or calibration starts, in the keys of timm's `pretrained_cfg`.

    Normalization, crop and interpolation are those of `preparation_of`, as far as known. A training may have taken
    another size than the model's own, and small images whole, which the next one need not do.
    """
    config = _library_config(model)
    own = PREPARATION.of(model)
    if own is None or not config:
        return config if own is None else own.config()
    if recorded_size(model) is None:
        return {**config, **own.config()}
    return {**config, "mean": own.mean, "std": own.std}


def test_config(model: nn.Module) -> dict[str, Any]:
    """The preparation with which a model is tested, in the keys of timm's `pretrained_cfg`, as far as known."""
    own = PREPARATION.of(model)
    return _library_config(model) if own is None else {**_library_config(model), **own.config()}


def _library_config(model: nn.Module) -> dict[str, Any]:
    """The configuration that a model's library gives it, with the size for which the model was built."""
    config = data_config(model)
    built = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(built, (tuple, list)) and len(built) == 2 and config.get("input_size"):
        return {**config, "input_size": (config["input_size"][0], *built)}
    return config


def recorded_size(model: nn.Module) -> int | None:
    """The size in pixels of the images in the training record of a loaded artifact; None without one."""
    record = TRAINING_RECORD.of(model) or {}
    return record["image_size"][-1] if record.get("image_size") else None


def chosen_size(model: nn.Module) -> tuple[int, int] | None:
    """The height and width in pixels that a training, or whoever converted a model, chose; None: its library's."""
    if (trained := (TRAINING_RECORD.of(model) or {}).get("image_size")) is not None:
        return trained[-2], trained[-1]
    own = PREPARATION.of(model)
    config = _library_config(model)
    if own is None or (config.get("input_size") and own.image_size[-1] == usual_size(config)):
        return None
    return own.image_size[1], own.image_size[2]


def usual_size(config: dict[str, Any]) -> int:
    """The size in pixels that a configuration names, or 224."""
    return (config.get("input_size") or (3, 224, 224))[-1]  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------------------------- classes


def class_names(model: nn.Module, record: dict[str, Any] | None = None) -> tuple[str, ...]:
    """The names of a model's classes in the order of its scores; empty where they are not known.

    They are those of its training, of its library's configuration, or of ImageNet where that says that the weights are
    for it. A model with another number of classes than the configuration has none.
    """
    record = record or TRAINING_RECORD.of(model) or {}
    if record.get("classes"):
        return tuple(str(name) for name in record["classes"])
    config = data_config(model)
    count = getattr(model, "num_classes", config.get("num_classes"))
    if not count or count != config.get("num_classes"):
        return ()
    named = _in_words(config.get("label_names"), config.get("label_descriptions"))
    names = named or _imagenet(config)
    return names if len(names) == count else ()


def _in_words(labels: Any, descriptions: Any) -> tuple[str, ...]:
    """The description of each label where there is one, and else the label."""
    labels = list(labels or ())
    if isinstance(descriptions, (list, tuple)) and len(descriptions) == len(labels):
        return tuple(map(str, descriptions))
    described = descriptions if isinstance(descriptions, dict) else {}
    return tuple(str(described.get(label, label)) for label in labels)


_OF_IMAGENET = re.compile(r"(?:^|_)in(?:1k|12k|21k|22k)(?:_|$)")
"""A part of the names of weights that were trained on ImageNet, such as `a1_in1k`."""


def _imagenet(config: dict[str, Any]) -> tuple[str, ...]:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(config)
    if subset is None or not _OF_IMAGENET.search(str(config.get("tag") or "")):
        return ()
    return tuple(ImageNetInfo(subset).label_descriptions())


def with_classes(preparation: Preparation | None, classes: list[str]) -> Preparation | None:
    """The preparation with these names of classes."""
    return None if preparation is None else replace(preparation, classes=tuple(classes))

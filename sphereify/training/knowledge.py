"""Knowledge that a plain network has learned, kept by the conversion that a training begins with."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sphereify.annotations import CALIBRATION_FIT, UNTRAINED
from sphereify.calibration.least_squares import calibrate
from sphereify.calibration.results import Calibration
from sphereify.convert.planner import plan_conversion
from sphereify.datasets import Data, training_images
from sphereify.errors import NoEffectError, choose
from sphereify.models import SourceOptions, open_model
from sphereify.nn import AngularHead
from sphereify.training.knowledge_options import KnowledgeOptions
from sphereify.training.recipe import GENTLE_RADIUS
from sphereify.weights.loading import fill_from

NOTHING, FEATURES, ALL = LEARNED = ("nothing", "features", "all")
"""The share of a network that has been trained: nothing, all but its classifier, or all."""


def open_plain(spec: str, source: SourceOptions, classes: int) -> tuple[nn.Module, str]:
    """A plain model to convert and train, and how much of it has been trained: a value of `LEARNED`.

    A checkpoint of other classes gives its features, and the classifier stays new.

    Args:
        spec: as for `open_model`, but no artifact.
        source: how to build the model.
        classes: number of classes of the data.

    Raises:
        UsageError, ArtifactError: as `open_model`.
    """
    model = open_model(spec, dataclasses.replace(source, weights=None))
    if source.weights is not None:
        new = fill_from(model, source.weights, source.num_classes or classes)
        return model, FEATURES if new else ALL
    if not source.pretrained:
        return model, NOTHING
    pretrained = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes", classes)
    return model, ALL if pretrained == classes and not UNTRAINED.is_on(model) else FEATURES


def with_radius(plain: nn.Module, conversion: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a conversion with a radius for a trained network, where they leave it open.

    Args:
        plain: the network before its conversion. One without a convolution that may pool gets no radius.
        conversion: keyword arguments of `sphereify`. With a magnitude of their own they get no radius.
    """
    if conversion.get("radius") is not None or conversion.get("magnitude", "sphere") != "sphere":
        return dict(conversion)
    pooled = {**conversion, "radius": GENTLE_RADIUS}
    try:
        plan_conversion(plain, **pooled)
    except NoEffectError as error:
        if error.option != "radius":
            raise
        return dict(conversion)
    return pooled


def keep_knowledge(
    model: nn.Module,
    original: nn.Module,
    data: Data,
    learned: str,
    *,
    images: int = KnowledgeOptions.calibration_images,
    device: str | torch.device | None = None,
    on_layer: Callable[[str, float], None] = lambda name, explained: None,
) -> Calibration:
    """Calibrate a converted network, in place, on training images without labels or augmentation.

    Args:
        model: from a conversion of `original`.
        original: the plain network, trained. It is not changed.
        data: whose training images are taken.
        learned: "all"; or "features" if the classifier is new: then the head stays as the conversion left it.
        images: number of images.
        device, on_layer: as for `calibrate`.

    Raises:
        UsageError, DataError: as `calibrate`.
    """
    if learned not in (FEATURES, ALL):
        raise choose("learned", learned, (FEATURES, ALL))
    with _new_heads(model if learned == FEATURES else nn.Identity()) as heads:
        result = calibrate(model, original, training_images(data, images), device=device, on_layer=on_layer)
    for name in heads:
        result.layers.pop(name, None)
    fit = CALIBRATION_FIT.required(model)
    CALIBRATION_FIT.write(model, {**fit, "r2": {name: r2 for name, r2 in fit["r2"].items() if name in result.layers}})
    return result


@contextmanager
def _new_heads(model: nn.Module) -> Iterator[dict[str, AngularHead]]:
    """Put the angular heads of a model back into their state at the end of the block, which gets them by name."""
    heads = {name: module for name, module in model.named_modules() if isinstance(module, AngularHead)}
    states = {name: copy.deepcopy(head.state_dict()) for name, head in heads.items()}
    yield heads
    for name, head in heads.items():
        head.load_state_dict(states[name])


def summary(result: Calibration, learned: str, data: Data, images: int = KnowledgeOptions.calibration_images) -> str:
    """One line on a calibration of `keep_knowledge`."""
    count = min(images, len(data.train))  # type: ignore[arg-type]
    head = "; the classifier is new" if learned == FEATURES else ""
    return f"kept what was learned, on {count:,} training images without labels: {result.summary()}{head}"

"""Embeddings: the features of images that a network hands to its classifier, scaled to unit length."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from sphereify.annotations import PLAN
from sphereify.calibration.layer_pairs import path_of, reference_of
from sphereify.conversion import plan_conversion
from sphereify.convert.finite import first_bad_layer
from sphereify.convert.graph import read_graph
from sphereify.convert.names import submodule
from sphereify.deployment.folding import is_folded
from sphereify.errors import DataError, TrainingError, UnsupportedModelError, option, refused
from sphereify.nn.functional_calls import Arguments
from sphereify.nn.modules import check_module
from sphereify.training.checks import check_images
from sphereify.training.evaluation import autocast
from sphereify.training.loader import Batches, make_loader, on_device
from sphereify.training.settings import Settings


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of all images that could be read."""

    vectors: Tensor
    """Vectors of unit length, or zero for features that are zero: (images, features), fp32, on the CPU."""
    rows: Tensor
    """Number of each image in its data set, (images,)."""
    skipped: int
    """Number of images that could not be read."""


@torch.no_grad()
def embeddings(
    model: nn.Module,
    images: Dataset,
    image_size: tuple[int, int, int],
    settings: Settings | None = None,
    *,
    layer: str | None = None,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> Embeddings:
    """The embeddings of images: what the classifier of a model takes, whether angular or not.

    Features at several positions, as in front of a convolution, are averaged over these.

    Args:
        model: plain or converted; it is moved to the device of `settings` and left in eval mode.
        images: a data set of pairs whose first is an image.
        image_size: channels, height and width of an image.
        settings: only batch_size, workers, device, amp, channels_last and strict are used.
        layer: name of the layer whose input is the embedding; default: the classifier.
        on_images: called after each batch with the number of images that are done, and of all.

    Raises:
        UnsupportedModelError: no classifier, or several of them.
        UsageError: no layer of that name.
        DataError: images that the model does not take, a layer whose input is no features of images, or not one image
            that can be read.
        TrainingError: features that are not finite.
        ArgumentTypeError: the model is no module.
    """
    check_module(model)
    settings = settings or Settings()
    check_images(model, image_size)
    network, path = _with_classifier(model, image_size) if layer is None else (model, _checked(model, layer))
    device = settings.chosen_device
    layout: Any = {"memory_format": torch.channels_last} if settings.channels_last else {}
    for one in (model, network):  # a copy of the model, where its classifier is a functional call
        one.to(device, **layout).eval()
    total = len(images)  # type: ignore[arg-type]
    loader = make_loader(_Numbered(images), Batches(total, settings.batch_size, seed=None), settings, device)
    vectors, rows, skipped, done = [], [], 0, 0
    with _input_of(network, path) as taken:
        for batch in loader:
            skipped += batch[1]
            placed = on_device(batch, device, settings.channels_last)
            if placed is not None:
                with autocast(device, settings.amp):
                    network(placed[0])
                features = _features(taken.pop(), path, len(placed[0]))
                if not features.isfinite().all():
                    raise TrainingError(
                        f"{path}: its input, which is the embedding, is not finite for some images; the first layer "
                        f"with a value that is not finite is {first_bad_layer(network, placed[0])}"
                    )
                vectors.append(F.normalize(features).cpu())
                rows.append(placed[1].cpu())
                done += len(placed[0])
            on_images(done + skipped, total)
    if not rows:
        raise DataError("not one of the images to embed could be read")
    return Embeddings(torch.cat(vectors), torch.cat(rows), skipped)


class _Numbered(Dataset):
    """Images with their numbers in place of their classes."""

    def __init__(self, images: Any):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        return self.images[number][0], number


# ---------------------------------------------------------------------------------------------------------- classifier


def _with_classifier(model: nn.Module, image_size: tuple[int, int, int]) -> tuple[nn.Module, str]:
    """A network that computes what the model does, the model itself where possible, and its module that classifies."""
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    example = torch.zeros(1, *image_size, device=device)
    plan = PLAN.of(model)
    sites: Any = plan.decisions if plan is not None and is_folded(model) else read_graph(model, example).sites
    classifiers = [site for site in sites if site.role == "classifier" and _classifies(site)]
    if len(classifiers) != 1:
        names = ", ".join(site.name for site in classifiers)
        which = f"{len(classifiers)} classifiers: {names}" if classifiers else "no classifier"
        raise UnsupportedModelError(
            f"{type(model).__name__} has {which}; the embedding is the input of the classifier. Name the layer whose "
            f"input it is with {option('embedding_layer')}"
        )
    (site,) = classifiers
    if site.call is None:
        return model, site.name
    plan = plan_conversion(model, example_inputs=example)
    decisions = [
        replace(d, action="convert", operator="cosine", head=None) if d.name == site.name else replace(d, action="keep")
        for d in plan.decisions
    ]
    return reference_of(model, replace(plan, decisions=decisions)), path_of(site)


def _classifies(site: Any) -> bool:
    """True for a linear map, and for a convolution of single positions, as SqueezeNet's."""
    return site.kind == "linear" or (site.kind.startswith("conv") and all(size == 1 for size in site.shape[2:]))


def _checked(model: nn.Module, layer: str) -> str:
    if submodule(model, layer) is None:
        names = ", ".join([name for name, _ in model.named_modules() if name][-5:])
        raise refused("embedding_layer", f"the model has no layer {layer!r}; its last ones are {names}")
    return layer


@contextmanager
def _input_of(network: nn.Module, path: str) -> Iterator[list[Any]]:
    """Put the newest input of a module into the list that this yields, with whether the module is a convolution."""
    module = network.get_submodule(path)
    taken: list[Any] = []

    def record(_: nn.Module, args: Any, keywords: Any) -> None:
        value = next(iter([*args, *keywords.values()]), None)
        weight = getattr(value if isinstance(value, Arguments) else module, "weight", None)
        is_convolution = isinstance(weight, Tensor) and weight.dim() > 2
        taken[:] = [(value.x if isinstance(value, Arguments) else value, is_convolution)]

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield taken
    finally:
        handle.remove()


def _features(taken: tuple[Any, bool], path: str, images: int) -> Tensor:
    """Features (images, features) from the input of a layer, at least in fp32."""
    x, is_convolution = taken
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or len(x) != images:
        shape = f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise DataError(f"{path}: takes {shape}, expected features of shape ({images}, features) for {images} images")
    x = x.float()
    if x.dim() == 2:
        return x
    channels_first = is_convolution or x.dim() > 3
    return x.flatten(2).mean(2) if channels_first else x.flatten(1, -2).mean(1)

"""The trainings and tests of `heads.py`: the images of each panel, and what is measured on them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset

from examples.cnn import small
from examples.evidence.images import shuffled, whole
from examples.evidence.work import Found
from examples.papers.training_images import with_few_images, with_label_noise
from sphereify.class_splits import LEAST, only_classes, targets_of, without_classes
from sphereify.datasets import Data, choose_images, with_transform_of
from sphereify.training import Settings, Variant, evaluate, train_once, trained
from sphereify.training.embeddings import embeddings
from sphereify.training.verification import verification

TRIED_NOISE = 1_000
"""Seed of the wrong labels of a try, beyond those of the runs."""
WEIGHT_DECAY = 0.05


@dataclass(frozen=True)
class Network:
    """A network and its training."""

    width: int
    iterations: int
    batch_size: int
    tests: int
    """Number of tests during the training."""
    lr: float
    """Peak learning rate of AdamW."""
    options: dict[str, Any] | None
    """Options of `sphereify`; None: the network stays plain."""

    def settings(self, seed: int, workers: int) -> Settings:
        tests = min(self.tests, self.iterations)
        return Settings(
            epochs=tests, epoch_batches=self.iterations // tests, batch_size=self.batch_size, opt="adamw", lr=self.lr,
            weight_decay=WEIGHT_DECAY, seed=seed, workers=workers,
        )  # fmt: skip


# Each kind of split gives the images to train on, and those to measure the network on as test images. A try takes
# another task of the same kind, and none of the test images of the runs.


def halves(data: Data, images: dict[str, Any], *, seed: int, tried: bool) -> tuple[Data, Data]:
    """The first half of the classes to train on, and the images of the others to verify; swapped for a try."""
    middle = len(data.classes) // 2
    first, second = data.classes[:middle], data.classes[middle:]
    unseen = first if tried else second
    held_out = only_classes(data, unseen)
    held_out = choose_images(held_out, "test", min(images["held_out_images"], len(held_out.test)))  # type: ignore[arg-type]
    return _part(without_classes(data, unseen), images["train_images"]), held_out


def few_images(data: Data, images: dict[str, Any], *, seed: int, tried: bool) -> tuple[Data, Data]:
    """A share of the images of the first three of ten classes, of the last three for a try."""
    rare = rare_classes(data.classes, tried=tried)
    train, held_out = _with_held_out(data, images, tried)
    return with_few_images(train, rare, images["share"]), held_out


def noisy_labels(data: Data, images: dict[str, Any], *, seed: int, tried: bool) -> tuple[Data, Data]:
    """A share of wrong labels among the training images, other ones for each seed and for a try."""
    train, held_out = _with_held_out(data, images, tried)
    return with_label_noise(train, images["share"], TRIED_NOISE if tried else seed), held_out


def rare_classes(classes: list[str], *, tried: bool) -> list[str]:
    """The classes with few images: three of ten, the first ones, or the last ones for a try."""
    count = max(1, round(0.3 * len(classes)))
    return classes[-count:] if tried else classes[:count]


def _part(data: Data, count: int) -> Data:
    """The data with a fixed random choice of training images."""
    return choose_images(data, "train", min(count, len(data.train)))  # type: ignore[arg-type]


def _with_held_out(data: Data, images: dict[str, Any], tried: bool) -> tuple[Data, Data]:
    """Training images, and the images to measure on: all test images; for a try, others of the training images."""
    total = len(data.train)  # type: ignore[arg-type]
    kept = min(images["train_images"], total - min(images["held_out_images"], total // 2))
    order = shuffled(total)
    train: Any = Subset(data.train, order[:kept])
    chosen = replace(data, name=f"{data.name}, {kept} train images", train=train)
    if not tried:
        return chosen, chosen
    others: Any = Subset(with_transform_of(data.train, data.test), order[kept : kept + images["held_out_images"]])
    return replace(chosen, test=others), replace(chosen, test=others)


SPLITS: dict[str, Callable[..., tuple[Data, Data]]] = {
    "verification": halves,
    "few images": few_images,
    "label noise": noisy_labels,
}


def train(data: str, folder: Path, *, kind: str, network: Network, images: dict[str, Any], seed: int, tried: bool,
          workers: int = 0) -> Found:  # fmt: skip
    """Train a network on the images of a kind of split, and measure it.

    Returns:
        The numbers of the table as shares in [0, 1], and "goal", by which tries are compared.
    """
    train_data, held_out = SPLITS[kind](whole(data), images, seed=seed, tried=tried)
    # During training a few images are tested, which says that it runs; what counts is measured at its end.
    watched = choose_images(train_data, "test", min(500, len(train_data.test)))  # type: ignore[arg-type]
    build = partial(small, num_classes=len(train_data.classes), in_chans=train_data.image_size[0], width=network.width)
    settings, variant = network.settings(seed, workers), Variant(folder.name, network.options)
    train_once(build, watched, variant, settings, output=folder)
    model = trained(build, variant, folder)
    tested = evaluate(model, train_data, replace(settings, batch_size=500))
    if kind == "verification":
        verified = verification(model, held_out, replace(settings, batch_size=500))
        return {
            "EER": verified.eer,
            **{f"TAR at FAR {rate:g}": verified.tar[rate] for rate in (1e-1, 1e-2)},
            "nearest neighbour": verified.neighbour_accuracy,
            "trained classes": tested.top1,
            "goal": -verified.eer,
        }
    if kind == "few images":
        rare = rare_classes(train_data.classes, tried=tried)
        by_means = nearest_means(model, train_data, replace(settings, batch_size=500))
        return {
            "rare by means": _mean(by_means, train_data.classes, rare),
            "all by means": _mean(by_means, train_data.classes, train_data.classes),
            "rare by classifier": _mean(tested.per_class, train_data.classes, rare),
            "all by classifier": tested.top1,
            **_told_apart(model, train_data, rare, settings),
            "goal": _mean(by_means, train_data.classes, train_data.classes),
        }
    return {"accuracy": tested.top1, "goal": tested.top1}


def _told_apart(model: nn.Module, data: Data, rare: list[str], settings: Settings) -> Found:
    """The equal error rate among test images of the rare classes: their embeddings, whatever the classifier prefers."""
    if len(rare) < LEAST:
        return {}
    nothing: Any = Subset(data.train, [])
    return {"EER of rare": verification(model, only_classes(replace(data, train=nothing), rare), settings).eer}


def nearest_means(model: nn.Module, data: Data, settings: Settings) -> list[float]:
    """The accuracy of each class if a test image belongs to the class whose mean embedding is nearest to its own.

    The means are those of the training images. Unlike a classifier they do not prefer classes with many images.
    """
    known, asked = (
        embeddings(model, part, data.image_size, settings)
        for part in (with_transform_of(data.train, data.test), data.test)
    )
    known_targets, asked_targets = (
        torch.tensor(targets_of(part))[found.rows] for part, found in ((data.train, known), (data.test, asked))
    )
    classes = range(len(data.classes))
    means = torch.stack([known.vectors[known_targets == one].mean(0).nan_to_num() for one in classes])
    right = (asked.vectors @ F.normalize(means, dim=1).T).argmax(1) == asked_targets
    # A class without an image, as small choices may have, counts as not recognised.
    return [float(right[asked_targets == one].double().mean().nan_to_num()) for one in classes]


def _mean(shares: list[float], classes: list[str], chosen: list[str]) -> float:
    return sum(shares[classes.index(name)] for name in chosen) / len(chosen)

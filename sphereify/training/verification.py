"""Verification: whether the embeddings of a network tell images of one identity from images of others.

The score of two images is the cosine of their embeddings, which is compared with a threshold. Identities are usually
classes that the network was not trained on.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sphereify.class_splits import targets_of
from sphereify.datasets import Data
from sphereify.errors import DataError, invalid, option, wrong_type
from sphereify.files import write_text
from sphereify.plots import plot_verification
from sphereify.scikit_learn import check_installed, neighbour_accuracy, roc
from sphereify.training.checks import check_arguments
from sphereify.training.embeddings import Embeddings, embeddings
from sphereify.training.pairs import Pairs, pairs_of
from sphereify.training.settings import Settings
from sphereify.training.verification_options import VerificationOptions

FALSE_ACCEPT_RATES = (1e-1, 1e-2, 1e-3, 1e-4)
MEASURABLE = 10
"""Smallest number of falsely accepted pairs from which a rate is told."""
CURVE_POINTS, BINS = 200, 200
"""Number of points of a ROC, and of bins of the scores, that are kept."""
CHUNK = 16_384
"""Number of pairs that are scored at a time."""


@dataclass(frozen=True)
class Roc:
    """The share of accepted pairs of one identity over that of accepted pairs of two."""

    false_accepts: list[float]
    """Rates in (0, 1], evenly spaced in their logarithm; the first is that of one pair."""
    true_accepts: list[float]
    """The highest true accept rate whose false accept rate is at most that."""


@dataclass(frozen=True)
class Verification:
    """Results of a verification."""

    eer: float
    """Equal error rate in [0, 1]: where as many pairs are falsely accepted as are falsely rejected."""
    tar: dict[float, float | None]
    """True accept rate at most at each false accept rate; None where fewer than ten pairs of different identities would
    be accepted, of which a rate would be chance."""
    roc: Roc
    same_scores: list[int]
    """Histogram of the scores of pairs of one identity, in bins of equal width from −1 to 1."""
    different_scores: list[int]
    """Histogram of the scores of pairs of two identities."""
    images: int
    skipped: int
    """Number of images that could not be read; pairs of these are left out."""
    pairs: int
    """Number of pairs of which these were chosen."""
    identities: int | None = None
    """Number of identities; None for a list of pairs, which does not name them."""
    neighbours: int = 1
    neighbour_accuracy: float | None = None
    """Share of images whose nearest neighbours among all others are of their identity; None for a list of pairs, or if
    no identity has two images."""

    @property
    def same(self) -> int:
        """Number of scored pairs of one identity."""
        return sum(self.same_scores)

    @property
    def different(self) -> int:
        """Number of scored pairs of two identities."""
        return sum(self.different_scores)

    def too_few(self, rate: float) -> str:
        """A sentence on a false accept rate for which there are too few pairs; empty if there are enough."""
        if self.tar[rate] is not None:
            return ""
        return f"needs {round(MEASURABLE / rate):,} pairs of different identities, there are {self.different:,}"

    def of_what(self) -> str:
        """A phrase on the images and the pairs."""
        skipped = f" ({self.skipped} could not be read)" if self.skipped else ""
        identities = "" if self.identities is None else f" of {self.identities} identities"
        chosen = self.same + self.different
        choice = f", chosen of {self.pairs:,}" if chosen < self.pairs and self.identities is not None else ""
        return (
            f"{self.images:,} images{skipped}{identities}; {self.same:,} pairs of one identity, {self.different:,} of "
            f"two{choice}"
        )

    def to_json(self) -> dict[str, Any]:
        """All results as plain JSON values."""
        return {
            "images": self.images,
            "skipped": self.skipped,
            "identities": self.identities,
            "pairs": {"same": self.same, "different": self.different, "chosen_of": self.pairs},
            "eer": self.eer,
            "tar": {f"{rate:g}": share for rate, share in self.tar.items()},
            "too_few_pairs": {f"{rate:g}": why for rate in self.tar if (why := self.too_few(rate))},
            "neighbours": self.neighbours,
            "neighbour_accuracy": self.neighbour_accuracy,
            "roc": {"false_accepts": self.roc.false_accepts, "true_accepts": self.roc.true_accepts},
            "scores": {"from": -1, "to": 1, "same": self.same_scores, "different": self.different_scores},
        }


def verification(
    model: nn.Module,
    data: Data,
    settings: Settings | None = None,
    *,
    pairs: Pairs | None = None,
    max_pairs: int = VerificationOptions.max_pairs,
    neighbours: int = VerificationOptions.neighbours,
    embedding_layer: str | None = None,
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> Verification:
    """Test whether a model tells the identities of images apart, which need not be classes of its own.

    Args:
        model: plain or converted; it is moved to the device of `settings` and left in eval mode.
        data: its test images are taken; from `sphereify.class_splits.only_classes` or any other `Data`.
        settings: only batch_size, workers, device, amp, channels_last, strict and seed are used; the seed is that of
            the choice of pairs.
        pairs: pairs of test images by their numbers; default: pairs of the classes of `data`, which are the identities.
        max_pairs: largest number of pairs, ≥ 2; of more, a fixed random choice is scored.
        neighbours: number of nearest neighbours that vote for an identity, ≥ 1.
        embedding_layer: name of the layer whose input is the embedding; default: the classifier.
        on_images: called after each batch with the number of images that are done, and of all.

    Raises:
        UsageError: an argument out of its range, or no scikit-learn.
        DataError: images of one identity only, no two images of one identity, or as `embeddings`.
        UnsupportedModelError, TrainingError: as `embeddings`.
    """
    check_arguments(model, data, settings)
    settings = settings or Settings()
    VerificationOptions(True, max_pairs=max_pairs, neighbours=neighbours)  # checks them
    embed = partial(embeddings, model, data.test, data.image_size, settings, layer=embedding_layer, on_images=on_images)
    if pairs is None:
        identities = check_identities(data, neighbours)
        embedded = embed()
        identities = identities[embedded.rows]
        _check_neighbours(neighbours, len(identities))
        return _measured(data, embedded, pairs_of(identities, max_pairs, settings.seed), identities, neighbours)
    check_installed("verification")
    images = len(data.test)  # type: ignore[arg-type]
    _check_pairs(data, pairs, images)
    embedded = embed()
    return _measured(data, embedded, pairs.among(embedded.rows, images), None, neighbours)


def check_identities(data: Data, neighbours: int = 1) -> Tensor:
    """The identity of each test image of `data`, which must allow a verification.

    Raises:
        UsageError: no scikit-learn, or fewer images than neighbours.
        DataError: images of one identity only, or no two images of one identity.
    """
    check_installed("verification")
    identities = torch.tensor(targets_of(data.test), dtype=torch.int64)
    _check_kinds(data, pairs_of(identities[identities >= 0], 2))
    _check_neighbours(neighbours, len(identities))
    return identities


def _check_pairs(data: Data, pairs: Pairs, images: int) -> None:
    """Make sure that pairs are those of images, and of both kinds."""
    if not isinstance(pairs, Pairs):
        raise wrong_type("pairs", pairs, "Pairs, as sphereify.training.pairs.read_pairs returns them")
    numbers = torch.cat([pairs.first, pairs.second])
    strange = numbers[(numbers < 0) | (numbers >= images)]
    if len(strange):
        raise DataError(f"pairs: name image {int(strange[0])}, but {data.name} has {images} images, from 0 on")
    _check_kinds(data, pairs)


def _check_kinds(data: Data, pairs: Pairs) -> None:
    """Make sure that there are pairs of both kinds."""
    if pairs.same.all():
        raise DataError(
            f"{option('verification')}: {data.name} has images of one identity only, or none; pairs of different "
            f"identities are needed, too"
        )
    if not pairs.same.any():
        raise DataError(f"{option('verification')}: {data.name} has no two images of one identity")


def _check_neighbours(neighbours: int, images: int) -> None:
    if neighbours >= images:
        raise invalid("neighbours", neighbours, f"fewer than the {images} images")


def _measured(
    data: Data, embedded: Embeddings, pairs: Pairs, identities: Tensor | None, neighbours: int
) -> Verification:
    """The measures of pairs, whose images are rows of the embeddings, and of the identities of these, if there are."""
    _check_kinds(data, pairs)  # images that could not be read may have been all of a kind
    scores = cosines(embedded.vectors, pairs)
    false_accepts, true_accepts = roc(pairs.same.numpy(), scores)
    different = int((~pairs.same).sum())
    same_scores, different_scores = (
        np.histogram(scores[kind.numpy()], BINS, (-1, 1))[0].tolist() for kind in (pairs.same, ~pairs.same)
    )
    rates = np.geomspace(1 / different, 1, CURVE_POINTS)
    counts = None if identities is None else torch.unique(identities, return_counts=True)[1]
    return Verification(
        equal_error_rate(false_accepts, true_accepts),
        {
            rate: true_accept_rate(false_accepts, true_accepts, rate) if rate * different >= MEASURABLE else None
            for rate in FALSE_ACCEPT_RATES
        },
        Roc(rates.tolist(), [true_accept_rate(false_accepts, true_accepts, rate) for rate in rates]),
        same_scores,
        different_scores,
        images=len(embedded.rows),
        skipped=embedded.skipped,
        pairs=pairs.total,
        identities=None if counts is None else len(counts),
        neighbours=neighbours,
        neighbour_accuracy=None
        if identities is None
        else neighbour_accuracy(embedded.vectors.numpy(), identities.numpy(), neighbours),
    )


def cosines(vectors: Tensor, pairs: Pairs) -> Any:
    """The cosine of the vectors, of unit length, of each pair, as an array; a part of the pairs at a time."""
    scores = torch.empty(len(pairs))  # one block: small results between large parts would tear the memory
    parts = (one.split(CHUNK) for one in (pairs.first, pairs.second, scores))
    for first, second, place in zip(*parts, strict=True):
        torch.sum(vectors[first] * vectors[second], 1, out=place)
    return scores.clamp_(-1, 1).numpy()


def equal_error_rate(false_accepts: Any, true_accepts: Any) -> float:
    """The rate at which the piecewise linear ROC has as many false accepts as false rejects."""
    excess = false_accepts - (1 - true_accepts)  # rises from −1 to 1
    after = int(np.argmax(excess >= 0))
    before = after - 1
    share = -excess[before] / (excess[after] - excess[before])
    return float(false_accepts[before] + share * (false_accepts[after] - false_accepts[before]))


def true_accept_rate(false_accepts: Any, true_accepts: Any, rate: float) -> float:
    """The highest true accept rate of a threshold whose false accept rate is at most `rate`."""
    # A rate of so many pairs is a quotient, whose last bit may differ.
    place = np.searchsorted(false_accepts, rate * (1 + 1e-9), side="right") - 1
    return float(true_accepts[place])


def write_verification(verification: Verification, folder: Path) -> None:
    """Write the results as verification.json, and their picture as verification.png.

    Raises:
        ArtifactError: a file cannot be written.
        UsageError: matplotlib is not installed.
    """
    results = verification.to_json()
    write_text(folder / "verification.json", json.dumps(results, indent=1) + "\n")
    plot_verification(results, folder / "verification.png")

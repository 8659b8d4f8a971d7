"""Robustness: the accuracy of networks on corrupted test images, beside that of the original and of its rival.

The rival is the original behind `ContrastStandardized`: one line of preprocessing, which undoes a loss of contrast as
well. What a conversion gains is what it gains over the rival.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from sphereify.annotations import TRAINING_RECORD
from sphereify.artifact import TENSORS
from sphereify.convert.finite import answers_of
from sphereify.datasets import Data, training_images
from sphereify.errors import DataError, choose, option, refused
from sphereify.files import write_text
from sphereify.models import SourceOptions, is_saved, open_model
from sphereify.nn.modules import check_module
from sphereify.plots import plot_robustness
from sphereify.sources import accepts
from sphereify.training.checks import check_arguments, check_classes, check_record, check_trained
from sphereify.training.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from sphereify.training.evaluation import autocast
from sphereify.training.loader import Batches, make_loader, on_device
from sphereify.training.objective import logits_of
from sphereify.training.settings import Settings

NETWORK, ORIGINAL, RIVAL = "network", "original", "original, contrast standardised"
"""Names of the networks in the results of `robustness`."""
RESULTS = "robustness.json"
"""The file of these results."""
MEASURED = 1024
"""Largest number of training images on which the contrast of a training set is measured."""


@dataclass(frozen=True)
class CorruptedAccuracy:
    """The accuracy of a network on test images, as they are and corrupted."""

    clean: float
    """Accuracy on the images as they are, in [0, 1]."""
    corrupted: dict[str, list[float]]
    """Accuracies in [0, 1] at the strengths 1 to 5, by corruption."""

    @property
    def means(self) -> dict[str, float]:
        """Mean accuracy over the strengths, by corruption."""
        return {name: statistics.mean(accuracies) for name, accuracies in self.corrupted.items()}

    @property
    def mean(self) -> float:
        """Mean accuracy over all corruptions and strengths."""
        return statistics.mean(self.means.values())


@dataclass(frozen=True)
class Robustness:
    """The accuracies of one or several networks on the same corrupted images."""

    networks: dict[str, CorruptedAccuracy]
    images: int
    """Number of test images, each of which was corrupted in every way."""
    classes: int
    skipped: int = 0
    """Number of images that could not be read."""

    @property
    def chance(self) -> float:
        """The accuracy of guessing, for classes of equal size."""
        return 1 / self.classes

    def columns(self) -> list[str]:
        """The headings of `rows`."""
        first = next(iter(self.networks.values()))
        return ["accuracy, %", "clean", *first.corrupted, "mean"]

    def rows(self) -> list[list[str]]:
        """The cells of the table, a network in each row: means over the strengths, and over the corruptions."""
        return [
            [name, *(f"{100 * share:.1f}" for share in (found.clean, *found.means.values(), found.mean))]
            for name, found in self.networks.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """All accuracies and their means as plain JSON values."""
        networks = {
            name: {**asdict(found), "means": found.means, "mean": found.mean} for name, found in self.networks.items()
        }
        return {"images": self.images, "skipped": self.skipped, "chance": self.chance, "networks": networks}


def robustness(
    model: nn.Module,
    data: Data,
    settings: Settings | None = None,
    *,
    against: nn.Module | None = None,
    name: str = NETWORK,
    corruptions: Iterable[str] = tuple(CORRUPTIONS),
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> Robustness:
    """Test a model on corrupted test images, beside the network that it was made of and the rival of that.

    Args:
        model: converted or not; returns logits (B, classes). It is moved to the device of `settings` and left in eval
            mode, as the others.
        data: from `sphereify.datasets.load_data`; images of 1 or 3 channels, with `mean` and `std`.
        settings: only batch_size, workers, device, amp, channels_last, strict and seed are used; the seed is that of
            noise and fog.
        against: the original network. With it the result has three networks: `model` under `name`, "original", and
            "original, contrast standardised", the original behind `ContrastStandardized`.
        corruptions: keys of `sphereify.training.corruptions.CORRUPTIONS`; default: all.
        on_images: called after each batch with the number of images that are done, and of all.

    Raises:
        UsageError: an unknown corruption, or none.
        DataError: images of other than 1 or 3 channels, or whose normalization is not known; otherwise as `evaluate`.
        ArgumentTypeError: a network that is no module, or data or settings of another type.
    """
    check_arguments(model, data, settings)
    if against is None:
        return corrupted_accuracies({name: model}, data, settings, corruptions=corruptions, on_images=on_images)
    check_module(against, "against")
    networks = {NETWORK if name in (ORIGINAL, RIVAL) else name: model}
    networks |= {ORIGINAL: against, RIVAL: rival_of(against, data)}
    return corrupted_accuracies(networks, data, settings, corruptions=corruptions, on_images=on_images)


def corrupted_accuracies(
    networks: Mapping[str, nn.Module],
    data: Data,
    settings: Settings | None = None,
    *,
    corruptions: Iterable[str] = tuple(CORRUPTIONS),
    on_images: Callable[[int, int], None] = lambda done, total: None,
) -> Robustness:
    """Test networks on the same corrupted test images; the arguments are those of `robustness`.

    Each image is read once. Its corruption depends on the seed and on its number in the data set alone.
    """
    settings, kinds = settings or Settings(), list(corruptions)
    images = _CorruptedImages(data, kinds, settings.seed)
    device, layout = settings.chosen_device, {"memory_format": torch.channels_last} if settings.channels_last else {}
    for network in networks.values():
        check_record(TRAINING_RECORD.of(network), data)
        check_classes(network, data)
        network.to(device, **layout).eval()  # type: ignore[call-overload]
    # A batch of the loader holds so many images that, with their copies, they are a batch for the networks.
    batches = Batches(len(images), max(1, settings.batch_size // images.copies), seed=None)
    counts = {name: torch.zeros(images.copies, dtype=torch.int64, device=device) for name in networks}
    tested = skipped = 0
    for batch in make_loader(images, batches, settings, device):
        skipped += batch[1]
        placed = on_device(batch, device, channels_last=False)
        if placed is not None:
            copies, targets = placed
            for name, network in networks.items():
                counts[name] += _right_answers(network, copies, targets, settings)
            tested += len(targets)
        on_images(tested + skipped, len(images))
    if not tested:
        raise DataError(f"{data.name}: not one of its test images could be read")
    accuracies = {name: _shares(count.tolist(), kinds, tested) for name, count in counts.items()}
    return Robustness(accuracies, tested, len(data.classes), skipped)


def check_corruptible(data: Data) -> None:
    """Make sure that there are test images which can be corrupted.

    Raises:
        DataError: there are none, or they have other than 1 or 3 channels, or their normalization is not known.
    """
    if data.image_size[0] not in (1, 3):
        raise DataError(
            f"{option('corruptions')}: {data.name} has images of {data.image_size[0]} channels, expected 1 or 3"
        )
    if data.mean is None or data.std is None:
        raise DataError(
            f"{option('corruptions')}: how {data.name} was normalized is not known, and corruptions are of pixels in "
            f"[0, 1]; give its Data the mean and std of the channels"
        )
    if not len(data.test):  # type: ignore[arg-type]
        raise DataError(f"{data.name}: has no test images")


class _CorruptedImages(Dataset):
    """Test images with all their corrupted copies: (copies, C, H, W), the first as it is, then by kind and strength.

    Raises:
        UsageError, DataError: see `robustness`.
    """

    def __init__(self, data: Data, kinds: list[str], seed: int):
        check_corruptible(data)
        unknown = next((kind for kind in kinds if kind not in CORRUPTIONS), None)
        if unknown is not None:
            raise choose("corruptions", unknown, CORRUPTIONS)
        if not kinds:
            raise refused("corruptions", f"got none, expected some of {', '.join(CORRUPTIONS)}")
        self.images, self.kinds, self.seed = data.test, kinds, seed
        self.mean, self.std = (torch.tensor(values or ()).view(-1, 1, 1) for values in (data.mean, data.std))

    @property
    def copies(self) -> int:
        """Number of copies of an image, the one as it is included."""
        return 1 + STRENGTHS * len(self.kinds)

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, number: int) -> tuple[Tensor, Any]:
        image, target = self.images[number]
        pixels = (image * self.std + self.mean).clamp(0, 1)[None]
        corrupted = [
            corrupt(pixels, kind, strength, seed=self.seed, first=number)
            for kind in self.kinds
            for strength in range(1, STRENGTHS + 1)
        ]
        return torch.cat([image[None], (torch.cat(corrupted) - self.mean) / self.std]), target


@torch.no_grad()
def _right_answers(network: nn.Module, copies: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    """Number of right answers for each of the copies, from images (B, copies, C, H, W)."""
    count = copies.shape[1]
    layout: Any = {"memory_format": torch.channels_last} if settings.channels_last else {}
    answers = []
    for images in copies.flatten(0, 1).split(max(settings.batch_size, 1)):
        with autocast(images.device, settings.amp):
            answers.append(answers_of(logits_of(network(images.contiguous(**layout)))))
    return (torch.cat(answers).view(-1, count) == targets[:, None]).sum(0)


def _shares(counts: list[int], kinds: list[str], images: int) -> CorruptedAccuracy:
    clean, *others = [count / images for count in counts]
    strengths = [others[place : place + STRENGTHS] for place in range(0, len(others), STRENGTHS)]
    return CorruptedAccuracy(clean, dict(zip(kinds, strengths, strict=True)))


def write_robustness(robustness: Robustness, folder: Path) -> None:
    """Write the results as robustness.json, and their picture as robustness.png.

    Raises:
        ArtifactError: a file cannot be written.
        UsageError: matplotlib is not installed.
    """
    results = robustness.to_json()
    write_text(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    plot_robustness(results["networks"], robustness.chance, folder / "robustness.png")


def read_robustness(artifact: Path) -> dict[str, Any] | None:
    """The results that `write_robustness` wrote beside an artifact, or in the folder of its run.

    Args:
        artifact: the folder of the artifact.

    Returns:
        As `Robustness.to_json`; None if there are none that are newer than the artifact, and whole.
    """
    tensors = artifact / TENSORS
    for file in (artifact / RESULTS, artifact.resolve().parent / RESULTS):
        if tensors.is_file() and file.is_file() and file.stat().st_mtime >= tensors.stat().st_mtime:
            try:
                results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
                if results["networks"]:
                    return results
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return None


# --------------------------------------------------------------------------------------------- the original, its rival


class ContrastStandardized(nn.Module):
    """A network behind per-image contrast standardisation.

    The standard deviation of each picture, pooled over its channels, becomes that of the training set; the mean of each
    channel stays. A picture of one colour stays as it is.

    Args:
        network: takes images (B, C, H, W).
        deviation: of a picture of the training set, as `contrast_of` measures it.
    """

    def __init__(self, network: nn.Module, deviation: float):
        super().__init__()
        self.network, self.deviation = network, deviation

    def forward(self, images: Tensor) -> Any:
        mean = images.mean((2, 3), keepdim=True)
        deviations = deviations_of(images)
        # One colour, but for rounding: there is no contrast to amplify.
        factors = torch.where(deviations > 1e-4 * self.deviation, self.deviation / deviations, 1.0)
        return self.network(mean + (images - mean) * factors[:, None, None, None])


def contrast_of(data: Data) -> float:
    """The mean standard deviation of a training image around the means of its channels, over up to 1,024 of them."""
    deviations = [deviations_of(images) for images in training_images(data, MEASURED)]
    return float(torch.cat(deviations).mean())


def deviations_of(images: Tensor) -> Tensor:
    """The standard deviation of each image around the means of its channels, of shape (B,)."""
    return images.var((2, 3), correction=0).mean(1).sqrt()


def rival_of(original: nn.Module, data: Data) -> nn.Module:
    """The original behind contrast standardisation."""
    return ContrastStandardized(original, contrast_of(data))


def open_original(spec: str, data: Data, *, weights: Path | None = None, factory: str | None = None) -> nn.Module:
    """The trained network to compare with, built for the classes and channels of `data`.

    Args:
        spec: a model as `open_model` takes it, or an artifact.
        weights: checkpoint of a model by name; default: the library's pretrained weights.
        factory: builder of the plain model that an artifact was made of.

    Raises:
        UsageError: no such model, or one without trained weights.
        ArtifactError: as `open_model`.
    """
    if is_saved(spec):
        if weights is not None:
            raise refused("against_weights", f"does not go with the artifact {spec}, which has its own")
        return open_model(spec, SourceOptions(factory=factory))
    if weights is None and ":" in spec and not spec.startswith("torchvision:"):
        raise refused("against", f"{spec} needs {option('against_weights')}, its trained weights")
    pretrained = weights is None
    sized: dict[str, Any] = {}
    if accepts(spec, "num_classes"):
        sized["num_classes"] = len(data.classes)
    if data.image_size[0] != 3 and accepts(spec, "in_chans"):
        sized["in_chans"] = data.image_size[0]
    model = open_model(spec, SourceOptions(pretrained=pretrained, weights=weights, **sized))
    check_trained(model, data, "against", "against_weights")
    return model

"""Evaluation: the accuracy of a network on images that it was not trained on."""

import json
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sphereify.annotations import TRAINING_RECORD
from sphereify.convert.finite import answers_of, first_bad_layer
from sphereify.datasets import Data
from sphereify.errors import DataError, TrainingError
from sphereify.files import write_text
from sphereify.nn.modules import check_module
from sphereify.plots import plot_confusion
from sphereify.training.checks import check_arguments, check_classes, check_record
from sphereify.training.distributed import Processes
from sphereify.training.loader import make_loader, on_device, test_batches
from sphereify.training.objective import logits_of
from sphereify.training.settings import Settings


@dataclass(frozen=True)
class Evaluation:
    """Results of a test on held-out images."""

    top1: float
    """Share of the images, in [0, 1], whose class has the highest score, which must be finite."""
    top5: float
    """Share of the images, in [0, 1], whose class is among the five highest scores; 1 for fewer than six classes."""
    confusion: Tensor
    """Counts of shape (classes, classes): true class in rows, predicted class in columns."""
    images: int
    """Number of images that were tested."""
    images_per_second: float
    """Speed, with loading, over all processes."""
    skipped: int
    """Number of images that could not be read."""
    unanswered_by_class: tuple[int, ...] = ()
    """Number of images of each class whose highest score is not finite, which are not in `confusion`; empty: none."""

    @property
    def unanswered(self) -> int:
        """Number of images whose highest score is not finite."""
        return sum(self.unanswered_by_class)

    @property
    def by_class(self) -> Tensor:
        """Number of images of each class."""
        return self.confusion.sum(1) + torch.tensor(self.unanswered_by_class or 0)

    @property
    def per_class(self) -> list[float]:
        """Accuracy of each class in [0, 1]; NaN where there was no image."""
        shares = self.confusion.diagonal().double() / self.by_class
        return shares.tolist()  # type: ignore[no-any-return]

    def not_finite(self) -> str:
        """A sentence on the images without a finite score."""
        return f"the scores of {self.unanswered} of {self.images} images are not finite, which counts as wrong"


def evaluate(model: nn.Module, data: Data, settings: Settings | None = None) -> Evaluation:
    """Test a model on the held-out part of `data`; it is moved to the device of `settings` and left in eval mode.

    Args:
        model: converted or not; returns logits (B, classes).
        data: from `sphereify.datasets.load_data`.
        settings: only batch_size, workers, device, amp, channels_last and strict are used.

    Raises:
        DataError: no test images, images that the model does not take, another number of classes, or other classes
            than those that the record of a loaded artifact names.
        TrainingError: not one image has a finite score.
        ArgumentTypeError: a model that is no module, or data or settings of another type.
    """
    check_arguments(model, data, settings)
    settings = settings or Settings()
    if not len(data.test):  # type: ignore[arg-type]
        raise DataError(f"{data.name}: has no test images")
    check_record(TRAINING_RECORD.of(model), data)
    check_classes(model, data)
    alone = Processes(0, 1, settings.chosen_device)
    layout: Any = {"memory_format": torch.channels_last} if settings.channels_last else {}
    model.to(alone.device, **layout)
    loader = make_loader(data.test, test_batches(data, settings, alone), settings, alone.device)
    return score(model, loader, alone, settings, data)


@torch.no_grad()
def score(model: nn.Module, loader: DataLoader, processes: Processes, settings: Settings, data: Data) -> Evaluation:
    """Test a model over a loader of `make_loader`; each process takes its share, and all get the whole result.

    Raises:
        DataError: not one image could be read.
        TrainingError: not one image has a finite score.
    """
    device = processes.device
    model.eval()
    classes = len(data.classes)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    top5 = torch.zeros((), dtype=torch.int64, device=device)
    unanswered = torch.zeros(classes, dtype=torch.int64, device=device)
    placed = None
    skipped, began = 0, time.monotonic()
    for batch in loader:
        skipped += batch[1]
        placed = on_device(batch, device, settings.channels_last)
        if placed is None:
            if settings.fsdp:  # the others wait for this process's part of the weights
                model(torch.zeros(1, *data.image_size, device=device))
            continue
        images, targets = placed
        with autocast(device, settings.amp):
            logits = logits_of(model(images))
        answers = answers_of(logits)
        has_answer = answers >= 0
        # Without an index that depends on values, for which a GPU would have to be waited.
        cells = torch.where(has_answer, targets * classes + answers, classes * classes)
        confusion += torch.bincount(cells, minlength=classes * classes + 1)[:-1]
        unanswered += torch.bincount(torch.where(has_answer, classes, targets), minlength=classes + 1)[:-1]
        top5 += ((logits.topk(min(5, classes), 1).indices == targets[:, None]) & has_answer[:, None]).sum()
    counts = processes.sum(torch.cat([confusion, unanswered, top5[None], top5.new_tensor([skipped])]))
    seconds = max(time.monotonic() - began, 1e-9)
    table = counts[: classes**2].view(classes, classes).cpu()
    without = tuple(counts[classes**2 : -2].tolist())
    count = int(table.sum()) + sum(without)
    if not count:
        raise DataError(f"{data.name}: not one of its test images could be read")
    if count == sum(without):
        layer = first_bad_layer(model, None if placed is None else placed[0])
        raise TrainingError(
            f"{data.name}: the scores of all {count} test images are not finite; the first layer with a value that is "
            f"not finite is {layer}"
        )
    return Evaluation(
        top1=int(table.diagonal().sum()) / max(count, 1),
        top5=int(counts[-2]) / max(count, 1),
        confusion=table,
        images=count,
        images_per_second=count / seconds,
        skipped=int(counts[-1]),
        unanswered_by_class=without if any(without) else (),
    )


def write_evaluation(evaluation: Evaluation, classes: list[str], folder: Path) -> None:
    """Write the results as evaluation.json and the confusion matrix as confusion.png.

    Raises:
        ArtifactError: a file cannot be written.
        UsageError: matplotlib is not installed.
    """
    shares = [None if math.isnan(share) else share for share in evaluation.per_class]
    results = {
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "images": evaluation.images,
        "skipped": evaluation.skipped,
        "not_finite": evaluation.unanswered,
        "images_per_second": evaluation.images_per_second,
        "classes": classes,
        "per_class": shares,
        "confusion": evaluation.confusion.tolist(),
    }
    write_text(folder / "evaluation.json", json.dumps(results, indent=1) + "\n")
    plot_confusion(evaluation.confusion, classes, folder / "confusion.png")


def autocast(device: torch.device, amp: str) -> Any:
    """The context of half precision that `Settings.amp` names."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtypes[amp]) if amp in dtypes else nullcontext()


def accuracy(model: nn.Module, loader: DataLoader, device: torch.device | str = "cpu") -> float:
    """The share of correct answers, in [0, 1], over any loader of (images, targets); the model is left in eval mode."""
    check_module(model)
    model.eval()
    correct = count = 0
    with torch.no_grad():
        for images, targets in loader:
            correct += int((answers_of(logits_of(model(images.to(device)))).cpu() == targets).sum())
            count += len(targets)
    return correct / count

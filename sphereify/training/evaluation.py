"""How good a network is on images that it has not seen."""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sphereify.datasets import Data
from sphereify.errors import DataError
from sphereify.training.distributed import Processes
from sphereify.training.loader import Batches, make_loader, on_device
from sphereify.training.objective import logits_of
from sphereify.training.settings import Settings


@dataclass(frozen=True)
class Evaluation:
    """What a test on held-out images gave; shares in [0, 1]."""

    top1: float
    top5: float
    """Whether the right class is among the five best; of fewer than six classes it always is."""
    confusion: Tensor
    """Counts of shape (classes, classes): the right class in rows, the answer in columns."""
    images: int
    images_per_second: float
    skipped: int
    """Images that could not be read."""

    @property
    def per_class(self) -> list[float]:
        """Accuracy of each class; not a number where there was no image."""
        right = self.confusion.diagonal().double() / self.confusion.sum(1)
        return right.tolist()  # type: ignore[no-any-return]


def evaluate(model: nn.Module, data: Data, settings: Settings | None = None) -> Evaluation:
    """Test a model on the held-out part of `data`; it is moved to the device of `settings` and left in eval mode.

    Args:
        model: converted or not; returns logits (B, classes).
        data: from `sphereify.datasets.load_data`.
        settings: batch_size, workers, device, amp, channels_last and strict count here.

    Raises:
        DataError: the model has another number of classes than the data.
    """
    from sphereify.training.run import check_classes

    settings = settings or Settings()
    device = settings.chosen_device
    layout: Any = {"memory_format": torch.channels_last} if settings.channels_last else {}
    model.to(device, **layout)
    check_classes(model, data, device)
    batches = Batches(len(data.test), settings.batch_size, seed=None)  # type: ignore[arg-type]
    if not len(data.test):  # type: ignore[arg-type]
        raise DataError(f"{data.name}: has no test images")
    return score(model, make_loader(data.test, batches, settings, device), Processes(0, 1, device), settings, data)


@torch.no_grad()
def score(model: nn.Module, loader: DataLoader, processes: Processes, settings: Settings, data: Data) -> Evaluation:
    """As `evaluate`, over a loader of this package, whose share each process takes."""
    device = processes.device
    model.eval()
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    autocast = torch.autocast(device.type, kinds[settings.amp]) if settings.amp in kinds else nullcontext()
    classes = len(data.classes)
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
    among = torch.zeros((), dtype=torch.int64, device=device)
    skipped, began = 0, time.monotonic()
    for batch in loader:
        skipped += batch[1]
        placed = on_device(batch, device, settings.channels_last)
        if placed is None:
            if settings.fsdp:  # the others wait for this process's part of the weights
                model(torch.zeros(1, *data.image_size, device=device))
            continue
        images, targets = placed
        with autocast:
            logits = logits_of(model(images))
        confusion += torch.bincount(targets * classes + logits.argmax(1), minlength=classes * classes)
        among += (logits.topk(min(5, classes), 1).indices == targets[:, None]).sum()
    counts = processes.sum(torch.cat([confusion, among[None], among.new_tensor([skipped])]))
    seconds = max(time.monotonic() - began, 1e-9)
    table = counts[:-2].view(classes, classes).cpu()
    count = int(table.sum())
    if not count:
        raise DataError(f"{data.name}: not one of its test images could be read")
    return Evaluation(
        top1=int(table.diagonal().sum()) / max(count, 1),
        top5=int(counts[-2]) / max(count, 1),
        confusion=table,
        images=count,
        images_per_second=count / seconds,
        skipped=int(counts[-1]),
    )


def accuracy(model: nn.Module, loader: DataLoader, device: torch.device | str = "cpu") -> float:
    """The share of right answers in [0, 1] over any loader of (images, targets); the model is left in eval mode."""
    model.eval()
    right = count = 0
    with torch.no_grad():
        for images, targets in loader:
            right += int((logits_of(model(images.to(device))).argmax(1).cpu() == targets).sum())
            count += len(targets)
    return right / count

"""A small training loop: AdamW, cosine schedule with a warm-up, accuracy after each epoch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sphereify.errors import DataError, TrainingError, UsageError, first_line
from sphereify.finetune.groups import param_groups
from sphereify.finetune.objective import Objective, Terms
from sphereify.sources import Data


@dataclass(frozen=True)
class Settings:
    """How to train."""

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    """Peak learning rate of AdamW; reached after a tenth of all steps, then down to 0 along a cosine."""
    weight_decay: float = 0.05
    """On plain weights only; angular ones have no length to decay."""
    seed: int = 0
    workers: int = 0
    device: str = "auto"
    terms: Terms = field(default_factory=Terms)
    """What is minimised."""

    def __post_init__(self) -> None:
        for name, lowest in {"epochs": 1, "batch_size": 1, "workers": 0, "weight_decay": 0}.items():
            if getattr(self, name) < lowest:
                raise UsageError(f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected at least {lowest}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise UsageError(f"--lr: got {self.lr}, expected a number above 0; a usual value is 1e-3")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(
                f"--device: got {self.device!r}, but torch sees no CUDA device. Leave it out, or take 'cpu'."
            )

    @property
    def chosen_device(self) -> torch.device:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        if name.startswith("meta"):
            raise UsageError("--device: got 'meta', which holds no values; take 'cpu' or 'cuda'")
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise UsageError(f"--device: got {name!r}: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class Epoch:
    """What one pass over the data gave."""

    number: int
    loss: float
    """Mean training loss."""
    accuracy: float
    """On the held-out part, in [0, 1]."""


def finetune(
    model: nn.Module,
    data: Data,
    settings: Settings | None = None,
    *,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:
    """Train `model` in place on `data` with the loss of its head; it ends in eval mode on the device it was trained on.

    Args:
        model: returns logits of shape (B, classes) for images (B, C, H, W).
        data: from `sphereify.sources.load_data`.
        settings: default: `Settings()`.
        on_step: called after each step with its number (from 1), the number of all steps, and the loss.
        on_epoch: called after each epoch.

    Raises:
        DataError: the model has another number of classes than the data.
        TrainingError: the loss is not finite; the model is then not usable.
    """
    settings = settings or Settings()
    torch.manual_seed(settings.seed)
    device = settings.chosen_device
    model.to(device)
    alone = len(data.train) % settings.batch_size == 1 < len(data.train)  # type: ignore[arg-type]
    train = DataLoader(  # type: ignore[var-annotated]
        data.train,
        settings.batch_size,
        shuffle=True,
        num_workers=settings.workers,
        drop_last=alone and settings.batch_size > 1,  # BatchNorm cannot train on a single image
    )
    test = DataLoader(data.test, settings.batch_size, num_workers=settings.workers)  # type: ignore[var-annotated]
    _check_classes(model, data, device)

    objective = Objective(model, settings.terms).to(device)
    optimizer = torch.optim.AdamW(param_groups(model, settings.weight_decay), lr=settings.lr)
    steps = settings.epochs * len(train)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(steps))
    history: list[Epoch] = []
    step = 0
    for number in range(1, settings.epochs + 1):
        model.train()
        total, count = 0.0, 0
        for images, targets in train:
            loss = objective(model(images.to(device)), targets.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            total += _finite(loss, step) * len(targets)
            count += len(targets)
            on_step(step, steps, loss.item())
        epoch = Epoch(number, total / count, accuracy(model, test, device))
        history.append(epoch)
        on_epoch(epoch)
    return history


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader, device: torch.device | str = "cpu") -> float:
    """The share of right answers in [0, 1]; the model is left in eval mode."""
    model.eval()
    right = count = 0
    for images, targets in loader:
        right += int((model(images.to(device)).argmax(1).cpu() == targets).sum())
        count += len(targets)
    return right / count


def _check_classes(model: nn.Module, data: Data, device: torch.device) -> None:
    """One image through the model, before any time is spent."""
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(1, *data.image_size, device=device))
    except Exception as error:  # a model may refuse a size in its own way
        raise DataError(
            f"the model does not take images of {' × '.join(map(str, data.image_size))} (channels, height, width): "
            f"{first_line(error)}. Try another --img-size."
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise DataError(f"the model returns {type(logits).__name__}, expected logits of shape (batch, classes)")
    if logits.shape[1] != len(data.classes):
        raise DataError(
            f"the model has {logits.shape[1]} classes, {data.name} has {len(data.classes)}: convert it again with "
            f"--num-classes {len(data.classes)}"
        )


def _warm_cosine(steps: int) -> Callable[[int], float]:
    warm = max(1, steps // 10)
    return lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _finite(loss: Tensor, step: int) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingError(f"the loss is {value} at step {step}. Try a smaller --lr.")
    return value

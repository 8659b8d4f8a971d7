"""Results of training: after each step, after each epoch, and of the whole run."""

import statistics
from dataclasses import dataclass, field

from sphereify.sources import versions
from sphereify.training.settings import Settings


@dataclass(frozen=True)
class Step:
    """The progress of a run after an optimizer step."""

    number: int
    """Optimizer steps so far."""
    steps: int
    """Optimizer steps of the whole run."""
    epoch: int
    """Number of the present epoch, from 1."""
    loss: float
    """Training loss of the last batch."""
    lr: float
    """Learning rate of the first parameter group."""
    images_per_second: float
    """Training speed within this epoch, over all processes."""


@dataclass(frozen=True)
class Epoch:
    """Measurements of an epoch: one pass over the data, or `Settings.epoch_batches`."""

    number: int
    """Number of the epoch, from 1."""
    loss: float
    """Mean training loss."""
    accuracy: float
    """Accuracy on the test images, in [0, 1]; that of the moving average of the weights, if there is one."""
    lr: float = 0.0
    """Learning rate of the first parameter group at the last step."""
    images_per_second: float = 0.0
    """Training speed, over all processes."""
    skipped: int = 0
    """Number of images, of training and test together, that could not be read."""
    step: int = 0
    """Optimizer steps until the end of this epoch."""
    k: dict[str, float] = field(default_factory=dict)
    """Mean of the learned k of each layer that has one."""
    radius: dict[str, float] = field(default_factory=dict)
    """Learned radius ρ of each layer that has one."""
    energy: dict[str, float] = field(default_factory=dict)
    """Hyperspherical energy of each layer."""
    morph: float = 1.0
    """Share of the way from the original network to its conversion; 1 without `Settings.morph`."""


@dataclass(frozen=True)
class Result:
    """All epochs of a run."""

    epochs: list[Epoch]
    peak_memory: int | None
    """Largest memory in bytes on the GPU; None on a CPU."""

    @property
    def best(self) -> Epoch:
        """The first epoch of the highest accuracy, of those in which the network was what it was to become."""
        return max(self.epochs, key=lambda epoch: (epoch.morph == 1, epoch.accuracy, -epoch.number))

    @property
    def accuracy(self) -> float:
        """Accuracy after the last epoch, in [0, 1]."""
        return self.epochs[-1].accuracy


@dataclass(frozen=True)
class Summary:
    """A run that is complete, as its summary.json tells it."""

    data: str
    """Name of the data set."""
    epochs: int
    """Number of epochs."""
    accuracy: float
    """Accuracy after the last epoch, in [0, 1]."""
    best_epoch: int
    """Number of the best epoch, from 1; see `Result.best`."""
    best_accuracy: float
    """Accuracy after the best epoch."""
    peak_memory: int | None
    """Largest memory in bytes on the GPU; None on a CPU."""
    images_per_second: float
    """Training speed: the mean over the epochs."""
    settings: Settings
    versions: dict[str, str]
    """Versions of the libraries with which the run ended."""

    @classmethod
    def of(cls, result: Result, data: str, settings: Settings) -> "Summary":
        """The summary of a run on a data set of this name."""
        return cls(
            data=data,
            epochs=len(result.epochs),
            accuracy=result.accuracy,
            best_epoch=result.best.number,
            best_accuracy=result.best.accuracy,
            peak_memory=result.peak_memory,
            images_per_second=statistics.mean(epoch.images_per_second for epoch in result.epochs),
            settings=settings,
            versions=versions(),
        )

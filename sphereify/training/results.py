"""Results of training: after each step, after each epoch, and of the whole run."""

from dataclasses import dataclass, field


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

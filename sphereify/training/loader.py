"""Batches that do not depend on how often a run was interrupted, or on how many processes load them."""

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from sphereify.datasets import Data
from sphereify.errors import DataError, first_line
from sphereify.training.distributed import Processes
from sphereify.training.settings import Settings

Key = tuple[int, int]
"""Number of a pass over all images, and index of an image."""


class Batches(Sampler[list[Key]]):
    """The order of images: shuffled anew for each pass or as they are, from some batch on, this process's share.

    A batch of all processes together is a contiguous part of the order, so that two processes see the same images as
    one with batches of double size.

    Args:
        length: number of images.
        batch_size: images per batch on each process.
        seed: random seed of the order; None: images come as they are.
        rank, world: number of this process, and of all processes.
        epoch_batches: batches of an epoch, which then begins where the one before it ended; None: one pass.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int | None,
        rank: int = 0,
        world: int = 1,
        epoch_batches: int | None = None,
    ):
        super().__init__()
        self.length, self.batch_size, self.seed, self.rank, self.world = length, batch_size, seed, rank, world
        self.epoch_batches = epoch_batches
        self.epoch = 0
        self.start = 0
        """Batches of this epoch that are done."""

    def __iter__(self) -> Iterator[list[Key]]:
        whole = self.batch_size * self.world
        order, ordered = torch.empty(0), None
        for number in range(self.epoch * len(self) + self.start, (self.epoch + 1) * len(self)):
            passed, place = divmod(number, self._of_a_pass)
            if passed != ordered:
                order, ordered = self._order(passed), passed
            mine = order[place * whole : (place + 1) * whole][self.rank :: self.world]
            yield [(passed, index) for index in mine.tolist()]

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.epoch_batches or self._of_a_pass

    def steps(self, accumulate: int) -> int:
        """Optimizer steps in an epoch, where the gradients of `accumulate` batches make one."""
        return math.ceil(len(self) / accumulate)

    @property
    def _of_a_pass(self) -> int:
        """Batches in a pass over all images. In training a last, smaller one is left out: its gradient is noisier."""
        whole = self.batch_size * self.world
        rounded = self.length // whole
        return rounded if self.seed is not None and rounded else -(-self.length // whole)

    def _order(self, passed: int) -> Tensor:
        if self.seed is None:
            return torch.arange(self.length)
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(self.seed * 100_003 + passed))


class _Seeded(Dataset):
    """Images by (pass, index), with augmentation drawn from the seed and the key alone."""

    def __init__(self, images: Dataset, seed: int, strict: bool):
        self.images, self.seed, self.strict = images, seed, strict

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            return [self._one(*key) for key in keys]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def _one(self, passed: int, index: int) -> Any:
        """An image and its class; if it cannot be read, None, or the error where settings are strict."""
        mixed = (self.seed * 1_000_003 + passed) * 16_777_619 + index
        torch.default_generator.manual_seed(mixed % 2**63)  # torch.manual_seed would turn to GPUs, too, which is slow
        random.seed(mixed)
        np.random.seed(mixed % 2**32)
        try:
            return self.images[index]
        except (DataError, OSError) as error:
            unreadable = error if isinstance(error, DataError) else DataError(f"image {index}: {first_line(error)}")
            return unreadable if self.strict else None  # an error raised in a worker would come with its traceback


def _collate(items: list[Any]) -> tuple[Any, int]:
    """A batch and the number of its unreadable images.

    In place of the batch stands None if no image could be read, or the error that ends the run.
    """
    errors = [item for item in items if isinstance(item, DataError)]
    if errors:
        return errors[0], len(errors)
    read = [item for item in items if item is not None]
    return (default_collate(read) if read else None), len(items) - len(read)


def training_batches(data: Data, settings: Settings, processes: Processes) -> Batches:
    """This process's share of the training images, in an order that the seed decides."""
    return Batches(
        len(data.train),  # type: ignore[arg-type]
        settings.batch_size,
        seed=settings.seed,
        rank=processes.rank,
        world=processes.world,
        epoch_batches=settings.epoch_batches,
    )


def test_batches(data: Data, settings: Settings, processes: Processes) -> Batches:
    """This process's share of the test images, in their own order."""
    return Batches(
        len(data.test),  # type: ignore[arg-type]
        settings.batch_size,
        seed=None,
        rank=processes.rank,
        world=processes.world,
    )


def make_loader(images: Dataset, batches: Batches, settings: Settings, device: torch.device) -> DataLoader:
    """A loader over `batches`, whose `epoch` and `start` may be set between two passes."""
    return DataLoader(
        _Seeded(images, settings.seed, settings.strict),
        batch_sampler=batches,
        num_workers=settings.workers,
        collate_fn=_collate,
        persistent_workers=settings.workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else each pass would draw from the generator that dropout uses
    )


def on_device(batch: tuple[Any, int], device: torch.device, channels_last: bool) -> tuple[Tensor, Tensor] | None:
    """Images and targets of a batch on the device of the model; None if no image could be read.

    Raises:
        DataError: an image that could not be read ends the run.
    """
    if isinstance(batch[0], DataError):
        raise batch[0]
    if batch[0] is None:
        return None
    images, targets = batch[0]
    images = images.to(device, non_blocking=True)
    if channels_last and images.dim() == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    return images, targets.to(device, non_blocking=True)

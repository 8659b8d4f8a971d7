"""Training images that are harder to learn from: few of some classes, or some under a wrong label."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset, Subset

from sphereify.class_splits import targets_of
from sphereify.datasets import Data


def with_few_images(data: Data, classes: Collection[str], share: float) -> Data:
    """The data with only a share of the training images of some classes, the first ones; at least one image of each."""
    targets = torch.tensor(targets_of(data.train))
    kept = torch.ones(len(targets), dtype=torch.bool)
    for name in classes:
        rows = (targets == data.classes.index(name)).nonzero().flatten()
        kept[rows[max(1, round(share * len(rows))) :]] = False
    train = Subset(data.train, kept.nonzero().flatten().tolist())
    return replace(data, name=f"{data.name}, {share:g} of {', '.join(classes)}", train=train)


def with_label_noise(data: Data, share: float, seed: int) -> Data:
    """The data with new labels for a share of the training images, chosen and drawn at random.

    A new label is drawn from all classes, so that one of C images keeps its own by chance; tests keep theirs.

    Args:
        share: in [0, 1].
        seed: random seed of the choice and of the labels.
    """
    targets = torch.tensor(targets_of(data.train))
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(targets), generator=draw)[: round(share * len(targets))]
    targets[rows] = torch.randint(len(data.classes), (len(rows),), generator=draw)
    train = Relabelled(data.train, targets.tolist())
    return replace(data, name=f"{data.name}, {share:g} relabelled with seed {seed}", train=train)


class Relabelled(Dataset):
    """Images with labels of their own."""

    def __init__(self, images: Any, targets: list[int]):
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Any, int]:
        return self.images[row][0], self.targets[row]

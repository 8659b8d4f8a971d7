"""Splits of a data set by its classes: some are left out of training, and serve to test features on classes that a
network has never seen."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from sphereify.datasets import Data, with_transform_of
from sphereify.errors import DataError, invalid

LEAST = 2
"""Smallest number of classes on either side of a split: one alone has nothing to be told apart from."""


def choose_classes(classes: Sequence[str], count: int, seed: int | None = None) -> tuple[str, ...]:
    """The classes to leave out, in their order; the same ones each time.

    Args:
        classes: names of all classes.
        count: number of classes to leave out, ≥ 2; at least two classes must stay.
        seed: random seed of the choice; None: the last classes.

    Raises:
        UsageError: fewer than two classes to leave out, or fewer than two that stay.

    >>> choose_classes("abcdef", 2)
    ('e', 'f')
    """
    check_count(len(classes), count)
    if seed is None:
        return tuple(classes[-count:])
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    return tuple(classes[place] for place in sorted(order[:count].tolist()))


def check_count(classes: int, count: int) -> None:
    """Make sure that so many of the classes can be left out.

    Raises:
        UsageError: fewer than two classes to leave out, or fewer than two that stay.
    """
    if not LEAST <= count <= classes - LEAST:
        raise invalid(
            "hold_out_classes",
            count,
            f"2 to {classes - LEAST}, which leaves two or more of the {classes} classes"
            if classes >= 2 * LEAST
            else f"data of at least four classes, of which two stay; there are {classes}",
        )


def without_classes(data: Data, held_out: Iterable[str]) -> Data:
    """The data without the images of some classes; the others are numbered anew, in their order.

    Raises:
        DataError: a class that the data does not have.
    """
    left_out = _in_class_order(data, held_out)
    remaining = [name for name in data.classes if name not in left_out]
    return dataclasses.replace(
        data,
        name=f"{data.name} without {len(left_out)} classes",
        train=_of_classes(data.train, data, remaining),
        test=_of_classes(data.test, data, remaining),
        classes=remaining,
        held_out=left_out,
    )


def only_classes(data: Data, classes: Iterable[str]) -> Data:
    """All images of some classes, those for training and those for tests, as test images; there are no others.

    Raises:
        DataError: a class that the data does not have, or not one image of them.
    """
    chosen = _in_class_order(data, classes)
    parts = [_of_classes(part, data, chosen) for part in (with_transform_of(data.train, data.test), data.test)]
    parts = [part for part in parts if len(part)]
    if not parts:
        raise DataError(f"{data.name}: has no images of the classes {', '.join(chosen[:5])}")
    name = f"{data.name}, {len(chosen)} held-out classes"
    test: Any = parts[0] if len(parts) == 1 else ConcatDataset(parts)
    return dataclasses.replace(data, name=name, train=_Nothing(), test=test, classes=list(chosen))


def _in_class_order(data: Data, names: Iterable[str]) -> tuple[str, ...]:
    """The names in the order of the classes."""
    chosen = list(names)
    unknown = sorted({*chosen} - {*data.classes})
    if unknown:
        raise DataError(f"{data.name}: has no class {', '.join(unknown[:5])} to hold out")
    return tuple(name for name in data.classes if name in chosen)


class _Nothing(Dataset):
    """No images."""

    def __len__(self) -> int:
        return 0


class ClassSubset(Subset):
    """The images of some classes, with other numbers for these.

    Args:
        images: labelled images.
        rows: those to take.
        numbers: the new number of each class that they have.
    """

    def __init__(self, images: Any, rows: list[int], numbers: dict[int, int]):
        super().__init__(images, rows)
        self.numbers = numbers

    def __getitem__(self, index: Any) -> Any:
        image, target = super().__getitem__(index)
        return image, self.numbers[int(target)]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


def _of_classes(images: Any, data: Data, names: Sequence[str]) -> Any:
    numbers = {data.classes.index(name): place for place, name in enumerate(names)}
    rows = [row for row, target in enumerate(targets_of(images)) if target in numbers]
    return ClassSubset(images, rows, numbers)


def targets_of(images: Any) -> list[int]:
    """The classes of all images, without reading the images where the data set says them.

    An image that must be read for its class, and cannot be, has the class −1.
    """
    if isinstance(images, ConcatDataset):
        return [target for part in images.datasets for target in targets_of(part)]
    if isinstance(images, Subset):
        whole = targets_of(images.dataset)
        numbers = getattr(images, "numbers", None)
        return [whole[row] if numbers is None else numbers.get(whole[row], -1) for row in images.indices]
    for listed in _listed_targets(images):
        if len(listed) == len(images) and _is_right(images, listed):
            return [int(target) for target in listed]
    return [_target_by_reading(images, row) for row in range(len(images))]


def _target_by_reading(images: Any, row: int) -> int:
    """The class of an image; −1, which is that of none, if the image cannot be read."""
    try:
        return int(images[row][1])
    except (DataError, OSError):
        return -1


def _listed_targets(images: Any) -> Iterable[Any]:
    """Lists in which data sets of torch, torchvision and timm may have the classes of their images."""
    if isinstance(images, TensorDataset):
        yield images.tensors[1]
    for holder in (images, getattr(images, "reader", None)):
        for name in ("targets", "labels", "_labels"):
            if hasattr(getattr(holder, name, None), "__len__"):
                yield getattr(holder, name)
        for name in ("samples", "_samples"):
            samples = getattr(holder, name, None)
            if isinstance(samples, list) and all(isinstance(one, (tuple, list)) and len(one) > 1 for one in samples):
                yield [one[1] for one in samples]
        table, column = getattr(holder, "dataset", None), getattr(holder, "label_key", None)
        if column is not None and column in getattr(table, "column_names", ()):
            yield table[column]  # type: ignore[index]


def _is_right(images: Any, listed: Any) -> bool:
    """True if the first and the last image have the classes that a list says; one that cannot be read is left out."""
    for row in {0, len(listed) - 1} if len(listed) else ():
        try:
            if int(images[row][1]) != int(listed[row]):
                return False
        except (DataError, OSError):
            continue
        except (TypeError, ValueError):
            return False
    return True

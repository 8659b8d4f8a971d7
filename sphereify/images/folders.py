"""Folders of images: their parts for training and testing, their classes, and the files in them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sphereify.errors import DataError

TRAIN, HELD_OUT = "train", ("val", "test", "validation")
"""Names of the folder of training images, and of that of test images; of several, the first counts."""


def open_parts(
    folder: Path, moves: list[Any], open_image: Callable[[str], Any], *, test_only: bool = False
) -> tuple[Any, Any]:
    """The training and the test images of a folder, as labelled data sets.

    Args:
        folder: with train/ and val/ (or test/), which hold one folder of images per class.
        moves: the transforms of training and of test images.
        open_image: opens a file.
        test_only: be content with test images, in val/ (or test/) or in the folder itself; the training images are then
            an empty list.

    Raises:
        DataError: a part or a class is missing or empty, or the parts differ in classes.
    """
    held_out = next((folder / name for name in HELD_OUT if (folder / name).is_dir()), None)
    has_training = (folder / TRAIN).is_dir()
    if test_only and held_out is None and not has_training and _is_part(folder):
        held_out = folder
    if held_out is None or not (has_training or test_only):
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        parts = "val/ (or test/)" if test_only else "train/ and val/ (or test/)"
        raise DataError(f"data {str(folder)!r}: expected {parts} inside, found {names}")
    train: Any = _open_part(folder / TRAIN, moves[0], open_image) if has_training else []
    test = _open_part(held_out, moves[1], open_image)
    if not has_training:
        return train, test
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"data {str(folder)!r}: {TRAIN}/ and {held_out.name}/ differ in classes: {', '.join(odd[:5])}")
    return train, test


def _open_part(folder: Path, transform: Any, open_image: Callable[[str], Any]) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(folder), transform=transform, loader=open_image)
    except FileNotFoundError as error:
        raise DataError(
            f"data {str(folder)!r}: {str(error).splitlines()[0]}. Expected one folder a class with images in it."
        ) from error


def _is_part(folder: Path) -> bool:
    """True if each folder in a folder has images of its own."""
    inside = [entry for entry in folder.iterdir() if entry.is_dir()]
    return bool(inside) and all(any(map(is_image, entry.iterdir())) for entry in inside)


def classes_in(folder: Path) -> list[str] | None:
    """The classes of a folder by the names in it, without looking for images; None if it has no folder train/."""
    if not (folder / TRAIN).is_dir():
        return None
    return sorted(entry.name for entry in (folder / TRAIN).iterdir() if entry.is_dir())


def image_files(folder: Path) -> list[Path]:
    """The images in a folder at any depth, in order; if it has a folder train/, only those in there.

    Links to folders are followed, but not into a folder that holds them.

    Raises:
        DataError: there are none.
    """
    return images_below(folder / TRAIN if (folder / TRAIN).is_dir() else folder)


def images_below(folder: Path) -> list[Path]:
    """The images in a folder at any depth, in order; links are followed as by `image_files`.

    Raises:
        DataError: there are none.
    """
    files = sorted(file for file in _files_below(folder, set()) if is_image(file))
    if not files:
        raise DataError(f"no images in {folder}, expected files such as *.jpg or *.png, at any depth")
    return files


def _files_below(folder: Path, seen: set[str]) -> Iterator[Path]:
    place = os.path.realpath(folder)
    if place in seen:  # a link to a folder above it
        return
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            yield from _files_below(entry, seen | {place})
        else:
            yield entry


def is_image(file: Path) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return file.suffix.lower() in IMG_EXTENSIONS

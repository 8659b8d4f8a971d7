"""Folders of images with linked classes, and those that have test images only."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sphereify.datasets import class_count, load_data, load_images, training_images
from sphereify.errors import DataError


def paint(folder: Path, count: int = 2) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / f"{number}.png")


def test_linked_classes_are_seen_by_a_training_and_by_a_calibration(tmp_path):
    paint(tmp_path / "store" / "a", 5)
    for part in ("train", "val"):
        paint(tmp_path / "data" / part / "b", 3)
        (tmp_path / "data" / part / "a").symlink_to(tmp_path / "store" / "a")
    folder = tmp_path / "data"
    (folder / "train" / "b" / "up").symlink_to(folder / "train")  # which holds itself
    assert sum(map(len, load_images(str(tmp_path / "data" / "val"), 100, img_size=8))) == 8
    (folder / "train" / "a" / "deep").mkdir()
    (folder / "train" / "b" / "up").unlink()
    assert len(load_data(str(folder), img_size=8).train) == 8
    assert sum(map(len, load_images(str(folder), 100, img_size=8))) == 8
    assert class_count(str(folder)) == 2


def test_a_link_to_a_folder_above_ends_no_search_in_a_circle(tmp_path):
    paint(tmp_path / "photos" / "a", 3)
    (tmp_path / "photos" / "a" / "up").symlink_to(tmp_path / "photos")
    assert sum(map(len, load_images(str(tmp_path / "photos"), 100, img_size=8))) == 3


@pytest.mark.parametrize("part", ["test", "val", "validation", ""])
def test_test_images_alone_are_enough_for_a_test(tmp_path, part):
    for name in ("cat", "dog"):
        paint(tmp_path / part / name)
    data = load_data(tmp_path, img_size=8, test_only=True)
    assert (len(data.train), len(data.test), data.classes) == (0, 4, ["cat", "dog"])
    assert class_count(str(tmp_path), test_only=True) == 2
    with pytest.raises(DataError, match=r"expected train/ and val/ \(or test/\) inside"):
        load_data(str(tmp_path), img_size=8)
    with pytest.raises(DataError, match="has no training images"):
        training_images(data, 4)


def test_a_folder_of_data_sets_is_no_test_set(tmp_path):
    paint(tmp_path / "pets" / "test" / "cat")
    with pytest.raises(DataError, match=r"expected val/ \(or test/\) inside, found pets"):
        load_data(str(tmp_path), img_size=8, test_only=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected val/ \(or test/\) inside, found nothing"):
        load_data(str(tmp_path / "empty"), img_size=8, test_only=True)


def test_training_images_alone_are_not_enough_for_a_test(tmp_path):
    paint(tmp_path / "train" / "cat")
    with pytest.raises(DataError, match=r"expected val/ \(or test/\) inside, found train"):
        load_data(str(tmp_path), img_size=8, test_only=True)

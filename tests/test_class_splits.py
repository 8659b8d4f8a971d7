"""Splits by classes: deterministic, complete, with the right images and numbers on either side."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from sphereify.class_splits import choose_classes, only_classes, targets_of, without_classes
from sphereify.datasets import Data, choose_images, load_data, training_images
from sphereify.errors import DataError, UsageError

NAMES = list("abcdef")


def numbered(images: int = 24) -> Data:
    """Images whose pixels are 100 times their class plus their number; the classes take turns."""
    targets = torch.arange(images) % 6

    def part(first: int) -> TensorDataset:
        return TensorDataset((100.0 * targets + torch.arange(images) + first).view(-1, 1, 1, 1), targets)

    return Data("numbers", part(0), part(50), NAMES, (1, 1, 1))


def test_the_last_classes_are_chosen_or_those_of_a_seed():
    assert choose_classes(NAMES, 2) == ("e", "f")
    first = choose_classes(NAMES, 3, seed=7)
    assert first == choose_classes(NAMES, 3, seed=7)
    assert list(first) == sorted(first)
    assert len({choose_classes(NAMES, 3, seed=seed) for seed in range(8)}) > 4


@pytest.mark.parametrize("count", [1, 0, -1, 5, 6, 7])
def test_two_classes_must_be_on_either_side(count):
    with pytest.raises(UsageError, match=rf"hold_out_classes: got {count}, expected 2 to 4, .* 6 classes"):
        choose_classes(NAMES, count)


def test_data_of_three_classes_cannot_be_split():
    with pytest.raises(UsageError, match="at least four classes, of which two stay; there are 3"):
        choose_classes("abc", 2)


def test_the_sides_of_a_split_hold_each_image_once_with_its_class():
    data = numbered()
    kept, held_out = without_classes(data, "be"), only_classes(data, "be")
    assert (kept.classes, kept.held_out, held_out.classes) == (list("acdf"), ("b", "e"), list("be"))
    for side in (kept, held_out):
        for part in (side.train, side.test):
            for image, target in (part[i] for i in range(len(part))):
                assert NAMES[int(image) // 100] == side.classes[target]
    pixels = [
        int(image)
        for part in (kept.train, kept.test, held_out.test)
        for image, _ in (part[i] for i in range(len(part)))
    ]
    assert sorted(pixels) == sorted(int(image) for part in (data.train, data.test) for image, _ in part)
    assert len(held_out.train) == 0


def test_loaders_get_the_new_numbers_too():
    batches = DataLoader(without_classes(numbered(), "ab").train, 5)
    assert torch.cat([targets for _, targets in batches]).tolist() == [0, 1, 2, 3] * 4


def test_a_class_that_is_not_there_is_named():
    with pytest.raises(DataError, match="numbers: has no class x, z to hold out"):
        without_classes(numbered(), ["z", "a", "x"])


def test_a_choice_of_images_is_one_of_the_remaining_classes():
    data = choose_images(without_classes(numbered(), "ab"), "train", 7)
    assert targets_of(data.train) == [int(target) for _, target in (data.train[i] for i in range(7))]
    assert set(targets_of(data.train)) <= {0, 1, 2, 3}


def test_digits_are_split_and_tested_on_all_images_of_the_classes_left_out():
    data = load_data("digits", channels=1, img_size=8)
    kept, held_out = without_classes(data, "56789"), only_classes(data, "56789")
    assert kept.name == "digits without 5 classes"
    assert len(kept.train) + len(kept.test) + len(held_out.test) == 1797
    assert torch.bincount(torch.tensor(targets_of(held_out.test))).tolist() == [182, 181, 179, 174, 180]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, number in (("train", 3), ("val", 2)):
        for value, name in enumerate("abcd"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(number):
                Image.new("RGB", (8, 8), (60 * value, i, 0)).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def test_a_folder_is_split_without_opening_an_image(folder, monkeypatch):
    data = load_data(str(folder), img_size=8)
    data.test.loader = data.train.loader = None  # an image that is opened now is an error
    with monkeypatch.context() as closed:
        closed.setattr("sphereify.class_splits._is_right", lambda images, listed: True)
        kept, held_out = without_classes(data, "bd"), only_classes(data, "bd")
    assert (len(kept.train), len(kept.test), len(held_out.test)) == (6, 4, 10)


def test_held_out_training_images_are_prepared_as_for_a_test(folder):
    data = load_data(str(folder), img_size=16, augment="rand-m9-mstd0.5")
    first, second = ([image for image, _ in only_classes(data, "cd").test] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert len(first) == 10
    assert data.train.transform is not data.test.transform


def test_calibration_images_are_those_of_the_remaining_classes(folder):
    images = torch.cat(training_images(without_classes(load_data(str(folder), img_size=8), "cd"), 100))
    assert len(images) == 6
    assert images[:, 0].max() < 0  # red is 0 or 60 of 255


class Listed(Dataset):
    """Images with their classes in an attribute, or without it."""

    def __init__(self, **attributes):
        vars(self).update(attributes)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int):
        if getattr(self, "broken", None) == row:
            raise DataError("cannot be read")
        return torch.zeros(1), [2, 0, 1, 2][row]


@pytest.mark.parametrize(
    "images",
    [
        Listed(targets=[2, 0, 1, 2]),
        Listed(labels=torch.tensor([2, 0, 1, 2])),
        Listed(_labels=(2, 0, 1, 2)),
        Listed(samples=[("a", 2), ("b", 0), ("c", 1), ("d", 2)]),
        Listed(reader=Listed(samples=[("a", 2), ("b", 0), ("c", 1), ("d", 2)])),
        Listed(),
        Listed(targets=[1, 1, 1, 1]),  # of something else
        Listed(labels=["cat", "dog", "cat", "dog"]),
        Listed(targets=[2, 0]),
        ConcatDataset([Subset(Listed(), [0, 1]), Subset(Listed(), [2, 3])]),
    ],
)
def test_the_classes_of_data_sets_of_any_kind(images):
    assert targets_of(images) == [2, 0, 1, 2]


def test_an_image_that_cannot_be_read_has_no_class_where_it_must_be_read_for_it():
    assert targets_of(Listed(broken=1)) == [2, -1, 1, 2]
    data = Data("own", Listed(broken=1), Listed(), ["x", "y", "z", "w", "v"], (1,))
    assert len(without_classes(data, "zw").train) == 1

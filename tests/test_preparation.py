"""One description of how an image becomes an input: its transform, its forms as plain data, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as T

from sphereify.errors import DataError, UsageError
from sphereify.preparation import Preparation, PreparationOptions, preparation_in

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PHOTOS = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.8, "crop_mode": "center"}
LARGE = Preparation.of(96, 3, PHOTOS, ("cat", "dog"))
SMALL = Preparation.of(32, 3, PHOTOS)


def picture(width=150, height=120):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def normalized(image, mean=MEAN, std=STD):
    return (transforms.ToTensor()(image) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def test_the_middle_of_a_photograph_is_taken_after_its_shorter_edge_is_resized():
    resized = T.resize(picture(), 120, InterpolationMode.BICUBIC)  # 96 / 0.8
    expected = normalized(T.center_crop(resized, [96, 96]))
    torch.testing.assert_close(LARGE.transform()(picture()), expected)


def test_a_small_image_is_taken_whole():
    expected = normalized(T.resize(picture(), [32, 32], InterpolationMode.BILINEAR))
    torch.testing.assert_close(SMALL.transform()(picture()), expected)


def test_a_gray_image_has_one_channel_of_the_mean_normalization():
    gray = Preparation.of(32, 1, PHOTOS)
    expected = normalized(T.resize(picture().convert("L"), [32, 32]), (0.5,), (0.25,))
    torch.testing.assert_close(gray.transform()(picture()), expected)


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_other_crops_keep_the_whole_image(mode):
    whole = replace(LARGE, crop_mode=mode, crop_pct=1.0).transform()(picture())
    assert whole.shape == (3, 96, 96)
    white = Image.new("RGB", (200, 100), (255, 255, 255))
    top = replace(LARGE, crop_mode=mode, crop_pct=1.0).transform()(white)[:, 0, 0]
    expected = torch.zeros(3) if mode == "border" else (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(top, expected, atol=0.02, rtol=0)  # the mean in 8 bits


@pytest.mark.parametrize("preparation", [LARGE, SMALL, replace(SMALL, crop_mode="center", crop_pct=0.9)])
def test_a_configuration_a_file_and_metadata_give_it_back(preparation):
    size, channels = preparation.image_size[1], preparation.image_size[0]
    assert Preparation.of(size, channels, preparation.config(), preparation.classes) == preparation
    assert Preparation.from_json(json.loads(json.dumps(preparation.to_json()))) == preparation
    assert preparation_in(preparation.metadata()) == preparation


def test_a_key_of_a_later_version_is_passed_over_and_no_metadata_is_no_preparation():
    assert Preparation.from_json({**SMALL.to_json(), "gamma": 2}) == SMALL
    assert preparation_in({"other": "entry"}) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image_size": [5, 8, 8]}, "image_size is"),
        ({"image_size": [3, 8]}, "image_size is"),
        ({"mean": [0.5]}, "mean is"),
        ({"std": [0.5, 0.5, 0.0]}, "above 0"),
        ({"std": [0.5, 0.5, "x"]}, "std is"),
        ({"interpolation": "cubic"}, "expected one of nearest"),
        ({"crop_mode": "left"}, "expected one of center"),
        ({"crop_pct": 1.5}, "at most 1"),
        ({"classes": [1, 2]}, "not all text"),
        ({"classes": "cats"}, "expected the names of all classes"),
        ({"mean": 0.5}, "mean is 0.5, expected several values"),
    ],
)
def test_damaged_values_are_refused(change, told):
    with pytest.raises(ValueError, match=told):
        Preparation.from_json({**SMALL.to_json(), **change})
    with pytest.raises(ValueError):  # noqa: PT011
        Preparation.from_json([1])


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_numbers_in_an_array_become_plain_ones(make):
    made = Preparation(make([3, 32, 32]), make([0.5, 0.25, 0.75]), make([0.5, 0.25, 0.5]))
    assert json.loads(json.dumps(made.to_json()))["mean"] == [0.5, 0.25, 0.75]
    assert made == Preparation((3, 32, 32), (0.5, 0.25, 0.75), (0.5, 0.25, 0.5))


# ------------------------------------------------------------------------------------------------------------- options


def test_options_change_what_they_name_and_nothing_else(tmp_path):
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    options = PreparationOptions(mean=(0.1,), crop_pct=0.5, class_names=tmp_path / "names.txt")
    expected = replace(LARGE, mean=(0.1, 0.1, 0.1), crop_pct=0.5, classes=("ant", "bee"))
    assert options.over(LARGE) == expected
    assert PreparationOptions().over(LARGE) == LARGE
    assert PreparationOptions(img_size=32).over(LARGE) == replace(SMALL, classes=LARGE.classes)


def test_without_a_preparation_three_options_make_one():
    assert PreparationOptions(mean=(0.5,)).over(None, 3) is None
    assert str(UsageError(PreparationOptions(img_size=8).missing())) == "mean, std"
    made = PreparationOptions(img_size=80, mean=(0.5,), std=(0.2,)).over(None, 3)
    assert made == Preparation((3, 80, 80), (0.5,) * 3, (0.2,) * 3)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"mean": (0.1, 0.2)}, "mean: got \\[0.1, 0.2\\], expected 1 or 3 numbers"),
        ({"std": (0.0,)}, "std: got \\[0.0\\], expected 1 or 3 numbers above 0"),
        ({"crop_mode": "middle"}, "crop_mode: got 'middle', expected one of center"),
        ({"img_size": 0}, "img_size: got 0"),
    ],
)
def test_options_that_are_not_valid_are_refused(given, told):
    with pytest.raises(UsageError, match=told):
        PreparationOptions(**given)


def test_images_of_more_channels_than_files_have_cannot_be_prepared():
    with pytest.raises(UsageError, match="takes images of 5 channels, and files of images have 1 or 3"):
        PreparationOptions(img_size=80, mean=(0.5,), std=(0.2,)).over(None, 5)


def test_numbers_for_other_channels_are_refused():
    with pytest.raises(UsageError, match=r"mean: got .* expected 1 numbers, one for each channel"):
        PreparationOptions(mean=MEAN).over(Preparation.of(32, 1, PHOTOS))


@pytest.mark.parametrize(("name", "content"), [("n.json", '{"a": 1}'), ("n.json", "{"), ("n.txt", ""), ("gone", None)])
def test_a_file_without_names_is_refused(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"class_names: .*{name}"):
        PreparationOptions(class_names=tmp_path / name).over(LARGE)

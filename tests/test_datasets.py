"""Digits and image folders, as the models see them."""

from pathlib import Path

import numpy as np
import pytest
import timm
import timm.data
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from sphereify.convert.model_inputs import data_config
from sphereify.datasets import load_data, load_images, training_images
from sphereify.errors import DataError, UsageError


def paint(folder: Path, number: int = 3, mode: str = "RGB", size: tuple[int, int] = (20, 24), value: int | None = None):
    """Images of one class: of one value, or of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        noise = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(noise) if value is None else Image.new("RGB", size, (value, value, value))
        image.convert(mode).save(folder / f"{i}.png")


@pytest.fixture
def folder(tmp_path):
    for part, number in (("train", 4), ("val", 2)):
        for name in ("cat", "dog", "eel"):
            paint(tmp_path / part / name, number)
    return tmp_path


def everything(dataset) -> tuple[torch.Tensor, list[int]]:
    images, targets = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return torch.stack(images), [int(target) for target in targets]


# ------------------------------------------------------------------------------------------------------------ digits


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("img_size", [None, 8, 40])
def test_digits_have_the_channels_and_size_asked_for(channels, img_size):
    data = load_data("digits", channels=channels, img_size=img_size)
    size = img_size or 32
    assert data.image_size == (channels, size, size)
    for part, number in ((data.train, 1437), (data.test, 360)):
        assert part.tensors[0].shape == (number, channels, size, size)
        assert part.tensors[0].dtype == torch.float32
        assert part.tensors[1].shape == (number,)
        assert part.tensors[1].dtype == torch.int64


def test_digits_lie_between_minus_one_and_one_and_use_the_whole_range():
    images = load_data("digits", channels=1, img_size=8).train.tensors[0]
    assert images.min() == -1
    assert images.max() == 1


def test_digits_in_three_channels_are_the_same_gray_thrice():
    one, three = (load_data("digits", channels=channels).test.tensors[0] for channels in (1, 3))
    torch.testing.assert_close(three, one.repeat(1, 3, 1, 1), rtol=0, atol=0)


def test_the_two_parts_of_digits_are_disjoint_and_together_all_of_it():
    data = load_data("digits", channels=1, img_size=8)
    raw = load_digits()
    labelled = [
        (*image.flatten().tolist(), int(target))
        for part in (data.train, data.test)
        for image, target in zip((part.tensors[0] + 1) * 8, part.tensors[1], strict=True)
    ]
    expected = [(*image.flatten().tolist(), int(target)) for image, target in zip(raw.images, raw.target, strict=True)]
    assert sorted(labelled) == sorted(expected)  # each image once, with its own label


def test_digits_are_split_with_the_same_share_of_each_class():
    data = load_data("digits", channels=1)
    train, test = (torch.bincount(part.tensors[1], minlength=10) for part in (data.train, data.test))
    assert data.classes == [str(digit) for digit in range(10)]
    torch.testing.assert_close(test / (train + test), torch.full((10,), 0.2), rtol=0, atol=0.005)


def test_digits_are_split_the_same_way_each_time():
    first, second = (load_data("digits", channels=1, img_size=8).test.tensors for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"needs scikit-learn: pip install 'sphereify\[digits\]'"):
        load_data("digits")


# ----------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("img_size", [32, 64, 72])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_images_of_any_mode_and_shape_come_as_the_model_takes_them(tmp_path, channels, img_size, mode):
    for part in ("train", "val"):
        paint(tmp_path / part / "a", 2, mode)
        paint(tmp_path / part / "b", 2, mode, size=(90, 30))
    data = load_data(str(tmp_path), channels=channels, img_size=img_size)
    assert data.image_size == (channels, img_size, img_size)
    for part in (data.train, data.test):
        images, targets = everything(part)
        assert images.shape == (4, channels, img_size, img_size)
        assert images.dtype == torch.float32
        assert torch.isfinite(images).all()
        assert targets == [0, 0, 1, 1]


@pytest.mark.parametrize("held_out", ["val", "test", "validation"])
def test_classes_and_parts_are_those_of_the_folders(folder, held_out):
    (folder / "val").rename(folder / held_out)
    data = load_data(str(folder), img_size=32)
    assert data.name == str(folder)
    assert data.classes == ["cat", "dog", "eel"]
    assert everything(data.train)[1] == [0] * 4 + [1] * 4 + [2] * 4
    assert everything(data.test)[1] == [0, 0, 1, 1, 2, 2]


def test_val_comes_before_test(folder):
    for name in ("cat", "dog", "eel"):
        paint(folder / "test" / name, 9)
    assert len(load_data(str(folder), img_size=32).test) == 6


def test_the_size_is_the_models_unless_given(folder):
    assert load_data(str(folder)).image_size == (3, 224, 224)
    assert load_data(str(folder), config={"input_size": (3, 96, 96)}).image_size == (3, 96, 96)
    assert load_data(str(folder), config={"input_size": (3, 96, 96)}, img_size=48).image_size == (3, 48, 48)
    images, _ = everything(load_data(str(folder), config={"input_size": (3, 96, 96)}).test)
    assert images.shape == (6, 3, 96, 96)


@pytest.mark.parametrize("img_size", [32, 96])
@pytest.mark.parametrize("channels", [1, 3])
def test_mean_and_deviation_are_the_models(tmp_path, img_size, channels):
    for part in ("train", "val"):
        paint(tmp_path / part / "a", 2, value=51)  # 0.2
    config = {"mean": (0.1, 0.2, 0.6), "std": (0.5, 0.25, 0.75)}
    image = everything(load_data(str(tmp_path), img_size=img_size, channels=channels, config=config).test)[0][0]
    default = everything(load_data(str(tmp_path), img_size=img_size, channels=channels).test)[0][0]
    expected = [(0.2 - 0.3) / 0.5] if channels == 1 else [0.2, 0.0, (0.2 - 0.6) / 0.75]
    torch.testing.assert_close(image.mean((1, 2)), torch.tensor(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(image.std((1, 2)), torch.zeros(channels), atol=1e-5, rtol=0)
    torch.testing.assert_close(default.mean((1, 2)), torch.full((channels,), (0.2 - 0.5) / 0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("img_size", [32, 96])
def test_training_images_are_moved_about_and_test_images_are_not(folder, img_size):
    data = load_data(str(folder), img_size=img_size)
    torch.manual_seed(0)
    moved = torch.stack([data.train[0][0] for _ in range(6)])
    still = torch.stack([data.test[0][0] for _ in range(6)])
    assert not torch.equal(moved[:1].expand_as(moved), moved)
    torch.testing.assert_close(still, still[:1].expand_as(still), rtol=0, atol=0)


@pytest.mark.parametrize("img_size", [32, 64])
def test_small_test_images_are_seen_whole(tmp_path, img_size):
    """A border that a centre crop would cut away stays."""
    for part in ("train", "val"):
        paint(tmp_path / part / "a", 1, value=0)
        image = Image.new("RGB", (img_size, img_size))
        image.paste((255, 255, 255), (1, 1, img_size - 1, img_size - 1))
        image.save(tmp_path / part / "a" / "0.png")
    seen = everything(load_data(str(tmp_path), img_size=img_size).test)[0][0, 0]
    assert (seen[0] == -1).all()
    assert (seen[:, -1] == -1).all()
    assert (seen[1:-1, 1:-1] == 1).all()


# --------------------------------------------------------------------------------------------------------- bad input


def test_data_that_does_not_exist(tmp_path):
    with pytest.raises(DataError, match=r"data '.*nowhere': neither 'digits' nor a folder. A folder needs train/ and"):
        load_data(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("present", "found"), [(("train",), "train"), (("val", "old"), "old, val"), ((), "nothing"), (("a", "b"), "a, b")]
)
def test_a_folder_without_both_parts_says_what_it_needs_and_what_it_found(tmp_path, present, found):
    for name in present:
        paint(tmp_path / name / "cat")
    with pytest.raises(DataError, match=rf"expected train/ and val/ \(or test/\) inside, found {found}$") as error:
        load_data(str(tmp_path))
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_part_without_classes(folder, part):
    for child in (folder / part).iterdir():
        for image in child.iterdir():
            image.unlink()
        child.rmdir()
    with pytest.raises(DataError, match=f"{part}.*Couldn't find any class folder.*one folder a class with images"):
        load_data(str(folder))


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_without_images_is_named(folder, part):
    (folder / part / "fox").mkdir()
    (folder / part / "fox" / "readme.txt").write_text("no image")
    with pytest.raises(DataError, match=f"{part}.*fox.*one folder a class with images"):
        load_data(str(folder))


def test_parts_of_different_classes_name_the_odd_ones(folder):
    paint(folder / "train" / "fox")
    paint(folder / "val" / "gnu")
    with pytest.raises(DataError, match="train/ and val/ differ in classes: fox, gnu"):
        load_data(str(folder))


@pytest.mark.parametrize("spec", ["digits", "folder"])
@pytest.mark.parametrize("size", [0, -3])
def test_an_impossible_size(folder, spec, size):
    with pytest.raises(UsageError, match=f"img_size: got {size}, expected a number of at least 1"):
        load_data(spec if spec == "digits" else str(folder), img_size=size)


# ------------------------------------------------------------------------------------------------------ small images


@pytest.fixture
def steps(tmp_path):
    """Images of 20×24 with a step in brightness, which shows mirroring and shifting."""
    picture = np.zeros((24, 20, 3), dtype=np.uint8)
    picture[5:, 3:] = 200
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(4):
                Image.fromarray(picture + number).save(tmp_path / part / name / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_memory_are_those_of_the_files_with_the_same_augmentation(steps, shift, channels):
    found = []
    for in_memory in (False, True):
        torch.manual_seed(3)
        data = load_data(str(steps), img_size=32, shift=shift, in_memory=in_memory, train_images=6, channels=channels)
        found.append([everything(data.train), everything(data.test)])
    for files, kept in zip(*found, strict=True):
        assert torch.equal(files[0], kept[0])
        assert files[1] == kept[1]
    assert len(found[1][0][1]) == 6


def test_images_in_memory_are_not_read_again(steps):
    data = load_data(str(steps), img_size=16, in_memory=True)
    before = everything(data.test)
    for file in steps.rglob("*.png"):
        file.unlink()
    assert torch.equal(everything(data.test)[0], before[0])


@pytest.mark.parametrize("size", [32, 80])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [None, "rand-m5-n0"])
def test_color_jitter_changes_training_images_by_bounded_factors_and_test_images_never(steps, size, channels, augment):
    """In a picture of one grey of 100, contrast and saturation change nothing, and brightness gives 100·(1 ± x)."""
    for file in steps.rglob("*.png"):
        Image.new("RGB", (20, 24), (100, 100, 100)).save(file)
    torch.manual_seed(0)
    kind = {"img_size": size, "channels": channels, "augment": augment}
    data = load_data(str(steps), color_jitter=0.5, shift=size > 64, **kind)
    moved = [(data.train[0][0] * 0.5 + 0.5) * 255 for _ in range(40)]
    means = torch.stack([image.mean() for image in moved])
    assert all(image.std() < 1 for image in moved)
    assert 49 <= means.min() < 70
    assert 130 < means.max() <= 151
    still = (data.test[0][0] * 0.5 + 0.5) * 255
    torch.testing.assert_close(still, torch.full_like(still, 100), atol=0.6, rtol=0)
    none = load_data(str(steps), color_jitter=0.0, shift=size > 64, **kind)
    assert {round(float((none.train[0][0].mean() * 0.5 + 0.5) * 255)) for _ in range(5)} == {100}


def test_color_jitter_of_another_strength_is_refused(steps):
    with pytest.raises(UsageError, match=r"color_jitter.* got 1\.5, expected a number of at least 0 and at most 1"):
        load_data(str(steps), img_size=32, color_jitter=1.5)
    with pytest.raises(UsageError, match=r"color_jitter.* the digits are not photographs"):
        load_data("digits", color_jitter=0.4)


def test_without_a_shift_images_are_mirrored_only(steps):
    train, test = (getattr(load_data(str(steps), img_size=32, shift=False), part) for part in ("train", "test"))
    torch.manual_seed(0)
    mirrored = []
    for _ in range(8):
        image, still = train[0][0], test[0][0]
        mirrored.append(torch.equal(image, still.flip(2)))
        assert mirrored[-1] or torch.equal(image, still)
    assert set(mirrored) == {True, False}


def test_a_choice_of_images_is_the_same_each_time():
    choices = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        data = load_data("digits", train_images=20, test_images=10)
        assert (len(data.train), len(data.test)) == (20, 10)
        choices.append([*(image for image, _ in data.train), *load_images("digits", 8)])
    torch.testing.assert_close(choices[0], choices[1], rtol=0, atol=0)


@pytest.mark.parametrize("option", [{"shift": False}, {"in_memory": True}])
def test_options_of_small_images_are_refused_for_large_ones(steps, option):
    with pytest.raises(UsageError, match=f"{next(iter(option))}: is for images of up to 64 pixels, got 65"):
        load_data(str(steps), img_size=65, **option)


# ------------------------------------------------------------------------------------------- pictures as they come


def folder_of(root: Path, picture: Image.Image, name: str = "0.png") -> Path:
    for part in ("train", "val"):
        for label in ("a", "b"):
            (root / part / label).mkdir(parents=True)
            picture.save(root / part / label / name)
    return root


def test_images_of_sixteen_bits_keep_their_contrast(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    data = load_data(str(folder_of(tmp_path, Image.fromarray(ramp))), img_size=64)
    image = data.test[0][0]
    assert (image.min(), image.max()) == (pytest.approx(-1, abs=0.02), pytest.approx(1, abs=0.02))
    assert image.std() > 0.5


def test_an_image_with_a_broken_chunk_is_left_out(tmp_path):
    folder = folder_of(tmp_path, Image.new("RGB", (32, 32), "red"))
    whole = (folder / "train" / "a" / "0.png").read_bytes()
    (folder / "train" / "a" / "1.png").write_bytes(whole.replace(b"IDAT", b"\0DAT"))
    with pytest.raises(DataError, match=r"1\.png: cannot be read as an image"):
        load_data(str(folder), img_size=32).train[1]


def test_test_images_are_prepared_as_the_model_wants_them(tmp_path):
    folder = str(
        folder_of(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 260, 3), np.uint8)))
    )
    model = timm.create_model("test_vit")
    expected = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    found = load_data(folder, config=data_config(model)).test
    with Image.open(found.samples[0][0]) as picture:
        torch.testing.assert_close(found[0][0], expected(picture.convert("RGB")), rtol=0, atol=0)


def test_torchvision_models_want_the_images_of_imagenet():
    config = data_config(torchvision.models.resnet18())
    assert (config["mean"], config["std"]) == (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)


# ---------------------------------------------------------------------------- normalization, and images to calibrate on


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 80])
def test_the_normalization_of_the_images_is_part_of_the_data(folder, channels, size):
    config = {"mean": (0.1, 0.2, 0.6), "std": (0.2, 0.25, 0.3)}
    paint(folder / "val" / "cat", 1, size=(100, 100), value=102)  # its first image is of one value
    data = load_data(str(folder), channels=channels, img_size=size, config=config)
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.mean, data.std))
    assert (len(data.mean), len(data.std)) == (channels, channels)
    torch.testing.assert_close(data.test[0][0] * std + mean, torch.full((channels, size, size), 0.4))
    digits = load_data("digits", channels=channels, img_size=8)
    assert digits.mean == digits.std == (0.5,) * channels


def rows(images: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(tuple(image.flatten().tolist()) for image in images)


@pytest.mark.parametrize("options", [{}, {"in_memory": True}, {"train_images": 7}, {"augment": "rand-m9"}])
def test_training_images_come_as_for_a_test(folder, options):
    data = load_data(str(folder), img_size=12, **options)
    plain = load_data(str(folder), img_size=12)
    plain.train.transform = plain.test.transform
    whole = rows(everything(plain.train)[0])
    before = data.train
    batches = training_images(data, 100, batch_size=5)
    assert [len(batch) for batch in batches][:-1] == [5] * (len(batches) - 1)
    found = rows(torch.cat(batches))
    assert len(found) == options.get("train_images", 12)
    assert set(found) <= set(whole)
    assert data.train is before
    assert getattr(before, "transform", None) is not data.test.transform  # it still augments
    assert torch.equal(training_images(data, 4)[0], torch.cat(batches)[:4])


def test_training_images_that_cannot_be_read_are_passed_over(folder):
    for name in ("cat", "dog"):
        for file in (folder / "train" / name).iterdir():
            file.write_bytes(b"broken")
    data = load_data(str(folder), img_size=12)
    assert sum(map(len, training_images(data, 100))) == 4
    for file in (folder / "train" / "eel").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(DataError, match="not one training image could be read"):
        training_images(data, 100)

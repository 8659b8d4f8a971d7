"""Labelled images by name: handwritten digits, folders, and the data sets that timm reads."""

import copy
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from sphereify.errors import DataError, UsageError, first_line, invalid, no_effect, refused, wrong_type
from sphereify.images.folders import classes_in, image_files, open_parts
from sphereify.images.pictures import as_rgb, open_image
from sphereify.images.transforms import make_transform
from sphereify.preparation import SMALL, Preparation
from sphereify.scikit_learn import handwritten_digits
from sphereify.shared_options import AugmentationOptions

TIMM_READERS = ("torch/", "hfds/", "tfds/", "wds/", "hfids/")
"""Beginnings of the names that `timm.data.create_dataset` reads through another library."""


@dataclass(frozen=True)
class Data:
    """A classification data set in two parts, ready for a model."""

    name: str
    train: Dataset
    test: Dataset
    classes: list[str]
    image_size: tuple[int, int, int]
    """Channels, height, width of one image as the model sees it."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel by which pixels in [0, 1] were normalized; None: not known."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel by which they were normalized; None: not known."""
    held_out: tuple[str, ...] = ()
    """Classes of the data set that were left out, with their images; see `sphereify.class_splits`."""
    preparation: Preparation | None = None
    """Preparation of the test images, without the names of classes; None: not known."""

    @classmethod
    def prepared(cls, name: str, train: Any, test: Any, classes: list[str], preparation: Preparation) -> "Data":
        """The data whose test images are prepared so."""
        size, mean, std = preparation.image_size, preparation.mean, preparation.std
        return cls(name, train, test, classes, size, mean, std, preparation=preparation)


def load_data(
    spec: str,
    *,
    channels: int = 3,
    img_size: int | None = None,
    config: dict[str, Any] | None = None,
    data_root: str | Path | None = None,
    splits: tuple[str, str] = ("train", "validation"),
    augment: str | None = None,
    shift: bool = True,
    color_jitter: float | None = None,
    train_images: int | None = None,
    test_images: int | None = None,
    in_memory: bool = False,
    test_only: bool = False,
) -> Data:
    """A labelled data set by name, prepared for a model.

    Args:
        spec: "digits" (scikit-learn's 1,797 handwritten digits of 8×8 pixels, a fifth of them for testing), a folder
            with train/ and val/ (or test/), each with one folder of images per class, or a name for
            `timm.data.create_dataset`, such as "torch/cifar10" or "hfds/…".
        channels: channels of an image, 1 or 3.
        img_size: height and width in pixels; default: 32 for digits, else the size in `config`, or 224.
        config: a model's `pretrained_cfg`: size, mean and standard deviation, crop and interpolation.
        data_root: folder that holds a data set of timm.
        splits: names of the training and the test part in a data set of timm.
        augment: automatic augmentation by timm of the training images, such as "rand-m9-mstd0.5".
        shift: shift training images of up to 64 pixels by up to an eighth, as in CIFAR-10+; otherwise they are only
            mirrored.
        color_jitter: strength x, in [0, 1], of random changes of brightness, contrast and saturation of training
            images, each by a factor from 1 - x to 1 + x; default: 0.4 for RGB images above 64 pixels without
            `augment`, else 0.
        train_images, test_images: size of a fixed random choice from each part; default: all images.
        in_memory: read and decode each image once, now, and keep its pixels; for images of up to 64 pixels.
        test_only: be content with the test images of a folder, in val/ (or test/) or in the folder itself, if it has no
            train/; then there are no training images.

    Raises:
        DataError: no such data, no classes, no images, a missing library, or data that comes as a stream; with
            `in_memory`, an image that cannot be read.
        UsageError: an unknown augmentation, a size below 1, more images than there are, or images too large for
            `in_memory` and `shift=False`.
    """
    spec = _checked_name(spec)
    size = _size(img_size, config or {})
    if spec != "digits" and size > SMALL and (in_memory or not shift):
        name = "in_memory" if in_memory else "shift"
        raise refused(name, f"is for images of up to {SMALL} pixels, got {size}; larger ones are cropped at random")
    changes = vars(AugmentationOptions(augment, color_jitter))
    data = _load(spec, channels, img_size, config or {}, data_root, splits, changes, shift, test_only)
    for part, count in (("train", train_images), ("test", test_images)):
        if count is not None:
            data = choose_images(data, part, count)
    if in_memory and spec != "digits":  # the digits are a tensor already
        data = dataclasses.replace(data, train=_InMemory(data.train, size), test=_InMemory(data.test, size))
    return data


class _InMemory(Dataset):
    """Images that were decoded and resized once; the rest of their transform runs each time."""

    def __init__(self, images: Any, size: int):
        import numpy as np

        whole: Any
        rows: Any
        whole, rows = (images.dataset, images.indices) if isinstance(images, Subset) else (images, range(len(images)))
        self.transform, whole.transform = whole.transform, None
        try:
            pictures, targets = zip(*(whole[row] for row in rows), strict=True)
        finally:
            whole.transform = self.transform
        # The transform resizes once more, which leaves an image of that size as it is.
        self.pixels = np.stack(
            [np.asarray(as_rgb(picture).resize((size, size), Image.Resampling.BILINEAR)) for picture in pictures]
        )
        self.targets = [int(target) for target in targets]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.targets[index]


def choose_images(data: Data, part: str, count: int) -> Data:
    """The data with a fixed random choice of `count` images of a part, "train" or "test".

    Raises:
        UsageError: fewer than one image, or more than there are.
    """
    whole: Any = getattr(data, part)
    if not 1 <= count <= len(whole):
        raise invalid(f"{part}_images", count, f"1 to {len(whole)}, the number that {data.name} has")
    chosen: Any = Subset(whole, _random_rows(len(whole), count))
    return dataclasses.replace(data, name=f"{data.name}, {count} {part} images", **{part: chosen})


def _random_rows(total: int, count: int) -> list[int]:
    """`count` of `total` rows in random order, the same ones each time."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].tolist()


def _size(img_size: int | None, config: dict[str, Any]) -> int:
    return img_size or (config.get("input_size") or (3, 224, 224))[-1]


def _load(
    spec: str,
    channels: int,
    img_size: int | None,
    config: dict[str, Any],
    root: Any,
    splits: tuple[str, str],
    changes: dict[str, Any],
    shift: bool,
    test_only: bool,
) -> Data:
    _check_shape(spec, channels, img_size)
    if spec == "digits":
        if name := next((name for name, value in changes.items() if value), None):
            raise refused(name, "the digits are not photographs; it needs a folder or a data set of timm's")
        return _digits(channels, img_size or 32)
    size = _size(img_size, config)
    moves = [make_transform(size, channels, config, training=on, shift=shift, **changes) for on in (True, False)]
    preparation = Preparation.of(size, channels, config)
    if spec.startswith(TIMM_READERS):
        return _of_timm(spec, root, splits, moves, preparation)
    folder = Path(spec)
    if not folder.is_dir():
        raise DataError(
            f"data {spec!r}: neither 'digits' nor a folder. A folder needs train/ and val/ (or test/) inside."
        )
    train, test = open_parts(folder, moves, open_image, test_only=test_only)
    return Data.prepared(str(folder), train, test, test.classes, preparation)


def load_images(
    spec: str,
    count: int,
    *,
    channels: int = 3,
    img_size: int | None = None,
    config: dict[str, Any] | None = None,
    data_root: str | Path | None = None,
    split: str = "train",
    batch_size: int = 64,
) -> list[Tensor]:
    """Training images without labels or augmentation, prepared as for a test; for a calibration.

    Args:
        spec: as for `load_data`, or a folder with images at any depth; if it has a folder train/, only those in there.
        count: size, ≥ 1, of a fixed random choice of images; all of them if there are fewer.
        channels, img_size, config, data_root: as for `load_data`.
        split: name of the training part of a data set of timm.
        batch_size: images per tensor.

    Returns:
        Tensors of shape (≤ batch_size, channels, img_size, img_size).

    Raises:
        DataError: no such data, no images in it, or one that cannot be read.
        UsageError: a count below 1.
    """
    if count < 1:
        raise invalid("count", count, "a number of at least 1", "Usual: 500 to 2,000")
    spec = _checked_name(spec)
    _check_shape(spec, channels, img_size)
    if data_root is not None and not spec.startswith(TIMM_READERS):
        raise no_effect("data_root", f"on {spec!r}; it names the folder of a data set of timm's")
    if spec == "digits":
        part: Any = _digits(channels, img_size or 32).train
    elif spec.startswith(TIMM_READERS):
        preparation = Preparation.of(_size(img_size, config or {}), channels, config or {})
        part = _of_timm(spec, data_root, (split,), [preparation.transform()], preparation).train
    else:
        if not Path(spec).is_dir():
            raise DataError(f"data {spec!r}: neither 'digits' nor a folder; any folder of images will do")
        part = ImageFiles(image_files(Path(spec)), channels=channels, img_size=img_size, config=config)
    return list(torch.stack([part[row][0] for row in _random_rows(len(part), count)]).split(batch_size))


def training_images(data: Data, count: int, batch_size: int = 64) -> list[Tensor]:
    """Training images of `data` without labels, prepared as its test images are, so without augmentation.

    Images that cannot be read are passed over. Data sets without a `transform` of their own give images as they are.

    Args:
        count: size, ≥ 1, of a fixed random choice of images; all of them if there are fewer.
        batch_size: images per tensor.

    Returns:
        Tensors of shape (≤ batch_size, channels, height, width).

    Raises:
        DataError: not one image can be read.
    """
    if not len(data.train):  # type: ignore[arg-type]
        raise DataError(f"{data.name}: has no training images")
    return _images_of(with_transform_of(data.train, data.test), count, batch_size, f"{data.name}: not one training")


def some_test_images(data: Data, count: int) -> list[Tensor]:
    """Test images of `data` without labels; otherwise as `training_images`."""
    if not len(data.test):  # type: ignore[arg-type]
        raise DataError(f"{data.name}: has no test images")
    return _images_of(data.test, count, count, f"{data.name}: not one test")


def _images_of(plain: Any, count: int, batch_size: int, none: str) -> list[Tensor]:
    """A fixed random choice of images that can be read; `none` begins the message that there is none."""
    images: list[Tensor] = []
    for row in _random_rows(len(plain), len(plain)):
        try:
            images.append(plain[row][0])
        except (DataError, OSError):
            continue
        if len(images) == count:
            break
    if not images:
        raise DataError(f"{none} image could be read")
    return list(torch.stack(images).split(batch_size))


def with_transform_of(images: Any, others: Any) -> Any:
    """The images with the transform of others, where both have one."""
    return _with_transform(images, _transform_of(others))


def _transform_of(images: Any) -> Any:
    return _transform_of(images.dataset) if isinstance(images, Subset) else getattr(images, "transform", None)


def _with_transform(images: Any, transform: Any) -> Any:
    if transform is None or (not isinstance(images, Subset) and getattr(images, "transform", None) is None):
        return images
    changed = copy.copy(images)
    if isinstance(images, Subset):
        changed.dataset = _with_transform(images.dataset, transform)
    else:
        changed.transform = transform
    return changed


class ImageFiles(Dataset):
    """Images in files, prepared as for a test, each with its own number as its target.

    Args:
        files: paths.
        channels, img_size, config: as for `load_data`.

    Attributes:
        image_size: channels, height and width of an image.
    """

    def __init__(self, files: Sequence[Path], *, channels: int = 3, img_size: int | None = None, config: Any = None):
        preparation = Preparation.of(_size(img_size, config or {}), channels, config or {})
        self.files, self.image_size = list(files), preparation.image_size
        self.transform = preparation.transform()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.transform(open_image(str(self.files[number]))), number


def class_count(spec: str, *, data_root: str | Path | None = None, test_only: bool = False) -> int:
    """The number of classes of a data set, without reading it if it is a folder with training images.

    Raises:
        DataError: as `load_data`.
    """
    classes = None if spec == "digits" else classes_in(Path(spec))
    return len(load_data(spec, data_root=data_root, test_only=test_only).classes if classes is None else classes)


def _checked_name(spec: object) -> str:
    """The name of a data set, which may be given as a path."""
    if not isinstance(spec, (str, os.PathLike)):
        raise wrong_type("data", spec, "the name of a data set or the path of a folder")
    return os.fspath(spec)


def _check_shape(spec: str, channels: int, img_size: int | None) -> None:
    if not spec:
        raise UsageError("data: got an empty name, expected digits, a folder, or a name of timm's")
    if img_size is not None and img_size < 1:
        raise invalid("img_size", img_size, "a number of at least 1")
    if channels not in (1, 3):
        raise DataError(f"data {spec!r}: the model takes images of {channels} channels, expected 1 (gray) or 3 (RGB)")


def _digits(channels: int, size: int) -> Data:
    pixels, targets, classes, train, test = handwritten_digits()
    images = torch.from_numpy(pixels).float().div(8).sub(1).unsqueeze(1)  # 0..16 -> -1..1
    images = nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    images = images.expand(-1, channels, -1, -1).contiguous()
    labels, half = torch.from_numpy(targets), (0.5,) * channels
    parts = [TensorDataset(images[rows], labels[rows]) for rows in (train, test)]
    preparation = Preparation((channels, size, size), half, half, "bilinear", 1.0, "squash")
    return Data.prepared("digits", parts[0], parts[1], classes, preparation)


def _of_timm(spec: str, root: Any, splits: tuple[str, ...], moves: list[Any], preparation: Preparation) -> Data:
    from timm.data import create_dataset
    from torchvision.transforms import Compose

    parts = []
    for split, transform in zip(splits, moves, strict=True):
        try:
            part = create_dataset(spec, root=root, split=split, input_img_mode="")
        except Exception as error:  # each reader raises in its own way, for a missing library or file
            raise DataError(f"data {spec!r}, split {split!r}: {first_line(error)}") from error
        if isinstance(part, IterableDataset):
            raise DataError(f"data {spec!r} comes as a stream, which cannot be continued inside an epoch; download it")
        part.transform = Compose([as_rgb, transform])
        parts.append(part)
    return Data.prepared(spec, parts[0], parts[-1], _classes_of(parts[0]), preparation)


def _classes_of(part: Any) -> list[str]:
    names = getattr(part, "classes", None) or getattr(getattr(part, "reader", None), "class_to_idx", None)
    if isinstance(names, dict):
        names = sorted(names, key=names.__getitem__)
    if names:
        return [str(name) for name in names]
    features = getattr(getattr(getattr(part, "reader", None), "dataset", None), "features", None) or {}
    label = next((f for f in features.values() if hasattr(f, "names")), None)
    if label is None:
        raise DataError("the data set does not say what its classes are")
    return [str(name) for name in label.names]

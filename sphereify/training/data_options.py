"""The images to train and test on, as options. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphereify.annotations import TRAINING_RECORD
from sphereify.errors import no_effect, option, refused
from sphereify.options import check_options, option_field, same_option
from sphereify.shared_options import AugmentationOptions

if TYPE_CHECKING:
    from torch import nn

    from sphereify.datasets import Data

IMAGES = "Images"


@dataclass(frozen=True)
class DataOptions:
    """A choice of labelled images, and their preparation.

    Raises:
        UsageError: no data set, or a value that is not valid.
    """

    data: str | None = option_field(
        None,
        "digits, a folder with train/ and val/ (or test/), or a data set of timm such as torch/cifar10.",
        panel=IMAGES,
    )
    data_root: Path | None = option_field(None, "Folder that holds a data set of timm.", panel=IMAGES)
    img_size: int | None = option_field(
        None,
        "Height and width of an image in pixels; default: 32 for digits, else the model's own size.",
        panel=IMAGES,
        at_least=1,
    )
    augment: str | None = same_option(AugmentationOptions, "augment", panel=IMAGES)
    color_jitter: float | None = same_option(AugmentationOptions, "color_jitter", panel=IMAGES)
    train_images: int | None = option_field(
        None,
        "Number of training images, a fixed random choice; default: all.",
        panel=IMAGES,
        at_least=1,
    )
    test_images: int | None = option_field(
        None,
        "Number of test images, a fixed random choice; default: all.",
        panel=IMAGES,
        at_least=1,
    )
    hold_out_classes: int | None = option_field(
        None,
        "Number of classes to leave out of training, with all their images, to verify embeddings on them. Default: "
        "none, and where a trained network is tested, those of its training.",
        panel=IMAGES,
        at_least=2,
    )
    hold_out_seed: int | None = option_field(
        None, "Random seed by which these classes are chosen; default: the last ones.", panel=IMAGES
    )

    def __post_init__(self) -> None:
        if self.data is None:
            raise refused("data", "is missing; digits, a folder with train/ and val/ (or test/), or a data set of timm")
        check_options(self)
        if self.hold_out_seed is not None and self.hold_out_classes is None:
            raise no_effect("hold_out_seed", f"without {option('hold_out_classes')}")

    def class_count(self, *, test_only: bool = False) -> int:
        """The number of classes to train on.

        Args:
            test_only: be content with test images, as `sphereify.datasets.load_data`.

        Raises:
            DataError: as `sphereify.datasets.load_data`.
            UsageError: too many classes are left out.
        """
        from sphereify.datasets import class_count

        count = class_count(self.data or "", data_root=self.data_root, test_only=test_only)
        if self.hold_out_classes is None:
            return count
        from sphereify.class_splits import check_count

        check_count(count, self.hold_out_classes)
        return count - self.hold_out_classes

    def open(
        self, model: "nn.Module", *, as_trained: bool = False, test_only: bool = False, held_out: bool = False
    ) -> "Data":
        """The data set, with images prepared as `model` takes them, without the classes that are left out.

        Args:
            model: decides the channels, the normalization and, where `img_size` does not say it, the size.
            as_trained: take the size, and which classes are left out, from the training record of a loaded artifact
                where the options do not say it.
            test_only: be content with test images, as `sphereify.datasets.load_data`.
            held_out: the images of the classes that are left out, as test images, instead of the others. Without such
                classes, all test images.

        Raises:
            DataError, UsageError: as `sphereify.datasets.load_data` and `sphereify.class_splits.choose_classes`.
        """
        from sphereify.class_splits import only_classes, without_classes
        from sphereify.datasets import choose_images, load_data

        data = load_data(
            self.data or "",
            **self.preparation(model, as_trained=as_trained),
            data_root=self.data_root,
            augment=self.augment,
            color_jitter=self.color_jitter,
            test_only=test_only,
        )
        record = TRAINING_RECORD.of(model) if as_trained else None
        if left_out := self._classes_left_out(data, record):
            data = (only_classes if held_out else without_classes)(data, left_out)
        counts = {"train": None if held_out else self.train_images, "test": self.test_images}
        for part, count in counts.items():
            data = data if count is None else choose_images(data, part, count)
        return data

    def preparation(self, model: "nn.Module", *, as_trained: bool = False) -> dict[str, Any]:
        """The arguments of `sphereify.datasets.load_data` for images as `model` takes them; as for `open`."""
        from sphereify.convert.input_channels import input_channels
        from sphereify.model_images import image_config, recorded_size, test_config

        size = recorded_size(model) if as_trained else None
        return {
            "channels": input_channels(model),
            "img_size": size if self.img_size is None else self.img_size,
            "config": test_config(model) if as_trained else image_config(model),
        }

    def _classes_left_out(self, data: "Data", record: dict[str, Any] | None) -> tuple[str, ...]:
        """The classes of `data` to leave out: by the options, or else by a training record of just these classes."""
        from sphereify.class_splits import choose_classes

        if self.hold_out_classes is not None:
            return choose_classes(data.classes, self.hold_out_classes, self.hold_out_seed)
        recorded = (record or {}).get("held_out_classes") or ()
        is_same = bool(recorded) and {*recorded, *(record or {}).get("classes", ())} == {*data.classes}
        return tuple(recorded) if is_same else ()

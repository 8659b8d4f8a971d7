"""The images to train and test on, as options. Imports no torch, so that `--help` answers at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sphereify.errors import UsageError, option
from sphereify.options import check_options, option_field

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
    augment: str | None = option_field(
        None,
        "Automatic augmentation by timm of the training images, such as rand-m9-mstd0.5.",
        panel=IMAGES,
    )
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

    def __post_init__(self) -> None:
        if self.data is None:
            raise UsageError(
                f"{option('data')}: is missing; digits, a folder with train/ and val/ (or test/), or a data set of timm"
            )
        check_options(self)

    def class_count(self, *, test_only: bool = False) -> int:
        """The number of classes of the data set.

        Args:
            test_only: be content with test images, as `sphereify.datasets.load_data`.

        Raises:
            DataError: as `sphereify.datasets.load_data`.
        """
        from sphereify.datasets import class_count

        return class_count(self.data or "", data_root=self.data_root, test_only=test_only)

    def open(self, model: "nn.Module", *, as_trained: bool = False, test_only: bool = False) -> "Data":
        """The data set, with images prepared as `model` takes them.

        Args:
            model: decides the channels, the normalization and, where `img_size` does not say it, the size.
            as_trained: take the size from the training record of a loaded artifact first.
            test_only: be content with test images, as `sphereify.datasets.load_data`.

        Raises:
            DataError, UsageError: as `sphereify.datasets.load_data`.
        """
        from sphereify.convert.input_channels import input_channels
        from sphereify.convert.model_inputs import data_config
        from sphereify.datasets import load_data
        from sphereify.sources import RECORD_ATTRIBUTE

        record = getattr(model, RECORD_ATTRIBUTE, None) or {} if as_trained else {}
        trained = record["image_size"][-1] if record.get("image_size") else None
        return load_data(
            self.data or "",
            channels=input_channels(model),
            img_size=trained if self.img_size is None else self.img_size,
            config=data_config(model),
            data_root=self.data_root,
            augment=self.augment,
            train_images=self.train_images,
            test_images=self.test_images,
            test_only=test_only,
        )

"""Unlabelled images for a calibration, prepared as the model takes them."""

from torch import Tensor, nn

from sphereify.annotations import PLAN
from sphereify.calibration.options import CalibrationOptions
from sphereify.convert.input_channels import input_channels
from sphereify.datasets import load_images
from sphereify.errors import refused
from sphereify.model_images import image_config


def calibration_images(model: nn.Module, options: CalibrationOptions) -> list[Tensor]:
    """Batches of the images that `options` names, of the channels, size and range that a plain model takes.

    Args:
        model: the original, before its conversion.
        options: with `data` given.

    Returns:
        Tensors of shape (≤ 64, channels, height, width), on the CPU.

    Raises:
        UsageError: no `data`, or a model that is converted already and so has no original to follow.
        DataError: no such data, no images in it, or one that cannot be read.
    """
    if options.data is None:
        raise refused("data", "is missing; the images to calibrate on: digits, a folder, or a name of timm's")
    if PLAN.is_on(model):
        raise refused("data", "this model is converted already; a calibration takes the plain one, with its weights")
    return load_images(
        options.data,
        options.images,
        channels=input_channels(model),
        img_size=options.img_size,
        config=image_config(model),
        data_root=options.data_root,
    )

"""Transforms of timm and torchvision that prepare images for a model."""

from typing import Any

from sphereify.errors import first_line, invalid
from sphereify.preparation import SMALL, Preparation, normalization_of

PHOTOGRAPH_JITTER = 0.4
"""Strength of the colour jitter of larger images, timm's default."""


def make_transform(
    size: int,
    channels: int,
    config: dict[str, Any],
    *,
    training: bool,
    augment: str | None,
    shift: bool = True,
    color_jitter: float | None = None,
) -> Any:
    """The transform of timm for the model: for tests that of `Preparation`, for training with random changes.

    In training, images of up to SMALL pixels are shifted and mirrored instead of cropped.

    Args:
        size, channels: of an image as the model takes it.
        config: the `pretrained_cfg` of a model.
        training: True for training images, False for test images, which are neither moved nor changed in colour.
        augment, shift, color_jitter: as for `sphereify.datasets.load_data`.
    """
    if not training:
        return Preparation.of(size, channels, config).transform()
    from timm.data import create_transform
    from torchvision import transforms

    mean, deviation = normalization_of(channels, config)
    gray = [transforms.Grayscale()] if channels == 1 else []
    if size <= SMALL:
        shifts = [transforms.RandomCrop(size, padding=size // 8)] if shift else []
        moves = [*shifts, transforms.RandomHorizontalFlip()]
        moves += [transforms.ColorJitter(*(color_jitter,) * 3)] if color_jitter else []
        moves += [_augmentation(augment, size, mean)] if augment else []
        steps = [transforms.Resize((size, size)), *moves, transforms.ToTensor(), transforms.Normalize(mean, deviation)]
        return transforms.Compose([*gray, *steps])
    usual = 0.0 if channels == 1 else PHOTOGRAPH_JITTER
    if augment:
        _augmentation(augment, size, mean)  # fails now if timm does not know it
    photographs = create_transform(
        (channels, size, size),
        is_training=True,
        mean=mean,
        std=deviation,
        interpolation=config.get("interpolation") or "bicubic",
        color_jitter=usual if color_jitter is None else color_jitter,
        auto_augment=augment,
        crop_pct=config.get("crop_pct"),
        crop_mode=config.get("crop_mode"),
    )
    # A policy takes the place of timm's own jitter, so one that is asked for comes before it.
    jitters = [transforms.ColorJitter(*(color_jitter,) * 3)] if augment and color_jitter else []
    return transforms.Compose([*gray, *jitters, photographs])


def _augmentation(augment: str, size: int, mean: tuple[float, ...]) -> Any:
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    makers = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    settings = {"translate_const": int(size * 0.45), "img_mean": tuple(round(255 * m) for m in mean)}
    try:
        return makers.get(augment.split("-")[0], auto_augment_transform)(augment, settings)
    except Exception as error:  # timm checks with asserts
        raise invalid(
            "augment", augment, f"a policy of timm's, such as rand-m9-mstd0.5 ({first_line(error)})"
        ) from error

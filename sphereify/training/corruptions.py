"""Corruptions of images at five strengths, as ImageNet-C and CIFAR-10-C define them (Hendrycks & Dietterich 2019).

Images are in [0, 1] before and after. Strengths that depend on the size of an image (fog, noise, blur) are those of
CIFAR-10-C up to 64 pixels, and those of ImageNet-C above. Contrast, brightness and their kin have ImageNet-C's at any
size; darkness and γ, which it does not have, are its brightness downwards and a power of the pixels.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sphereify.errors import DataError, choose, invalid

SMALL = 64
"""Largest size in pixels of images that take CIFAR-10-C's strengths."""
STRENGTHS = 5


class Corruption(NamedTuple):
    """A corruption and its five strengths, for small and for large images."""

    apply: Callable[[Tensor, Any, torch.Generator], Tensor]
    small: tuple[Any, ...]
    large: tuple[Any, ...]


def corrupt(images: Tensor, name: str, strength: int, *, seed: int = 0, first: int = 0) -> Tensor:
    """Corrupted copies of images; each depends on its own number and the seed only, so batches may be of any size.

    Args:
        images: (B, C, H, W) in [0, 1], C 1 or 3.
        name: a key of `CORRUPTIONS`.
        strength: 1 (weak) to 5 (strong).
        seed: seed of noise and fog.
        first: number of the first image in its data set.

    Raises:
        UsageError: an unknown corruption, or a strength outside 1 to 5.
        DataError: images with other than 1 or 3 channels.
    """
    if name not in CORRUPTIONS:
        raise choose("corruptions", name, CORRUPTIONS)
    if not (isinstance(strength, int) and 1 <= strength <= STRENGTHS):
        raise invalid("strength", strength, f"a whole number from 1 to {STRENGTHS}")
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise DataError(f"corruptions: got images of shape {tuple(images.shape)}, expected (B, 1 or 3, H, W)")
    corruption = CORRUPTIONS[name]
    amount = (corruption.small if max(images.shape[2:]) <= SMALL else corruption.large)[strength - 1]
    corrupted = []
    for number, image in enumerate(images, start=first):
        generator = torch.Generator().manual_seed(hash_of(seed, number))
        corrupted.append(corruption.apply(image, amount, generator))
    return torch.stack(corrupted).clamp(0, 1) if corrupted else images.clone()


def hash_of(seed: int, number: int) -> int:
    """A seed for one image of a data set, far from those of its neighbours."""
    return (seed * 0x9E3779B1 + number * 0x85EBCA77 + 0x165667B1) % 2**63


def _contrast(image: Tensor, factor: float, _: torch.Generator) -> Tensor:
    """Deviations from the mean of each channel, times a factor."""
    mean = image.mean((1, 2), keepdim=True)
    return mean + (image - mean) * factor


def _brightness(image: Tensor, amount: float, _: torch.Generator) -> Tensor:
    """The value of hue, saturation and value, moved by an amount; black becomes grey."""
    value = image.amax(0, keepdim=True)
    moved = (value + amount).clamp(0, 1)
    return torch.where(value > 0, image * (moved / value.clamp_min(1e-12)), moved)


def _gamma(image: Tensor, exponent: float, _: torch.Generator) -> Tensor:
    """Each pixel to the power of an exponent."""
    return image.clamp(0, 1) ** exponent


def _noise(image: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of a standard deviation, of its own in each channel."""
    return image + deviation * torch.randn(image.shape, generator=generator).to(image)


def _blur(image: Tensor, deviation: float, _: torch.Generator) -> Tensor:
    """A Gaussian blur of a standard deviation in pixels."""
    from torchvision.transforms.v2.functional import gaussian_blur

    reach = min(math.ceil(4 * deviation), min(image.shape[1:]) - 1)  # reflected at the edge, so within the image
    return gaussian_blur(image, [2 * reach + 1] * 2, [deviation] * 2)  # type: ignore[no-any-return]


def _fog(image: Tensor, density_and_decay: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Plasma fog: light of a fractal density, by the diamond-square method."""
    density, decay = density_and_decay
    height, width = image.shape[1:]
    cloud = _plasma(2 ** math.ceil(math.log2(max(height, width, 2))), decay, generator)[:height, :width].to(image)
    brightest = image.max()
    return (image + density * cloud) * brightest / (brightest + density).clamp_min(1e-12)


def _plasma(size: int, decay: float, generator: torch.Generator) -> Tensor:
    """A fractal map of (size, size) in [0, 1] that repeats at its edges; `size` is a power of two.

    From coarse to fine, the middle of each square, then of each diamond, is the mean of its four corners and a random
    number, whose range falls by `decay` from one scale to the next.
    """
    cloud = torch.zeros(size, size)
    step, spread = size, 100.0

    def jitter(like: Tensor) -> Tensor:
        return spread * (2 * torch.rand(like.shape, generator=generator) - 1)

    while step >= 2:
        half = step // 2
        corners = cloud[::step, ::step]
        rows = corners + corners.roll(-1, 0)
        middles = (rows + rows.roll(-1, 1)) / 4
        middles = middles + jitter(middles)
        cloud[half::step, half::step] = middles
        across = (corners + corners.roll(-1, 1) + middles + middles.roll(1, 0)) / 4
        cloud[::step, half::step] = across + jitter(across)
        down = (corners + corners.roll(-1, 0) + middles + middles.roll(1, 1)) / 4
        cloud[half::step, ::step] = down + jitter(down)
        step, spread = half, spread / decay
    cloud -= cloud.min()
    return cloud / cloud.max().clamp_min(1e-12)


_BRIGHTER, _DARKER = (0.1, 0.2, 0.3, 0.4, 0.5), (-0.1, -0.2, -0.3, -0.4, -0.5)
_CONTRASTS, _GAMMAS = (0.4, 0.3, 0.2, 0.1, 0.05), (1.5, 2.0, 2.5, 3.0, 4.0)
CORRUPTIONS: dict[str, Corruption] = {
    "contrast": Corruption(_contrast, _CONTRASTS, _CONTRASTS),
    "brightness": Corruption(_brightness, _BRIGHTER, _BRIGHTER),
    "darkness": Corruption(_brightness, _DARKER, _DARKER),
    "gamma": Corruption(_gamma, _GAMMAS, _GAMMAS),
    "fog": Corruption(
        _fog,
        ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)),
        ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)),
    ),
    "noise": Corruption(_noise, (0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "blur": Corruption(_blur, (0.4, 0.6, 0.7, 0.8, 1.0), (1.0, 2.0, 3.0, 4.0, 6.0)),
}
"""The corruptions by name: amounts are factors (contrast), differences of value (brightness, darkness), exponents
(gamma), density and decay (fog), standard deviations of pixels in [0, 1] (noise) and in pixels (blur)."""

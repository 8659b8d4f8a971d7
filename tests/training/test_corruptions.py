"""Corruptions: what each does to an image, at which strengths, and that it depends on the image alone."""

import pytest
import torch

from sphereify.errors import DataError, UsageError
from sphereify.training.corruptions import CORRUPTIONS, STRENGTHS, corrupt


def pictures(number: int = 4, channels: int = 3, size: int = 16) -> torch.Tensor:
    """Smooth colours with some texture, inside [0.3, 0.7], so that little is cut off at the ends of the range."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(number, channels, 4, 4, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    return 0.3 + 0.36 * smooth + 0.04 * torch.rand(smooth.shape, generator=draw)


def deviation(images: torch.Tensor) -> torch.Tensor:
    return images.std((2, 3), correction=0)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_changed_more_and_more_and_stays_in_the_range(name, channels):
    images = pictures(channels=channels)
    before = images.clone()
    distances = []
    for strength in range(1, STRENGTHS + 1):
        corrupted = corrupt(images, name, strength)
        assert corrupted.shape == images.shape
        assert corrupted.min() >= 0
        assert corrupted.max() <= 1
        distances.append(float((corrupted - images).square().mean()))
    assert distances == sorted(distances)
    assert distances[0] > 0
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_depends_on_the_image_its_number_and_the_seed_but_not_on_the_batch(name):
    images = pictures(5)
    whole = corrupt(images, name, 3, seed=7, first=10)
    parts = [corrupt(images[:2], name, 3, seed=7, first=10), corrupt(images[2:], name, 3, seed=7, first=12)]
    assert torch.equal(whole, torch.cat(parts))
    is_random = name in ("noise", "fog")
    assert torch.equal(whole, corrupt(images, name, 3, seed=8, first=10)) != is_random
    same = corrupt(images[:1].repeat(2, 1, 1, 1), name, 3)
    assert torch.equal(same[0], same[1]) != is_random


def test_contrast_keeps_the_mean_of_each_channel():
    images = pictures()
    for strength, factor in enumerate((0.4, 0.3, 0.2, 0.1, 0.05), start=1):
        found = corrupt(images, "contrast", strength)
        torch.testing.assert_close(found.mean((2, 3)), images.mean((2, 3)))
        torch.testing.assert_close(deviation(found), factor * deviation(images), rtol=1e-3, atol=1e-6)


def test_brightness_and_darkness_move_the_value_and_keep_the_hue():
    images = pictures()
    for name, sign in (("brightness", 1), ("darkness", -1)):
        found = corrupt(images, name, 2)
        torch.testing.assert_close(found.amax(1), images.amax(1) + sign * 0.2)
        torch.testing.assert_close(found / found.amax(1, keepdim=True), images / images.amax(1, keepdim=True))


def test_gamma_is_a_power_of_the_pixels():
    torch.testing.assert_close(corrupt(pictures(), "gamma", 2), pictures() ** 2)


def test_noise_has_its_standard_deviation():
    grey = torch.full((8, 3, 32, 32), 0.5)
    assert float((corrupt(grey, "noise", 2) - grey).std()) == pytest.approx(0.06, rel=0.03)
    large = torch.full((1, 3, 80, 80), 0.5)
    assert float((corrupt(large, "noise", 2) - large).std()) == pytest.approx(0.12, rel=0.03)


def test_a_blur_keeps_the_mean_and_spreads_a_point_by_its_standard_deviation():
    point = torch.zeros(1, 1, 33, 33)
    point[..., 16, 16] = 1
    found = corrupt(point, "blur", 5)[0, 0]
    assert float(found.sum()) == pytest.approx(1, abs=1e-4)
    places = torch.arange(33.0) - 16
    assert float((found.sum(1) * places**2).sum()) == pytest.approx(1, rel=0.1)


def test_fog_lightens_what_is_dark_and_does_not_exceed_the_brightest_pixel():
    images = pictures()
    images[..., :8] = 0
    found = corrupt(images, "fog", 3)
    assert (found[..., :8].mean((1, 2, 3)) > 0.1).all()
    assert (found.amax((1, 2, 3)) <= images.amax((1, 2, 3)) + 1e-6).all()
    assert corrupt(torch.ones(1, 3, 7, 12) * 0.5, "fog", 5).shape == (1, 3, 7, 12)


def test_no_image_is_no_error():
    assert corrupt(torch.zeros(0, 3, 8, 8), "fog", 1).shape == (0, 3, 8, 8)


def test_what_cannot_be_corrupted_is_refused():
    with pytest.raises(
        UsageError, match=r"corruptions: got 'contrst', expected .*noise, blur\. Did you mean 'contrast'"
    ):
        corrupt(pictures(), "contrst", 1)
    for strength in (0, 6, 1.5):
        with pytest.raises(UsageError, match=f"strength: got {strength}, expected a whole number from 1 to 5"):
            corrupt(pictures(), "fog", strength)
    for shape in ((1, 4, 8, 8), (3, 8, 8)):
        with pytest.raises(DataError, match=r"corruptions: got images of shape .*, expected \(B, 1 or 3, H, W\)"):
            corrupt(torch.zeros(shape), "fog", 1)

"""Options of a calibration, and the images that they name."""

import re

import pytest
import torch
from torch import nn

from sphereify import sphereify
from sphereify.calibration.images import calibration_images
from sphereify.calibration.options import CalibrationOptions
from sphereify.errors import UsageError


def test_the_images_have_the_channels_and_the_size_of_the_model():
    gray = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    batches = calibration_images(gray, CalibrationOptions("digits", images=70, img_size=12))
    assert [tuple(batch.shape) for batch in batches] == [(64, 1, 12, 12), (6, 1, 12, 12)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"images": 5}, "images: has no effect without data"),
        ({"steps": 5}, "steps: has no effect without data"),
        ({"data": "digits", "contrast_jitter": True}, "contrast_jitter: has no effect without steps"),
        ({"agreement": 0.9}, "agreement: has no effect without data"),
        (
            {"data": "digits", "agreement": 1.0},
            "agreement: got 1.0, expected a number above 0 and below 1. Usual: 0.95",
        ),
        ({"img_size": 32}, "img_size: has no effect without data"),
        ({"data": "digits", "images": 0}, "images: got 0, expected a number of at least 1. Usual: 500 to 2,000."),
        ({"data": "digits", "steps": -1}, "steps: got -1, expected a number of at least 0"),
        ({"data": "digits", "img_size": 0}, "img_size: got 0, expected a number of at least 1"),
    ],
)
def test_options_that_are_not_valid_or_have_no_effect_are_errors(options, told):
    with pytest.raises(UsageError, match=re.escape(told)):
        CalibrationOptions(**options)


def test_a_calibration_needs_images_and_the_plain_model():
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
    with pytest.raises(UsageError, match="data: is missing"):
        calibration_images(plain, CalibrationOptions())
    with pytest.raises(UsageError, match="converted already"):
        calibration_images(sphereify(plain, example_inputs=torch.randn(2, 1, 8, 8)), CalibrationOptions("digits"))

"""The way of a layer's output through sums and ReLUs."""

import copy

import torch

from sphereify import calibrate, sphereify
from tests.calibration.networks import Residual, error, smooth_images, trained_statistics


def test_sums_are_followed_in_place_or_not():
    torch.manual_seed(0)
    original = trained_statistics(Residual())
    x = smooth_images()
    before = copy.deepcopy(original.state_dict())
    model = sphereify(original)
    calibration = calibrate(model, original, x.split(32))
    assert list(calibration.layers) == ["stem", "a", "b", "fc"]
    assert min(calibration.r2.values()) > 0.6
    assert error(model, original, smooth_images()) < 0.5
    torch.testing.assert_close(original.state_dict(), before, rtol=0, atol=0)


def test_each_fit_knows_the_sum_and_the_relu_behind_its_layer(monkeypatch):
    from sphereify.calibration import layer

    torch.manual_seed(0)
    original = trained_statistics(Residual())
    seen = []

    def spy(pair, batches):
        seen.append((pair.name, batches[0].rectified, batches[0].added is not None))
        x = batches[0].x  # both blocks add what they received, and a ReLU follows
        if batches[0].added is not None:
            torch.testing.assert_close(batches[0].added, x.movedim(1, -1).flatten(0, -2), rtol=0, atol=0)
        return layer.set_layer(pair, batches)

    monkeypatch.setattr("sphereify.calibration.least_squares.set_layer", spy)
    calibrate(sphereify(original), original, [smooth_images(16)])
    assert seen == [("stem", True, False), ("a", True, True), ("b", True, True)]

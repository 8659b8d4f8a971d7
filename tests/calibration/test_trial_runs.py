"""Trial runs of the original: networks whose passes cannot take turns, and outputs that are not finite."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sphereify import calibrate, sphereify
from sphereify.errors import DataError
from tests.calibration.networks import Residual, smooth_images


class KeepsState(nn.Module):
    """Hangs a tensor on itself between two layers: two batches side by side would mix it up."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 8))
        self.kept = None

    def forward(self, x):
        self.kept = self.a(x).relu()
        return F.leaky_relu(self.c(torch.cat([self.b(self.kept).relu(), self.kept], 1)), 1.0)


@pytest.mark.parametrize("sizes", [[16, 16, 16], [16, 16, 8]])
def test_a_network_that_keeps_a_state_is_calibrated_as_on_one_batch(sizes):
    torch.manual_seed(8)
    original = KeepsState()
    x = smooth_images(sum(sizes))
    parts = sphereify(original, calibration=x.split(sizes))
    whole = sphereify(original, calibration=[x])
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_an_original_without_finite_outputs_is_named():
    original = Residual()
    with torch.no_grad():
        original.fc.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="original network's output is not finite"):
        calibrate(sphereify(Residual()), original, [smooth_images(16)])

"""The calibration of an angular head."""

import torch
import torch.nn.functional as F
from torch import nn

from sphereify import calibrate, sphereify
from sphereify.nn import AngularHead


def test_a_head_of_unit_class_weights_is_reproduced():
    torch.manual_seed(4)
    original = nn.Sequential(nn.Linear(6, 5, bias=False))
    with torch.no_grad():
        original[0].weight.copy_(F.normalize(original[0].weight, dim=1))
    model = sphereify(original, head="w-softmax")
    with torch.no_grad():
        model[0].weight.normal_()
    x = torch.randn(300, 6)
    calibration = calibrate(model, original, [x])
    assert isinstance(model[0], AngularHead)
    assert calibration.r2["0"] >= 0.999
    torch.testing.assert_close(model(x), original(x), atol=1e-2, rtol=1e-3)

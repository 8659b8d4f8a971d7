"""A network trained on digits, converted with and without a calibration."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sphereify import sphereify
from sphereify.datasets import load_data


@pytest.fixture(scope="module")
def digits():
    """A small network trained on digits, its images, and its accuracy on the held-out part."""
    torch.manual_seed(0)
    data = load_data("digits", channels=1, img_size=12)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    x, y = data.train.tensors
    for _ in range(6):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval(), data


@torch.no_grad()
def accuracy(net: nn.Module, data) -> float:
    x, y = data.test.tensors
    return float((net.eval()(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize(
    "operator", ["cosine", *(pytest.param(o, marks=pytest.mark.exhaustive) for o in ("linear", "sigmoid"))]
)
def test_a_trained_network_keeps_its_accuracy_when_calibrated_and_loses_it_when_copied(digits, operator):
    net, data = digits
    original = accuracy(net, data)
    assert original > 0.93
    copied = accuracy(sphereify(net, operator=operator), data)
    calibrated = accuracy(sphereify(net, operator=operator, calibration=data.train.tensors[0].split(500)), data)
    assert copied < original - 0.2
    assert calibrated > original - 0.05

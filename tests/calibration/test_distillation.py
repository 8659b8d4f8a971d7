"""Optimizer steps towards the original's outputs."""

import copy

import pytest
import torch
from torch import nn

from sphereify import calibrate, sphereify
from sphereify.calibration.distillation import distill
from sphereify.errors import UsageError
from tests.calibration.networks import Residual, smooth_images, trained_statistics


def test_steps_bring_the_outputs_closer_and_change_nothing_else():
    torch.manual_seed(5)
    original = trained_statistics(Residual())
    x = smooth_images(128)
    model = sphereify(original, calibration=[x])
    model.stem.weight.requires_grad_(False)
    frozen, statistics = model.stem.weight.clone(), model.na.running_mean.clone()
    heard = []
    before, after = distill(model, original, x.split(64), steps=40, on_step=lambda step, loss: heard.append(step))
    assert after < before
    assert heard == list(range(1, 41))
    assert torch.equal(model.stem.weight, frozen)
    assert torch.equal(model.na.running_mean, statistics)
    assert not model.training
    assert all(p.requires_grad for p in original.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_steps_that_make_it_worse_are_taken_back():
    torch.manual_seed(6)
    original = trained_statistics(Residual())
    x = smooth_images(64)
    model = sphereify(original, calibration=[x])
    kept = copy.deepcopy(model.state_dict())
    before, after = distill(model, original, [x], steps=5, lr=1e4)
    assert after == before
    torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)


def test_steps_ask_the_original_again_where_its_outputs_are_too_many_to_keep(monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    inputs = [torch.randn(8, 3, 12, 12)]
    kept, asked = sphereify(network), sphereify(network)
    first = distill(kept, network, inputs, steps=3)
    monkeypatch.setattr("sphereify.calibration.distillation.CACHE_BYTES", 0)
    assert distill(asked, network, inputs, steps=3) == first


@pytest.mark.parametrize("steps", [-1, -5])
def test_negative_steps_are_an_error(steps):
    original = Residual()
    with pytest.raises(UsageError, match="expected 0 or more"):
        calibrate(sphereify(original), original, [smooth_images(8)], steps=steps)

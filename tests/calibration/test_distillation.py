"""Optimizer steps towards the original's outputs."""

import copy

import pytest
import torch
from torch import nn

from sphereify import calibrate, plan_conversion, sphereify
from sphereify.calibration.distillation import distill
from sphereify.calibration.features import feature_modules, moved, recorded
from sphereify.convert.arguments import ModelArguments
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
    first = distill(kept, network, inputs, steps=3, augment=False)
    monkeypatch.setattr("sphereify.calibration.distillation.CACHE_BYTES", 0)
    assert distill(asked, network, inputs, steps=3, augment=False) == first


@pytest.mark.parametrize("steps", [-1, -5])
def test_negative_steps_are_an_error(steps):
    original = Residual()
    with pytest.raises(UsageError, match=f"steps: got {steps}, expected a number of at least 0"):
        calibrate(sphereify(original), original, [smooth_images(8)], steps=steps)


# ------------------------------------------------------------------------------------------- features and variations


class Blocks(nn.Module):
    """Two blocks of two convolutions between others."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU())
            for _ in range(2)
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean((2, 3)))


def test_features_are_those_of_the_blocks_at_one_and_two_thirds_of_the_depth_or_of_norms():
    original = Blocks()
    assert feature_modules(plan_conversion(original), original) == ["blocks.0", "blocks.1"]
    flat = nn.Sequential(*[layer for i in range(4) for layer in (nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())])
    names = feature_modules(plan_conversion(flat, include=["0", "3", "6"]), flat)
    assert names == ["4"]  # of three layers, both depths are at the middle one
    assert feature_modules(None, original) == []
    whole = nn.Sequential(
        nn.Sequential(*[nn.Conv2d(3, 3, 3) for _ in range(4)]), nn.ReLU()
    )  # one block around all layers
    assert feature_modules(plan_conversion(whole), whole) == ["0.1"]


def test_steps_with_features_bring_the_features_closer_than_steps_without():
    torch.manual_seed(5)
    original = trained_statistics(Blocks())
    x = smooth_images(64)
    start = sphereify(original).eval()

    def features(network):
        with recorded(network, ["blocks.0"]) as outputs, torch.no_grad():
            network.eval()(x)
        return outputs["blocks.0"]

    errors = []
    for with_features in (False, True):
        model = copy.deepcopy(start)
        distill(model, original, [x], steps=30, lr=1e-2, features=with_features, augment=False)
        errors.append(float((features(model) - features(original)).square().mean()))
    assert errors[1] < 0.5 * errors[0]
    assert not original.blocks[0]._forward_hooks


@pytest.mark.parametrize("jitter", [False, True])
def test_both_networks_see_the_same_varied_images_and_only_the_converted_one_less_contrast(jitter):
    torch.manual_seed(5)
    original = trained_statistics(Residual())
    x = smooth_images(32)
    model = sphereify(original)
    seen = {"model": [], "original": []}
    for name, network in (("model", model), ("original", original)):
        network.register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0]))
    distill(model, original, [x], steps=1, contrast_jitter=jitter, on_step=lambda *_: seen.update(last=len(seen)))
    (one,) = [y for y in seen["model"] if not torch.equal(y, x)]
    (other,) = [y for y in seen["original"] if not torch.equal(y, x)]
    assert torch.equal(one, other) != jitter
    means = [y.mean((2, 3), keepdim=True) for y in (one, other)]
    torch.testing.assert_close(*means)
    factor = (one - means[0]).flatten(1).norm(dim=1) / (other - means[1]).flatten(1).norm(dim=1)
    torch.testing.assert_close(one, means[1] + (other - means[1]) * factor.view(-1, 1, 1, 1))
    assert (factor <= 1 + 1e-5).all()
    assert (factor >= 0.2 - 1e-5).all()


def test_varied_images_are_mirrored_or_not_and_shifted_alike():
    images = torch.arange(2 * 3 * 16 * 16.0).view(2, 3, 16, 16)
    varied, label = moved(ModelArguments((images, "label")), torch.Generator().manual_seed(3)).args
    assert label == "label"
    assert varied.shape == images.shape
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    mirrored = torch.nn.functional.pad(images.flip(3), (2, 2, 2, 2), mode="replicate")
    places = [
        [(i, j) for i in range(5) for j in range(5) for source in (padded, mirrored)
         if torch.equal(source[number, :, i : i + 16, j : j + 16], varied[number])]
        for number in range(2)
    ]  # fmt: skip
    assert places[0] == places[1]
    assert len(places[0]) == 1

"""Normalizations behind a calibrated layer."""

import pytest
import torch
from torch import nn

from sphereify import sphereify
from sphereify.calibration.norms import set_batch_norm
from tests.calibration.networks import (
    conv_norm_net,
    hidden,
    r_squared,
    rows,
    smooth_images,
    trained_statistics,
)


def test_statistics_in_training_and_evaluation_agree_after_a_calibration():
    """A BatchNorm behind an angular layer keeps the statistics that the layer has: training begins where it stands."""
    torch.manual_seed(1)
    original = trained_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(10)))
    x = smooth_images(256)
    model = sphereify(original, calibration=[x])
    with torch.no_grad():
        evaluated, trained = model.eval()(x), model.train()(x)
    torch.testing.assert_close(trained, evaluated, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "operator", ["linear", *(pytest.param(o, marks=pytest.mark.exhaustive) for o in ("cosine", "sigmoid"))]
)
def test_a_layer_that_replaces_its_norm_is_fitted_to_the_output_of_the_norm(operator):
    torch.manual_seed(1)
    original = conv_norm_net(bias=False)
    batches = [smooth_images(192)]
    unseen = smooth_images()
    target = original(unseen)
    always = sphereify(original, operator=operator, rescale="always", calibration=batches)
    replaced = sphereify(original, operator=operator, norm="replace", calibration=batches)
    assert isinstance(replaced[1], nn.Identity)
    assert r_squared(replaced(unseen), target) > r_squared(always(unseen), target) - 0.05


# Fails at present for "replace": the target is taken with running statistics that such a norm does not have.
@pytest.mark.parametrize("norm", ["keep", "replace"])
def test_a_norm_that_keeps_no_statistics_is_no_obstacle(norm):
    torch.manual_seed(8)
    original = hidden(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))
    x = smooth_images()
    model = sphereify(original, norm=norm, calibration=[x])
    assert r_squared(rows(model(x)), rows(original(x))) > 0.5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1.0, 1e4], ids=["usual", "variance below eps"])
def test_beta_and_gamma_of_either_sign_move_into_the_norm(size, bias):
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8)).double().eval()
    norm = plain[1]
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    model = sphereify(plain)
    beta, gamma = torch.randn(8).double() * size, torch.randn(8).double()
    assert (beta < 0).any()
    assert (beta > 0).any()
    g = model[0](torch.randn(4, 3, 6, 6).double()).detach()
    with torch.no_grad():
        set_batch_norm(norm, beta, gamma, rows(g).mean(0), rows(g).var(0, correction=0))
        expected = beta.view(-1, 1, 1) * g + gamma.view(-1, 1, 1)
        torch.testing.assert_close(norm(g), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(norm.train()(g), expected, rtol=1e-6, atol=1e-6)

"""Calibrations of layers with a magnitude: h(‖x‖) is a part of what the targets are regressed on."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sphereify import calibrate, sphereify
from tests.calibration.networks import hidden

FORMS = ("ball", "tanh", "linear", "segment", "log", "mix")


def images(number: int = 96) -> torch.Tensor:
    """Images of very different contrast."""
    draw = torch.Generator().manual_seed(2)
    return torch.randn(number, 4, 7, 7, generator=draw) * torch.rand(number, 1, 1, 1, generator=draw) * 3


def explained(output: torch.Tensor, target: torch.Tensor) -> float:
    residual = (output - target).square().sum()
    return float(1 - residual / (target - target.mean((0, 2, 3), keepdim=True)).square().sum())


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_fit_is_the_regression_on_sized_unit_patches(form, weighted):
    torch.manual_seed(0)
    net, x = hidden(nn.Conv2d(4, 6, 3, groups=2)), images()
    model = sphereify(net, magnitude=form, weighted=weighted, rescale="always")
    fit = calibrate(model, net, [x[:48], x[48:]])
    layer = model[0]
    # An independent regression, by torch's solver, of the original's output on h·x/‖x‖ of each group.
    target, predicted = net(x), []
    for group in range(2):
        patches = F.unfold(x[:, 2 * group : 2 * group + 2], 3).movedim(1, 2)
        norms = (patches.square().sum(2, keepdim=True) + layer.eps).sqrt()
        unit = None if layer.magnitude.radius is None else layer.magnitude.radius * norms.mean(1, keepdim=True)
        rows = (patches / norms * layer.magnitude.of(norms, unit)).flatten(0, 1)
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        wanted = target[:, 3 * group : 3 * group + 3].flatten(2).movedim(1, 2).flatten(0, 1)
        predicted.append((rows @ torch.linalg.lstsq(rows, wanted).solution).unflatten(0, (len(x), -1)).movedim(2, 1))
    best = explained(torch.cat(predicted, 1).unflatten(2, target.shape[2:]), target)
    got = explained(model(x), target)
    assert got == pytest.approx(best, abs=2e-3)
    assert fit.r2["0"] == pytest.approx(got, abs=1e-3)
    if form in ("linear", "segment", "mix"):
        assert got > 0.9


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_norm_behind_it_holds_the_scale_and_knows_the_statistics(form):
    torch.manual_seed(0)
    net, x = hidden(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()), images()
    for _ in range(20):
        net(x)
    net.eval()
    for weighted in (False, True):
        model = sphereify(net, magnitude=form, weighted=weighted, operator="linear")
        calibrate(model, net, [x])
        inside = model[0](x)
        torch.testing.assert_close(model[1].running_mean, inside.mean((0, 2, 3)), rtol=2e-2, atol=2e-3)
        torch.testing.assert_close(model[1].running_var, inside.var((0, 2, 3)), rtol=5e-2, atol=1e-4)
        # Bounded forms in units of the input cannot see the contrast, in which these images differ most.
        assert explained(model(x), net(x)) > (0.5 if form in ("ball", "tanh") else 0.75 if form == "log" else 0.95)


@torch.no_grad()
def test_filters_hold_the_scale_where_nothing_else_does():
    torch.manual_seed(0)
    net, x = hidden(nn.Conv2d(4, 6, 3)), images()
    model = sphereify(net, magnitude="tanh", weighted=True, rescale="never")
    always = sphereify(net, magnitude="tanh", weighted=True, rescale="always")
    for one in (model, always):
        calibrate(one, net, [x])
    torch.testing.assert_close(model(x), always(x), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_calibration_sets_the_mean_of_the_data():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8)), torch.randn(64, 6)
    model = sphereify(net, magnitude="tanh", magnitude_radius=2.0, head="keep")
    calibrate(model, net, [x[:32], x[32:]])
    expected = (x.square().sum(1) + model[0].eps).sqrt().mean()
    torch.testing.assert_close(model[0].mean_norm, expected)

"""Normalizations whose channels are the filters of the layer before them, and others."""

import pytest
import torch
from torch import nn

from sphereify import calibrate, fold, plan_conversion, sphereify
from tests.convert.models import Net

TOKENS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class OwnRMS(nn.Module):
    """A normalization over one axis, written by hand."""

    def __init__(self, channels, axis):
        super().__init__()
        self.axis = axis
        self.weight = nn.Parameter(torch.ones(channels, *[1] * (-1 - axis)))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(self.axis, keepdim=True) + 1e-6) * self.weight


class OwnRMSNorm(OwnRMS):
    pass


def over_tokens(filters, norm, turn=lambda y: y, inputs=TOKENS):
    wiring = lambda n, x: n.last(n.norm(turn(n.layer(x))).flatten(1))  # noqa: E731
    return Net(wiring, layer=nn.Linear(8, filters), norm=norm, last=nn.Linear(5 * filters, 3)), inputs


def over_images(norm, turn=lambda y: y):
    return Net(
        lambda n, x: n.last(n.norm(turn(n.layer(x))).flatten(1)),
        layer=nn.Conv2d(3, 6, 3), norm=norm, last=nn.Linear(216, 3),
    ), IMAGES  # fmt: skip


OWN = {
    "layer norm of each token": lambda: over_tokens(6, nn.LayerNorm(6)),
    "batch norm behind a transposition": lambda: over_tokens(6, nn.BatchNorm1d(6), lambda y: y.transpose(1, 2)),
    "layer norm of each head": lambda: over_tokens(6, nn.LayerNorm(3), lambda y: y.unflatten(2, (2, 3))),
    "layer norm over tokens and channels": lambda: over_tokens(6, nn.LayerNorm((5, 6))),
    "a norm by hand": lambda: over_tokens(6, OwnRMSNorm(6, -1)),
    "batch norm of maps": lambda: over_images(nn.BatchNorm2d(6)),
    "layer norm of channels last": lambda: over_images(nn.LayerNorm(6), lambda y: y.permute(0, 2, 3, 1)),
}
FOREIGN = {
    "batch norm of tokens": lambda: over_tokens(6, nn.BatchNorm1d(5)),
    "batch norm of as many tokens as filters": lambda: over_tokens(5, nn.BatchNorm1d(5)),
    "group norm of tokens": lambda: over_tokens(6, nn.GroupNorm(1, 5)),
    "instance norm of tokens": lambda: over_tokens(5, nn.InstanceNorm1d(5, affine=True)),
    "layer norm over tokens": lambda: over_tokens(5, nn.LayerNorm(5), lambda y: y.transpose(1, 2)),
    "a norm over tokens by hand": lambda: over_tokens(5, OwnRMSNorm(5, -2)),
    "layer norm of columns": lambda: over_images(nn.LayerNorm(6)),
    "layer norm of positions": lambda: over_images(nn.LayerNorm((6, 6))),
    "batch norm of positions": lambda: over_images(nn.BatchNorm1d(36), lambda y: y.flatten(2).transpose(1, 2)),
    "batch norm of rows": lambda: over_images(nn.BatchNorm2d(6), lambda y: y.transpose(1, 2)),
    "one channel for all": lambda: over_images(nn.BatchNorm2d(1), lambda y: y.flatten(2).unsqueeze(1)),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_normalization_of_the_filters_rescales_the_layer(kind):
    model, x = OWN[kind]()
    decision = plan_conversion(model, example_inputs=x).decisions[0]
    assert (decision.name, decision.norm, decision.rescale) == ("layer", "norm", False)


@pytest.mark.parametrize("kind", FOREIGN)
def test_behind_a_normalization_along_another_axis_the_layer_is_rescaled_by_itself(kind):
    model, x = FOREIGN[kind]()
    decision = plan_conversion(model, example_inputs=x).decisions[0]
    assert (decision.name, decision.norm, decision.owns_norm, decision.rescale) == ("layer", None, False, True)
    assert decision.reason == "norm normalizes along another axis: SphereNorm rescaling"


def test_without_a_run_a_number_of_channels_that_does_not_fit_tells():
    plan = plan_conversion(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(5), nn.Flatten(), nn.Linear(30, 3)))
    assert (plan.decisions[0].norm, plan.decisions[0].rescale) == (None, True)


def trained(model, x):
    with torch.no_grad():
        for _ in range(20):
            model(x + torch.randn_like(x))
    return model.eval()


@pytest.mark.parametrize("kind", ["batch norm of as many tokens as filters", "batch norm of tokens"])
def test_calibration_and_folding_leave_a_batch_norm_of_tokens_alone_that_no_run_has_shown(kind):
    torch.manual_seed(0)
    model, x = FOREIGN[kind]()
    original = trained(model.train(), x)
    angular = sphereify(original, rescale="always")  # planned without a run: only a pass shows the axis
    before = {name: value.clone() for name, value in angular.norm.state_dict().items()}
    calibrate(angular, original, [TOKENS + 0.1 * torch.randn_like(TOKENS) for _ in range(4)])
    torch.testing.assert_close(angular.norm.state_dict(), before, rtol=0, atol=0)
    folded = fold(angular, x)
    torch.testing.assert_close(folded(x), angular.eval()(x), rtol=1e-4, atol=1e-4)
    assert folded.folding.layers["layer"] is None

"""The closed-form start: exact where an exact answer exists, close to the original elsewhere, never in the way."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify import apply_plan, calibrate, plan_conversion, sphereify
from sphereify.calibration.distillation import distill
from sphereify.errors import UsageError
from sphereify.nn import SphereConv2d, SphereLinear
from tests.calibration.networks import (
    GEOMETRIES,
    OPERATORS,
    SPHERE,
    Residual,
    conv,
    conv_norm_net,
    hidden,
    images,
    r_squared,
    rows,
    small,
    smooth_images,
    state,
    trained_statistics,
)


def test_calibrating_twice_gives_the_same_weights():
    torch.manual_seed(4)
    original = trained_statistics(Residual())
    x = smooth_images()
    first, second = (sphereify(original, calibration=x.split(16), calibration_steps=3) for _ in range(2))
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def test_channels_that_are_constant_are_told():
    original = trained_statistics(Residual())
    with torch.no_grad():
        original.a.weight[:3] = 0
    calibration = calibrate(sphereify(original), original, [smooth_images(64)])
    assert "3 of 8 channels are constant" in calibration.layers["a"].note


def test_after_an_error_half_way_the_model_is_what_it_was():
    original = Residual()
    model = sphereify(original)
    before = copy.deepcopy(model.state_dict())

    def stop(name, explained):
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        calibrate(model, original, [smooth_images(16)], on_layer=stop)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_what_can_have_no_effect_is_an_error():
    original = Residual()
    with pytest.raises(UsageError, match="without calibration"):
        sphereify(original, calibration_steps=5)
    model = sphereify(original).requires_grad_(False)
    with pytest.raises(UsageError, match="requires a gradient"):
        distill(model, original, [smooth_images(8)], steps=2)
    with pytest.raises(UsageError, match="one network"):
        calibrate(model, model, [smooth_images(8)])


def test_autocast_around_a_calibration_changes_nothing():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    inputs = [torch.randn(8, 3, 12, 12)]
    plain, cast = sphereify(network), sphereify(network)
    calibrate(plain, network, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        calibrate(cast, network, inputs)
    for one, other in zip(plain.parameters(), cast.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def randomized(layer: nn.Module) -> nn.Module:
    """An angular layer with filters, β of both signs, and γ that nobody would get by chance."""
    with torch.no_grad():
        layer.weight.normal_()
        layer.beta.normal_().mul_(2)
        (layer.gamma if layer.bias is None else layer.bias).normal_()
    return layer


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_layer_that_is_itself_angular_is_recovered(dim, geometry):
    torch.manual_seed(0)
    original = hidden(randomized(conv(dim, SPHERE, rescale=True, **geometry)))
    model = sphereify(hidden(conv(dim, **geometry)))
    x = images(dim)
    calibration = calibrate(model, original, x.split(20))
    assert calibration.r2["0"] >= 0.999
    fresh = images(dim)
    torch.testing.assert_close(model(fresh), original(fresh), atol=2e-2, rtol=2e-3)
    assert not torch.equal(fresh, x)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_plain_convolution_is_reproduced_where_all_patches_have_one_norm(dim):
    torch.manual_seed(1)
    original = hidden(conv(dim, padding=1, padding_mode="circular"))
    signs = images(dim).sign() * 2
    model = sphereify(original, calibration=[signs])
    torch.testing.assert_close(model(signs), original(signs), atol=2e-2, rtol=2e-3)
    assert r_squared(sphereify(original)(signs), original(signs)) < 0.999  # copying takes inputs of unit size


def test_a_1x1_convolution_over_unit_channels_is_reproduced():
    torch.manual_seed(2)
    original = hidden(nn.Conv2d(4, 8, 1))
    x = F.normalize(images(2), dim=1)
    model = sphereify(original, calibration=[x])
    torch.testing.assert_close(model(x), original(x), atol=2e-2, rtol=2e-3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(200, 6), (40, 5, 6)], ids=["rows", "tokens"])
def test_a_linear_map_over_unit_rows_is_reproduced(bias, shape):
    torch.manual_seed(3)
    original = nn.Sequential(nn.Linear(6, 7, bias=bias), nn.ReLU(), nn.Linear(7, 3))
    x = F.normalize(torch.randn(shape), dim=-1)
    model = sphereify(original, calibration=[x], include="0", head="keep")
    assert isinstance(model[0], SphereLinear)
    torch.testing.assert_close(model(x), original(x), atol=1e-2, rtol=2e-3)


def test_r_squared_is_the_share_of_the_variance_that_the_layer_explains():
    torch.manual_seed(5)
    original = hidden(nn.Conv2d(4, 8, 3, padding=1))
    x = images(2)
    model = sphereify(original)
    calibration = calibrate(model, original, x.split(16))
    y, target = rows(model(x)), rows(original(x))
    assert 0.5 < calibration.r2["0"] < 0.999
    assert calibration.r2["0"] == pytest.approx(r_squared(y, target), abs=1e-3)


def test_a_plain_convolution_is_fitted_at_least_as_well_as_any_rescaling_of_its_own_filters():
    """The least squares of the docstring: copied filters with the best β and γ cannot be better."""
    torch.manual_seed(6)
    original = hidden(nn.Conv2d(4, 8, 3))
    x = images(2) * torch.rand(48, 1, 1, 1).mul(4).exp()
    target = rows(original(x))
    copied = SphereConv2d.from_conv(copy.deepcopy(original[0]))
    copied.bias = None
    g = rows(copied(x))
    beta = ((g - g.mean(0)) * (target - target.mean(0))).sum(0) / (g - g.mean(0)).square().sum(0)
    best = beta * (g - g.mean(0)) + target.mean(0)
    calibration = calibrate(sphereify(original), original, [x])
    assert calibration.r2["0"] >= r_squared(best, target) - 1e-3


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_calibrated_network_is_closer_to_its_original_than_copied_weights(operator, bias):
    torch.manual_seed(0)
    original = conv_norm_net(bias)
    model = sphereify(original, operator=operator, calibration=smooth_images().split(32))
    unseen = smooth_images()
    target = original(unseen)
    copied = r_squared(sphereify(original, operator=operator)(unseen), target)
    calibrated = r_squared(model(unseen), target)
    assert calibrated > copied + 0.05
    assert calibrated > 0.6


class DefinedBackwards(nn.Module):
    """Layers run in another order than they were written down in. It takes small images, which nobody would assume."""

    def __init__(self, traceable: bool):
        super().__init__()
        self.traceable = traceable
        self.last = nn.Conv2d(8, 8, 3)
        self.first = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.shape[-1] > 16:
            raise ValueError("small images only")
        return F.leaky_relu(self.last(self.first(x).relu()), 1.0)


@pytest.mark.parametrize("traceable", [True, False])
def test_layers_are_fitted_in_the_order_in_which_they_run(traceable):
    torch.manual_seed(2)
    original = DefinedBackwards(traceable)
    x = smooth_images()
    model = sphereify(original)
    order: list[str] = []
    calibration = calibrate(model, original, [x], on_layer=lambda name, r2: order.append(name))
    assert order == ["first", "last"] == list(calibration.layers)
    y, target = rows(model(x)), rows(original(x))
    assert calibration.r2["last"] == pytest.approx(r_squared(y, target), abs=1e-3)


@pytest.mark.parametrize("inplace", [True, False])
def test_the_original_is_not_touched_unless_asked(inplace):
    torch.manual_seed(0)
    original = small()
    before = state(original)
    kinds = [type(module) for module in original]
    model = sphereify(original, calibration=[torch.randn(40, 3, 6, 6)], inplace=inplace)
    assert (model is original) == inplace
    if not inplace:
        torch.testing.assert_close(original.state_dict(), before, rtol=0, atol=0)
        assert [type(module) for module in original] == kinds


def test_converting_in_place_gives_the_same_as_on_a_copy():
    torch.manual_seed(1)
    original = small().eval()
    x = torch.randn(40, 3, 6, 6)
    on_a_copy = sphereify(original, calibration=[x])(x)
    torch.testing.assert_close(sphereify(original, calibration=[x], inplace=True)(x), on_a_copy, rtol=0, atol=0)


def test_both_models_get_their_modes_and_hooks_back():
    original = small()
    original[1].eval()
    model = sphereify(original)
    model[3].eval()
    modes = [[module.training for module in net.modules()] for net in (model, original)]
    assert not all(modes[0])
    assert any(modes[0])
    calibrate(model, original, [torch.randn(40, 3, 6, 6)])
    assert [[module.training for module in net.modules()] for net in (model, original)] == modes
    assert not any(module._forward_hooks for net in (model, original) for module in net.modules())


def test_modes_come_back_after_an_error_too():
    original = small()
    model = sphereify(original)
    with pytest.raises(UsageError, match=r"does not take the first batch, .*mat1 and mat2 shapes cannot be multiplied"):
        calibrate(model, original, [torch.randn(4, 3, 9, 9)])
    assert all(module.training for net in (model, original) for module in net.modules())
    assert not any(module._forward_hooks for net in (model, original) for module in net.modules())


def test_calibration_runs_in_eval_mode():
    """Dropout off and no BatchNorm statistics gathered: a second calibration on the same inputs gives the same."""
    torch.manual_seed(2)
    original = small().train()
    x = torch.randn(60, 3, 6, 6)
    first, second = (sphereify(original, calibration=[x]) for _ in range(2))
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert original[1].num_batches_tracked == 0


def test_parameters_stay_the_same_objects_and_trainable():
    model = sphereify(small())
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    calibrate(model, small(), [torch.randn(40, 3, 6, 6)])
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_kept_layers_are_left_alone():
    torch.manual_seed(3)
    original = hidden(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model = sphereify(original, exclude="2", calibration=[torch.randn(20, 3, 8, 8)])
    torch.testing.assert_close(model[2].state_dict(), original[2].state_dict(), rtol=0, atol=0)
    assert not torch.equal(model[0].weight, original[0].weight)


def test_a_model_that_was_not_converted_is_an_error():
    with pytest.raises(UsageError, match="calibration: Sequential was not converted"):
        calibrate(small(), small(), [torch.randn(4, 3, 6, 6)])


class Unused(nn.Module):
    """Takes small images, which nobody would assume: without inputs it is not run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.rare = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 16:
            raise ValueError("small images only")
        return F.leaky_relu(self.rare(x) if float(x.max()) > 1e9 else self.conv(x), 1.0)


def test_a_layer_that_the_inputs_never_reach_is_left_as_it_is_and_not_reported():
    original = Unused()
    model = sphereify(original)
    heard: list[str] = []
    calibration = calibrate(model, original, [torch.randn(8, 3, 6, 6)], on_layer=lambda name, r2: heard.append(name))
    assert list(calibration.layers) == ["conv"] == heard
    torch.testing.assert_close(model.rare.weight, original.rare.weight, rtol=0, atol=0)


def test_a_layer_called_twice_is_fitted_to_both_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.conv(self.conv(x)), 1.0)

    torch.manual_seed(6)
    original = Twice()
    x = smooth_images(64)
    model = sphereify(original, calibration=[x])
    assert torch.isfinite(model(x)).all()
    assert r_squared(model(x).flatten(1), original(x).flatten(1)) > r_squared(sphereify(original)(x).flatten(1),
                                                                             original(x).flatten(1))  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS)
def test_constant_inputs_and_dead_filters_stay_finite(operator):
    original = small()
    with torch.no_grad():
        original[0].weight[0].zero_()
        original[0].bias.zero_()
    model = sphereify(original, operator=operator, calibration=[torch.zeros(8, 3, 6, 6), torch.ones(8, 3, 6, 6)])
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_a_plan_that_was_applied_by_hand_can_be_calibrated():
    torch.manual_seed(7)
    original = conv_norm_net(bias=False)
    x = smooth_images()
    model = apply_plan(original, plan_conversion(original))
    calibration = calibrate(model, original, [x])
    assert list(calibration.layers) == ["0", "3", "6"]
    torch.testing.assert_close(model(x), sphereify(original, calibration=[x])(x), rtol=0, atol=0)

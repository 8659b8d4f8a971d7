"""The closed-form start: exact where an exact answer exists, close to the original on real images, never in the way."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify import apply_plan, plan_conversion, sphereify
from sphereify.calibration import rows as fitting_rows
from sphereify.calibration.layer import _set_norm
from sphereify.calibration.least_squares import calibrate
from sphereify.calibration.rows import Geometry
from sphereify.datasets import load_data
from sphereify.errors import UsageError
from sphereify.nn import AngularHead, SphereConv1d, SphereConv2d, SphereConv3d, SphereLinear

OPERATORS = ("cosine", "linear", "sigmoid")
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SPHERE = {1: SphereConv1d, 2: SphereConv2d, 3: SphereConv3d}
GEOMETRIES = [
    pytest.param({"padding": 1}, id="padding"),
    pytest.param({"stride": 2}, id="stride"),
    pytest.param({"groups": 2, "padding": 1}, id="groups"),
    pytest.param({"dilation": 2}, id="dilation"),
    pytest.param({"dilation": 2, "padding": "same"}, id="same"),
    pytest.param({"padding": "valid", "bias": False}, id="valid"),
    pytest.param({"padding": 1, "padding_mode": "reflect"}, id="reflect"),
    pytest.param({"padding": 2, "padding_mode": "circular", "stride": 2, "groups": 4}, id="circular"),
    pytest.param({"kernel_size": 2, "padding": "same", "padding_mode": "replicate"}, id="even-same"),
]


def images(dim: int, number: int = 48, channels: int = 4, size: int | None = None) -> Tensor:
    return torch.randn(number, channels, *[size or {1: 24, 2: 9, 3: 6}[dim]] * dim)


def conv(dim: int, kinds: dict = PLAIN, **geometry) -> nn.Module:
    return kinds[dim](4, 8, **{"kernel_size": 3, **geometry})


def hidden(*layers: nn.Module) -> nn.Sequential:
    """The layers and an identity: a convolution that ends in the model's output would be kept as its classifier."""
    return nn.Sequential(*layers, nn.LeakyReLU(1.0))


def unrolled(layer: nn.Module, x: Tensor) -> Tensor:
    """(B, groups, positions, fan_in): every patch of a convolution."""
    shape = tuple(layer.weight.shape)
    vars(layer).setdefault("eps", 1e-4)
    site = SimpleNamespace(layer=layer, decision=SimpleNamespace(kind=f"conv{len(shape) - 2}d", shape=shape))
    patches = Geometry.of(site).patches(x).flatten(1, len(shape) - 2)
    return patches.unflatten(2, (layer.groups, -1)).flatten(3).movedim(2, 1)


def rows(output: Tensor) -> Tensor:
    """(B, C, …) -> (positions, C)"""
    return output.detach().movedim(1, -1).flatten(0, -2)


@torch.no_grad()
def r_squared(y: Tensor, target: Tensor) -> float:
    return 1 - float((y - target).square().sum() / (target - target.mean(0)).square().sum())


def randomized(layer: nn.Module) -> nn.Module:
    """An angular layer with filters, β of both signs, and γ that nobody would get by chance."""
    with torch.no_grad():
        layer.weight.normal_()
        layer.beta.normal_().mul_(2)
        (layer.gamma if layer.bias is None else layer.bias).normal_()
    return layer


# -------------------------------------------------------------------------------------- where an exact answer exists


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_layer_that_is_itself_angular_is_recovered(dim, geometry):
    torch.manual_seed(0)
    original = hidden(randomized(conv(dim, SPHERE, rescale=True, **geometry)))
    model = sphereify(hidden(conv(dim, **geometry)))
    x = images(dim)
    explained = calibrate(model, original, x.split(20))
    assert explained["0"] >= 0.999
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


def test_a_head_of_unit_class_weights_is_reproduced():
    torch.manual_seed(4)
    original = nn.Sequential(nn.Linear(6, 5, bias=False))
    with torch.no_grad():
        original[0].weight.copy_(F.normalize(original[0].weight, dim=1))
    model = sphereify(original, head="w-softmax")
    with torch.no_grad():
        model[0].weight.normal_()
    x = torch.randn(300, 6)
    explained = calibrate(model, original, [x])
    assert isinstance(model[0], AngularHead)
    assert explained["0"] >= 0.999
    torch.testing.assert_close(model(x), original(x), atol=1e-2, rtol=1e-3)


def test_r_squared_is_the_share_of_the_variance_that_the_layer_explains():
    torch.manual_seed(5)
    original = hidden(nn.Conv2d(4, 8, 3, padding=1))
    x = images(2)
    model = sphereify(original)
    explained = calibrate(model, original, x.split(16))
    y, target = rows(model(x)), rows(original(x))
    assert 0.5 < explained["0"] < 0.999
    assert explained["0"] == pytest.approx(r_squared(y, target), abs=1e-3)


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
    explained = calibrate(sphereify(original), original, [x])
    assert explained["0"] >= r_squared(best, target) - 1e-3


# --------------------------------------------------------------------------------------------------------- unrolling


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, (2, 3)])
@pytest.mark.parametrize("dilation", [1, (2, 1)])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 0), ((2, 3), (1, 2)), (1, 0)])
def test_unrolled_patches_are_those_of_unfold(groups, stride, dilation, kernel, padding):
    torch.manual_seed(0)
    layer = SphereConv2d(4, 8, kernel, stride, padding, dilation, groups)
    x = torch.randn(2, 4, 8, 9)
    unfolded = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)  # (B, positions, C · kernel)
    expected = torch.stack(unfolded.chunk(groups, dim=2), 1)
    torch.testing.assert_close(unrolled(layer, x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_unrolled_patches_times_the_filters_are_the_convolution(dim, geometry):
    torch.manual_seed(1)
    layer = conv(dim, **{"bias": False, **geometry})
    x = images(dim, 2)
    groups = layer.groups
    filters = layer.weight.flatten(1).unflatten(0, (groups, -1))  # (groups, filters of one, fan_in)
    product = torch.einsum("bgpf,gof->bgop", unrolled(layer, x), filters).flatten(1, 2)
    torch.testing.assert_close(product, layer(x).flatten(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("dim", [1, 3])
def test_unrolled_patches_are_those_of_a_loop(dim, dilation, groups):
    torch.manual_seed(2)
    layer = SPHERE[dim](4, 4, 2, stride=2, padding=1, dilation=dilation, groups=groups)
    x = images(dim, 2, size=5)
    padded = torch.zeros(2, 4, *[7] * dim)
    padded[(..., *[slice(1, 6)] * dim)] = x
    places = range(0, 7 - dilation, 2)
    patches = [
        [
            [padded[(b, slice(g * 4 // groups, (g + 1) * 4 // groups),
                     *(slice(p, p + dilation + 1, dilation) for p in place))].flatten()
             for place in itertools.product(places, repeat=dim)]
            for g in range(groups)
        ]
        for b in range(2)
    ]  # fmt: skip
    expected = torch.stack([torch.stack([torch.stack(group) for group in image]) for image in patches])
    torch.testing.assert_close(unrolled(layer, x), expected, rtol=0, atol=0)


def test_the_bound_on_memory_changes_nothing(monkeypatch):
    torch.manual_seed(3)
    original = hidden(nn.Conv2d(4, 8, 3, groups=2))
    x = images(2, 12)
    whole, pieces = sphereify(original), sphereify(original)
    calibrate(whole, original, [x])
    monkeypatch.setattr(fitting_rows, "CHUNK_BYTES", 1)
    monkeypatch.setattr(fitting_rows, "CACHE_BYTES", 1)
    calibrate(pieces, original, [x])
    torch.testing.assert_close(pieces(x), whole(x), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- whole small networks


def smooth_images(number: int = 96, channels: int = 3, size: int = 12) -> Tensor:
    return F.interpolate(torch.randn(number, channels, size // 2, size // 2), size=size, mode="bilinear")


def conv_norm_net(bias: bool) -> nn.Sequential:
    """Convolutions and BatchNorms with the statistics of `smooth_images`, some of the scales negative."""
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 12), (12, 16)):
        norm = nn.BatchNorm2d(after)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias, std=0.3)
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=bias), norm, nn.ReLU()]
    net = nn.Sequential(*layers[:-1]).train()
    with torch.no_grad():
        for _ in range(60):
            net(smooth_images(32))
    return net.eval()


@pytest.mark.parametrize("bias", [True, False])
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


@pytest.mark.parametrize("operator", OPERATORS)
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


class DefinedBackwards(nn.Module):
    """Layers run in another order than they were written down in."""

    def __init__(self, traceable: bool):
        super().__init__()
        self.traceable = traceable
        self.last = nn.Conv2d(8, 8, 3)
        self.first = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and bool(x.sum() > math.inf):
            return x
        return F.leaky_relu(self.last(self.first(x).relu()), 1.0)


@pytest.mark.parametrize("traceable", [True, False])
def test_layers_are_fitted_in_the_order_in_which_they_run(traceable):
    torch.manual_seed(2)
    original = DefinedBackwards(traceable)
    x = smooth_images()
    model = sphereify(original)
    order: list[str] = []
    explained = calibrate(model, original, [x], on_layer=lambda name, r2: order.append(name))
    assert order == ["first", "last"] == list(explained)
    y, target = rows(model(x)), rows(original(x))
    assert explained["last"] == pytest.approx(r_squared(y, target), abs=1e-3)


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
        _set_norm(norm, beta, gamma, rows(g).mean(0), rows(g).var(0, correction=0))
        expected = beta.view(-1, 1, 1) * g + gamma.view(-1, 1, 1)
        torch.testing.assert_close(norm(g), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(norm.train()(g), expected, rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_trained_network_keeps_its_accuracy_when_calibrated_and_loses_it_when_copied(digits, operator):
    net, data = digits
    original = accuracy(net, data)
    assert original > 0.93
    copied = accuracy(sphereify(net, operator=operator), data)
    calibrated = accuracy(sphereify(net, operator=operator, calibration=data.train.tensors[0].split(500)), data)
    assert copied < original - 0.2
    assert calibrated > original - 0.05


# ----------------------------------------------------------------------------------------------------------- manners


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 5)
    )


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


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
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
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


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return F.leaky_relu(self.conv(x * scale), 1.0)


def test_a_batch_may_be_a_tuple_of_arguments():
    torch.manual_seed(4)
    original = TwoInputs()
    x, scale = torch.randn(24, 3, 8, 8), torch.full((24, 1, 1, 1), 3.0)
    pairs = list(zip(x.split(8), scale.split(8), strict=True))
    model = sphereify(original, calibration=pairs)
    assert r_squared(model(x, scale).flatten(1), original(x, scale).flatten(1)) > 0.5
    one = sphereify(hidden(copy.deepcopy(original.conv)), calibration=[(x * scale,)])
    torch.testing.assert_close(model(x, scale), one(x * scale), rtol=1e-3, atol=1e-3)


def test_batches_may_come_from_a_generator():
    torch.manual_seed(5)
    original = small()
    x = torch.randn(40, 3, 6, 6)
    model = sphereify(original, calibration=(batch for batch in x.split(10)))
    again = sphereify(original, calibration=x.split(10))
    torch.testing.assert_close(model.state_dict(), again.state_dict(), rtol=0, atol=0)


def test_no_batches_are_an_error():
    original = small()
    before = state(original)
    with pytest.raises(UsageError, match="calibration: got no batches, expected tensors of inputs"):
        sphereify(original, calibration=[])
    torch.testing.assert_close(original.state_dict(), before, rtol=0, atol=0)


def test_a_model_that_was_not_converted_is_an_error():
    with pytest.raises(UsageError, match="calibration: Sequential was not converted"):
        calibrate(small(), small(), [torch.randn(4, 3, 6, 6)])


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.rare = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.rare(x) if float(x.max()) > 1e9 else self.conv(x), 1.0)


def test_a_layer_that_the_inputs_never_reach_is_left_as_it_is_and_not_reported():
    original = Unused()
    model = sphereify(original)
    heard: list[str] = []
    explained = calibrate(model, original, [torch.randn(8, 3, 6, 6)], on_layer=lambda name, r2: heard.append(name))
    assert list(explained) == ["conv"] == heard
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
    explained = calibrate(model, original, [x])
    assert list(explained) == ["0", "3", "6"]
    torch.testing.assert_close(model(x), sphereify(original, calibration=[x])(x), rtol=0, atol=0)

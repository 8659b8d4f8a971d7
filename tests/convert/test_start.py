"""Start values without data: β of a converted layer, and the running statistics of the BatchNorm behind it."""

import copy
import math

import pytest
import torch
from timm.layers import BatchNormAct2d, StdConv2d
from torch import nn

from sphereify import apply_plan, load, plan_conversion, save, sphereify
from sphereify.choices import OPERATORS
from sphereify.nn.operators import make_operator
from tests.convert.models import CLASSES, Net, conv, images, plain

CHANNELS = 48


def normed(norm=nn.BatchNorm2d, body=None, width=CHANNELS):
    """A convolution of many channels, a norm, and a classifier."""
    torch.manual_seed(0)
    body = body or nn.Conv2d(3, width, 3, padding=1, bias=False)
    layers = [body, norm(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]
    return nn.Sequential(*layers)


def trained(norm, seed=0):
    """A BatchNorm with a scale, a shift and statistics, as after a training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norm.weight.copy_(0.5 + torch.rand(norm.num_features, generator=generator))
        norm.bias.copy_(torch.randn(norm.num_features, generator=generator))
        norm.running_mean.copy_(0.1 * torch.randn(norm.num_features, generator=generator))
        norm.running_var.copy_(0.1 + torch.rand(norm.num_features, generator=generator))
    return norm


@pytest.mark.parametrize("k", [None, 0.1, 0.7])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_slope_at_right_angles_is_the_derivative(name, k):
    k = k if "sigmoid" in name else None
    operator = make_operator(name, k=k, filters=3).to(torch.float64)
    cos = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(operator(cos).sum(), cos)
    slope = torch.as_tensor(operator.slope_at_right_angles(), dtype=torch.float64).expand(3)
    torch.testing.assert_close(slope, expected[0], rtol=1e-6, atol=0)
    assert not slope.requires_grad


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("radius", [0.0, 2.0])
@pytest.mark.parametrize("rescale", ["auto", "always"])
def test_a_fresh_batch_norm_expects_the_variance_that_angles_to_random_inputs_have(name, radius, rescale):
    model = sphereify(normed(), operator=name, radius=radius, rescale=rescale)
    x = torch.randn(64, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    layer, norm = model[0], model[1]
    with torch.no_grad():
        inside = layer(x)[:, :, 1:-1, 1:-1]
    seen = inside.var((0, 2, 3)).mean()
    assert 0.75 < (norm.running_var.mean() / seen).item() < 1.3
    assert torch.equal(norm.running_mean, torch.zeros(CHANNELS))
    assert norm.num_batches_tracked == 0


def test_the_bias_of_a_fresh_convolution_is_its_mean():
    model = normed(body=nn.Conv2d(3, CHANNELS, 3))
    assert torch.equal(sphereify(model)[1].running_mean, model[0].bias.detach())


def test_a_linear_map_with_a_batch_norm():
    model = nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))
    torch.testing.assert_close(sphereify(model)[1].running_var, torch.full((8,), 1 / 20))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm, lambda n: BatchNormAct2d(n, act_layer=nn.ReLU)])
def test_each_kind_of_batch_norm_takes_statistics(norm):
    model = sphereify(normed(norm))
    torch.testing.assert_close(model[1].running_var, torch.full((CHANNELS,), 1 / 27))


@pytest.mark.parametrize("name", ["cosine", "sigmoid"])
@pytest.mark.parametrize("radius", [0.0, 2.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rescale", ["auto", "always"])
@pytest.mark.parametrize("norm", ["keep", "replace"])
def test_a_trained_batch_norm_keeps_scale_and_shift_for_patches_as_long_as_it_saw(name, radius, bias, rescale, norm):
    """For such a patch, w·x times the slope over both lengths is g, so the output is what it was."""
    model = normed(body=nn.Conv2d(3, CHANNELS, 3, bias=bias)).eval()
    trained(model[1])
    angular = sphereify(model, operator=name, radius=radius, rescale=rescale, norm=norm)
    layer = angular[0]
    lengths = (model[0].weight.flatten(1).square().sum(1) + layer.eps).sqrt()
    shift = model[0].bias if bias else torch.zeros(CHANNELS)
    square = (model[1].running_var + (model[1].running_mean - shift) ** 2) / lengths**2
    patch = (27 * square.mean() + layer.eps).sqrt() * math.sqrt(1 + radius**2)
    product = 0.01 * torch.randn(5, CHANNELS, generator=torch.Generator().manual_seed(3))
    g = product / (lengths * patch) * layer.operator.slope_at_right_angles()
    y = g * (1 if layer.beta is None else layer.beta) + (0 if layer._shift is None else layer._shift)
    expected = model[1]((product + shift)[:, :, None, None])
    got = angular[1](y[:, :, None, None])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_mean_square_of_a_group_tells_the_length_of_its_patches():
    model = normed(body=nn.Conv2d(4, 8, 3, groups=2, bias=False), width=8).eval()
    model.insert(0, conv(3, 4))
    trained(model[2])
    with torch.no_grad():
        model[2].running_mean.zero_()
        model[2].running_var[4:] *= 100  # the second group saw patches ten times as long
    before = copy.deepcopy(model[2])
    norm = sphereify(model, eps=1e-9)[2]
    ratio = norm.running_var / before.running_var
    weights = model[1].weight.flatten(1).square().sum(1)
    relative = (ratio * weights).view(2, 4)
    torch.testing.assert_close(relative, relative.mean(1, keepdim=True).expand(2, 4), rtol=1e-2, atol=0)
    assert relative[0].mean() / relative[1].mean() > 20


def test_what_is_not_the_layers_own_is_left():
    shared = Net(
        lambda n, x: n.fc((n.norm(n.a(x)) + n.norm(n.b(x)).relu()).mean((2, 3))),
        a=conv(3, 4), b=conv(3, 4), norm=trained(nn.BatchNorm2d(4)), fc=nn.Linear(4, CLASSES),
    )  # fmt: skip
    frozen = normed().train()
    trained(frozen[1]).eval()
    kept = normed()
    for model, options in ((shared, {}), (frozen, {}), (kept, {"exclude": "0"})):
        norm = model.norm if model is shared else model[1]
        result = sphereify(model, **options)
        after = result.norm if model is shared else result[1]
        assert torch.equal(after.running_mean, norm.running_mean)
        assert torch.equal(after.running_var, norm.running_var)


@pytest.mark.parametrize("norm", [lambda n: nn.BatchNorm2d(n, track_running_stats=False), nn.InstanceNorm2d,
                                  lambda n: nn.InstanceNorm2d(n, affine=True, track_running_stats=True),
                                  lambda n: nn.GroupNorm(2, n)])  # fmt: skip
def test_other_norms_are_left(norm):
    before = {name: tensor.clone() for name, tensor in normed(norm)[1].state_dict().items()}
    after = sphereify(normed(norm))[1].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_computed_filters_tell_their_number_of_weights_and_nothing_of_their_length():
    fresh = normed(body=StdConv2d(3, CHANNELS, 3))
    torch.testing.assert_close(
        sphereify(fresh, example_inputs=images())[1].running_var, torch.full((CHANNELS,), 1 / 27)
    )
    trained(fresh.eval()[1])
    after = sphereify(fresh, example_inputs=images())[1]
    assert torch.equal(after.running_var, fresh[1].running_var)


@pytest.mark.parametrize("inplace", [False, True])
def test_only_in_place_touches_the_model_that_is_passed(inplace):
    model = normed().eval()
    mean, var = (tensor.clone() for tensor in (trained(model[1]).running_mean, model[1].running_var))
    buffer = model[1].running_var
    angular = sphereify(model, inplace=inplace)
    assert torch.equal(model[1].running_mean, mean) != inplace
    assert torch.equal(model[1].running_var, var) != inplace
    assert (angular[1].running_var is buffer) == inplace


@pytest.mark.parametrize("start", ["fresh", "trained"])
def test_odd_weights_give_finite_statistics(start):
    model = normed(body=nn.Conv2d(3, CHANNELS, 3)).eval()
    if start == "trained":
        trained(model[1])
        model[1].running_var[:4] = 0
        model[1].running_mean[:4] = 0
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[0].bias[:4] = 0
    for norm in ("keep", "replace"):
        angular = sphereify(model, radius=2.0, norm=norm)
        assert all(tensor.isfinite().all() for tensor in angular.state_dict().values())
        assert angular(images()).isfinite().all()
    if start == "trained":
        with torch.no_grad():
            model[1].running_mean.zero_(), model[1].running_var.zero_()
        assert all(tensor.isfinite().all() for tensor in sphereify(model).state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_statistics_have_the_dtype_of_the_norm(dtype):
    model = normed().to(dtype)
    for norm in (sphereify(model)[1], sphereify(model, norm="keep", operator="learnable-sigmoid")[1]):
        assert norm.running_var.dtype is dtype
        assert (norm.running_var < 0.1).all()


def test_a_network_made_in_inference_mode_takes_statistics():
    with torch.inference_mode():
        model = normed()
    torch.testing.assert_close(sphereify(model, inplace=True)[1].running_var, torch.full((CHANNELS,), 1 / 27))


@pytest.mark.parametrize("radius", [0.0, 2.0])
def test_beta_starts_where_the_output_is_the_inner_product_for_inputs_of_unit_size(radius):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), conv(8, 2))
    angular = sphereify(model, operator="linear", radius=radius)
    lengths = model[2].weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(angular[2].beta.detach(), lengths * 6 * math.sqrt(1 + radius**2) * math.pi / 2)


def test_loading_an_artifact_brings_the_statistics_that_were_saved(tmp_path):
    model = sphereify(plain(), radius=2.0)
    model.train()
    model(images())
    save(model, tmp_path / "a")
    loaded = load(tmp_path / "a", factory=plain)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_a_plan_gives_a_fresh_model_the_statistics_of_its_own_weights():
    plan = plan_conversion(plain(), radius=2.0)
    other = plain()
    trained(other.norm)
    expected = sphereify(other, radius=2.0)
    assert torch.equal(apply_plan(other, plan).norm.running_var, expected.norm.running_var)
    assert not torch.equal(other.norm.running_var, expected.norm.running_var)

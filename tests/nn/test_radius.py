"""The pooled radius: an angle in one dimension more, against float64 loops, finite differences and its limits."""

import copy
import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from sphereify.deployment.folding import folded
from sphereify.errors import UsageError
from sphereify.nn import SphereConv1d, SphereConv2d, SphereConv3d
from sphereify.nn.functional import sphere_conv2d
from sphereify.nn.operators import make_operator
from tests.grids import grid
from tests.nn import oracle
from tests.nn.oracle import normal
from tests.nn.test_functional import CONVS, EXACT, geometries, operators

COSINE = make_operator("cosine")
LAYERS = {1: SphereConv1d, 2: SphereConv2d, 3: SphereConv3d}


def learned(radius: float) -> torch.Tensor:
    return torch.tensor([radius], dtype=torch.float64, requires_grad=True)


@given(geometry=geometries(), radius=st.sampled_from([0.5, 1.0, 3.0]), seed=st.integers(0, 9))
def test_a_radius_is_a_coordinate_more(geometry, radius, seed):
    shape, weight_shape, how = geometry
    dim, filters = len(weight_shape) - 2, weight_shape[0]
    x, weight = normal(*shape, seed=seed), normal(*weight_shape, seed=seed + 100)
    batched = len(shape) == dim + 2
    theta = oracle.conv_angles(x if batched else x.unsqueeze(0), weight, 1e-4, radius=radius, **how)
    for name, operator, k in operators(filters):
        expected = oracle.g_of_angles(name, theta, k)
        expected = expected if batched else expected.squeeze(0)
        for rho in (radius, learned(radius)):
            torch.testing.assert_close(CONVS[dim](x, weight, operator, radius=rho, **how), expected, **EXACT)


def test_a_radius_of_zero_is_the_papers_operator_bit_by_bit():
    x, weight = normal(2, 4, 9, 8, dtype=torch.float32), normal(6, 2, 3, 3, dtype=torch.float32)
    plain = sphere_conv2d(x, weight, COSINE, padding=1, groups=2)
    assert torch.equal(sphere_conv2d(x, weight, COSINE, padding=1, groups=2, radius=0.0), plain)
    assert torch.equal(sphere_conv2d(x, weight, COSINE, padding=1, groups=2, radius=0), plain)


@pytest.mark.parametrize(
    ("groups", "name"),
    grid(
        [(groups, name) for groups in (1, 2, 4) for name in ("cosine", "linear", "sigmoid")],
        lambda groups, name: (groups, name) in ((1, "sigmoid"), (2, "cosine")),
    ),
)
def test_first_and_second_derivatives_run_through_the_pool(name, groups):
    channels = max(groups, 2)
    x = normal(2, channels, 4, 3).requires_grad_()
    weight = normal(channels, channels // groups, 3, 3, seed=1).requires_grad_()
    beta, bias = normal(channels, seed=2).requires_grad_(), normal(channels, seed=3).requires_grad_()
    inputs = (x, weight, learned(1.5), beta, bias)

    def layer(x, weight, radius, beta, bias):
        return sphere_conv2d(
            x, weight, make_operator(name), bias, stride=(2, 1), padding=1, groups=groups, beta=beta, radius=radius
        )

    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


def test_a_fixed_radius_has_the_gradients_of_a_learned_one():
    x, weight = normal(2, 4, 5, 5).requires_grad_(), normal(6, 2, 3, 3, seed=1).requires_grad_()
    outputs = [sphere_conv2d(x, weight, COSINE, groups=2, radius=rho) for rho in (2.0, learned(2.0))]
    grads = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in outputs]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-14)


def test_a_learned_radius_has_a_gradient_where_the_input_needs_none():
    radius = learned(1.0)
    sphere_conv2d(normal(2, 3, 5, 5), normal(4, 3, 3, 3, seed=1), COSINE, radius=radius).square().sum().backward()
    step = 1e-6
    values = [
        sphere_conv2d(normal(2, 3, 5, 5), normal(4, 3, 3, 3, seed=1), COSINE, radius=1.0 + sign * step).square().sum()
        for sign in (1, -1)
    ]
    torch.testing.assert_close(radius.grad.item(), ((values[0] - values[1]) / (2 * step)).item(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("radius", [0.0, 0.7, 4.0])
def test_the_length_of_an_input_does_not_matter(radius):
    x, weight = normal(2, 4, 6, 6), normal(4, 4, 3, 3, seed=1)
    y, scaled = (sphere_conv2d(a * x, weight, COSINE, padding=1, eps=1e-12, radius=radius) for a in (1.0, 0.01))
    torch.testing.assert_close(y, scaled, rtol=0, atol=1e-7)


def test_a_large_radius_is_the_convolution_normalized_by_the_energy_of_its_input():
    x, weight, radius = normal(2, 4, 6, 5), normal(3, 4, 3, 3, seed=1), 1e4
    y = sphere_conv2d(x, weight, COSINE, padding=1, eps=1e-12, radius=radius) * radius
    energy = F.conv2d(x.square().sum(1, keepdim=True), torch.ones(1, 1, 3, 3, dtype=x.dtype), padding=1)
    expected = F.conv2d(x, weight, padding=1) / weight.flatten(1).norm(dim=1).view(1, -1, 1, 1)
    torch.testing.assert_close(y, expected / energy.mean((1, 2, 3), keepdim=True).sqrt(), rtol=1e-6, atol=1e-7)


def test_samples_and_groups_have_pools_of_their_own():
    x, weight = normal(3, 4, 6, 6), normal(4, 2, 3, 3, seed=1)
    y = sphere_conv2d(x, weight, COSINE, groups=2, radius=2.0)
    for sample in range(3):
        alone = sphere_conv2d(x[sample : sample + 1], weight, COSINE, groups=2, radius=2.0)
        torch.testing.assert_close(y[sample : sample + 1], alone)
    louder = torch.cat([x[:, :2], 100 * x[:, 2:]], 1)
    torch.testing.assert_close(sphere_conv2d(louder, weight, COSINE, groups=2, radius=2.0)[:, :2], y[:, :2])
    loud_sample = x * torch.tensor([1.0, 50.0, 1.0], dtype=x.dtype).view(3, 1, 1, 1)
    torch.testing.assert_close(sphere_conv2d(loud_sample, weight, COSINE, groups=2, radius=2.0)[0], y[0])


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("name", ["cosine", "linear", "sigmoid"])
def test_constant_inputs_have_finite_values_and_gradients(value, name):
    x = torch.full((2, 3, 5, 5), value, requires_grad=True)
    weight = normal(4, 3, 3, 3, dtype=torch.float32).requires_grad_()
    radius = torch.ones(1, requires_grad=True)
    y = sphere_conv2d(x, weight, make_operator(name), padding=1, radius=radius)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(t.grad.isfinite().all() for t in (x, weight, radius))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_single(dtype):
    layer = SphereConv2d(4, 8, 3, padding=1, radius=2.0, learn_radius=True)
    x = normal(2, 4, 8, 8, dtype=torch.float32)
    half = copy.deepcopy(layer).to(dtype)
    y, z = layer(x), half(x.to(dtype))
    assert z.dtype is dtype
    torch.testing.assert_close(z.float(), y, rtol=0, atol=0.02)
    z.float().square().sum().backward()
    assert half.log_radius.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("learn", [False, True])
def test_a_folded_layer_has_the_radius_of_its_layer(dim, learn):
    layer = LAYERS[dim](4, 6, 3, padding=1, groups=2, rescale=True, radius=1.5, learn_radius=learn, operator="linear")
    x = normal(2, 4, *[6, 5, 4][:dim], dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(folded(layer)(x), layer(x), rtol=1e-5, atol=1e-6)
    assert "radius=1.5" in repr(folded(layer))


def test_vmap_sees_each_radius():
    x, weight = normal(3, 4, 5, 5), normal(4, 4, 3, 3, seed=1)
    radii = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)
    together = torch.vmap(lambda rho: sphere_conv2d(x, weight, COSINE, radius=rho))(radii)
    for rho, y in zip(radii, together, strict=True):
        torch.testing.assert_close(y, sphere_conv2d(x, weight, COSINE, radius=rho.item()))


@pytest.mark.parametrize("learn", [False, True])
def test_a_compiled_layer_takes_other_sizes_without_breaks(learn):
    layer = SphereConv2d(3, 4, 3, padding=1, radius=2.0, learn_radius=learn)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for size in (8, 9, 13):
        x = normal(2, 3, size, size + 1, dtype=torch.float32)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_empty_and_unbatched_inputs():
    layer = SphereConv2d(3, 4, 3, radius=2.0)
    assert layer(torch.empty(0, 3, 6, 6)).shape == (0, 4, 4, 4)
    x = normal(3, 6, 6, dtype=torch.float32)
    torch.testing.assert_close(layer(x), layer(x.unsqueeze(0)).squeeze(0))


def test_a_learned_radius_is_one_positive_parameter_in_the_state():
    layer = SphereConv2d(3, 4, 3, radius=2.0, learn_radius=True)
    assert dict(layer.named_parameters())["log_radius"].shape == (1,)
    assert math.isclose(layer.radius.item(), 2.0, rel_tol=1e-6)
    other = SphereConv2d(3, 4, 3, radius=1.0, learn_radius=True)
    other.load_state_dict(layer.state_dict())
    assert other.radius.item() == layer.radius.item()
    assert "radius=2, learn_radius=True" in repr(layer)
    assert "log_radius" not in SphereConv2d(3, 4, 3, radius=2.0).state_dict()


def test_nothing_more_is_saved_for_the_backward_than_without_a_radius():
    def saved(**options) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            layer = SphereConv2d(4, 8, 3, padding=1, **options)
            layer(normal(2, 4, 8, 8, dtype=torch.float32).requires_grad_())
        return sum(sizes)

    assert saved(radius=2.0) == saved()
    assert saved(radius=2.0, learn_radius=True) <= saved() + 4  # ρ itself and its logarithm


@pytest.mark.parametrize("radius", [-1.0, math.nan, math.inf, "2", None, True])
def test_a_radius_that_is_no_number_of_at_least_zero_is_refused(radius):
    with pytest.raises(UsageError, match=r"radius: got .*, expected a finite number of at least 0"):
        SphereConv2d(3, 4, 3, radius=radius)
    with pytest.raises(UsageError, match=r"radius: got .*, expected a finite number of at least 0"):
        sphere_conv2d(normal(1, 3, 5, 5), normal(4, 3, 3, 3), COSINE, radius=radius)


def test_learning_from_zero_is_refused_with_a_start_to_try():
    with pytest.raises(UsageError, match=r"learn_radius: starts from radius, whose gradient is 0 at 0.*radius=1\.0"):
        SphereConv2d(3, 4, 3, learn_radius=True)

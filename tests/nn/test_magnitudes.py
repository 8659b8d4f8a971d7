"""Magnitudes h(‖x‖)·g(θ): against loops in float64, finite differences, invariances, and where one meets another."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sphereify.choices import MAGNITUDES
from sphereify.errors import UsageError
from sphereify.nn import Magnitude, SphereConv1d, SphereConv2d, SphereConv3d, SphereLinear
from tests.nn import oracle
from tests.nn.oracle import normal

EPS = 1e-4
WITH_RADIUS = ("ball", "tanh", "segment", "log", "mix")
GEOMETRY = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def h(form: str, r: float, unit: float | None, beta: float | None) -> float:
    """The table of the paper, with lengths in units where a ρ is given; segment keeps its own units."""
    t = r if unit is None else r / unit
    return {
        "sphere": lambda: 1.0,
        "ball": lambda: min(r, unit) / unit,
        "tanh": lambda: math.tanh(r / unit),
        "linear": lambda: r,
        "segment": lambda: r if r <= unit else unit + beta * (r - unit),
        "log": lambda: math.log(1 + t),
        "mix": lambda: t + beta * math.log(1 + t),
    }[form]()


def by_hand(x, weight, magnitude, operator, *, radius=None, mean=None, stride, padding, dilation, groups):
    """h·g one patch and one filter at a time; `radius` holds ρ of each filter, `mean` the mean norm of the data."""
    theta = oracle.conv_angles(x, weight, EPS, stride=stride, padding=padding, dilation=dilation, groups=groups)
    g = oracle.g_of_angles(operator, theta)
    padded = F.pad(x, (padding[1],) * 2 + (padding[0],) * 2)
    each, out = x.shape[1] // groups, torch.empty_like(g)
    per_group = len(weight) // groups
    norms = torch.empty(len(x), groups, *g.shape[2:], dtype=torch.float64)
    for b, group, i, j in itertools.product(*map(range, norms.shape)):
        total = EPS
        for c, u, v in itertools.product(range(each), *map(range, weight.shape[2:])):
            place = (i * stride[0] + u * dilation[0], j * stride[1] + v * dilation[1])
            total += float(padded[(b, group * each + c, *place)]) ** 2
        norms[b, group, i, j] = math.sqrt(total)
    for b, o, i, j in itertools.product(*map(range, g.shape)):
        group = o // per_group
        of = float(norms[b, group].mean()) if mean is None else mean
        unit = None if radius is None else radius[o] * of
        length = math.sqrt(sum(w * w for w in weight[o].flatten().tolist()) + EPS) if magnitude.weighted else 1.0
        out[b, o, i, j] = length * h(magnitude.form, float(norms[b, group, i, j]), unit, magnitude.beta) * g[b, o, i, j]
    return out


def layer_of(magnitude, operator="cosine", *, rescale=False, geometry=GEOMETRY, **options):
    torch.manual_seed(0)
    made = SphereConv2d(
        4, 6, 3, operator=operator, magnitude=magnitude, rescale=rescale, eps=EPS, **geometry, **options
    )
    return made.double()


def parameters(made):
    return {name: p.detach().clone().requires_grad_() for name, p in made.named_parameters()}


@pytest.mark.parametrize("form", MAGNITUDES)
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_what_a_loop_over_patches_gives(form, weighted):
    x = normal(2, 4, 4, 5)
    for operator, radius in (("cosine", None), ("linear", 0.5 if form in WITH_RADIUS else None)):
        magnitude = Magnitude(form, weighted=weighted, radius=radius)
        made = layer_of(magnitude, operator, bias=False)
        rho = None if magnitude.radius is None else [magnitude.radius] * 6
        expected = by_hand(x, made.weight.detach(), magnitude, operator, radius=rho, **GEOMETRY)
        torch.testing.assert_close(made(x).detach(), expected, **CLOSE)


def test_a_learned_radius_is_one_of_each_filter_and_beta_and_gamma_come_after():
    magnitude = Magnitude("tanh", weighted=True, radius=1.5, learned=True)
    made, x = layer_of(magnitude, "linear", rescale=True), normal(2, 4, 6, 7)
    assert made.log_magnitude_radius.exp().tolist() == pytest.approx([1.5] * 6)
    with torch.no_grad():
        made.log_magnitude_radius.add_(normal(6, seed=1) / 2)
        made.beta.copy_(normal(6, seed=2))
    rho = made.log_magnitude_radius.detach().exp().tolist()
    g = by_hand(x, made.weight.detach(), magnitude, "linear", radius=rho, **GEOMETRY)
    expected = g * made.beta.view(-1, 1, 1) + made.bias.view(-1, 1, 1)
    torch.testing.assert_close(made(x), expected, **CLOSE)


def test_the_mean_of_the_data_runs_in_training_and_stays_in_evaluation():
    magnitude = Magnitude("ball", radius=1.5, mean="data")
    made = layer_of(magnitude, bias=False)
    first, second = normal(2, 4, 6, 7), 3 * normal(2, 4, 6, 7, seed=1)
    untrained = made.eval()(first)  # as long as nothing was seen: the mean of the input at hand
    made.train()(first)
    start = float(made.mean_norm)
    torch.testing.assert_close(untrained, made.eval()(first), rtol=1e-6, atol=1e-6)
    made.train()(second)
    assert float(made.mean_norm) == pytest.approx(0.9 * start + 0.1 * 3 * start, rel=0.1)
    expected = by_hand(
        first, made.weight.detach(), magnitude, "cosine", radius=[1.5] * 6, mean=float(made.mean_norm), **GEOMETRY
    )
    torch.testing.assert_close(made.eval()(first).detach(), expected, **CLOSE)
    again = copy.deepcopy(made)
    again(second)
    assert float(again.mean_norm) == float(made.mean_norm)


@pytest.mark.parametrize("form", MAGNITUDES)
def test_first_and_second_derivatives(form):
    numbers = {"radius": 0.8, "learned": True} if form in WITH_RADIUS else {}
    for weighted, operator in ((False, "cosine"), (True, "sigmoid")):
        torch.manual_seed(0)
        magnitude = Magnitude(form, weighted, **numbers)
        made = SphereConv2d(2, 4, 2, groups=2, operator=operator, magnitude=magnitude, rescale=True, eps=EPS).double()
        named = parameters(made)

        def layer(x, *values, made=made, named=named):
            return torch.func.functional_call(made, dict(zip(named, values, strict=True)), (x,))

        inputs = (normal(1, 2, 3, 2).requires_grad_(), *named.values())
        assert torch.autograd.gradcheck(layer, inputs)
        assert torch.autograd.gradgradcheck(layer, inputs)


def test_derivatives_of_a_linear_map_and_of_a_pooled_radius():
    torch.manual_seed(0)
    rows = SphereLinear(4, 3, operator="sigmoid", magnitude="tanh", weighted=True).double().eval()
    rows.mean_norm.fill_(1.3)
    assert torch.autograd.gradcheck(rows, normal(2, 2, 4).requires_grad_())
    assert torch.autograd.gradgradcheck(rows, normal(2, 2, 4).requires_grad_())
    pooled = layer_of("log", "linear", radius=1.0, learn_radius=True)
    assert torch.autograd.gradcheck(pooled, normal(1, 4, 5, 5).requires_grad_())


@pytest.mark.parametrize(
    ("plain", "angular", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding=1), SphereConv1d, (2, 4, 9)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="reflect"), SphereConv2d, (2, 4, 9, 9)),
        (nn.Conv2d(4, 6, 3, padding="same", bias=False), SphereConv2d, (4, 9, 9)),
        (nn.Conv3d(4, 6, 3, dilation=2), SphereConv3d, (2, 4, 6, 6, 6)),
        (nn.Linear(4, 6), SphereLinear, (2, 3, 4)),
    ],
)
def test_a_weighted_linear_magnitude_with_cosine_is_the_plain_layer_to_the_last_digit(plain, angular, shape):
    adopt = angular.from_linear if angular is SphereLinear else angular.from_conv
    x = torch.randn(shape)
    made = adopt(plain, magnitude="linear", weighted=True)
    assert torch.equal(made(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(x), plain(x))


def test_where_the_operator_is_not_cosine_the_general_way_agrees_with_the_plain_one():
    x, made = normal(2, 4, 6, 7), layer_of("linear", lambda cos: cos, weighted=True)
    torch.testing.assert_close(made(x), F.conv2d(x, made.weight, made.bias, **GEOMETRY), **CLOSE)


@pytest.mark.parametrize("form", MAGNITUDES)
@pytest.mark.parametrize("rescale", [False, True])
def test_cosine_as_one_product_is_cosine_as_any_operator_with_a_pooled_radius_too(form, rescale):
    x, outputs = normal(2, 4, 6, 7), []
    for operator in ("cosine", lambda cos: cos):
        made = layer_of(form, operator, weighted=rescale, rescale=rescale, radius=1.5)
        if rescale:
            with torch.no_grad():
                made.beta.copy_(normal(6, seed=4))
        outputs.append(made(x))
    torch.testing.assert_close(*outputs, **CLOSE)
    assert (outputs[0] - layer_of(form, weighted=rescale, rescale=rescale)(x)).abs().max() > 1e-2


@pytest.mark.parametrize("form", ["ball", "tanh", "log", "mix"])
def test_in_units_of_the_input_its_length_does_not_matter(form):
    made, x = layer_of(Magnitude(form, radius=1.5), bias=False), 100 * normal(2, 4, 6, 7)
    torch.testing.assert_close(made(7 * x), made(x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("form", ["linear", "segment"])
def test_others_are_proportional_to_it(form):
    made, x = layer_of(Magnitude(form), bias=False), 100 * normal(2, 4, 6, 7)
    torch.testing.assert_close(made(7 * x), 7 * made(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", MAGNITUDES)
def test_the_lengths_of_filters_matter_in_the_weighted_form_alone(form):
    for weighted, factor in ((False, 1.0), (True, 3.0)):
        made, x = layer_of(Magnitude(form, weighted), bias=False), normal(2, 4, 6, 7)
        with torch.no_grad():
            made.weight.mul_(100)
        before = made(x)
        with torch.no_grad():
            made.weight.mul_(3)
        torch.testing.assert_close(made(x), factor * before, rtol=1e-7, atol=1e-7)


def test_limits_of_the_radius_meet_the_neighbours():
    x = normal(2, 4, 6, 7)
    cosine, linear = layer_of("sphere", bias=False)(x), layer_of("linear", bias=False)(x)

    def of(form, radius=None, beta=None):
        return layer_of(Magnitude(form, radius=radius, beta=beta), bias=False)(x)

    small, large, near = 1e-9, 1e6, {"rtol": 1e-5, "atol": 1e-5}
    for form in ("ball", "tanh"):  # all patches lie beyond ρ, or all within
        torch.testing.assert_close(of(form, small), cosine, **near)
        torch.testing.assert_close(large * of(form, large), large * of("log", large), **near)
    torch.testing.assert_close(of("segment", large), linear, **near)
    torch.testing.assert_close(of("segment", small, 0.3), 0.3 * linear, **near)
    torch.testing.assert_close(of("segment", 1.0, 1.0), linear, **near)
    torch.testing.assert_close(of("mix", beta=0.0), linear, **near)
    torch.testing.assert_close(of("mix", beta=2.0), linear + 2 * of("log"), **near)
    torch.testing.assert_close(of("mix", large, 1.0), 2 * of("log", large), **near)


@pytest.mark.parametrize("form", MAGNITUDES)
def test_zero_patches_and_empty_batches_have_finite_gradients(form):
    for made in (layer_of(Magnitude(form, weighted=True), "linear").float(), SphereLinear(4, 6, magnitude=form)):
        shape = (2, 6, 6, 4) if isinstance(made, SphereLinear) else (2, 4, 6, 6)
        for number in (0, 2):
            x = torch.zeros(number, *shape[1:], requires_grad=True)
            y = made(x)
            y.sum().backward()
            assert y.isfinite().all()
            assert x.grad.isfinite().all()
            assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())


def test_norms_and_magnitudes_are_taken_in_single_precision():
    made = layer_of("tanh", weighted=True, operator="linear").float()
    x = torch.randn(2, 4, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), made(x), rtol=2e-2, atol=2e-2)
    half = copy.deepcopy(made).to(torch.float16)
    torch.testing.assert_close(half(x.half() * 1e4).float(), made(x * 1e4), rtol=2e-2, atol=2e-2)


def test_the_output_may_be_changed_in_place_and_single_inputs_are_taken():
    for form in MAGNITUDES:
        made, x = layer_of(form, weighted=True, bias=False), normal(2, 4, 6, 7)
        torch.testing.assert_close(made(x[0]), made(x)[0], **CLOSE)
        grads = []
        for change in (torch.relu, torch.relu_):
            made.zero_grad()
            change(made(x)).square().sum().backward()
            grads.append(made.weight.grad)
        torch.testing.assert_close(*grads, **CLOSE)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torch_func_and_compile_go_through():
    made, x = layer_of(Magnitude("tanh", weighted=True), geometry={"padding": 1}), normal(3, 4, 5, 5)

    def loss(x):
        return made(x.unsqueeze(0)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss))(x)
    whole = torch.autograd.grad(made(x.requires_grad_()).square().sum(), x)[0]
    torch.testing.assert_close(each, whole, **CLOSE)
    tangent = torch.func.jvp(made, (x.detach(),), (torch.ones_like(x),))[1]
    step = 1e-6
    torch.testing.assert_close(tangent, (made(x + step) - made(x - step)) / (2 * step), rtol=1e-5, atol=1e-6)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), made(x), **CLOSE)


def test_the_papers_layer_has_no_trace_of_it():
    made = SphereConv2d(3, 4, 3, bias=False)
    assert set(made.state_dict()) == {"weight"}
    assert "magnitude" not in repr(made)
    assert "magnitude" not in vars(made)
    assert torch.equal(SphereConv2d.from_conv(made, magnitude="sphere")(x := torch.randn(1, 3, 5, 5)), made(x))


def test_repr_names_it():
    assert "magnitude=weighted tanh ρ=2" in repr(SphereConv2d(3, 4, 3, magnitude=Magnitude("tanh", True, 2.0)))
    assert "magnitude=segment ρ=1 of the data β=0.5" in repr(SphereLinear(3, 4, magnitude="segment"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"form": "bal"}, "magnitude: got 'bal', expected one of sphere, ball.* Did you mean 'ball'"),
        ({"form": "tanh", "radius": 0}, "magnitude_radius: got 0, expected a finite number above 0. Usual: 0.5 to 2"),
        ({"form": "tanh", "radius": math.inf}, "magnitude_radius: got inf"),
        ({"form": "linear", "radius": 1.0}, "magnitude_radius: magnitude='linear' has no ρ; ball, tanh"),
        ({"learned": True}, "learn_magnitude_radius: magnitude='sphere' has no ρ"),
        ({"form": "linear", "mean": "data"}, "magnitude_mean='data': magnitude='linear' has no ρ"),
        ({"form": "tanh", "mean": "batch"}, "magnitude_mean: got 'batch', expected one of input, data"),
        ({"form": "tanh", "beta": 0.5}, "magnitude_beta: tanh has no β; segment and mix have one"),
        ({"form": "segment", "beta": -0.1}, "magnitude_beta: got -0.1, expected a finite number of at least 0"),
        ({"form": "mix", "beta": math.nan}, "magnitude_beta: got nan"),
        ({"form": "mix", "beta": True}, "magnitude_beta: got True"),
    ],
)
def test_what_it_refuses(given, message):
    with pytest.raises(UsageError, match=message):
        Magnitude(**given)


def test_a_linear_map_refuses_the_mean_of_its_input():
    with pytest.raises(UsageError, match="an input of a linear map is one row; take mean='data'"):
        SphereLinear(3, 4, magnitude=Magnitude("tanh"))

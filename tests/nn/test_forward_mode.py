"""Forward-mode differentiation: tangents, Jacobians column by column and Hessians, against backward mode."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from sphereify.choices import OPERATORS
from sphereify.nn import AngularHead, SphereConv1d, SphereConv2d, SphereConv3d, SphereLinear
from sphereify.nn.operators import make_operator
from sphereify.nn.precision import in_forward_mode, runs_eagerly
from tests.nn.oracle import normal

# torch scripts some of its own derivatives when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def layer(kind, operator="cosine", **settings):
    torch.manual_seed(0)
    made = kind(operator=operator, dtype=torch.float64, **settings)
    for number, parameter in enumerate(made.parameters()):  # β, γ and k that differ from filter to filter
        parameter.data += 0.1 * normal(*parameter.shape, seed=number).abs()
    return made


CONV = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}
LAYERS = {
    "plain": (SphereConv2d, {**CONV, "bias": False}, (2, 4, 4, 4)),
    "strided": (SphereConv2d, {**CONV, "stride": 2, "padding": 1, "dilation": 2, "rescale": True}, (2, 4, 5, 6)),
    "grouped": (SphereConv2d, {**CONV, "groups": 2, "rescale": True, "bias": False}, (1, 4, 4, 4)),
    "depthwise": (SphereConv1d, {**CONV, "groups": 4, "padding": "same"}, (2, 4, 5)),
    "pooled": (SphereConv2d, {**CONV, "radius": 1.5, "learn_radius": True}, (2, 4, 4, 4)),
    "grouped and pooled": (SphereConv1d, {**CONV, "groups": 2, "radius": 2.0, "learn_radius": True}, (2, 4, 6)),
    "volume": (SphereConv3d, {**CONV, "padding": 1}, (1, 4, 2, 2, 3)),
    "linear": (SphereLinear, {"in_features": 5, "out_features": 3, "rescale": True}, (2, 3, 5)),
}


def in_parameters_and_input(module, shape):
    """(a function of the parameters and the input, their values)"""
    names = [name for name, _ in module.named_parameters()]
    values = (*(p.detach() for p in module.parameters()), normal(*shape))
    return lambda *at: functional_call(module, dict(zip(names, at[:-1], strict=True)), (at[-1],)), values


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", LAYERS)
def test_the_jacobian_by_columns_is_the_one_by_rows(case, operator):
    kind, settings, shape = LAYERS[case]
    function, values = in_parameters_and_input(layer(kind, operator, **settings), shape)
    every = tuple(range(len(values)))
    for got, expected in zip(jacfwd(function, every)(*values), jacrev(function, every)(*values), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


SMALL = {"in_channels": 2, "out_channels": 2, "kernel_size": 2}
SMALL_LAYERS = {
    "strided": (SphereConv2d, {**SMALL, "stride": 2, "padding": 1, "rescale": True}, (1, 2, 3, 3)),
    "grouped and pooled": (SphereConv1d, {**SMALL, "groups": 2, "radius": 2.0, "learn_radius": True}, (2, 2, 4)),
    "linear": LAYERS["linear"],
}


@pytest.mark.parametrize("operator", ["cosine", "learnable-sigmoid"])
@pytest.mark.parametrize("case", SMALL_LAYERS)
def test_hessians_agree_whichever_modes_they_are_made_of(case, operator):
    kind, settings, shape = SMALL_LAYERS[case]
    function, values = in_parameters_and_input(layer(kind, operator, **settings), shape)

    def loss(*at):
        return function(*at).pow(3).sum()

    every = tuple(range(len(values)))
    expected = jacrev(jacrev(loss, every), every)(*values)
    for outer, inner in [(jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)]:
        torch.testing.assert_close(outer(inner(loss, every), every)(*values), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backward_is_differentiable", [False, True])
def test_tangents_go_through_a_backward_as_through_a_forward(backward_is_differentiable):
    module = layer(SphereConv2d, "sigmoid", **LAYERS["strided"][1])
    x, direction = normal(2, 4, 5, 6), normal(2, 4, 5, 6, seed=1)

    def gradient(x):
        return grad(lambda at: module(at).pow(3).sum())(x)

    with fwAD.dual_level():
        dual = fwAD.make_dual(x.clone().requires_grad_(), direction)
        assert in_forward_mode()
        with torch.no_grad():
            assert not runs_eagerly(dual)
        y = module(dual).pow(3).sum()
        got = torch.autograd.grad(y, dual, create_graph=backward_is_differentiable)[0]
        value, tangent = (part.detach() for part in fwAD.unpack_dual(got))
    expected = jacrev(gradient)(x).flatten(4).matmul(direction.flatten()).view_as(x)
    torch.testing.assert_close(value, gradient(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tangent, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tangent_has_the_dtype_of_the_output_and_agrees_with_float64(dtype):
    module = layer(SphereConv2d, "linear", **LAYERS["pooled"][1])
    x, direction = normal(2, 4, 4, 4), normal(2, 4, 4, 4, seed=1)
    _, expected = jvp(module, (x,), (direction,))
    y, tangent = jvp(module.to(dtype), (x.to(dtype),), (direction.to(dtype),))
    assert y.dtype is tangent.dtype is dtype
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    torch.testing.assert_close(tangent.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("operator", OPERATORS)
def test_tangents_are_finite_at_the_poles_and_at_zero(operator):
    module = SphereLinear(4, 2, operator=operator, bias=False)
    x = torch.stack([module.weight[0].detach(), -module.weight[0].detach(), torch.zeros(4)])
    assert jacfwd(module)(x).isfinite().all()
    cos = torch.tensor([1.0, -1.0, 0.0])
    by_columns, by_rows = (mode(make_operator(operator))(cos) for mode in (jacfwd, jacrev))
    torch.testing.assert_close(by_columns, by_rows, rtol=1e-2, atol=1e-6)  # the slope of fp32 next to a pole
    assert by_columns.isfinite().all()


def test_an_operator_of_the_users_own_has_tangents():
    module = layer(SphereConv2d, lambda cos: cos**3, **LAYERS["grouped"][1])
    x = normal(1, 4, 4, 4)
    torch.testing.assert_close(jacfwd(module)(x), jacrev(module)(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["w-softmax", "s-softmax"])
def test_a_head_has_a_hessian(kind):
    head = AngularHead(4, 3, kind=kind, operator="learnable-sigmoid", bias=True, dtype=torch.float64)
    x = normal(2, 4)

    def loss(x):
        return nn.functional.cross_entropy(head(x), torch.tensor([0, 2]))

    torch.testing.assert_close(hessian(loss)(x), jacrev(jacrev(loss))(x), rtol=1e-9, atol=1e-9)


def test_hessians_of_samples_are_those_of_a_loop():
    module = layer(SphereConv1d, **LAYERS["depthwise"][1])
    x = normal(3, 4, 5)

    def loss(x):
        return module(x).pow(3).sum()

    torch.testing.assert_close(
        vmap(hessian(loss))(x), torch.stack([hessian(loss)(one) for one in x]), rtol=1e-10, atol=1e-10
    )

"""Convolutions and linear maps that a forward calls as functions, held against slow answers of one angle at a time."""

import copy
import math
import pickle
import re
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import BlurPool2d, Conv2dSame, ScaledStdConv2d, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from sphereify import ConversionPlan, apply_plan, load, plan_conversion, save, sphereify
from sphereify.nn import LearnableSigmoidOperator
from sphereify.nn.functional_calls import AngularCall
from tests.convert.answers import conv_answer, linear_answer, shake, the_call
from tests.convert.models import Casting
from tests.nn.oracle import normal

OPERATOR = {"operator": "sigmoid", "k": 0.3}
THROUGH = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}


def convert(block: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    """The block alone, converted in a model in which it is not the classifier."""
    return sphereify(nn.Sequential(block, nn.Tanh()), example_inputs=x, **{**OPERATOR, **options})[0]


# ------------------------------------------------------------------------------------------------------- every function


class Calling(nn.Module):
    """Calls `function` with the weight of a layer: of a child that is itself never called, or taken over as its own."""

    def __init__(self, function: Callable[..., Tensor], layer: Any, child: bool):
        super().__init__()
        self.function = function
        if child:
            self.layer = layer
        else:
            self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        holder = self.layer if hasattr(self, "layer") else self
        return self.function(x, holder.weight, holder.bias)


GEOMETRY = {
    1: {"stride": [2], "padding": [1], "dilation": [2], "groups": 2},
    2: {"stride": [2, 1], "padding": [1, 2], "dilation": [1, 2], "groups": 2},
    3: {"stride": [1, 2, 1], "padding": [0, 1, 1], "dilation": [1, 1, 1], "groups": 2},
}


class Function(NamedTuple):
    call: Callable[..., Tensor]
    dims: int = 0
    """0 is a linear map."""
    geometry: dict[str, Any] = {}  # noqa: RUF012


FUNCTIONS = {
    "F.linear": Function(lambda x, w, b: F.linear(x, w, b)),
    "F.linear by keywords": Function(lambda x, w, b: F.linear(input=x, weight=w, bias=b)),
    "torch._C._nn.linear": Function(lambda x, w, b: torch._C._nn.linear(x, w, b)),
    "torch.addmm": Function(lambda x, w, b: torch.addmm(b, x, w.t())),
    "torch.addmm with beta": Function(lambda x, w, b: torch.addmm(b / 2, x, w.transpose(0, 1), beta=2)),
    "Tensor.addmm": Function(lambda x, w, b: b.addmm(x, w.t())),
    "F.conv1d": Function(lambda x, w, b: F.conv1d(x, w, b, **GEOMETRY[1]), 1, GEOMETRY[1]),
    "F.conv2d": Function(lambda x, w, b: F.conv2d(x, w, b, **GEOMETRY[2]), 2, GEOMETRY[2]),
    "F.conv2d by position": Function(lambda x, w, b: F.conv2d(x, w, b, *GEOMETRY[2].values()), 2, GEOMETRY[2]),
    "F.conv3d": Function(lambda x, w, b: F.conv3d(x, w, b, **GEOMETRY[3]), 3, GEOMETRY[3]),
    "torch.conv1d": Function(lambda x, w, b: torch.conv1d(x, w, b), 1, {}),
    "torch.conv2d": Function(lambda x, w, b: torch.conv2d(x, w, b), 2, {}),
    "torch.conv3d": Function(lambda x, w, b: torch.conv3d(x, w, b), 3, {}),
}


def layer_and_input(function: Function, seed: int = 0) -> tuple[Any, Tensor]:
    torch.manual_seed(seed)
    if not function.dims:
        return nn.Linear(4, 6), normal(3, 4, seed=seed, dtype=torch.float32)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[function.dims - 1]
    layer = kind(4, 6, 2 if function.dims == 3 else 3, groups=function.geometry.get("groups", 1))
    return layer, normal(2, 4, *[5] * function.dims, seed=seed, dtype=torch.float32)


@pytest.mark.parametrize("child", [False, True], ids=["own parameter", "a child's parameter"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_functional_call_is_the_operator_of_its_angles_times_beta_plus_bias(name, child):
    function = FUNCTIONS[name]
    layer, x = layer_and_input(function)
    angular = convert(Calling(function.call, layer, child), x, rescale="always")
    call = shake(the_call(angular))
    assert call.gamma is None
    answer = conv_answer if function.dims else linear_answer
    expected = answer(x, layer.weight, call.beta, layer.bias, **function.geometry)
    torch.testing.assert_close(angular(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("child", [False, True], ids=["own parameter", "a child's parameter"])
@pytest.mark.parametrize("name", ["F.linear", "F.conv2d"])
def test_a_call_without_bias_learns_gamma(name, child):
    function = FUNCTIONS[name]
    layer, x = layer_and_input(function)
    block = Calling(lambda x, w, b: function.call(x, w, None), layer, child)
    angular = convert(block, x, rescale="always")
    call = shake(the_call(angular))
    answer = conv_answer if function.dims else linear_answer
    expected = answer(x, layer.weight, call.beta, call.gamma, **function.geometry)
    torch.testing.assert_close(angular(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", ["F.linear", "torch.addmm"])
def test_a_call_is_answered_with_and_without_gradients(name, mode):
    layer, x = layer_and_input(FUNCTIONS[name])
    angular = convert(Calling(FUNCTIONS[name].call, layer, False), x, rescale="never")
    with mode():
        result = angular(x).clone()
    torch.testing.assert_close(
        result.detach().double(), linear_answer(x, layer.weight, None, layer.bias), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["F.linear", "torch.addmm", "F.conv2d"])
def test_the_gradient_reaches_weight_bias_and_beta(name):
    layer, x = layer_and_input(FUNCTIONS[name])
    angular = convert(Calling(FUNCTIONS[name].call, layer, False), x, rescale="always")
    angular(x).square().sum().backward()
    gradients = {n: p.grad for n, p in angular.named_parameters()}
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values()), gradients


# (in, out), as the Conv1D of GPT-2 keeps it: the filters are the columns.
@pytest.mark.parametrize("sizes", [(4, 6), (5, 5)])
def test_a_weight_that_is_stored_as_columns_is_converted_by_its_columns(sizes):
    torch.manual_seed(0)
    layer = nn.Linear(*sizes)
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous())
    x = normal(3, sizes[0], dtype=torch.float32)
    angular = convert(Calling(lambda x, w, b: torch.addmm(b, x, w), layer, False), x, rescale="always")
    call = the_call(angular)
    filters = layer.weight.detach().t()
    slope = 1 / (2 * 0.3 * math.tanh(math.pi / (4 * 0.3)))  # of the sigmoid with k = 0.3 at a right angle
    torch.testing.assert_close(call.beta.detach(), filters.norm(dim=1) * filters.shape[1] ** 0.5 / slope)
    expected = linear_answer(x, filters, shake(call).beta, layer.bias)
    torch.testing.assert_close(angular(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_beta_of_a_call_starts_where_a_layers_does():
    layer, x = layer_and_input(FUNCTIONS["F.linear"])
    as_call = the_call(convert(Calling(FUNCTIONS["F.linear"].call, layer, False), x, rescale="always"))
    as_layer = convert(layer, x, rescale="always")
    torch.testing.assert_close(as_call.beta, as_layer.beta, rtol=0, atol=0)


# ------------------------------------------------------------------------------------- weights and biases that are made


def standardized(weight: Tensor, eps: float) -> Tensor:
    rows = weight.detach().double().flatten(1)
    rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, keepdim=True, unbiased=False) + eps).sqrt()
    return rows.view_as(weight)


class Gained(nn.Module):
    """gain · weight, computed in each forward"""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([[-1.0], [2.0], [0.5], [3.0], [-0.1], [1.0]]))
        self.weight = nn.Parameter(normal(6, 4, dtype=torch.float32))

    def forward(self, x):
        return F.linear(x, self.gain * self.weight)


@pytest.mark.parametrize("layer", [StdConv2d, StdConv2dSame])
def test_timms_standardized_convolution_is_angular_in_its_standardized_weight(layer):
    torch.manual_seed(0)
    block, x = layer(4, 6, 3, padding=1, bias=True), normal(2, 4, 5, 5, dtype=torch.float32)
    angular = convert(block, x, rescale="always")
    weight, call = standardized(block.weight, block.eps), shake(the_call(angular))
    expected = conv_answer(x, weight, call.beta, block.bias, padding=[1, 1])
    torch.testing.assert_close(angular(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_timms_scaled_standardized_convolution_is_angular_in_its_standardized_weight():
    torch.manual_seed(0)
    block, x = ScaledStdConv2d(4, 6, 3, padding=1), normal(2, 4, 5, 5, dtype=torch.float32)
    with torch.no_grad():
        block.gain.copy_(normal(6, 1, 1, 1, seed=5))
    angular = convert(block, x, rescale="never")
    weight = standardized(block.weight, block.eps) * block.gain.detach().double() * block.scale
    torch.testing.assert_close(
        angular(x).double(), conv_answer(x, weight, None, block.bias, padding=[1, 1]), rtol=1e-3, atol=1e-4
    )
    assert isinstance(angular, ScaledStdConv2d)


def test_a_weight_times_a_learned_gain_is_angular_in_the_product_and_both_learn():
    block, x = Gained(), normal(3, 4, seed=1, dtype=torch.float32)
    angular = convert(block, x, rescale="never")
    expected = linear_answer(x, block.gain.detach() * block.weight.detach(), None)
    torch.testing.assert_close(angular(x).double(), expected, rtol=1e-4, atol=1e-5)
    angular(x).square().sum().backward()
    assert angular.weight.grad.abs().sum() > 0
    assert angular.gain.grad.isfinite().all()


class BeitQkv(nn.Module):
    """The bias of the keys is a buffer of zeros; the whole bias is put together in each forward."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 6, bias=False)
        self.q_bias = nn.Parameter(torch.ones(2))
        self.v_bias = nn.Parameter(torch.full((2,), -2.0))
        self.register_buffer("k_bias", torch.zeros(2), persistent=False)

    def forward(self, x):
        return F.linear(x, weight=self.qkv.weight, bias=torch.cat((self.q_bias, self.k_bias, self.v_bias)))


def test_a_bias_assembled_in_forward_is_added_and_learned():
    torch.manual_seed(0)
    block, x = BeitQkv(), normal(3, 4, dtype=torch.float32)
    angular = convert(block, x, rescale="always")
    call = shake(the_call(angular))
    bias = torch.tensor([1.0, 1, 0, 0, -2, -2])
    torch.testing.assert_close(
        angular(x).double(), linear_answer(x, block.qkv.weight, call.beta, bias), rtol=1e-4, atol=1e-5
    )
    assert call.gamma is None
    angular(x).sum().backward()
    torch.testing.assert_close(angular.q_bias.grad, torch.full((2,), 3.0))
    torch.testing.assert_close(angular.v_bias.grad, torch.full((2,), 3.0))
    assert [n for n, p in angular.named_parameters() if p.grad is None] == []


# A layer of the owner's own runs while the owner's calls are answered; its inner product has a computed weight too.
@pytest.mark.parametrize("layer", ["angular", "kept"])
def test_a_child_layer_is_not_taken_for_the_owners_computed_weight(layer):
    class Owner(Gained):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return super().forward(self.inner(x))

    torch.manual_seed(0)
    block, x = Owner(), normal(3, 4, seed=1, dtype=torch.float32)
    options = {"exclude": "*inner"} if layer == "kept" else {}
    angular = convert(block, x, rescale="never", **options)
    inner = block.inner(x) if layer == "kept" else linear_answer(x, block.inner.weight, None, block.inner.bias)
    expected = linear_answer(inner, block.gain.detach() * block.weight.detach(), None)
    torch.testing.assert_close(angular(x).double(), expected, rtol=1e-4, atol=1e-5)


class Slices(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(4, 4, dtype=torch.float32))

    def forward(self, x):
        return torch.cat([F.linear(x, self.weight[:2]), F.linear(x, self.weight[2:])], -1)


class TwoComputed(Slices):
    def forward(self, x):
        return F.linear(F.linear(x, 2 * self.weight), 3 * self.weight)


class WithComputedChild(Slices):
    def __init__(self):
        super().__init__()
        self.inner = parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x):
        return F.linear(self.inner(x), 2 * self.weight)


class BesideFixed(Slices):
    def __init__(self):
        super().__init__()
        self.register_buffer("smoother", normal(4, 4, seed=7, dtype=torch.float32))

    def forward(self, x):
        return F.linear(F.linear(x, self.smoother), 2 * self.weight)


class Given(nn.Module):
    def forward(self, x, weight):
        return F.linear(x, weight)


class Giving(Slices):
    def __init__(self):
        super().__init__()
        self.child = Given()

    def forward(self, x):
        return self.child(x, self.weight)


COMPUTED = "its weight is computed, and so is that of another call made there"


@pytest.mark.parametrize(
    ("block", "reasons"),
    [
        (Slices, [COMPUTED] * 2),
        (TwoComputed, [COMPUTED] * 2),
        (WithComputedChild, [COMPUTED]),
        (BesideFixed, ["its filter is not learned: a buffer, or computed from activations", COMPUTED]),
        (Giving, ["0.child is given its weight, 0.weight, by another module"]),
    ],
)
def test_a_call_that_cannot_be_told_from_others_is_kept_with_the_reason_and_left_alone(block, reasons):
    torch.manual_seed(0)
    model, x = nn.Sequential(block(), nn.Linear(4, 4), nn.Tanh()).eval(), normal(3, 4, seed=1, dtype=torch.float32)
    plan = plan_conversion(model, example_inputs=x)
    assert sorted(d.reason for d in plan.kept) == sorted(reasons)
    angular = sphereify(model, example_inputs=x, exclude="*inner" if block is WithComputedChild else None)
    torch.testing.assert_close(angular[0](x), model[0](x))


# ----------------------------------------------------------------------------------------------- the owner stays itself


class Owner(nn.Module):
    """A functional map and functional dropout; what follows depends on the values."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(normal(8, 8, dtype=torch.float32))
        self.bias = nn.Parameter(normal(8, seed=1, dtype=torch.float32))

    def forward(self, x):
        return F.dropout(F.linear(x, self.weight, self.bias), 0.5, self.training)

    def own_method(self):
        return self.bias.sum()


class Branching(Owner):
    def forward(self, x):
        x = super().forward(x)
        return x if float(x.mean()) > 0 else -2 * x


class Whole(nn.Module):
    def __init__(self, owner=Owner):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), owner(), nn.Tanh())
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.body(x))


@pytest.fixture
def whole():
    torch.manual_seed(0)
    return Whole(), normal(5, 4, seed=2, dtype=torch.float32)


def test_the_class_is_a_subclass_of_the_original_and_named_after_it(whole):
    model, x = whole
    angular = sphereify(model, example_inputs=x)
    owner = angular.body[1]
    assert isinstance(owner, Owner)
    assert "Owner" in type(owner).__name__
    assert type(model.body[1]) is Owner
    assert owner.own_method() == model.body[1].own_method()
    assert type(angular) is Whole


def test_control_flow_on_values_inside_the_owner_still_takes_both_ways():
    torch.manual_seed(0)
    model, x = nn.Sequential(Branching(), nn.Tanh()).eval(), normal(3, 8, seed=2, dtype=torch.float32)
    plan = plan_conversion(model, example_inputs=x)
    assert [d.name for d in plan.converted] == ["0.weight"]
    angular = sphereify(model, example_inputs=x, rescale="never", **OPERATOR)[0]
    ways = set()
    for sign in (1, -1):
        with torch.no_grad():
            angular.bias.copy_(sign * torch.ones(8) * 3)
        expected = linear_answer(x, angular.weight, None, angular.bias)
        ways.add(bool(expected.mean() > 0))
        expected = expected if expected.mean() > 0 else -2 * expected
        with torch.no_grad():
            torch.testing.assert_close(angular(x).double(), expected, rtol=1e-4, atol=1e-5)
    assert ways == {True, False}


def drops(owner: nn.Module) -> bool:
    return bool((owner(torch.ones(64, 8)) == 0).any())


def test_functional_dropout_follows_the_mode_of_the_owner_and_of_its_parents(whole):
    model, x = whole
    angular = sphereify(model.train(), example_inputs=x)
    owner = angular.body[1]
    assert drops(owner)
    for switched in (owner, angular.body, angular):
        switched.eval()
        assert not drops(owner)
        switched.train()
        assert drops(owner)
    assert the_call(angular).training
    evaluated = sphereify(model.eval(), example_inputs=x)
    assert not drops(evaluated.body[1])
    assert not the_call(evaluated).training


@pytest.mark.parametrize("through", THROUGH)
def test_a_copy_keeps_both_modes(whole, through):
    model, x = whole
    angular = sphereify(model, example_inputs=x, **OPERATOR)
    for training in (True, False):
        twin = THROUGH[through](angular.train(training))
        assert twin.training == twin.body[1].training == the_call(twin).training == training
        assert type(twin.body[1]) is type(angular.body[1])
        for mode in (True, False):
            results = []
            for model in (twin.train(mode), angular.train(mode)):
                torch.manual_seed(3)
                results.append(model(x))
            torch.testing.assert_close(*results, rtol=0, atol=0)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in angular.parameters()}


def test_the_keys_and_values_of_the_original_state_survive(whole):
    model, x = whole
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = sphereify(model, example_inputs=x).state_dict()
    assert set(before) <= set(state)
    assert all(torch.equal(before[name], state[name]) for name in before)
    assert sphereify(model, example_inputs=x).load_state_dict(state)


def test_converting_twice_changes_nothing(whole):
    model, x = whole
    once = sphereify(model, example_inputs=x)
    twice = sphereify(once, example_inputs=x)
    assert [type(module) for module in twice.modules()] == [type(module) for module in once.modules()]
    assert list(twice.state_dict()) == list(once.state_dict())
    torch.testing.assert_close(twice.eval()(x), once.eval()(x), rtol=0, atol=0)
    assert {d.name: d.action for d in plan_conversion(once, example_inputs=x).decisions} == {
        d.name: "keep" for d in once.conversion_plan.decisions
    }


def test_a_second_conversion_of_other_layers_adds_to_the_first(whole):
    model, x = whole
    options = {"example_inputs": x, "head": "keep", **OPERATOR}
    first = sphereify(model, include="body.0", **options)
    assert not any(isinstance(module, AngularCall) for module in first.modules())
    both = sphereify(first, include="body.1*", **options)
    assert [d.name for d in both.conversion_plan.converted] == ["body.0", "body.1.weight"]
    at_once = sphereify(model, include="body.*", **options)
    torch.testing.assert_close(both.eval()(x), at_once.eval()(x), rtol=0, atol=0)
    other_way = sphereify(sphereify(model, include="body.1*", **options), include="body.0", **options)
    torch.testing.assert_close(other_way.eval()(x), at_once.eval()(x), rtol=0, atol=0)


def test_a_second_call_of_the_same_owner_can_be_added_later():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(normal(6, 4, dtype=torch.float32))
            self.b = nn.Parameter(normal(5, 6, dtype=torch.float32))

        def forward(self, x):
            return F.linear(F.linear(x, self.a), self.b)

    model, x = nn.Sequential(Two(), nn.Tanh()), normal(3, 4, seed=1, dtype=torch.float32)
    options = {"example_inputs": x, "rescale": "never", **OPERATOR}
    first = sphereify(model, include="0.a", **options)
    half = linear_answer(x, model[0].a, None)
    torch.testing.assert_close(first[0](x).double(), half @ model[0].b.detach().double().t(), rtol=1e-4, atol=1e-5)
    both = sphereify(first, include="0.b", **options)
    torch.testing.assert_close(both[0](x).double(), linear_answer(half, model[0].b, None), rtol=1e-4, atol=1e-5)
    assert type(both[0]) is type(first[0])


@pytest.mark.parametrize(
    "make",
    [Owner, *(pytest.param(m, marks=pytest.mark.exhaustive) for m in (Gained, BeitQkv, lambda: StdConv2d(4, 6, 3)))],
)
def test_a_compiled_owner_computes_the_same_without_graph_breaks(make):
    torch.manual_seed(0)
    block = make()
    x = torch.randn(2, 4, 5, 5) if isinstance(block, nn.Conv2d) else torch.randn(3, 8 if make is Owner else 4)
    angular = convert(block, x, rescale="always").eval()
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(angular), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), angular(x), rtol=1e-5, atol=1e-5)
    compiled(x).sum().backward()


@pytest.mark.parametrize("make", [Owner, BeitQkv])
def test_an_exported_owner_computes_the_same(make):
    torch.manual_seed(0)
    x = torch.randn(3, 8 if make is Owner else 4)
    angular = convert(make(), x, rescale="always").eval()
    exported = torch.export.export(angular, (x,)).module()
    torch.testing.assert_close(exported(x), angular(x), rtol=1e-5, atol=1e-5)


def test_a_forward_replaced_on_the_owner_is_kept_or_answered_but_not_silently_lost():
    owner, x = Owner(), normal(3, 8, dtype=torch.float32)
    owner.forward = MethodType(lambda self, x: F.linear(x, self.weight), owner)
    model = nn.Sequential(nn.Linear(8, 8), owner, nn.Tanh())
    angular = sphereify(model, example_inputs=x, rescale="never")
    [decision] = [d for d in angular.conversion_plan.decisions if d.name == "1.weight"]
    same = torch.allclose(angular[1](x), model[1](x))
    assert same == (decision.action == "keep")


def test_a_shared_owner_that_is_called_twice_is_answered_both_times():
    owner, x = Owner().eval(), normal(3, 8, dtype=torch.float32)
    model = nn.Sequential(owner, nn.ReLU(), owner, nn.Tanh()).eval()
    angular = sphereify(model, example_inputs=x, rescale="never", **OPERATOR)
    assert angular[0] is angular[2]
    assert len([d for d in angular.conversion_plan.decisions if d.call]) == 1
    inner = linear_answer(x, owner.weight, None, owner.bias).relu()
    expected = linear_answer(inner, owner.weight, None, owner.bias).tanh()
    torch.testing.assert_close(angular(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_owners_that_are_tied_to_one_parameter_are_both_answered_and_stay_tied(tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(Owner(), nn.ReLU(), Owner(), nn.Tanh()).eval()
        model[2].weight = model[0].weight
        return model

    x = normal(3, 8, dtype=torch.float32)
    angular = sphereify(make(), example_inputs=x, rescale="never", **OPERATOR)
    assert angular[0].weight is angular[2].weight
    inner = linear_answer(x, angular[0].weight, None, angular[0].bias).relu()
    expected = linear_answer(inner, angular[2].weight, None, angular[2].bias).tanh()
    torch.testing.assert_close(angular(x).double(), expected, rtol=1e-4, atol=1e-5)
    loaded = load(save(angular, tmp_path / "tied"), factory=make)
    assert loaded[0].weight is loaded[2].weight
    torch.testing.assert_close(loaded(x), angular(x), rtol=0, atol=0)


def test_a_layer_and_a_functional_call_that_share_a_parameter_are_both_angular():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return F.linear(self.layer(x).relu(), self.layer.weight)

    torch.manual_seed(0)
    block, x = Tied(), normal(3, 4, dtype=torch.float32)
    angular = convert(block, x, rescale="never")
    inner = linear_answer(x, block.layer.weight, None).relu()
    torch.testing.assert_close(
        angular(x).double(), linear_answer(inner, block.layer.weight, None), rtol=1e-4, atol=1e-5
    )


# -------------------------------------------------------------------------------------- parametrizations and subclasses

PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_a_parametrized_layer_is_angular_in_its_effective_weight_with_the_parametrization_in_place(name, layer):
    torch.manual_seed(0)
    plain = nn.Linear(6, 4) if layer == "linear" else nn.Conv2d(2, 4, 3)
    x = normal(3, 6, dtype=torch.float32) if layer == "linear" else normal(2, 2, 4, 4, dtype=torch.float32)
    block = PARAMETRIZATIONS[name](plain).eval()
    angular = convert(block, x, rescale="always").eval()
    assert nn.utils.parametrize.is_parametrized(angular, "weight")
    assert isinstance(angular, type(block).__bases__[0])
    assert type(angular).__name__ == type(plain).__name__.replace("Parametrized", "ParametrizedAngular")
    answer = linear_answer if layer == "linear" else conv_answer
    expected = answer(x, block.weight, shake(the_call(angular)).beta, block.bias)
    torch.testing.assert_close(angular(x).double(), expected, rtol=1e-4, atol=1e-5)
    angular.train()(x).square().sum().backward()
    learned = {n: p.grad for n, p in angular.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in learned.values())
    directions = [n for n in learned if n.startswith("parametrizations.weight.original")][-1]
    assert learned[directions].abs().sum() > 1e-3
    twin = copy.deepcopy(angular).eval()
    torch.testing.assert_close(twin(x), angular.eval()(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("style", ["hook", "parametrization"])
def test_the_length_of_a_weight_normalized_filter_no_longer_matters_and_its_direction_learns(style):
    torch.manual_seed(0)
    norm = nn.utils.weight_norm if style == "hook" else parametrizations.weight_norm
    length, direction = {
        "hook": ("weight_g", "weight_v"),
        "parametrization": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    }[style]
    block, x = norm(nn.Conv2d(2, 4, 3)), normal(2, 2, 4, 4, dtype=torch.float32)
    # A weight that a hook has computed cannot be copied, says torch.
    angular = convert(block, x, rescale="never", inplace=style == "hook")
    result = angular(x)
    result.square().sum().backward()
    gradients = dict(angular.named_parameters())
    assert gradients[length].grad.isfinite().all()
    assert gradients[direction].grad.abs().sum() > 1e-2
    with torch.no_grad():
        angular.get_parameter(length).mul_(50)
        torch.testing.assert_close(angular(x), result, rtol=1e-4, atol=1e-4)
        angular.get_parameter(direction).copy_(normal(4, 2, 3, 3, seed=9))
        assert not torch.allclose(angular(x), result, rtol=1e-2, atol=1e-2)


class Doubling(nn.Conv2d):
    """A subclass that nobody knows."""

    def forward(self, x):
        return 3 * super().forward(2 * x) + 1


def test_an_unknown_subclass_of_a_convolution_keeps_what_it_adds_around_its_angular_call():
    torch.manual_seed(0)
    block, x = Doubling(4, 6, 3, padding=1), normal(2, 4, 5, 5, dtype=torch.float32)
    angular = convert(block, x, rescale="always")
    g = conv_answer(2 * x, block.weight, shake(the_call(angular)).beta, block.bias, padding=[1, 1])
    torch.testing.assert_close(angular(x).double(), 3 * g + 1, rtol=1e-4, atol=1e-4)
    assert isinstance(angular, Doubling)


def test_timms_same_padded_convolution_pads_as_before_and_answers_with_angles():
    torch.manual_seed(0)
    block, x = Conv2dSame(4, 6, 3, stride=2), normal(2, 4, 6, 6, dtype=torch.float32)
    angular = convert(block, x, rescale="never")
    padded = F.pad(x, (0, 1, 0, 1))  # for even sizes 'same' pads behind
    expected = conv_answer(padded, block.weight, None, block.bias, stride=[2, 2])
    torch.testing.assert_close(angular(x).double(), expected, rtol=1e-4, atol=1e-5)
    assert isinstance(angular, Conv2dSame)


@pytest.mark.parametrize("name", ["buffer", "BlurPool2d"])
def test_a_filter_that_is_not_learned_is_kept_with_the_reason(name):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kernel", torch.full((4, 1, 3, 3), 1 / 9))

        def forward(self, x):
            return F.conv2d(x, self.kernel.to(x.dtype), padding=1, groups=4)

    fixed = Fixed() if name == "buffer" else BlurPool2d(4)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), fixed, nn.Conv2d(4, 4, 1)), torch.randn(2, 3, 8, 8)
    found = {d.name: d for d in plan_conversion(model, example_inputs=x).decisions}
    assert set(found) == {"0", "1.fixed", "2"}
    assert found["1.fixed"].action == "keep"
    assert "not learned" in found["1.fixed"].reason
    angular = sphereify(model, example_inputs=x)
    features = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(angular[1](features), fixed(features), rtol=0, atol=0)
    assert type(angular[1]) is type(fixed)


class CentralDifference(nn.Conv2d):
    """Two convolutions with one weight."""

    def forward(self, x):
        return super().forward(x) - 0.7 * F.conv2d(x, self.weight.sum((2, 3), keepdim=True), padding=0)


def test_a_subclass_that_makes_two_convolutions_is_kept_whole_with_the_reason():
    torch.manual_seed(0)
    model = nn.Sequential(CentralDifference(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Tanh())
    x = torch.randn(2, 3, 8, 8)
    decisions = {d.name: d for d in plan_conversion(model, example_inputs=x).decisions}
    assert decisions["0"].action == "keep"
    assert "more than one convolution" in decisions["0"].reason
    torch.testing.assert_close(sphereify(model, example_inputs=x)[0](x), model[0](x))


def test_a_weight_that_is_cast_at_the_call_is_answered_in_every_dtype():
    torch.manual_seed(0)
    model = sphereify(nn.Sequential(Casting(), nn.Tanh()), example_inputs=torch.randn(5, 4), rescale="never")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert model[0](100 * torch.ones(5, 4, dtype=dtype)).abs().max() <= 1


# ----------------------------------------------------------------------------------------------------- out and in again


def make_whole() -> nn.Module:
    """Every sort of functional site at once."""
    torch.manual_seed(0)
    return nn.Sequential(
        StdConv2d(3, 4, 3), nn.ReLU(), Conv2dSame(4, 4, 3), nn.Flatten(), nn.Linear(4 * 8 * 8, 4), Gained(),
        nn.Tanh(), nn.Linear(6, 4), BeitQkv(), nn.Tanh(), nn.Linear(6, 8), Owner(), nn.Tanh(), nn.Linear(8, 3),
    )  # fmt: skip


ANGLES = {
    "sigmoid": {"operator": "sigmoid", "rescale": "always"},
    "k per filter": {"operator": "learnable-sigmoid"},
    "k of the network": {"operator": "learnable-sigmoid", "share_k": "network"},
}


@pytest.mark.parametrize("angles", ANGLES)
def test_a_trained_model_with_functional_calls_comes_back_bit_for_bit(angles, tmp_path):
    x = normal(4, 3, 8, 8, dtype=torch.float32)
    angular = sphereify(make_whole(), example_inputs=x, **ANGLES[angles])
    assert len([d for d in angular.conversion_plan.converted if d.call]) == 5
    optimizer = torch.optim.SGD(angular.parameters(), lr=0.1)
    angular(x).square().sum().backward()
    optimizer.step()
    loaded = load(save(angular, tmp_path / "model"), factory=make_whole)
    torch.testing.assert_close(loaded(x), angular.eval()(x), rtol=0, atol=0)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in angular.modules()]
    operators = [m for m in loaded.modules() if isinstance(m, LearnableSigmoidOperator)]
    assert len(operators) == {"sigmoid": 0, "k per filter": 9, "k of the network": 1}[angles]


@pytest.mark.parametrize("angles", ANGLES)
def test_a_plan_through_json_answers_the_same_calls(angles):
    x = normal(4, 3, 8, 8, dtype=torch.float32)
    plan = plan_conversion(make_whole(), example_inputs=x, **ANGLES[angles])
    again = ConversionPlan.from_json(plan.to_json())
    assert again == plan
    results = [apply_plan(make_whole(), p).eval()(x) for p in (plan, again)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_original_model_is_not_touched():
    x = normal(4, 3, 8, 8, dtype=torch.float32)
    model = make_whole().eval()
    types, expected = [type(module) for module in model.modules()], model(x)
    angular = sphereify(model, example_inputs=x, operator="learnable-sigmoid")
    with torch.no_grad():
        for parameter in angular.parameters():
            parameter.add_(1)
    assert [type(module) for module in model.modules()] == types
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_calls_under_autocast_are_close_to_those_in_full_precision():
    x = normal(4, 3, 8, 8, dtype=torch.float32)
    angular = sphereify(make_whole(), example_inputs=x, operator="sigmoid").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = angular(x)
    low.float().sum().backward()
    torch.testing.assert_close(low.float(), angular(x).float(), rtol=0.1, atol=0.1)


# -------------------------------------------------------------------------------------------------------------- the zoo

T, V = timm.create_model, torchvision.models
# name: (builder, size of its images, pattern of the weights that are passed to functions, how many there are)
ZOO = {
    "beit": (lambda: T("beit_base_patch16_224", depth=2, embed_dim=96, num_heads=3, img_size=224), 224, r"qkv$", 2),
    "beit of another size": (
        lambda: T("beit_base_patch16_224", depth=2, embed_dim=96, num_heads=3, img_size=64), 64, r"qkv$", 2,
    ),
    "swinv2": (
        lambda: T("swinv2_tiny_window8_256", depths=(1, 1), num_heads=(2, 4), embed_dim=32, img_size=64), 64,
        r"qkv$", 2,
    ),
    "eva02": (lambda: T("eva02_tiny_patch14_224", depth=2, img_size=56, num_classes=10), 56, r"qkv$", 2),
    "bit": (lambda: T("resnetv2_50x1_bit"), 64, r"conv\d?$", 53),
    "nfnet": (lambda: T("nfnet_l0"), 64, r"conv", 57),
    "mobilevit": (lambda: T("mobilevit_xxs"), 64, r"$^", 0),
    "xcit": (lambda: T("xcit_nano_12_p16_224", depth=2, img_size=64), 64, r"$^", 0),
    "tf_efficientnet": (lambda: T("tf_efficientnet_b0"), 64, r"conv", 5),
    "torchvision swin": (
        lambda: V.SwinTransformer(
            patch_size=[4, 4], embed_dim=32, depths=[1, 1], num_heads=[2, 4], window_size=[7, 7], num_classes=10
        ), 64, r"attn\.(qkv|proj)$", 4,
    ),
}  # fmt: skip


# Without inputs, images of the size in `pretrained_cfg` are tried, which some models of another size refuse.
LARGE = ("bit", "nfnet", "mobilevit", "xcit", "tf_efficientnet")
GIVEN = [
    *(pytest.param(name, True, marks=pytest.mark.zoo) if name in LARGE else (name, True) for name in ZOO),
    ("beit of another size", False),
    *(pytest.param(name, False, marks=pytest.mark.zoo) for name in ("swinv2", "eva02")),
]


@pytest.mark.parametrize(("name", "given"), GIVEN, ids=lambda part: part if isinstance(part, str) else f"given={part}")
def test_a_network_that_calls_functions_runs_forward_and_backward_with_every_site_called(name, given):
    build, size, pattern, calls = ZOO[name]
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    angular = sphereify(build(), inplace=True, example_inputs=x if given else None)
    plan = angular.conversion_plan
    assert not plan.kept or [d.name for d in plan.kept] == ["head.fc"]
    passed = [d for d in plan.converted if d.call]
    assert len(passed) == calls
    assert all(re.search(pattern, d.name) for d in passed)
    assert {d.name for d in plan.decisions if d.name.endswith("qkv") and d.action != "convert"} == set()
    result = angular.train()(x)
    result.square().mean().backward()
    assert result.isfinite().all()
    assert [n for n, p in angular.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert [d.name for d in plan.verify(angular, x).decisions if not d.called] == []


class SometimesBiased(nn.Module):
    """Passes a bias on demand, which it did not when it was converted."""

    def __init__(self):
        super().__init__()
        self.weight, self.shift = nn.Parameter(normal(5, 4)), nn.Parameter(normal(5, seed=1))
        self.biased = False

    def forward(self, x):
        return F.linear(x, self.weight, self.shift if self.biased else None)


def test_a_bias_that_comes_after_the_conversion_is_added_to_gamma():
    x = normal(3, 4, seed=2)
    model = sphereify(nn.Sequential(SometimesBiased(), nn.Tanh()), operator="sigmoid", example_inputs=x)
    owner, call = model[0], shake(the_call(model))
    owner.biased = True
    torch.testing.assert_close(owner(x), linear_answer(x, owner.weight, call.beta, call.gamma, owner.shift))


def cubed(cos):
    return cos**3


def test_repr_of_a_call_names_the_operator_function():
    call = AngularCall("linear", 3, cubed, rescale=False, has_bias=False, eps=1e-4)
    assert repr(call) == "AngularCall(linear, operator=cubed, rescale=False, eps=0.0001)"

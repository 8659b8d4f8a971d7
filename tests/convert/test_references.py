"""A layer becomes angular for everything that refers to it; products that Python functions do not make are told."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from sphereify import plan_conversion, sphereify
from sphereify.errors import UnsupportedModelError
from sphereify.nn import SphereLinear
from tests.convert.models import Net
from tests.nn.oracle import linear_angles, normal


def decisions(model: nn.Module, x: torch.Tensor, **options) -> dict:
    return {d.name: d for d in plan_conversion(model, example_inputs=x, **options).decisions}


class Referring(nn.Module):
    """Calls its layer by something else than its name."""

    def __init__(self, refer) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.reference = refer(self.layer)

    def forward(self, x):
        return self.last(self.reference(x).tanh())


WAYS = {
    "list": lambda layer: functools.partial(lambda held, x: held[0](x), [layer]),
    "partial": functools.partial,
    "dictionary": lambda layer: functools.partial(lambda held, x: held["a"](x), {"a": layer}),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_is_angular_however_it_is_referred_to(way, inplace):
    x = normal(5, 4, dtype=torch.float32)
    model = Referring(WAYS[way])
    layer = model.layer
    converted = sphereify(model, example_inputs=x, inplace=inplace, head="keep").eval()
    assert isinstance(converted.layer, SphereLinear)
    assert (converted.layer is layer) == inplace
    expected = converted.last(converted.layer(x).tanh())
    torch.testing.assert_close(converted(x), expected, rtol=0, atol=0)
    assert not torch.allclose(expected, Referring(WAYS[way])(x))
    assert not inplace or isinstance(layer, SphereLinear)


def test_a_model_that_is_one_layer_becomes_angular_itself():
    model = nn.Linear(4, 3)
    assert sphereify(model, inplace=True) is model
    assert type(model).__name__ == "AngularHead"


def test_functional_call_answers_each_call_as_the_model_does():
    """There parameters are plain tensors, as computed weights are."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.filters = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 3, 3, 3))
            self.plain = nn.Linear(4, 4)

        def forward(self, x):
            x = F.conv2d(x, self.filters - self.filters.mean((1, 2, 3), keepdim=True)).relu().mean((2, 3))
            return self.plain(F.linear(x, self.weight))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    model = sphereify(nn.Sequential(Block(), nn.ReLU(), nn.Linear(4, 3)), example_inputs=x, exclude="0.plain")
    assert {d.name for d in model.conversion_plan.converted} == {"0.weight", "0.computed", "2"}
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(model, parameters, (x,)), model(x), rtol=0, atol=0)


def test_a_fixed_matrix_of_the_shape_of_a_weight_stays_as_it_is():
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.register_buffer("basis", torch.randn(4, 4, dtype=torch.float64))

        def forward(self, x):
            return F.linear(F.linear(x, self.weight).double(), self.basis)

    torch.manual_seed(0)
    x = torch.randn(2, 4)
    model = sphereify(Projected(), example_inputs=x, head="keep", rescale="never")
    expected = F.linear(linear_angles(x, model.weight, 1e-4).cos(), model.basis)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


def test_a_part_of_a_weight_that_was_planned_whole_is_an_error():
    class Slim(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.width = nn.Parameter(torch.randn(4, 4)), 4

        def forward(self, x):
            return F.linear(x, self.weight[: self.width]).tanh()

    model = sphereify(nn.Sequential(Slim(), nn.Tanh()), example_inputs=torch.randn(2, 4))
    model[0].width = 2
    with pytest.raises(UnsupportedModelError, match=r"Slim uses a part of weight, of shape \(2, 4\), as a weight, and"):
        model(torch.randn(2, 4))


def test_layers_that_other_values_would_call_are_converted():
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            chosen, out = self.gate(x).argmax(1), torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                if (chosen == number).any():
                    out[chosen == number] = expert(x[chosen == number])
            return self.last(out)

    found = decisions(Routed(), torch.randn(1, 4))
    assert {found[f"experts.{i}"].action for i in range(4)} == {"convert"}
    assert sorted(found[f"experts.{i}"].called is None for i in range(4)) == [False, True, True, True]


def test_a_weight_that_a_function_with_several_results_computes_is_one_site():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True)
            return F.conv2d(x, (self.weight - mean) / (variance + 1e-10).sqrt(), self.bias)

    model = nn.Sequential(Standardized(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    found = decisions(model, torch.randn(2, 3, 8, 8))
    assert (found["0"].action, found["0"].call.parameter) == ("convert", None)


class OwnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


TOLD = {
    "own backward": (OwnLinear.apply, "inside an autograd.Function"),
    "torch.ops": (torch.ops.aten.linear, "by torch.ops"),
    "torch.ops, overload": (lambda x, w: torch.ops.aten.mm.default(x, w), "by torch.ops"),
    "multi_dot": (lambda x, w: torch.linalg.multi_dot([x, w, w]), "no linear map of rows"),
    "addmm_": (lambda x, w: torch.zeros(len(x), 4).addmm_(x, w), "no linear map of rows"),
}


@pytest.mark.parametrize("way", TOLD)
def test_a_product_that_cannot_be_answered_is_kept_and_told(way):
    multiply, reason = TOLD[way]
    model = Net(lambda n, x: n.last(multiply(x, n.weight).tanh()), last=nn.Linear(4, 3))
    model.weight = nn.Parameter(torch.randn(4, 4))
    x = torch.randn(2, 4)
    found = decisions(model, x)
    assert set(found) == {"weight", "last"}
    assert found["weight"].action == "keep"
    assert reason in found["weight"].reason


def test_looking_leaves_autograd_functions_as_they_are():
    before = OwnLinear.apply(torch.ones(1, 2), torch.ones(2, 2))
    known = vars(torch.autograd.Function).get("apply")
    plan_conversion(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    assert vars(torch.autograd.Function).get("apply") is known
    torch.testing.assert_close(OwnLinear.apply(torch.ones(1, 2), torch.ones(2, 2)), before)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("make", [nn.utils.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)],
                         ids=["weight norm", "pruning"])  # fmt: skip
def test_a_layer_that_holds_a_computed_weight_can_be_copied_and_traced(make):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    make(model[0])
    x = torch.randn(2, 4)
    converted = sphereify(model, example_inputs=x)
    assert [d.name for d in converted.conversion_plan.converted] == ["0", "2"]
    assert converted.conversion_plan.decisions[-1].head == "w-softmax"
    converted(x).sum().backward()
    assert all(p.grad is not None for p in converted[0].parameters())
    assert model[0].bias.grad is None


def test_the_addend_of_a_product_may_be_a_matrix():
    model = Net(lambda n, x: n.last(torch.addmm(x, x, n.weight).tanh()), last=nn.Linear(4, 3))
    model.weight = nn.Parameter(normal(4, 4, dtype=torch.float32))
    x = normal(3, 4, dtype=torch.float32)
    converted = sphereify(model, example_inputs=x, rescale="never", head="keep")
    angular = torch.addmm(x, F.normalize(x, dim=1), F.normalize(model.weight, dim=0))
    torch.testing.assert_close(converted(x), model.last(angular.tanh()), atol=1e-4, rtol=0)


def test_a_norm_that_writes_into_its_input_trains():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten(), nn.Linear(4, 2))  # fmt: skip
    model[1].register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
    x = torch.randn(2, 3, 6, 6)
    sphereify(model, example_inputs=x)(x).sum().backward()


def test_a_class_that_allows_no_subclass_is_told_before_anything_changes():
    class Final(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.last = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 3)

        def __init_subclass__(cls) -> None:
            raise TypeError("Final is final")

        def forward(self, x):
            return self.last(F.linear(x, self.weight).tanh())

    model = Final()
    with pytest.raises(UnsupportedModelError, match="the model: Final allows no subclass, which its angular calls"):
        sphereify(model, example_inputs=torch.randn(2, 4), inplace=True)
    assert type(model.last) is nn.Linear


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
@pytest.mark.parametrize("through", [lambda m: m, copy.deepcopy], ids=["itself", "a copy"])
def test_a_parametrization_can_be_removed_from_an_angular_layer(name, through):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    getattr(parametrizations, name)(model[0])
    x = torch.randn(2, 4)
    converted = through(sphereify(model, example_inputs=x)).eval()
    before = converted(x)
    parametrize.remove_parametrizations(converted[0], "weight")
    assert not parametrize.is_parametrized(converted[0])
    torch.testing.assert_close(converted(x), before, rtol=0, atol=1e-6)
    plain = F.linear(x, converted[0].weight, converted[0].bias)
    assert not torch.allclose(converted[0](x), plain)

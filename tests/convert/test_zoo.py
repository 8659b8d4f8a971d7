"""Networks of timm and torchvision: each is built once, and all properties are checked on it.

The two smallest stand for the others where time is short.
"""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sphereify import ConversionPlan, apply_plan, plan_conversion, sphereify
from sphereify.nn import AngularHead
from sphereify.nn.layers import AngularLayer
from tests.convert.models import classifier_of, conv

# name: (builder, height and width of its input, its classifier, the shortcuts it has)
SMALL = {
    "test_resnet": (
        lambda: timm.create_model("test_resnet"), 64, "fc", {f"layer{i}.0.downsample.1" for i in (2, 3, 4)},
    ),
    "test_vit": (lambda: timm.create_model("test_vit"), 160, "head", set()),
}  # fmt: skip
LARGE = {
    "resnet18": (lambda: timm.create_model("resnet18"), 64, "fc", {f"layer{i}.0.downsample.0" for i in (2, 3, 4)}),
    "resnet50": (lambda: timm.create_model("resnet50"), 64, "fc", {f"layer{i}.0.downsample.0" for i in (1, 2, 3, 4)}),
    "mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_100"), 64, "classifier", set()),
    "efficientnet": (lambda: timm.create_model("efficientnet_b0"), 64, "classifier", set()),
    "convnext": (lambda: timm.create_model("convnext_atto"), 64, "head.fc", set()),
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224"), 224, "head", set()),
    "swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224"), 224, "head.fc", set()),
    "densenet": (lambda: timm.create_model("densenet121"), 64, "classifier", set()),
    "torchvision-resnet18": (torchvision.models.resnet18, 64, "fc", {f"layer{i}.0.downsample.0" for i in (2, 3, 4)}),
    "torchvision-mobilenetv3": (torchvision.models.mobilenet_v3_small, 64, "classifier.3", set()),
    "googlenet": (lambda: torchvision.models.googlenet(init_weights=False), 64, "fc", set()),
    "vgg11": (lambda: torchvision.models.vgg11(init_weights=False), 32, "classifier.6", set()),
}
ZOO = SMALL | LARGE
EACH = [*SMALL, *(pytest.param(name, marks=pytest.mark.zoo) for name in LARGE)]
KEPT = {"googlenet": {"aux1.fc2", "aux2.fc2"}}
SITES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
FIRED = []


def note_call(module, args, output):
    FIRED.append(module)


@dataclass
class Case:
    """A model, what was known of it before the conversion, and the result."""

    name: str
    build: Callable[[], nn.Module]
    classifier: str
    shortcuts: set[str]
    x: torch.Tensor
    model: nn.Module
    hooked: str
    before: dict[str, torch.Tensor]
    types: list[type]
    expected: torch.Tensor
    angular: nn.Module


def output(model, x):
    """In eval mode; each module is put back into the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        result = model(x)
    for module, mode in modes.items():
        module.training = mode
    return result


def build(name):
    torch.manual_seed(0)
    model = ZOO[name][0]().train()
    # A frozen norm and a frozen weight, as in fine-tuning.
    next(
        module for module in model.modules() if "Norm" in type(module).__name__ or module.__class__ is nn.Dropout
    ).eval()
    next(module for module in model.modules() if isinstance(module, SITES)).weight.requires_grad_(False)
    return model


@pytest.fixture(scope="module", params=EACH)
def case(request):
    _, size, classifier, shortcuts = ZOO[request.param]
    model = build(request.param)
    hooked = next(name for name, module in model.named_modules() if isinstance(module, SITES))
    model.get_submodule(hooked).register_forward_hook(note_call)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    expected = output(model, x)
    return Case(request.param, lambda: build(request.param), classifier, shortcuts, x, model, hooked, before, types,
                expected, sphereify(model))  # fmt: skip


def test_every_convolution_and_linear_map_is_in_the_plan_once_with_a_reason(case):
    found = [name for name, module in case.model.named_modules() if isinstance(module, SITES)]
    decisions = case.angular.conversion_plan.decisions
    assert sorted(name for d in decisions for name in (d.name, *d.aliases)) == sorted(found)
    assert all(d.reason for d in decisions)
    assert all(d.action in ("convert", "keep") for d in decisions)


def test_what_the_plan_says_is_what_was_done(case):
    modules = dict(case.angular.named_modules())
    for d in case.angular.conversion_plan.decisions:
        assert isinstance(modules[d.name], (AngularLayer, AngularHead)) == (d.action == "convert"), d.name


def test_the_classifier_is_swapped_and_all_else_is_converted(case):
    decisions = case.angular.conversion_plan.decisions
    assert [d.name for d in decisions if d.head] == [case.classifier]
    assert type(case.angular.get_submodule(case.classifier)) is AngularHead
    assert {d.name for d in decisions if d.action == "keep"} == KEPT.get(case.name, set())


def test_the_shortcuts_are_found_by_their_exact_names(case):
    plan = plan_conversion(case.model, skip_shortcuts=True)
    assert {d.name for d in plan.decisions if d.role == "shortcut"} == case.shortcuts
    assert {d.name for d in plan.kept} == case.shortcuts | KEPT.get(case.name, set())


def test_the_original_is_untouched(case):
    state = case.model.state_dict()
    assert list(state) == list(case.before)
    assert all(torch.equal(state[name], tensor) for name, tensor in case.before.items())
    assert [type(module) for module in case.model.modules()] == case.types
    own = {parameter.data_ptr() for parameter in case.model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in case.angular.parameters()}
    torch.testing.assert_close(output(case.model, case.x), case.expected, rtol=0, atol=0)


def test_names_and_values_of_the_original_state_survive(case):
    state = case.angular.state_dict()
    assert set(case.before) <= set(state)
    # A BatchNorm behind a converted layer starts with the statistics that angular outputs have.
    same = {name: tensor for name, tensor in case.before.items() if not name.endswith(("running_mean", "running_var"))}
    assert all(torch.equal(state[name], tensor) for name, tensor in same.items())
    assert type(case.angular) is type(case.model)


def test_modes_and_frozen_parameters_survive(case):
    modes = {name: module.training for name, module in case.angular.named_modules()}
    assert {name: modes[name] for name, _ in case.model.named_modules()} == {
        name: module.training for name, module in case.model.named_modules()
    }
    assert set(modes.values()) == {True, False}
    learned = {name: parameter.requires_grad for name, parameter in case.angular.named_parameters()}
    originally = {name: parameter.requires_grad for name, parameter in case.model.named_parameters()}
    assert {name: learned[name] for name in originally} == originally
    assert False in originally.values()


def test_forward_and_backward_are_finite_and_hooks_fire(case):
    FIRED.clear()
    model = copy.deepcopy(case.angular)
    result = model(case.x)
    results = [result] if isinstance(result, torch.Tensor) else [r for r in result if r is not None]
    assert all(r.shape == (2, 1000) and r.isfinite().all() for r in results)
    torch.stack(results).square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert len(FIRED) == 1
    assert FIRED[0] is model.get_submodule(case.hooked)


def test_the_angular_network_computes_something_else(case):
    assert not torch.allclose(output(case.angular, case.x), case.expected, rtol=1e-2, atol=1e-3)


@pytest.mark.zoo
def test_converting_twice_changes_nothing(case):
    twice = sphereify(case.angular)
    assert [type(module) for module in twice.modules()] == [type(module) for module in case.angular.modules()]
    assert {d.name: d for d in twice.conversion_plan.decisions} == {
        d.name: d for d in case.angular.conversion_plan.decisions
    }
    first, second = case.angular.state_dict(), twice.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_pickled_copy_gives_equal_outputs(case):
    twin = pickle.loads(pickle.dumps(case.angular))
    torch.testing.assert_close(output(twin, case.x), output(case.angular, case.x), rtol=0, atol=0)


def test_the_plan_through_json_makes_the_same_network_from_a_fresh_model_of_the_same_seed(case):
    plan = ConversionPlan.from_json(case.angular.conversion_plan.to_json())
    assert plan == case.angular.conversion_plan
    fresh = apply_plan(case.build(), plan, inplace=True)
    torch.testing.assert_close(output(fresh, case.x), output(case.angular, case.x), rtol=0, atol=0)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("share_k", ["filter", "network"])
def test_dtype_and_device_survive_and_reach_the_new_parameters(name, share_k):
    with torch.device("meta"):
        model = ZOO[name][0]().bfloat16()
    angular = sphereify(model, operator="learnable-sigmoid", share_k=share_k, norm="replace", inplace=True)
    assert {tensor.device.type for tensor in angular.state_dict().values()} == {"meta"}
    assert {parameter.dtype for parameter in angular.parameters()} == {torch.bfloat16}


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3", "vit"])
def test_a_bfloat16_network_runs(name):
    model = sphereify(ZOO[name][0]().bfloat16())
    result = model(torch.randn(2, 3, ZOO[name][1], ZOO[name][1]).bfloat16())
    assert result.dtype == torch.bfloat16
    assert result.isfinite().all()


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3", "efficientnet", "densenet"])
def test_with_every_batch_norm_replaced_a_network_runs(name):
    torch.manual_seed(0)
    model = sphereify(ZOO[name][0](), norm="replace", rescale="always")
    dropped = {d.norm for d in model.conversion_plan.decisions if d.drops_norm}
    assert not any(isinstance(model.get_submodule(norm), nn.BatchNorm2d) for norm in dropped)
    assert len(dropped) > 10
    result = model(torch.randn(2, 3, 64, 64))
    result.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("make", [lambda: timm.create_model("resnet18"), torchvision.models.resnet18])
def test_resnet18_is_17_convolutions_converted_3_shortcuts_kept_and_the_head_swapped(make):
    with torch.device("meta"):
        model = make()
    plan = plan_conversion(model, operator="cosine", skip_shortcuts=True)
    assert plan.summary() == "17 convolutions converted, 3 shortcuts kept, the head swapped for w-softmax"
    assert [d.name for d in plan.kept] == [f"layer{i}.0.downsample.0" for i in (2, 3, 4)]
    assert {d.reason for d in plan.kept} == {"1×1 convolution on a residual shortcut"}
    assert len(plan.decisions) == 21


# ------------------------------------------------------------------------------------------------------------ compiling


def compiling(*names):
    """A small network, and in the zoo those of these names."""
    return pytest.mark.parametrize("name", ["small", *(pytest.param(name, marks=pytest.mark.zoo) for name in names)])


def build_by_name(name):
    torch.manual_seed(0)
    return classifier_of(conv(4, 6, bias=False)) if name == "small" else timm.create_model(name, num_classes=10)


@compiling("test_resnet", "resnet18", "mobilenetv3_small_100")
def test_a_compiled_network_computes_the_same_without_graph_breaks(name):
    # In float64: compiled, sums are taken in another order.
    model = sphereify(build_by_name(name), operator="sigmoid").eval().double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.zoo
@compiling("test_byobnet", "test_convnext", "test_mambaout", "test_nfnet", "test_vit")
def test_another_batch_size_is_compiled_once_more_and_then_no_more(name):
    model = sphereify(build_by_name(name), operator="linear").train()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (2, 3, 5, 4):
        compiled(torch.randn(batch, 3, 64, 64)).sum().backward()
    assert counter.frame_count <= 2
    assert all(parameter.grad is not None for parameter in model.parameters())

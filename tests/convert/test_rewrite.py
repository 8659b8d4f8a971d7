"""Application of a plan: the changes that it makes, and all that it leaves as it was."""

import copy
import pickle

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from sphereify import ConversionPlan, apply_plan, plan_conversion, sphereify
from sphereify.errors import UnsupportedModelError, UsageError
from sphereify.nn import AngularHead, SphereConv1d, SphereConv2d, SphereConv3d, SphereLinear
from tests.convert.models import (
    CLASSES,
    GuessedNorm,
    Mlp,
    Net,
    PreActNet,
    UntraceableNet,
    ValueGate,
    WithAuxiliary,
    classifier_of,
    conv,
    gated_block,
    images,
    plain,
    pyramid,
)

FIRED = []


def note_call(module, args, output):
    """A forward hook; at the top of the module, so that it pickles."""
    FIRED.append(module)


def note_call_before(module, args):
    FIRED.append(module)


def note_gradient(module, grad_input, grad_output):
    FIRED.append(module)


@pytest.fixture(autouse=True)
def _no_calls_yet():
    FIRED.clear()


def snapshot(model):
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return tensors, [type(module) for module in model.modules()]


def assert_same_tensors(tensors, model):
    state = model.state_dict()
    assert list(state) == list(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


MODELS = {
    "plain": plain,
    "pre-activation": PreActNet,
    "pyramid": lambda: pyramid("F.interpolate"),
    "gated": lambda: classifier_of(gated_block()),
    "untraceable": UntraceableNet,
    "untraceable part": lambda: classifier_of(ValueGate()),
    "auxiliary": WithAuxiliary,
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


# -------------------------------------------------------------------------------------------------- the model passed in


def test_the_model_passed_in_is_not_touched_and_shares_nothing_with_the_result(model):
    before, types = snapshot(model)
    x = images()
    model.eval()
    with torch.no_grad():
        expected = model(x)
    model.train()
    angular = sphereify(model, operator="learnable-sigmoid", norm="replace")
    output = angular(x)
    (output[0] if isinstance(output, tuple) else output).sum().backward()
    with torch.no_grad():
        for parameter in angular.parameters():
            parameter.add_(1)
    assert_same_tensors(before, model)
    assert [type(module) for module in model.modules()] == types
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not hasattr(model, "conversion_plan")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=0)


def test_every_name_and_value_of_the_original_state_is_in_the_result(model):
    before, _ = snapshot(model)
    state = sphereify(model).state_dict()
    assert set(before) <= set(state)
    # A BatchNorm behind an angular layer starts with the statistics of angles; tests/convert/test_start.py.
    assert all(torch.equal(before[name], state[name]) for name in before if ".running_" not in f".{name}")
    # What came new belongs to the angular layers.
    assert {name.split(".")[-1] for name in set(state) - set(before)} <= {"beta", "gamma", "p"}


def test_the_class_and_the_module_names_stay(model):
    angular = sphereify(model)
    assert type(angular) is type(model)
    new = set(dict(angular.named_modules())) - set(dict(model.named_modules()))
    assert all(name.endswith(".operator") for name in new)
    assert set(dict(model.named_modules())) <= set(dict(angular.named_modules()))


def test_in_place_changes_the_model_itself_and_keeps_its_parameters(model):
    parameters = dict(model.named_parameters())
    angular = sphereify(model, inplace=True)
    assert angular is model
    found = dict(angular.named_parameters())
    assert all(found[name] is parameter for name, parameter in parameters.items())
    assert any(isinstance(module, SphereConv2d) for module in model.modules())


def test_in_place_and_copied_give_the_same_network(model):
    x = images()
    copied = sphereify(model).eval()
    torch.testing.assert_close(sphereify(model, inplace=True).eval()(x), copied(x), rtol=0, atol=0)


def test_converting_twice_changes_nothing(model):
    once = sphereify(model)
    before, types = snapshot(once)
    twice = sphereify(once)
    assert_same_tensors(before, twice)
    assert [type(module) for module in twice.modules()] == types
    assert [d.action for d in plan_conversion(once).decisions] == ["keep"] * len(once.conversion_plan.decisions)
    assert {d.name: d for d in twice.conversion_plan.decisions} == {d.name: d for d in once.conversion_plan.decisions}


def test_a_second_conversion_adds_to_the_first_and_the_plan_tells_both():
    torch.manual_seed(0)
    model = plain()
    first = sphereify(model, include="b*", operator="linear", head="keep")
    both = sphereify(first, operator="sigmoid", head="w-softmax")
    assert {d.name: d.operator for d in both.conversion_plan.decisions} == {
        "stem": "sigmoid", "body": "linear", "bare": "linear", "neck": "sigmoid", "fc": "sigmoid",
    }  # fmt: skip
    again = apply_plan(model, ConversionPlan.from_json(both.conversion_plan.to_json()))
    x = images()
    torch.testing.assert_close(again.eval()(x), both.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"operator": "learnable-sigmoid", "share_k": "layer"}, {"norm": "replace"}])
def test_a_plan_through_json_makes_the_same_network_from_a_fresh_model(model, options):
    angular = sphereify(model, **options).eval()
    plan = ConversionPlan.from_json(angular.conversion_plan.to_json())
    fresh = apply_plan(copy.deepcopy(model), plan).eval()
    x = images()
    torch.testing.assert_close(fresh(x), angular(x), rtol=0, atol=0)
    assert fresh.conversion_plan == angular.conversion_plan


def test_a_plan_fits_another_model_of_the_same_architecture_and_leaves_its_weights():
    plan = plan_conversion(plain())
    torch.manual_seed(5)
    other = plain()
    before, _ = snapshot(other)
    state = apply_plan(other, plan).state_dict()
    assert all(torch.equal(before[name], state[name]) for name in before if ".running_" not in f".{name}")


@pytest.mark.parametrize(
    "through", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("make", [PreActNet, UntraceableNet, Mlp])
def test_a_copy_of_the_result_gives_equal_outputs(through, make):
    torch.manual_seed(0)
    angular = sphereify(make(), operator="learnable-sigmoid", share_k="network").eval()
    x = torch.randn(2, 8) if make is Mlp else images()
    twin = through(angular)
    torch.testing.assert_close(twin(x), angular(x), rtol=0, atol=0)
    assert twin.conversion_plan == angular.conversion_plan


# -------------------------------------------------------------------------------------------------------- what survives


@pytest.mark.parametrize("inplace", [True, False])
def test_modes_and_frozen_parameters_survive(inplace):
    model = plain().train()
    model.norm.eval()
    model.body.eval()
    model.body.weight.requires_grad_(False)
    model.fc.bias.requires_grad_(False)
    angular = sphereify(model, inplace=inplace)
    modes = {name: module.training for name, module in angular.named_modules()}
    assert [name for name in ("", "stem", "norm", "body", "neck", "fc") if not modes[name]] == ["norm", "body"]
    frozen = {name for name, parameter in angular.named_parameters() if not parameter.requires_grad}
    assert {"body.weight", "fc.bias"} <= frozen
    assert not frozen & {"stem.weight", "norm.weight", "neck.weight", "fc.weight"}


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("layer", ["stem", "neck", "fc"])
def test_every_kind_of_hook_survives(layer, inplace):
    model = plain()
    model.get_submodule(layer).register_forward_hook(note_call)
    model.get_submodule(layer).register_forward_pre_hook(note_call_before)
    model.get_submodule(layer).register_full_backward_hook(note_gradient)
    angular = sphereify(model, inplace=inplace)
    FIRED.clear()
    angular(images().requires_grad_()).sum().backward()
    module = angular.get_submodule(layer)
    assert len(FIRED) == 3
    assert all(fired is module for fired in FIRED)


def test_planning_and_converting_fire_no_hook_of_the_users():
    model = plain()
    for name in ("stem", "norm", "fc"):
        model.get_submodule(name).register_forward_hook(note_call)
        model.get_submodule(name).register_forward_pre_hook(note_call_before)
    sphereify(model)
    assert not FIRED


# A handle holds on to the dictionary of hooks, not to the module.
def test_a_hook_put_on_before_an_in_place_conversion_can_still_be_removed():
    model = plain()
    handle = model.stem.register_forward_hook(note_call)
    angular = sphereify(model, inplace=True)
    handle.remove()
    FIRED.clear()
    angular(images())
    assert not FIRED


def test_a_state_dict_hook_of_a_converted_layer_survives():
    model = plain()

    def drop_bias(module, state, prefix, local_metadata):
        del state[prefix + "bias"]

    model.body.register_state_dict_post_hook(drop_bias)
    assert "body.bias" not in sphereify(model).state_dict()


def test_a_hook_may_change_the_output_in_place():
    model = sphereify(plain())
    assert model.stem.output_read_only
    model.stem.register_forward_hook(lambda module, args, out: out.mul_(2))
    model(images()).sum().backward()
    assert model.stem.weight.grad.isfinite().all()


def test_a_guessed_norm_leaves_the_output_free_to_be_changed_in_place():
    model = sphereify(GuessedNorm())
    model(images()).sum().backward()
    assert model.conv.weight.grad.isfinite().all()


def test_attributes_that_a_user_hung_on_a_layer_survive():
    model = plain()
    model.body.lr_scale = 0.1
    model.body.register_buffer("steps", torch.tensor(3))
    angular = sphereify(model)
    assert angular.body.lr_scale == 0.1
    assert angular.state_dict()["body.steps"] == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", ["keep", "replace"])
def test_the_dtype_survives_and_reaches_the_new_parameters(dtype, norm):
    model = plain().to(dtype)
    angular = sphereify(model, operator="learnable-sigmoid", norm=norm)
    assert {parameter.dtype for parameter in angular.parameters()} == {dtype}
    output = angular(images().to(dtype))
    assert output.dtype == dtype
    assert output.isfinite().all()


@pytest.mark.parametrize("norm", ["keep", "replace"])
@pytest.mark.parametrize("share_k", ["filter", "layer", "network"])
def test_the_meta_device_survives_and_reaches_the_new_parameters(norm, share_k):
    with torch.device("meta"):
        model = plain()
    angular = sphereify(model, operator="learnable-sigmoid", norm=norm, share_k=share_k)
    assert {tensor.device.type for tensor in angular.state_dict().values()} == {"meta"}
    assert angular(images().to("meta")).shape == (2, CLASSES)


def test_tied_weights_stay_tied_and_both_layers_are_converted():
    angular = sphereify(Mlp())
    assert angular.a.weight is angular.b.weight
    assert type(angular.a) is type(angular.b) is SphereLinear
    assert angular.a is not angular.b
    assert angular(torch.randn(2, 8)).shape == (2, CLASSES)


def test_an_optimizer_made_before_an_in_place_conversion_knows_the_weights():
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sphereify(model, inplace=True)
    before = model.body.weight.detach().clone()
    model(images()).sum().backward()
    optimizer.step()
    assert not torch.equal(model.body.weight, before)


def test_the_memory_format_survives():
    model = plain().to(memory_format=torch.channels_last)
    assert sphereify(model).body.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("dims", "twin"), [(1, SphereConv1d), (2, SphereConv2d), (3, SphereConv3d)]
)  # fmt: skip
def test_a_convolution_of_each_dimension_gets_its_twin_with_its_geometry(dims, twin):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = kind(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="circular")
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(2, 4, *[6] * dims)
    shape = model(x).shape
    angular = sphereify(model)
    assert type(angular[0]) is twin
    for name in ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size"):
        assert getattr(angular[0], name) == getattr(layer, name)
    assert angular(x).shape == shape


# ------------------------------------------------------------------------------------------------------- norm="replace"


def _normed(norm, bias=False):
    return nn.Sequential(conv(3, 4, bias=bias), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
def test_a_replaced_batch_norm_is_gone_and_the_layer_rescales(bias, inplace):
    model = _normed(nn.BatchNorm2d(4), bias)
    angular = sphereify(model, norm="replace", inplace=inplace)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in angular.modules())
    assert angular[0].beta.shape == (4,)
    assert (angular[0].gamma is None) == bias
    angular(images()).sum().backward()
    assert angular[0].beta.grad.isfinite().all()


def test_the_activation_that_timm_fuses_into_a_norm_stays_when_the_norm_goes():
    angular = sphereify(_normed(BatchNormAct2d(4, act_layer=nn.ReLU)), norm="replace").eval()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in angular.modules())
    x = angular[0](images())
    assert (x < 0).any()
    torch.testing.assert_close(angular[1](x), x.relu())
    assert torch.isfinite(angular(images())).all()


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)])
def test_only_batch_norms_are_replaced(norm):
    angular = sphereify(_normed(norm), norm="replace")
    assert type(angular[1]) is type(norm)
    assert angular[0].beta is None


def test_the_norm_behind_a_kept_convolution_stays():
    angular = sphereify(_normed(nn.BatchNorm2d(4)), norm="replace", exclude="0")
    assert type(angular[1]) is nn.BatchNorm2d


def test_rescale_never_keeps_the_norm_that_there_is():
    angular = sphereify(_normed(nn.BatchNorm2d(4)), norm="replace", rescale="never")
    assert type(angular[1]) is nn.BatchNorm2d


def test_the_norms_behind_a_shared_convolution_go_all_or_none():
    model = Net(
        lambda n, x: n.fc(n.second(n.shared(n.first(n.shared(n.stem(x))).relu())).mean((2, 3))),
        stem=conv(3, 4),
        shared=conv(4, 4, bias=False),
        first=nn.BatchNorm2d(4),
        second=nn.BatchNorm2d(4),
        fc=nn.Linear(4, 3),
    )
    angular = sphereify(model, norm="replace")
    assert isinstance(angular.first, nn.BatchNorm2d) == isinstance(angular.second, nn.BatchNorm2d)


def test_a_norm_shared_with_a_kept_convolution_stays():
    model = Net(
        lambda n, x: n.fc((n.norm(n.a(x)) + n.norm(n.b(x)).relu()).mean((2, 3))),
        a=conv(3, 4),
        b=conv(3, 4),
        norm=nn.BatchNorm2d(4),
        fc=nn.Linear(4, 3),
    )
    assert type(sphereify(model, norm="replace", exclude="a").norm) is nn.BatchNorm2d


def test_a_shared_convolution_that_is_normalized_in_one_place_only_rescales_itself():
    model = Net(
        lambda n, x: n.fc(n.norm(n.shared(n.shared(n.stem(x)).relu())).mean((2, 3))),
        stem=conv(3, 4),
        shared=conv(4, 4, bias=False),
        norm=nn.BatchNorm2d(4),
        fc=nn.Linear(4, 3),
    )
    assert sphereify(model).shared.beta is not None


# -------------------------------------------------------------------------------------------------------- when it fails


def test_a_model_that_cannot_be_copied_is_told_to_convert_in_place():
    class Uncopyable(nn.Sequential):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    model = Uncopyable(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(UnsupportedModelError, match=r"Uncopyable cannot be copied .*no copies.* inplace=True"):
        sphereify(model)


def test_a_plan_that_lacks_an_operator_object_fails_before_it_changes_anything():
    model = plain()
    _, types = snapshot(model)
    plan = ConversionPlan.from_json(plan_conversion(model, overrides={"neck": {"operator": lambda cos: cos}}).to_json())
    with pytest.raises(UsageError, match="neck: the plan uses the operator object"):
        apply_plan(model, plan, inplace=True)
    assert [type(module) for module in model.modules()] == types


def test_a_converted_classifier_answers_for_its_sizes_as_a_linear_one():
    head = sphereify(plain()).fc
    assert type(head) is AngularHead
    assert (head.in_features, head.out_features) == (8, CLASSES)

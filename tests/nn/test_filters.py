"""The filters and the output layer of a model: each layer counts once, by the filters that it multiplies with."""

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils import parametrizations

from sphereify import sphereify
from sphereify.errors import UsageError
from sphereify.nn import AngularHead, HypersphericalEnergy, OrthogonalityPenalty
from sphereify.nn.filters import filter_banks
from tests.grids import grid
from tests.nn.energy_oracle import banks_by_hand, close, make_model, slow_energy
from tests.nn.oracle import normal


def names(model, *given, **options):
    return [bank.layer for bank in filter_banks(model, *given, **options)]


def outputs(model, *given):
    return [bank.layer for bank in filter_banks(model, *given) if bank.is_output]


def sites(model):
    """Convolutions and linear layers with two or more filters that look at the same input."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
    return [n for n, m in model.named_modules()
            if isinstance(m, kinds) and m.weight.shape[0] // getattr(m, "groups", 1) > 1]  # fmt: skip


V = torchvision.models
# name: (builder, the output layers)
ZOO = {
    "resnet18": (lambda: timm.create_model("resnet18"), ["fc"]),
    "vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224", depth=2), ["head"]),
    "deit distilled": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=1),
        ["head", "head_dist"],
    ),
    "resnetv2": (lambda: timm.create_model("resnetv2_50", layers=(1, 1, 1, 1)), ["head.fc"]),  # a 1×1 convolution
    "features": (lambda: timm.create_model("resnet18", num_classes=0), []),
    "torchvision resnet18": (lambda: V.resnet18(), ["fc"]),
    "torchvision mobilenet": (lambda: V.mobilenet_v3_small(), ["classifier.3"]),
}


@pytest.mark.parametrize("name", ZOO)
def test_every_convolution_and_linear_layer_counts_once_with_the_classifier_as_output(name):
    build, output = ZOO[name]
    model = build()
    assert names(model) == sites(model)
    assert outputs(model) == output
    for bank in filter_banks(model):
        layer = model.get_submodule(bank.layer)
        expected = layer.weight.detach().flatten(1)
        torch.testing.assert_close(bank.filters.detach().flatten(0, 1), expected, rtol=0, atol=0)
        assert len(bank.filters) == getattr(layer, "groups", 1)


def test_depthwise_convolutions_do_not_count_in_the_energy_and_do_where_single_filters_are_asked_for():
    model = make_model()
    hidden, _ = banks_by_hand(model)
    assert names(model) == [*hidden, "head"]
    assert set(names(model, single=True)) - set(names(model)) == {"depthwise", "depthwise_up", "single"}
    assert {b.layer: tuple(b.filters.shape) for b in filter_banks(model, single=True)}["depthwise"] == (6, 1, 9)


def test_shared_modules_and_tied_weights_count_once():
    shared, tied = nn.Linear(4, 4), nn.Linear(4, 4)
    tied.weight = shared.weight
    model = nn.Sequential(shared, nn.ReLU(), shared, tied, nn.Linear(4, 3))
    assert names(model) == ["0", "4"]


def test_layers_without_inputs_do_not_count():
    assert names(nn.Sequential(nn.Conv2d(4, 4, 1), SimpleEmpty(), nn.Linear(4, 4))) == ["0", "2"]


class SimpleEmpty(nn.Linear):
    """Of no inputs: its filters are points without a direction."""

    def __init__(self):
        super().__init__(1, 4)
        self.weight = nn.Parameter(torch.zeros(4, 0))


# ----------------------------------------------------------------------------------------------------------- the output


class Named(nn.Sequential):
    def get_classifier(self):
        return self[0]


class Raising(nn.Sequential):
    def get_classifier(self):
        raise NotImplementedError


def test_output_is_the_angular_head_then_the_models_own_classifier_then_the_last_linear_layer():
    layers = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1)]
    assert outputs(nn.Sequential(layers[0], AngularHead(4, 3), *layers[1:])) == ["1"]
    assert outputs(Named(layers[0], AngularHead(4, 3), *layers[1:])) == ["1"]
    assert outputs(Named(*layers)) == ["0"]
    assert outputs(nn.Sequential(*layers)) == ["1"]
    assert outputs(Raising(*layers)) == ["1"]


# ----------------------------------------------------------------------------------------------------- functional calls


class Calling(nn.Module):
    """Calls a function with the weight of a layer, which is never called itself, or with its own."""

    def __init__(self, function, layer, child=True):
        super().__init__()
        self.function = function
        if child:
            self.layer = layer
        else:
            self.weight = layer.weight

    def forward(self, x):
        return self.function(x, self.layer.weight if hasattr(self, "layer") else self.weight)


def converted(block, x):
    """The block in a model, converted."""
    return sphereify(nn.Sequential(block, nn.Tanh()), example_inputs=x)


def stored_as_columns(inputs, filters):
    layer = nn.Linear(inputs, filters)
    layer.weight = nn.Parameter(layer.weight.detach().t().contiguous())
    return layer


@pytest.mark.parametrize("child", [True, False], ids=["a child's parameter", "own parameter"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_of_a_functional_convolution_are_banks_of_their_own(groups, child):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3, groups=groups)
    block = Calling(lambda x, w: F.conv2d(x, w, groups=groups), layer, child)
    (bank,) = filter_banks(converted(block, normal(2, 4, 5, 5, dtype=torch.float32)))
    expected = layer.weight.detach().flatten(1).unflatten(0, (groups, -1))
    torch.testing.assert_close(bank.filters.detach(), expected, rtol=0, atol=0)


def test_a_depthwise_functional_convolution_does_not_count():
    block = Conv2dSame(4, 4, 3, stride=2, groups=4)  # calls F.conv2d
    model = nn.Sequential(nn.Conv2d(3, 4, 1), block, nn.Conv2d(4, 4, 1))
    angular = sphereify(model, example_inputs=normal(2, 3, 6, 6, dtype=torch.float32))
    assert [d.name for d in angular.conversion_plan.converted if d.call]
    assert names(model) == ["0", "2"]
    assert names(angular) == ["0", "2"]


def test_a_weight_that_is_computed_in_each_forward_does_not_count():
    block = Calling(lambda x, w: F.linear(x, 2 * w), nn.Linear(4, 6), child=False)
    angular = converted(block, normal(3, 4, dtype=torch.float32))
    assert angular.conversion_plan.converted
    assert names(angular) == []


# ----------------------------------------------------------------------------------------------------- parametrizations

PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_every_parametrized_layer_counts(name, mode):
    torch.manual_seed(0)
    model = nn.Sequential(*(PARAMETRIZATIONS[name](nn.Linear(6, 6)) for _ in range(12))).eval()
    with mode():
        assert names(model) == [str(i) for i in range(12)]


def test_filters_of_a_transposed_convolution_are_those_of_its_output_channels():
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False).double()
    ((bank,),) = [list(filter_banks(layer))]
    # One pixel through: output channel o of group g, at each place, is the input channels times the filter's taps.
    x = normal(1, 4, 1, 1)
    out = layer(x)[0].unflatten(0, (2, 3))
    taps = bank.filters.unflatten(-1, (2, 3, 3))
    torch.testing.assert_close(out, torch.einsum("gc,gockl->gokl", x.view(2, 2), taps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", grid(["resnet18", "vit_tiny"], lambda name: name == "vit_tiny"))
def test_a_converted_model_has_the_layers_the_output_and_the_energy_of_the_plain_one(name):
    build, output = ZOO[name]
    plain = build()
    angular = sphereify(plain, operator="learnable-sigmoid")
    assert any(isinstance(m, AngularHead) for m in angular.modules())
    assert names(angular) == names(plain)
    assert outputs(angular) == output
    energy = HypersphericalEnergy(1, "angular", output_weight=10)
    with torch.no_grad():
        torch.testing.assert_close(energy(angular), energy(plain), rtol=0, atol=0)


def test_output_that_is_named_wins():
    model = Named(nn.Linear(4, 4), AngularHead(4, 3), nn.Conv1d(4, 4, 1))
    assert outputs(model, "2") == ["2"]
    close(HypersphericalEnergy(hidden_weight=0, output="2")(model.double()), slow_energy(model[2].weight, 1))


def test_a_generator_of_convolutions_alone_has_no_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(8, 4, 4), nn.ReLU(), nn.ConvTranspose2d(4, 3, 4), nn.Tanh()).double()
    assert names(model) == ["0", "2"]
    assert outputs(model) == []
    hidden = sum(slow_energy(model[i].weight.transpose(0, 1), 2, half_space=True) for i in (0, 2))
    close(HypersphericalEnergy(2, half_space=True, output_weight=100)(model), hidden)


@pytest.mark.parametrize("regularizer", [HypersphericalEnergy, OrthogonalityPenalty])
@pytest.mark.parametrize("name", ["classifier", "act", "tail"])
def test_output_that_is_no_layer_is_refused(regularizer, name):
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "act": nn.ReLU(), "tail": nn.Sequential(nn.Linear(4, 3))})
    with pytest.raises(UsageError, match=f"output: ModuleDict has no layer '{name}'"):
        regularizer(output=name)(model)


@pytest.mark.parametrize("child", [True, False], ids=["a child's parameter", "own parameter"])
@pytest.mark.parametrize("kind", ["linear", "columns", "square columns", "conv"])
def test_weight_of_a_functional_call_counts_once_by_its_filters(kind, child):
    torch.manual_seed(0)
    function, layer, x, filters = {
        "linear": lambda: (F.linear, nn.Linear(4, 6), normal(3, 4), lambda w: w),
        "columns": lambda: (torch.matmul, stored_as_columns(4, 6), normal(3, 4), lambda w: w.t()),
        "square columns": lambda: (torch.matmul, stored_as_columns(5, 5), normal(3, 5), lambda w: w.t()),
        "conv": lambda: (F.conv2d, nn.Conv2d(4, 6, 3), normal(2, 4, 5, 5), lambda w: w.flatten(1)),
    }[kind]()
    block = Calling(function, layer, child).double()
    (bank,) = filter_banks(converted(block, x))
    expected = filters((layer if child else block).weight.detach())
    torch.testing.assert_close(bank.filters[0].detach(), expected, rtol=0, atol=0)
    close(HypersphericalEnergy(2)(converted(block, x)), slow_energy(expected, 2))


@pytest.mark.parametrize("name", ["beit", "torchvision vit"])
def test_layers_have_the_names_of_the_plan_and_exclude_finds_them_converted_or_not(name):
    build, qkv = {
        "beit": (
            lambda: timm.create_model("beit_base_patch16_224", depth=1, embed_dim=24, num_heads=3, img_size=32),
            "blocks.0.attn.qkv",
        ),
        "torchvision vit": (
            lambda: V.VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32),
            "encoder.layers.encoder_layer_0.self_attention.in_proj_weight",
        ),
    }[name]
    x = normal(2, 3, 32, 32, dtype=torch.float32)
    angular = sphereify(build(), attention="convert", example_inputs=x)
    planned = {d.name for d in angular.conversion_plan.decisions}
    assert qkv in planned
    assert set(names(angular)) == planned
    excluding = HypersphericalEnergy(exclude=qkv).report(angular)
    assert {row.layer for row in excluding.layers} == planned - {qkv}


@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_gradient_reaches_the_parameters_below_a_parametrized_weight(name, layer):
    torch.manual_seed(0)
    block = PARAMETRIZATIONS[name](nn.Linear(6, 4) if layer == "linear" else nn.Conv2d(2, 4, 3)).eval()
    energy = HypersphericalEnergy()(block)
    close(energy, slow_energy(block.weight, 1), 1e-5)
    energy.backward()
    gradients = {n: p.grad for n, p in block.named_parameters() if n.startswith("parametrizations")}
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    directions = [g for n, g in gradients.items() if "original" in n][-1]
    # The filters of an orthogonal layer are as far apart as they can be kept: every step leaves them orthogonal.
    assert name == "orthogonal" or directions.norm() > 1e-4

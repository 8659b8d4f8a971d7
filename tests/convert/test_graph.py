"""The graph of a model: roles, norms, aliases, and the reasons to leave a site alone."""

import copy
import operator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, LayerNorm2d
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from sphereify import plan_conversion, sphereify
from sphereify.nn import AngularHead, SphereConv2d, SphereLinear
from tests.convert.models import (
    ADDITIONS,
    CLASSES,
    UPSAMPLINGS,
    CastingConv2d,
    Net,
    NormLinear,
    OwnNorm,
    PreActNet,
    UnfoldingConv2d,
    UntraceableNet,
    ValueGate,
    WithAuxiliary,
    classifier_of,
    conv,
    gated_block,
    images,
    misnamed_block,
    plain,
    pyramid,
    shortcut_block,
)


def decisions(model, **options):
    return {decision.name: decision for decision in plan_conversion(model, **options).decisions}


def named(role, model, **options):
    return {name for name, decision in decisions(model, **options).items() if decision.role == role}


# ------------------------------------------------------------------------------------------------------------ shortcuts


@pytest.mark.parametrize("add", ADDITIONS)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_shortcut_is_known_by_its_wiring_and_not_by_its_name(add, swapped):
    def addition(a, b):
        return ADDITIONS[add](b, a) if swapped else ADDITIONS[add](a, b)

    assert named("shortcut", classifier_of(misnamed_block(addition))) == {"block.conv1"}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_pooled_and_normalized_shortcut_is_found_in_every_dimension(dims):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model = nn.Sequential(kind(3, 4, 1), shortcut_block(dims), nn.ReLU(), nn.Flatten(), nn.Linear(6, 2))
    assert named("shortcut", model) == {"1.side.1"}


def test_in_a_preact_resnet_only_the_projection_is_a_shortcut():
    assert named("shortcut", PreActNet()) == {"layer2.shortcut.0"}


def test_a_shortcut_right_on_the_input_is_a_shortcut():
    model = Net(
        lambda n, x: n.fc((n.main(x) + n.side(x)).mean((2, 3))),
        main=conv(3, 6),
        side=conv(3, 6, 1),
        fc=nn.Linear(6, CLASSES),
    )
    assert named("shortcut", model) == {"side"}


NO_SHORTCUT = {
    "identity": lambda: Net(lambda n, x: x + n.downsample(x), downsample=conv(4, 4, 1)),
    "identity around a bottleneck": lambda: Net(
        lambda n, x: x + n.expand(n.middle(n.reduce(x).relu()).relu()),
        reduce=conv(4, 2, 1),
        middle=conv(2, 2),
        expand=conv(2, 4, 1),
    ),
    "a 3×3 on the side": lambda: Net(
        lambda n, x: n.b(n.a(x).relu()) + n.shortcut(x), a=conv(4, 4), b=conv(4, 4), shortcut=conv(4, 4)
    ),
    "a side path of two": lambda: Net(
        lambda n, x: n.a(x) + n.c(n.b(x).relu()), a=conv(4, 4), b=conv(4, 4, 1), c=conv(4, 4, 1)
    ),
    "1×1 beside 1×1": lambda: Net(lambda n, x: n.a(x) + n.b(x), a=conv(4, 4, 1), b=conv(4, 4, 1)),
    "concatenated": lambda: Net(
        lambda n, x: torch.cat([n.a(x), n.downsample(x)], 1), a=conv(4, 2), downsample=conv(4, 2, 1)
    ),
    "multiplied": lambda: Net(lambda n, x: n.a(x) * n.skip(x), a=conv(4, 4), skip=conv(4, 4, 1)),
    "one after the other": lambda: nn.Sequential(conv(4, 4, 1), nn.ReLU(), conv(4, 4)),
}


@pytest.mark.parametrize("block", NO_SHORTCUT)
def test_a_1x1_convolution_of_the_main_path_is_no_shortcut(block):
    assert named("shortcut", classifier_of(NO_SHORTCUT[block](), channels=4)) == set()


def test_the_1x1_convolutions_of_a_gate_are_no_shortcuts():
    assert named("shortcut", classifier_of(gated_block())) == {"block.side"}


# The transposed convolution is FCN's upsampling.
@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
def test_a_lateral_convolution_of_a_feature_pyramid_is_no_shortcut(upsampling):
    assert named("shortcut", pyramid(upsampling)) == set()


# ---------------------------------------------------------------------------------------------------------------- norms


def _functional(**given):
    return lambda n, x: n.fc(F.layer_norm(n.c(x).permute(0, 2, 3, 1), (8,), **given).mean((1, 2)))


def _followed_by(*modules):
    names = {f"m{i}": module for i, module in enumerate(modules)}

    def wiring(n, x):
        x = n.c(x)
        for name in names:
            x = getattr(n, name)(x)
        return n.fc(x.mean((2, 3)))

    return Net(wiring, c=conv(3, 8), fc=nn.Linear(8, CLASSES), **names)


def _permuted(norm):
    return Net(
        lambda n, x: n.fc(n.m0(n.c(x).permute(0, 2, 3, 1)).mean((1, 2))), c=conv(3, 8), fc=nn.Linear(8, 2), m0=norm
    )


def _tokens(norm):
    return Net(
        lambda n, x: n.fc(n.m0(n.c(x).flatten(2).transpose(1, 2)).mean(1)), c=conv(3, 8), fc=nn.Linear(8, 2), m0=norm
    )


NORMED = {
    "batch norm": lambda: _followed_by(nn.BatchNorm2d(8)),
    "group norm": lambda: _followed_by(nn.GroupNorm(2, 8)),
    "affine instance norm": lambda: _followed_by(nn.InstanceNorm2d(8, affine=True)),
    "timm's norm with activation": lambda: _followed_by(BatchNormAct2d(8)),
    "timm's layer norm over channels": lambda: _followed_by(LayerNorm2d(8)),
    "a user's norm": lambda: _followed_by(OwnNorm(8)),
    "layer norm through permute": lambda: _permuted(nn.LayerNorm(8)),
    "RMS norm through permute": lambda: _permuted(nn.RMSNorm(8)),
    "layer norm through flatten and transpose": lambda: _tokens(nn.LayerNorm(8)),
}
NOT_NORMED = {
    "an activation between": lambda: _followed_by(nn.ReLU(), nn.BatchNorm2d(8)),
    "pooling between": lambda: _followed_by(nn.AvgPool2d(2), nn.BatchNorm2d(8)),
    "batch norm without scale": lambda: _followed_by(nn.BatchNorm2d(8, affine=False)),
    "instance norm as torch makes it": lambda: _followed_by(nn.InstanceNorm2d(8)),
    "layer norm without scale": lambda: _permuted(nn.LayerNorm(8, elementwise_affine=False)),
    "read by others too": lambda: Net(
        lambda n, x: (lambda y: n.fc((n.m0(y) + y).mean((2, 3))))(n.c(x)),
        c=conv(3, 8),
        m0=nn.BatchNorm2d(8),
        fc=nn.Linear(8, 2),
    ),
    "functional layer norm without scale": lambda: Net(_functional(), c=conv(3, 8), fc=nn.Linear(8, 2)),
    "a linear map named norm": lambda: Net(
        lambda n, x: n.fc(n.m0(n.c(x).permute(0, 2, 3, 1)).relu().mean((1, 2))),
        c=conv(3, 8),
        m0=NormLinear(8, 8),
        fc=nn.Linear(8, 2),
    ),
}


@pytest.mark.parametrize("model", NORMED)
def test_the_affine_norm_that_follows_is_named_and_rescales(model):
    decision = decisions(NORMED[model]())["c"]
    assert (decision.norm, decision.rescale) == ("m0", False)
    assert "m0" in decision.reason


def test_a_norm_behind_dropout_still_follows():
    decision = decisions(_followed_by(nn.Dropout(), nn.BatchNorm2d(8)))["c"]
    assert (decision.norm, decision.rescale) == ("m1", False)


@pytest.mark.parametrize("model", NOT_NORMED)
def test_without_an_affine_norm_right_behind_it_a_layer_rescales_itself(model):
    decision = decisions(NOT_NORMED[model]())["c"]
    assert (decision.norm, decision.rescale) == (None, True)


def test_a_functional_norm_with_a_scale_counts():
    model = Net(
        lambda n, x: n.fc(F.layer_norm(n.c(x).permute(0, 2, 3, 1), (8,), n.scale.weight[0]).mean((1, 2))),
        c=conv(3, 8),
        scale=nn.Embedding(1, 8),
        fc=nn.Linear(8, 2),
    )
    assert decisions(model)["c"].rescale is False


def test_a_linear_map_followed_by_a_batch_norm_leaves_rescaling_to_it():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    assert decisions(model)["0"].norm == "1"


# ---------------------------------------------------------------------------------------------------------- classifiers


class Output(NamedTuple):
    logits: torch.Tensor


CLASSIFIER_TAILS = {
    "bare": lambda n, x: n.fc(x),
    "dropout and flatten before": lambda n, x: n.fc(n.drop(x.unsqueeze(1).flatten(1))),
    "dropout after": lambda n, x: n.drop(n.fc(x)),
    "log_softmax": lambda n, x: F.log_softmax(n.fc(x), dim=1),
    "softmax method": lambda n, x: n.fc(x).softmax(-1),
    "softmax module": lambda n, x: n.softmax(n.fc(x)),
    "sigmoid": lambda n, x: n.fc(x).sigmoid(),
    "view": lambda n, x: n.fc(x).view(-1, CLASSES),
    "squeeze": lambda n, x: n.fc(x.unsqueeze(1)).squeeze(1),
    "temperature": lambda n, x: n.fc(x) / 0.07,
    "mean over tokens": lambda n, x: n.fc(x.unsqueeze(1)).mean(1),
    "cast": lambda n, x: n.fc(x).float(),
    "dictionary": lambda n, x: {"logits": n.fc(x)},
    "tuple": lambda n, x: (n.fc(x),),
    "named tuple": lambda n, x: Output(n.fc(x)),
}


def _with_tail(wiring):
    return Net(
        lambda n, x: wiring(n, n.body(x).relu()),
        body=nn.Linear(4, 8),
        fc=nn.Linear(8, CLASSES),
        drop=nn.Dropout(),
        softmax=nn.LogSoftmax(dim=1),
    )


@pytest.mark.parametrize("tail", CLASSIFIER_TAILS)
def test_the_classifier_is_found_through_what_keeps_the_classes(tail):
    model = _with_tail(CLASSIFIER_TAILS[tail])
    assert named("classifier", model) == {"fc"}
    assert type(sphereify(model).fc) is AngularHead


@pytest.mark.parametrize("tail", ["normalize", "cumulated", "cosine to a bank"])
def test_a_linear_map_whose_channels_are_no_classes_is_no_classifier(tail):
    tails = {
        "normalize": lambda n, x: F.normalize(n.fc(x)),
        "cumulated": lambda n, x: n.fc(x).cumsum(1),
        "cosine to a bank": lambda n, x: n.fc(x) @ torch.ones(CLASSES, 3),
    }
    assert named("classifier", _with_tail(tails[tail])) == set()


def test_both_halves_of_an_averaged_classifier_are_swapped():
    model = _with_tail(lambda n, x: (n.fc(x) + n.other(x)) / 2)
    model.other = nn.Linear(8, CLASSES)
    angular = sphereify(model)
    assert type(angular.fc) is type(angular.other) is AngularHead


def test_a_convolution_at_the_output_is_kept_as_no_linear_classifier():
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, CLASSES, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    decision = decisions(model)["2"]
    assert (decision.role, decision.action) == ("classifier", "keep")
    assert "output convolution" in decision.reason


def test_the_input_layer_has_its_role():
    assert named("input", plain()) == {"stem"}


def test_an_auxiliary_classifier_is_kept_and_its_hidden_layers_are_converted():
    found = decisions(WithAuxiliary())
    assert (found["aux"].role, found["aux"].action) == ("auxiliary", "keep")
    assert "auxiliary classifier" in found["aux"].reason
    assert found["aux_conv"].action == "convert"
    assert found["fc"].role == "classifier"


@pytest.mark.parametrize("container", [lambda *outs: outs, lambda *outs: list(outs), lambda a, b: {"a": a, "b": b}])
def test_the_heads_of_a_model_with_several_outputs_are_kept_unless_asked_for(container):
    model = _with_tail(lambda n, x: container(n.fc(x), n.second(x)))
    model.second = nn.Linear(8, 3)
    for name in ("fc", "second"):
        decision = decisions(model)[name]
        assert decision.action == "keep"
        assert "one of 2 outputs" in decision.reason
        assert "head='w-softmax'" in decision.reason
    assert type(sphereify(model, head="w-softmax").second) is AngularHead


def test_a_regression_to_one_number_is_kept():
    decision = decisions(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))["2"]
    assert decision.action == "keep"
    assert "single number" in decision.reason


# ------------------------------------------------------------------------------------------- shared, uncalled, read raw


def test_a_shared_module_is_one_decision_and_is_replaced_under_every_name():
    shared = nn.Linear(8, 8)
    model = Net(
        lambda n, x: n.fc(n.inner["again"](n.first(x).relu()).relu()),
        first=shared,
        inner=nn.ModuleDict({"again": shared}),
        fc=nn.Linear(8, 2),
    )
    plan = plan_conversion(model)
    assert [(d.name, d.aliases) for d in plan.decisions] == [("first", ("inner.again",)), ("fc", ())]
    angular = sphereify(model)
    assert type(angular.first) is SphereLinear
    assert angular.inner["again"] is angular.first


def test_a_pattern_may_name_a_shared_module_by_any_of_its_names():
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 2))
    assert decisions(model, exclude="2")["0"].reason == "excluded by pattern"


def test_a_module_that_is_never_called_is_kept_and_said_so():
    model = _with_tail(lambda n, x: n.fc(x))
    model.spare = nn.Linear(8, 8)
    decision = decisions(model)["spare"]
    assert decision.action == "keep"
    assert "never called" in decision.reason


def _ignores_length(module, x):
    """True if a map without bias and rescaling depends on the direction of its input alone, as g(θ) does."""
    return torch.allclose(module(x), module(10 * x), rtol=1e-3, atol=1e-3)


def test_a_weight_that_the_parent_passes_to_a_function_is_made_angular_in_the_parent():
    inner = Net(lambda n, x: F.linear(x, n.fc.weight), fc=nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), inner, nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 8)
    example = {"example_inputs": torch.randn(3, 4)}
    assert [d.name for d in plan_conversion(model, **example).converted].count("2.fc") == 1
    angular = sphereify(model, rescale="never", **example)
    assert isinstance(angular[2], Net)
    assert _ignores_length(angular[2], x)
    assert not _ignores_length(model[2], x)


def test_a_weight_that_is_read_and_called_is_converted():
    model = _with_tail(lambda n, x: n.fc(x + 0 * n.body.weight.sum()))
    assert decisions(model)["body"].action == "convert"


# ---------------------------------------------------------------------------------------------------------- untraceable


def test_an_untraceable_part_is_converted_with_a_note_and_the_rest_keeps_its_roles():
    model = classifier_of(ValueGate())
    plan = plan_conversion(model)
    found = {decision.name: decision for decision in plan.decisions}
    (note,) = plan.notes
    assert note.startswith("block: not traced (")
    assert note.endswith("; a run shows what is called inside")
    assert found["block.conv"].action == "convert"
    assert found["block.conv"].norm == "block.bn"
    assert (found["stem"].role, found["fc"].role) == ("input", "classifier")
    assert torch.isfinite(sphereify(model)(images())).all()


def test_an_untraceable_model_is_converted_by_names_and_shapes_with_a_note():
    plan = plan_conversion(UntraceableNet(), skip_shortcuts=True)
    found = {decision.name: decision for decision in plan.decisions}
    assert plan.notes[0].startswith("UntraceableNet: not traced")
    assert {name: d.action for name, d in found.items()} == {
        "stem": "convert", "body": "convert", "downsample": "keep", "fc": "convert",
    }  # fmt: skip
    assert found["stem"].norm == "bn"
    assert (found["downsample"].role, found["fc"].head) == ("shortcut", "w-softmax")
    assert torch.isfinite(sphereify(UntraceableNet())(images())).all()


# Its last feed-forward layer is called linear2.
def test_an_inner_layer_of_an_untraceable_transformer_is_not_guessed_to_be_the_classifier():
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)
    assert named("classifier", model) == set()


@pytest.mark.parametrize("training", [True, False])
def test_planning_changes_neither_the_model_nor_its_mode(training):
    model = WithAuxiliary().train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = set(vars(model))
    plan_conversion(model)
    assert all(module.training is training for module in model.modules())
    assert set(vars(model)) == attributes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_that_cannot_be_copied_is_planned_and_converted_in_place():
    class Uncopyable(nn.Sequential):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    model = Uncopyable(conv(3, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert "cannot be copied" in plan_conversion(model).notes[0]
    assert type(sphereify(model, inplace=True)[0]) is SphereConv2d


# ----------------------------------------------------------------------------------------------------------- left alone


def _patched():
    layer = conv(4, 6)
    layer.forward = lambda x: torch.zeros(x.shape[0], 6, *x.shape[2:])
    return layer


KEPT = {
    "subclass that calls no convolution": (
        lambda: UnfoldingConv2d(4, 6, 3, padding=1),
        "its weight is multiplied by other means",
    ),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, padding=1), "transposed convolution"),
    "patched forward": (_patched, "forward was replaced on the instance"),
}


@pytest.mark.parametrize("kept", KEPT)
def test_what_has_no_angular_twin_is_kept_with_its_reason_and_still_works(kept):
    make, reason = KEPT[kept]
    model = classifier_of(make())
    decision = decisions(model)["block"]
    assert decision.action == "keep"
    assert reason in decision.reason
    angular = sphereify(model)
    assert type(angular.block) is type(model.block)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(angular.block(x), model.block(x), rtol=0, atol=0)


COMPUTING = {
    "subclass": lambda: CastingConv2d(4, 6, 3, padding=1, bias=False),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(conv(4, 6, bias=False)),
}


@pytest.mark.parametrize("block", COMPUTING)
def test_a_layer_that_does_more_than_its_base_stays_what_it_is_around_its_angular_inner_call(block):
    torch.manual_seed(0)
    model = classifier_of(COMPUTING[block]())
    angular = sphereify(model, rescale="never")
    assert decisions(model)["block"].action == "convert"
    assert isinstance(angular.block, nn.Conv2d)
    assert type(model.block).__name__.removeprefix("Parametrized") in type(angular.block).__name__
    assert is_parametrized(angular.block) is is_parametrized(model.block)
    x = torch.randn(2, 4, 8, 8)
    assert _ignores_length(angular.block, x)
    assert not _ignores_length(model.block, x)
    angular(images()).sum().backward()
    learned = dict(model.block.named_parameters())
    assert all(angular.block.get_parameter(name).grad.isfinite().all() for name in learned)


def test_the_projections_of_torchs_attention_are_kept_by_default_and_attention_still_runs():
    model = Net(
        lambda n, x: n.fc(n.attention(n.embed(x), n.embed(x), n.embed(x))[0].mean(1)),
        embed=nn.Linear(4, 8),
        attention=nn.MultiheadAttention(8, 2, batch_first=True),
        fc=nn.Linear(8, 2),
    )
    inside = [d for name, d in decisions(model).items() if name.startswith("attention.")]
    assert "attention.out_proj" in {d.name for d in inside}
    assert all(d.action == "keep" and "attention" in d.reason for d in inside)
    x = torch.randn(2, 3, 8)
    angular = sphereify(model)
    torch.testing.assert_close(angular.attention(x, x, x)[0], model.attention(x, x, x)[0], rtol=0, atol=0)
    for training in (True, False):
        assert angular.train(training)(torch.randn(2, 3, 4)).shape == (2, 2)


def test_torchs_encoder_layer_computes_the_same_on_its_fused_path_as_on_the_other():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    assert {"1.self_attn.out_proj", "1.linear1", "1.linear2"} <= set(decisions(model))
    angular, x = sphereify(model).eval(), torch.randn(2, 3, 4)
    slow = angular(x)
    with torch.no_grad():  # torch takes the fused path if it may
        torch.testing.assert_close(angular(x), slow)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_model_that_is_a_single_linear_map_becomes_angular(inplace):
    layer = nn.Linear(3, 4)
    angular = sphereify(copy.deepcopy(layer), inplace=inplace)
    assert type(angular) in (SphereLinear, AngularHead)
    torch.testing.assert_close(angular.weight, layer.weight, rtol=0, atol=0)


def test_an_in_place_addition_does_not_change_which_branch_is_which():
    model = classifier_of(misnamed_block(operator.iadd))
    plan = plan_conversion(model, skip_shortcuts=True)
    assert [d.name for d in plan.kept] == ["block.conv1"]
    assert plan.kept[0].reason == "1×1 convolution on a residual shortcut"

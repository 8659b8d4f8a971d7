import math

import pytest
import timm
import torch
import torchvision
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn.utils import parametrizations

from sphereify import param_groups, sphereify
from sphereify.errors import UsageError
from sphereify.nn import AngularHead, LearnableSigmoidOperator, Magnitude, SphereConv2d, SphereLinear
from tests.convert.models import Casting

DECAYED = {"stem.weight", "fc.weight"}


def make_model():
    """A plain stem and linear layer, every kind of angular layer, norms, biases, an embedding-like parameter."""
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "conv": SphereConv2d(4, 4, 3, operator="learnable-sigmoid", rescale=True, bias=False),
            "pooled": SphereConv2d(4, 4, 3, radius=2.0, learn_radius=True),
            "linear": SphereLinear(4, 4, operator="linear", rescale=True),
            "layernorm": nn.LayerNorm(4),
            "fc": nn.Linear(4, 4),
            "head": AngularHead(4, 2, operator="learnable-sigmoid", bias=True),
        }
    )


def by_name(model, groups):
    """Each group as (weight decay, names of its parameters)."""
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=True)}
    return [(group["weight_decay"], [names[id(p)] for p in group["params"]]) for group in groups]


def test_only_plain_weights_are_decayed():
    model = make_model()
    (decay, decayed), (none, kept) = by_name(model, param_groups(model, weight_decay=0.1))
    assert (decay, none) == (0.1, 0.0)
    assert set(decayed) == DECAYED
    assert {"conv.weight", "conv.operator.p", "conv.beta", "conv.gamma", "linear.bias", "head.operator.p"} <= set(kept)
    assert {"pooled.weight", "pooled.log_radius"} <= set(kept)
    assert {"linear.weight", "head.weight", "head.bias", "stem.bias", "norm.weight", "layernorm.bias"} <= set(kept)


def test_filters_whose_lengths_count_are_decayed_as_plain_ones_are():
    weighted = Magnitude("tanh", weighted=True)
    model = make_model()
    model["conv"] = SphereConv2d(4, 4, 3, operator="learnable-sigmoid", rescale=True, bias=False, magnitude=weighted)
    model["linear"] = SphereLinear(4, 4, operator=lambda cos: cos, magnitude="tanh", weighted=True)
    model["pooled"] = SphereConv2d(4, 4, 3, magnitude=Magnitude("tanh", learned=True))
    (_, decayed), (_, kept) = by_name(model, param_groups(model, weight_decay=0.1))
    assert set(decayed) == DECAYED | {"conv.weight", "linear.weight"}
    assert {"conv.operator.p", "conv.beta", "pooled.weight", "pooled.log_magnitude_radius"} <= set(kept)


def test_a_conversion_that_computes_what_the_original_does_has_its_groups():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), Casting(), nn.ReLU(), nn.Linear(6, 3))
    model = sphereify(plain, magnitude="linear", weighted=True, head="keep", example_inputs=torch.randn(2, 3, 3, 3))
    assert {decision.name for decision in model.conversion_plan.converted} >= {"0", "3.weight"}
    assert by_name(model, param_groups(model, 0.1)) == by_name(plain, param_groups(plain, 0.1))


def test_every_trained_parameter_is_listed_exactly_once():
    model = make_model()
    listed = [name for _, names in by_name(model, param_groups(model, 0.1)) for name in names]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())


def test_frozen_parameters_are_absent():
    model = make_model()
    for name in ("stem.weight", "conv.weight", "norm.bias"):
        model.get_parameter(name).requires_grad_(False)
    listed = {name for _, names in by_name(model, param_groups(model, 0.1)) for name in names}
    assert not listed & {"stem.weight", "conv.weight", "norm.bias"}
    assert "fc.weight" in listed


def test_filters_of_functional_calls_are_not_decayed():
    model = nn.Sequential(Casting(), nn.Tanh(), nn.Linear(6, 4), nn.Tanh())
    model = sphereify(model, example_inputs=torch.randn(5, 4), exclude="2")
    decayed, undecayed = param_groups(model, 0.1)
    assert decayed["params"] == [model[2].weight]
    assert any(p is model[0].weight for p in undecayed["params"])


def test_group_without_parameters_is_left_out():
    assert [g["weight_decay"] for g in param_groups(nn.Linear(2, 2, bias=False), 0.1)] == [0.1]
    assert [g["weight_decay"] for g in param_groups(SphereLinear(2, 2), 0.1)] == [0.0]
    assert param_groups(nn.ReLU(), 0.1) == []


def test_shared_parameters_are_listed_once_and_an_angular_user_spares_them_the_decay():
    operator = LearnableSigmoidOperator()
    plain = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {
            "plain": plain,
            "twin": SphereLinear.from_linear(plain, operator=operator),
            "other": SphereLinear(4, 4, operator=operator),
        }
    )
    ((decay, names),) = by_name(model, param_groups(model, 0.1))
    assert decay == 0.0
    assert sorted(names) == ["other.bias", "other.weight", "plain.bias", "plain.weight", "twin.operator.p"]


def test_torch_optimizers_take_the_groups_and_decay_accordingly():
    model = make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=0.5), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.5 if name in DECAYED else 1.0
        torch.testing.assert_close(parameter, factor * before[name], msg=name)


def test_default_decays_nothing():
    assert {group["weight_decay"] for group in param_groups(make_model())} == {0.0}


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan")])
def test_negative_weight_decay_is_refused(weight_decay):
    with pytest.raises(UsageError, match=f"weight_decay: got {weight_decay}, expected a number of at least 0"):
        param_groups(make_model(), weight_decay)


# ------------------------------------------------------------------------------------------ what the model itself names

PLAIN = {
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", depth=3),
    "deit distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", depth=2),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)),
    "beit": lambda: timm.create_model("beit_base_patch16_224", depth=2, embed_dim=96, num_heads=3, img_size=64),
    "xcit": lambda: timm.create_model("xcit_nano_12_p16_224", depth=2, img_size=64),  # names "pos_embed.*"
    "resnet18": lambda: timm.create_model("resnet18"),
}


def each(model, groups):
    """Name of every parameter: (weight decay, lr_scale)"""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = [(names[id(p)], (g["weight_decay"], g.get("lr_scale"))) for g in groups for p in g["params"]]
    assert len(dict(listed)) == len(listed), "listed twice"
    return dict(listed)


def own_undecayed(model):
    return model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()


@pytest.mark.parametrize("name", PLAIN)
def test_plain_timm_models_are_decayed_as_timm_decays_them(name):
    model = PLAIN[name]()
    expected = param_groups_weight_decay(model, 0.1, no_weight_decay_list=own_undecayed(model))
    assert each(model, param_groups(model, 0.1)) == each(model, expected)


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("converted", [False, True])
def test_what_no_weight_decay_names_is_not_decayed(converted, layer_decay):
    model = PLAIN["vit"]()
    if converted:
        model = sphereify(model, exclude="blocks.0.mlp.fc1", inplace=True)
    decay = {n: d for n, (d, _) in each(model, param_groups(model, 0.1, layer_decay=layer_decay)).items()}
    assert decay["pos_embed"] == decay["cls_token"] == decay["blocks.0.mlp.fc1.bias"] == decay["norm.weight"] == 0
    assert decay["blocks.0.mlp.fc1.weight"] == 0.1
    assert decay["patch_embed.proj.weight"] == (0 if converted else 0.1)


@pytest.mark.parametrize("method", [None, lambda: ["linear"], lambda: {"nothing"}])
def test_a_model_without_the_method_or_with_other_names_is_decayed_as_usual(method):
    model = make_model()
    model.no_weight_decay = method
    assert dict(by_name(model, param_groups(model, 0.1)))[0.1] == sorted(DECAYED, reverse=True)


# ---------------------------------------------------------------------------------------------------------- layer decay


@pytest.mark.parametrize("name", PLAIN)
def test_plain_timm_models_have_timms_learning_rates_layer_by_layer(name):
    model = PLAIN[name]()
    expected = param_groups_layer_decay(model, 0.1, own_undecayed(model), layer_decay=0.7)
    assert each(model, param_groups(model, 0.1, layer_decay=0.7)) == each(model, expected)


def test_learning_rate_falls_by_the_factor_from_each_block_to_the_one_before_it():
    model = PLAIN["vit"]()
    scale = {n: s for n, (_, s) in each(model, param_groups(model, 0.1, layer_decay=0.5)).items()}
    assert scale["head.weight"] == scale["head.bias"] == 1
    assert [scale[f"blocks.{i}.mlp.fc1.weight"] for i in (2, 1, 0)] == [0.5, 0.25, 0.125]
    assert scale["norm.weight"] == 0.5
    assert scale["patch_embed.proj.weight"] == scale["cls_token"] == scale["pos_embed"] == 0.0625
    order = [scale[n] for n, _ in model.named_parameters() if n.startswith("blocks.")]
    assert order == sorted(order)


def learned(model, **options):
    return sphereify(model, operator="learnable-sigmoid", rescale="always", **options)


# name: where a learnable k and a β of a functional call or a layer are found, and the layer they go with
ADDED = {
    "vit": {"blocks.1.mlp.fc1.operator.p": "blocks.1.mlp.fc1", "head.operator.p": "head"},
    "resnet18": {"layer2.0.conv1.beta": "layer2.0.conv1", "fc.operator.p": "fc"},
    "beit": {"blocks.1.attn.angular_calls.qkv/weight.beta": "blocks.1.attn.qkv", "head.operator.p": "head"},
}


@pytest.mark.parametrize("name", ADDED)
def test_a_converted_model_keeps_its_learning_rates_and_angular_parameters_go_with_their_layer(name):
    plain = PLAIN[name]()
    before = each(plain, param_groups(plain, 0.1, layer_decay=0.7))
    angular = learned(plain, example_inputs=torch.randn(2, 3, 64, 64) if name == "beit" else None)
    after = each(angular, param_groups(angular, 0.1, layer_decay=0.7))
    assert sorted(after) == sorted(n for n, _ in angular.named_parameters())
    assert len(after) > len(before)
    assert {n: scale for n, (_, scale) in after.items() if n in before} == {n: s for n, (_, s) in before.items()}
    assert {n: after[n][1] for n in ADDED[name]} == {n: before[f"{w}.weight"][1] for n, w in ADDED[name].items()}
    assert after[f"{plain.pretrained_cfg['classifier']}.weight"][1] == 1
    assert all(decay == 0 for decay, _ in after.values()), "no layer is plain"


@pytest.mark.parametrize("layer_decay", [None, 1.0])
def test_every_trained_parameter_is_in_exactly_one_group_of_any_model(layer_decay):
    shared = nn.Linear(4, 4)
    models = [
        make_model(),
        nn.Sequential(shared, shared, SphereLinear.from_linear(shared), nn.Linear(4, 2)),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        torchvision.models.VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32),
    ]
    for model in models:
        model.get_parameter(next(n for n, _ in model.named_parameters())).requires_grad_(False)
        got = each(model, param_groups(model, 0.1, layer_decay=layer_decay))
        assert sorted(got) == sorted(n for n, p in model.named_parameters() if p.requires_grad)


def test_layers_that_a_model_does_not_name_cannot_be_decayed():
    with pytest.raises(UsageError, match="layer_decay: Sequential does not say what its layers are"):
        param_groups(nn.Sequential(nn.Linear(2, 2)), layer_decay=0.5)


@pytest.mark.parametrize("wrap", [torch.compile, nn.Sequential], ids=["compiled", "a part of another"])
def test_what_a_wrapped_model_wants_without_decay_has_none(wrap):
    plain = PLAIN["vit"]()
    wrapped = wrap(plain)
    kept = {id(p) for group in param_groups(wrapped, 0.1) if not group["weight_decay"] for p in group["params"]}
    assert {id(plain.pos_embed), id(plain.cls_token)} <= kept


def test_a_compiled_model_has_the_layers_of_the_plain_one():
    plain = PLAIN["vit"]()
    scales = [
        {id(p): g["lr_scale"] for g in param_groups(model, 0.1, layer_decay=0.7) for p in g["params"]}
        for model in (plain, torch.compile(plain))
    ]
    assert scales[0] == scales[1]


def test_layer_decay_of_one_is_no_layer_decay():
    model = PLAIN["vit"]()
    plain, scaled = (each(model, param_groups(model, 0.1, layer_decay=d)) for d in (None, 1.0))
    assert {n: d for n, (d, _) in plain.items()} == {n: d for n, (d, _) in scaled.items()}
    assert {s for _, s in scaled.values()} == {1.0}


def test_frozen_parameters_are_absent_with_layer_decay_too():
    model = PLAIN["vit"]()
    model.blocks[0].requires_grad_(False)
    model.head.bias.requires_grad_(False)
    got = each(model, param_groups(model, 0.1, layer_decay=0.7))
    assert sorted(got) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert not any(n.startswith("blocks.0.") for n in got)


def test_lr_sets_the_learning_rate_of_each_group_and_torchs_schedulers_keep_the_ratio():
    model = learned(PLAIN["vit"]())
    groups = param_groups(model, 0.1, layer_decay=0.5, lr=0.02)
    assert all(g["lr"] == pytest.approx(0.02 * g["lr_scale"]) for g in groups)
    assert {round(math.log2(g["lr_scale"])) for g in groups} == {0, -1, -2, -3, -4}
    assert all("lr" not in g for g in param_groups(model, 0.1, layer_decay=0.5))
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    schedule.step()
    assert all(g["lr"] == pytest.approx(0.002 * g["lr_scale"]) for g in optimizer.param_groups)
    # Adam's first step has the length of the learning rate.
    steps = {n: (p.detach() - before[n]).abs().mean().item() for n, p in model.named_parameters()}
    assert steps["blocks.0.mlp.fc1.weight"] == pytest.approx(0.02 * 0.5**3, rel=1e-3)
    assert steps["head.weight"] == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_timms_optimizers_and_schedulers_take_the_groups_and_scale_the_rates(opt):
    model = PLAIN["vit"]()
    optimizer = create_optimizer_v2(param_groups(model, 0.1, layer_decay=0.5), opt=opt, lr=0.4, weight_decay=0.1)
    assert each(model, optimizer.param_groups) == each(model, param_groups(model, 0.1, layer_decay=0.5))
    schedule, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=10, warmup_epochs=0, min_lr=0.0)
    for epoch in (0, 5):
        schedule.step(epoch)
        rate = 0.4 * (1 + math.cos(math.pi * epoch / 10)) / 2
        assert all(g["lr"] == pytest.approx(rate * g["lr_scale"]) for g in optimizer.param_groups)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("layer_decay", [0, -0.5, 1.01, float("nan"), float("inf")])
def test_layer_decay_outside_zero_to_one_is_refused(layer_decay):
    with pytest.raises(UsageError, match=f"layer_decay: got {layer_decay}, expected a number above 0 and at most 1"):
        param_groups(make_model(), 0.1, layer_decay=layer_decay)


def test_lr_without_layer_decay_is_refused():
    with pytest.raises(UsageError, match="lr: goes with layer_decay; without it, give the learning rate"):
        param_groups(make_model(), 0.1, lr=0.1)


def test_what_is_no_module_has_no_groups():
    with pytest.raises(TypeError, match=r"model: got list, expected a torch\.nn\.Module"):
        param_groups([torch.zeros(2)], 0.1)


def test_a_weight_decay_must_be_a_number():
    with pytest.raises(TypeError, match="weight_decay: got NoneType, expected a number of at least 0"):
        param_groups(nn.Linear(2, 2), None)

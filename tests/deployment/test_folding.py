"""A folded model computes what the converted one does, whatever it is made of, and says what it left."""

import copy
import itertools
import json

import pytest
import timm
import torch
from torch import nn

from sphereify import fold, load, save, sphereify
from sphereify.choices import HEAD_KINDS, OPERATORS
from sphereify.deployment.folded_layers import ACTIVATIONS, FoldedConv2d, FoldedHead, FoldedLayer
from sphereify.deployment.folding import folded
from sphereify.errors import ArtifactError, PlanMismatchError, UnsupportedModelError, UsageError
from sphereify.nn import AngularHead, SigmoidOperator, SphereConv1d, SphereConv2d, SphereConv3d, SphereLinear
from sphereify.nn.passes import compiled
from sphereify.training import Settings, finetune
from tests.convert.models import Net, Power, conv, images, plain
from tests.deployment.networks import assert_same, scrambled
from tests.grids import grid
from tests.test_artifact import document_of, edit_document

CONVOLUTIONS = {1: SphereConv1d, 2: SphereConv2d, 3: SphereConv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
OPERATIONS = [*OPERATORS, Power(2)]


SHAPES = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "same": {"padding": "same"},
    "same, even window": {"kernel_size": 2, "padding": "same"},
    "dilated": {"dilation": 2, "padding": 2},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 6, "padding": 1},
    "reflecting": {"padding": 1, "padding_mode": "reflect"},
    "pointwise, more channels": {"kernel_size": 1, "out_channels": 18},
    "pointwise, fewer channels": {"kernel_size": 1},
    "pointwise, strided": {"kernel_size": 1, "stride": 2, "out_channels": 18},
    "many channels": {"in_channels": 12, "padding": 1},
    "few channels": {"in_channels": 2, "padding": 1},
}


FORMS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize(
    ("operator", "shape", "form"),
    grid(
        itertools.product(OPERATIONS, SHAPES, FORMS),
        lambda operator, shape, form: form == "channels_last" if operator == "cosine" else shape == "strided",
    ),
    ids=str,
)
def test_a_convolution_with_beta_bias_and_batchnorm_is_the_same(operator, shape, form):
    settings = {"in_channels": 6, "out_channels": 12, "kernel_size": 3, **SHAPES[shape]}
    torch.manual_seed(0)
    layer = SphereConv2d(**settings, operator=operator, rescale=True)
    model = scrambled(nn.Sequential(layer, nn.BatchNorm2d(settings["out_channels"]), nn.ReLU()).double())
    x = torch.randn(2, settings["in_channels"], 9, 8, dtype=torch.float64)
    x[0, :, :4] = 0  # patches without an angle
    folded = fold(model).to(memory_format=FORMS[form])
    assert folded.folding.layers == {"0": "1"}
    assert folded.folding.left == {}
    assert_same(folded, model, x.to(memory_format=FORMS[form]), limit=1e-10)
    torch.testing.assert_close(folded(x[0]), folded(x)[0])


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("operator", OPERATORS)
def test_convolutions_of_other_dimensions_are_the_same(operator, groups, dims):
    torch.manual_seed(0)
    layer = CONVOLUTIONS[dims](4, 6, 3, stride=2, padding=1, dilation=2, groups=groups, operator=operator)
    model = scrambled(nn.Sequential(layer, NORMS[dims](6)).double())
    x = torch.randn(2, 4, *[9] * dims, dtype=torch.float64)
    assert_same(fold(model), model, x, limit=1e-10)


@pytest.mark.parametrize("sizes", [(6, 9), (9, 6)], ids=["more", "fewer"])
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("operator", OPERATIONS, ids=str)
def test_a_linear_map_is_the_same(operator, with_norm, sizes):
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(sizes[1])] if with_norm else []
    model = scrambled(nn.Sequential(SphereLinear(*sizes, operator=operator, rescale=True), *norm).double())
    x = torch.randn(5, sizes[0], dtype=torch.float64)
    assert_same(fold(model), model, x, limit=1e-10)
    if not with_norm:
        assert_same(fold(model), model, x.view(1, 5, -1), limit=1e-10)
        assert_same(fold(model), model, x[0], limit=1e-10)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_every_mixture_of_beta_gamma_and_bias_is_the_same(bias, rescale):
    model = scrambled(nn.Sequential(SphereConv2d(3, 4, 3, bias=bias, rescale=rescale)))
    assert_same(fold(model), model, images())


@pytest.mark.parametrize(
    ("operator", "kind"),
    grid(itertools.product(OPERATIONS, HEAD_KINDS), lambda operator, kind: operator == "cosine" or kind == "w-softmax"),
    ids=str,
)
def test_a_head_is_the_same(operator, kind):
    if kind == "a-softmax":
        operator = "cosine"
    torch.manual_seed(0)
    model = nn.Sequential(AngularHead(6, 4, kind=kind, operator=operator, bias=True)).double()
    nn.init.normal_(model[0].bias)
    x = torch.randn(5, 6, dtype=torch.float64)
    x[0] = 0
    assert_same(fold(model), model, x, limit=1e-10)
    assert_same(fold(model), model, x[1], limit=1e-10)


def test_a_k_of_each_filter_stays_that_filters():
    model = nn.Sequential(SphereConv2d(3, 8, 3, operator="learnable-sigmoid"))
    nn.init.uniform_(model[0].operator.p, 0.05, 2.0)
    assert_same(fold(model), model, images())


def test_one_k_for_a_network_is_copied_into_each_layer():
    model = scrambled(sphereify(plain(), operator="learnable-sigmoid", share_k="network"))
    assert_same(fold(model), model, images())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_rounding_and_does_not_overflow(dtype):
    model = scrambled(nn.Sequential(SphereConv2d(6, 8, 3), nn.BatchNorm2d(8), SphereConv2d(8, 9, 1, operator="linear")))
    x = torch.randn(2, 6, 8, 8).clamp(-4, 4) * 12000  # inner products beyond 65504
    expected = model(x)
    output = fold(model).to(dtype)(x.to(dtype))
    assert output.dtype is dtype
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()
    with torch.autocast("cpu", dtype=dtype):
        output = fold(model)(x)
    assert output.dtype is dtype
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()


def zoo(*case):
    return pytest.param(*case, marks=pytest.mark.zoo)


MODELS = {
    "resnet18": (64, {"skip_shortcuts": True}, 17),
    "mobilenetv3_small_100": (64, {}, 34),
    "vit_tiny_patch16_224": (224, {}, 0),
    "convnext_atto": (64, {}, 0),
}
"""Image size, options of the conversion, and the number of BatchNorms that are folded."""
FAST = [("resnet18", "cosine"), ("convnext_atto", "linear")]


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        *FAST,
        *(zoo(*case) for case in itertools.product(MODELS, OPERATORS) if case not in FAST),
    ],
)
def test_a_real_model_is_the_same_with_its_norms_folded(name, operator):
    size, options, norms = MODELS[name]
    torch.manual_seed(0)
    model = scrambled(sphereify(timm.create_model(name), operator=operator, **options))
    folded = fold(model)
    assert type(folded) is type(model)
    assert folded.folding.left == {}
    assert sum(norm is not None for norm in folded.folding.layers.values()) == norms
    assert len(folded.folding.layers) == len(model.conversion_plan.converted)
    assert_same(folded, model, torch.randn(2, 3, size, size))


# --------------------------------------------------------------------------------------------- what must not be folded


def net(wiring, **modules):
    return scrambled(sphereify(Net(wiring, **modules), head="keep"))


def test_the_compiled_loops_apply_each_activation_that_a_folded_layer_can_have():
    assert set(compiled.ACTIVATIONS) == {None, *ACTIVATIONS}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_function_of_an_activation_is_that_of_its_module(name):
    x = torch.linspace(-8, 8, 33)
    assert torch.equal(ACTIVATIONS[name].function(x, inplace=False), ACTIVATIONS[name].module()(x))


@pytest.mark.parametrize(
    ("activation", "expected"), [(nn.ReLU, "relu"), (nn.Hardswish, "hardswish"), (nn.SiLU, None), (None, None)]
)
def test_the_activation_in_a_norm_of_timms_is_part_of_the_layer(activation, expected):
    norm = timm.layers.BatchNormAct2d(6, apply_act=activation is not None, act_layer=activation or nn.ReLU)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Flatten(), nn.Linear(96, 4))
    model = scrambled(sphereify(plain, example_inputs=images(size=6)).eval())
    folded = fold(model)
    assert folded[0].activation == expected
    assert isinstance(folded[1], nn.Identity if expected or activation is None else nn.Sequential)
    x = 3 * torch.randn(2, 3, 6, 6)
    assert_same(folded, model, x)
    got, wanted = (torch.autograd.grad(network(x.requires_grad_()).sum(), x)[0] for network in (folded, model))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["hook", "hook before", "forward"])
def test_what_is_attached_to_the_activation_keeps_it_apart(way):
    norm = timm.layers.BatchNormAct2d(6)
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Flatten(), nn.Linear(96, 4))
    model = sphereify(plain, example_inputs=images(size=6)).eval()
    calls = []
    act = model[1].act
    if way == "hook":
        act.register_forward_hook(lambda *_: calls.append(1))
    elif way == "hook before":
        act.register_forward_pre_hook(lambda *_: calls.append(1))
    else:
        act.forward = lambda x: calls.append(1) or x
    folded = fold(model)
    assert folded[0].activation is None
    folded(torch.randn(2, 3, 6, 6))
    assert calls


def test_a_norm_that_reads_two_layers_stays():
    model = net(lambda n, x: n.norm(n.a(x)) + n.norm(n.b(x)), a=conv(3, 4), b=conv(3, 4), norm=nn.BatchNorm2d(4))
    folded = fold(model)
    assert folded.folding.layers == {"a": None, "b": None}
    assert_same(folded, model, images())


def test_a_norm_behind_a_layer_that_something_else_reads_stays():
    model = net(lambda n, x: ((y := n.a(x)) + n.norm(y)).tanh(), a=conv(3, 4), norm=nn.BatchNorm2d(4))
    assert fold(model).folding.layers == {"a": None}
    assert_same(fold(model), model, images())


def test_a_norm_whose_channels_are_no_filters_stays():
    """Turned between the two, and of as many rows as filters: only the wiring tells."""
    model = net(lambda n, x: n.norm(n.a(x).transpose(1, 2)), a=conv(3, 8), norm=nn.BatchNorm2d(8))
    assert fold(model).folding.layers == {"a": None}
    assert_same(fold(model), model, images())


def test_a_shared_layer_is_folded_without_its_norms():
    model = net(lambda n, x: n.norm(n.a(n.a(x))), a=conv(3, 3), norm=nn.BatchNorm2d(3))
    assert fold(model).folding.layers == {"a": None}
    assert_same(fold(model), model, images())


def test_a_norm_without_running_statistics_stays_and_is_named():
    model = net(lambda n, x: n.norm(n.a(x)), a=conv(3, 4), norm=nn.BatchNorm2d(4, track_running_stats=False))
    assert fold(model).folding.left == {"norm": "it has no running statistics"}
    assert_same(fold(model), model, images())


class DoublingNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


def test_a_norm_of_a_class_of_its_own_stays_and_is_named():
    model = net(lambda n, x: n.norm(n.a(x)), a=conv(3, 4), norm=DoublingNorm(4))
    assert "DoublingNorm is a subclass" in fold(model).folding.left["norm"]
    assert_same(fold(model), model, images())


@pytest.mark.parametrize("place", ["a", "norm"])
def test_a_hook_between_or_behind_keeps_the_norm_apart(place):
    model = net(lambda n, x: n.norm(n.a(x)), a=conv(3, 4), norm=nn.BatchNorm2d(4))
    model.get_submodule(place).register_forward_hook(lambda module, args, output: output.abs())
    assert "a hook" in fold(model).folding.left["norm"]
    assert_same(fold(model), model, images())


class Halved(SphereConv2d):
    def forward(self, input):
        return super().forward(input) / 2


def test_a_subclass_of_an_angular_layer_stays_and_is_named():
    model = scrambled(nn.Sequential(Halved(3, 4, 3), nn.ReLU(), SphereConv2d(4, 4, 3)))
    assert "Halved is a subclass" in fold(model).folding.left["0"]
    assert_same(fold(model), model, images())


@pytest.mark.parametrize("normed", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_computed_weights_stay(normed):
    layer = normed(SphereConv2d(3, 4, 3))
    model = scrambled(nn.Sequential(layer, nn.BatchNorm2d(4), SphereConv2d(4, 4, 3)))
    folded = fold(model)
    assert folded.folding.layers == {"2": None}
    assert "0" in folded.folding.left
    assert_same(folded, model, images())


def test_functional_calls_stay_angular_and_are_named():
    model = scrambled(sphereify(timm.create_model("beit_base_patch16_224", depth=1, embed_dim=48, num_heads=2)))
    folded = fold(model)
    assert set(folded.folding.left) == {"blocks.0.attn.qkv.weight"}
    assert_same(folded, model, torch.randn(1, 3, 224, 224))


def test_a_weight_that_another_layer_uses_is_left_to_it():
    first = SphereLinear(6, 6, bias=False)
    plain_one = nn.Linear(6, 6, bias=False)
    plain_one.weight = first.weight
    model = nn.Sequential(first, plain_one)
    assert_same(fold(model), model, torch.randn(3, 6))


def test_a_batchnorm_folded_into_a_linear_map_takes_rows_only():
    folded = fold(scrambled(nn.Sequential(SphereLinear(4, 5), nn.BatchNorm1d(5))))
    with pytest.raises(UnsupportedModelError, match=r"takes \(B, 4\) then, and got \(2, 5, 4\)"):
        folded(torch.randn(2, 5, 4))


# ------------------------------------------------------------------------------------------------ a folded model's life


def test_the_model_is_not_touched_unless_asked():
    model = scrambled(sphereify(plain())).train()
    before, state = model(images()), copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    fold(model)
    assert model.training
    assert not any(isinstance(module, FoldedLayer) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(model(images()), before)
    assert fold(model, inplace=True) is model
    assert isinstance(model.stem, FoldedConv2d)


def test_nothing_in_it_trains_and_training_is_refused():
    folded = fold(sphereify(plain()))
    assert not any(module.training for module in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    with pytest.raises(UnsupportedModelError, match="folded for inference and cannot be trained"):
        folded.train()
    with pytest.raises(UnsupportedModelError, match="stem is folded for inference"):
        sphereify(folded)
    with pytest.raises(UsageError, match="is folded already"):
        fold(folded)
    with pytest.raises(UnsupportedModelError, match="finetune: this Sequential is folded"):
        finetune(folded, None, Settings())


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_reach_the_input(operator):
    model = scrambled(sphereify(plain(), operator=operator)).double()
    x = images().double().requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    (output,) = torch.autograd.grad(fold(model)(x).square().sum(), x)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-9)


def test_a_model_with_nothing_angular_is_refused():
    with pytest.raises(UsageError, match="nothing in Sequential is angular; convert it first"):
        fold(plain())


def test_the_folding_prints():
    folding = fold(sphereify(plain())).folding
    assert folding.summary() == "5 layers folded, 1 of them with their BatchNorm"
    assert "stem: with norm" in str(folding)


@pytest.mark.parametrize("name", [zoo("resnet18"), "mobilenetv3_small_050"])
def test_a_folded_model_of_a_library_comes_back_from_the_folder_alone(name, tmp_path):
    model = fold(scrambled(sphereify(timm.create_model(name, num_classes=7), operator="sigmoid", k=0.4)))
    save(model, tmp_path)
    assert document_of(tmp_path)["folding"]["layers"]["conv1" if name == "resnet18" else "conv_stem"] == "bn1"
    loaded = load(tmp_path)
    assert loaded.folding == model.folding
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("operator", [*OPERATORS, Power(2)], ids=str)
def test_a_folded_model_of_ones_own_comes_back(operator, tmp_path):
    model = fold(scrambled(sphereify(plain(), operator=operator, head="s-softmax", scale=7)))
    save(model, tmp_path)
    objects = {} if isinstance(operator, str) else {"tests.convert.models.Power": operator}
    loaded = load(tmp_path, factory=plain, objects=objects)
    assert isinstance(loaded.fc, FoldedHead)
    torch.testing.assert_close(loaded(images()), model(images()), rtol=0, atol=0)


def test_a_folding_that_does_not_fit_is_refused(tmp_path):
    save(fold(sphereify(plain())), tmp_path)
    good = document_of(tmp_path)
    for folding, error, text in (
        (
            {"layers": {"nowhere": None}, "left": {}},
            PlanMismatchError,
            "nowhere: was folded, and Sequential has nothing",
        ),
        ({"strata": {}}, ArtifactError, "its part 'folding' is of another form"),
    ):
        edit_document(tmp_path, folding=folding, id=good["id"])
        with pytest.raises(error, match=text):
            load(tmp_path, factory=plain)


def test_a_network_built_of_angular_layers_by_hand_needs_no_plan():
    model = scrambled(nn.Sequential(SphereConv2d(3, 4, 3, operator=SigmoidOperator(0.4)), nn.BatchNorm2d(4)))
    assert fold(model, images()).folding.layers == {"0": "1"}
    assert json.dumps(fold(model).folding.to_json())


def test_a_norm_behind_a_head_made_by_hand_stays():
    model = nn.Sequential(AngularHead(6, 4), nn.BatchNorm1d(4)).eval()
    model[1].running_mean.fill_(5)
    x = torch.randn(8, 6)
    torch.testing.assert_close(fold(model)(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_forward_that_reads_the_weights_itself_is_refused_where_inputs_show_it():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(self.conv(x)) * self.conv.weight.norm()

    torch.manual_seed(0)
    network = Reads()
    network.norm.running_var.fill_(0.1)
    model, x = sphereify(network).eval(), torch.randn(2, 3, 9, 9)
    before = model(x)
    with pytest.raises(UnsupportedModelError, match="would change"):
        fold(model, x)
    with pytest.raises(UnsupportedModelError, match="would change"):
        fold(model, x, inplace=True)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_vmap_over_a_folded_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    model, x = fold(sphereify(net)), torch.randn(3, 3, 4, 4)
    torch.testing.assert_close(torch.func.vmap(lambda one: model(one[None])[0])(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("operator", OPERATORS)
def test_tangents_go_through_a_folded_model(operator):
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(24, 3))
    model = fold(sphereify(net.double(), operator=operator, example_inputs=torch.randn(1, 2, 4, 4).double()))
    x, direction = torch.randn(2, 1, 2, 4, 4, dtype=torch.float64)
    by_rows, by_columns = (mode(model)(x) for mode in (torch.func.jacrev, torch.func.jacfwd))
    torch.testing.assert_close(by_columns, by_rows, rtol=1e-9, atol=1e-11)
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(
            model(torch.autograd.forward_ad.make_dual(x, direction))
        ).tangent
    torch.testing.assert_close(tangent.flatten(), by_rows.flatten(2)[0] @ direction.flatten(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (SphereConv2d(8, 8, 3, groups=8), (1, 2, 6, 6)),
        (SphereConv2d(8, 8, 1, groups=8), (1, 2, 6, 6)),
        (SphereConv2d(4, 8, 3), (1, 4, 1, 2)),
        (SphereLinear(8, 4), (2, 6)),
    ],
    ids=["channels", "channels of one place", "size", "features"],
)
def test_inputs_that_do_not_fit_a_folded_layer_get_torchs_words(layer, shape):
    with pytest.raises(RuntimeError, match=r"to have 8 channels|greater than actual input|shapes cannot be multiplied"):
        folded(layer)(torch.randn(shape))


@pytest.mark.parametrize("operator", ["cosine", "linear", "sigmoid"])
def test_weights_of_a_folded_layer_that_are_asked_for_gradients_get_them(operator):
    layer = folded(SphereConv2d(4, 8, 3, operator=operator)).requires_grad_(True)
    layer(torch.randn(2, 4, 6, 6)).square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0

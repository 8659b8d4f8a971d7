"""Each option of the plan, its plain data, and the text of every refusal."""

import copy
import json
import re
import warnings

import pytest
import torch
from torch import nn

from sphereify import ConversionPlan, apply_plan, plan_conversion, sphereify
from sphereify.errors import (
    ArgumentTypeError,
    ArtifactError,
    PlanMismatchError,
    SphereifyError,
    UnsupportedModelError,
    UsageError,
)
from sphereify.nn import (
    AngularHead,
    CosineOperator,
    LearnableSigmoidOperator,
    LinearOperator,
    SigmoidOperator,
)
from sphereify.nn.layers import AngularLayer
from tests.convert.models import (
    CLASSES,
    Mlp,
    Net,
    Power,
    classifier_of,
    conv,
    images,
    misnamed_block,
    plain,
    pyramid,
)

ANGULAR = (AngularLayer, AngularHead)
SITES = ("stem", "body", "bare", "neck", "fc")


def residual():
    return classifier_of(misnamed_block(torch.add))


def angular_modules(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, ANGULAR)}


def parameters_named(model, last):
    return {name: p for name, p in model.named_parameters() if name.split(".")[-1] == last}


# ------------------------------------------------------------------------------------------------------------ operators


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("linear", LinearOperator),
        ("cosine", CosineOperator),
        ("sigmoid", SigmoidOperator),
        ("learnable-sigmoid", LearnableSigmoidOperator),
        ("learnable_sigmoid", LearnableSigmoidOperator),
        (LinearOperator(), LinearOperator),
        (SigmoidOperator(0.2), SigmoidOperator),
        (LearnableSigmoidOperator(), LearnableSigmoidOperator),
    ],
)
def test_the_operator_asked_for_is_in_every_layer_and_in_the_plan(given, expected):
    model = sphereify(plain(), operator=given)
    layers = angular_modules(model)
    assert set(layers) == set(SITES)
    assert {type(layer.operator) for layer in layers.values()} == {expected}
    assert {d.operator for d in model.conversion_plan.decisions} == {expected.name}
    assert torch.isfinite(model(images())).all()


def test_without_an_operator_it_is_the_cosine():
    assert {type(layer.operator) for layer in angular_modules(sphereify(plain())).values()} == {CosineOperator}


def test_the_operators_make_different_networks():
    model, x = plain().eval(), images()
    outputs = [sphereify(model, operator=name)(x) for name in ("linear", "cosine", "sigmoid")]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


@pytest.mark.parametrize("operator", [Power(1), lambda cos: cos], ids=["nn.Module", "lambda"])
def test_an_operator_of_the_users_own_is_used_and_equals_the_cosine_where_it_is_the_identity(operator):
    torch.manual_seed(0)
    model, x = plain().eval(), images()
    own = sphereify(model, operator=operator)
    torch.testing.assert_close(own(x), sphereify(model, operator="cosine")(x), rtol=1e-4, atol=1e-4)
    assert all(d.operator not in (None, "cosine") for d in own.conversion_plan.decisions)
    own.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in own.parameters())


def test_an_operator_object_with_parameters_is_copied_for_each_layer():
    given = Power(2)
    model = sphereify(plain(), operator=given)
    exponents = parameters_named(model, "exponent")
    assert len(exponents) == len(SITES)
    assert all(p is not given.exponent and p.item() == 2 for p in exponents.values())


@pytest.mark.parametrize(
    ("body", "head"),
    [(Power(1), Power(3)), (lambda cos: cos, lambda cos: cos**3)],
    ids=["nn.Module", "lambda"],
)
def test_two_operator_objects_of_one_class_stay_apart(body, head):
    model = sphereify(plain(), operator=body, head_operator=head)
    cos = torch.tensor([0.5])
    torch.testing.assert_close(model.stem.operator(cos), torch.tensor([0.5]), rtol=1e-4, atol=0)
    torch.testing.assert_close(model.fc.operator(cos), torch.tensor([0.125]), rtol=1e-4, atol=0)


class CubedCosine(CosineOperator):
    """An operator of a user's own, on the base that the package exports."""

    def forward(self, cos):
        return super().forward(cos) ** 3


def test_a_users_subclass_of_a_built_in_operator_is_not_replaced_by_its_base():
    model = sphereify(plain(), operator=CubedCosine())
    torch.testing.assert_close(model.stem.operator(torch.tensor([0.5])), torch.tensor([0.125]))


@pytest.mark.parametrize(("operator", "start"), [("sigmoid", 0.3), ("learnable-sigmoid", 0.5)])
@pytest.mark.parametrize("k", [None, 0.7])
def test_k_is_the_default_or_what_is_given(operator, start, k):
    for layer in angular_modules(sphereify(plain(), operator=operator, k=k)).values():
        torch.testing.assert_close(torch.as_tensor(layer.operator.k).mean().item(), k or start)


def test_a_k_in_an_operator_object_is_kept():
    model = sphereify(plain(), operator=SigmoidOperator(0.17))
    assert {layer.operator.k for layer in angular_modules(model).values()} == {0.17}


@pytest.mark.parametrize("share_k", ["filter", "layer", "network"])
def test_a_learnable_k_is_shared_as_asked(share_k):
    model = sphereify(plain(), operator="learnable-sigmoid", share_k=share_k)
    found = {name: p.numel() for name, p in parameters_named(model, "p").items()}
    if share_k == "network":
        assert list(found.values()) == [1]
        assert len({id(layer.operator) for layer in angular_modules(model).values()}) == 1
    else:
        filters = {"stem": 4, "body": 6, "bare": 6, "neck": 8, "fc": CLASSES}
        assert found == {f"{name}.operator.p": (n if share_k == "filter" else 1) for name, n in filters.items()}
    assert torch.isfinite(model(images())).all()


def test_a_k_shared_by_the_network_stays_shared_in_a_copy():
    model = copy.deepcopy(sphereify(plain(), operator="learnable-sigmoid", share_k="network"))
    assert len(parameters_named(model, "p")) == 1


# ------------------------------------------------------------------------------------------------ shortcuts, head, norm


@pytest.mark.parametrize("skip", [True, False])
def test_shortcuts_are_kept_only_when_asked(skip):
    plan = plan_conversion(residual(), skip_shortcuts=skip)
    assert [d.name for d in plan.kept] == (["block.conv1"] if skip else [])


@pytest.mark.parametrize(
    ("head", "kind"),
    [("auto", "w-softmax"), ("w-softmax", "w-softmax"), ("w_softmax", "w-softmax"), ("s-softmax", "s-softmax")],
)
def test_the_classifier_becomes_the_head_asked_for(head, kind):
    model = plain()
    angular = sphereify(model, head=head, **({"scale": 12.0} if kind == "s-softmax" else {}))
    assert type(angular.fc) is AngularHead
    assert angular.fc.kind == kind
    assert kind != "s-softmax" or angular.fc.scale == 12.0
    torch.testing.assert_close(angular.fc.weight, model.fc.weight, rtol=0, atol=0)
    assert f"the head swapped for {kind}" in angular.conversion_plan.summary()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"head": "keep", "margin": 3},
            "margin: has no effect on head='keep'; it belongs to ga-softmax, a-softmax, arcface, cosface and sph",
        ),
        ({"margin": 3}, "margin: has no effect on head='auto'"),
        ({"head": "a-softmax", "scale": 10}, "scale: has no effect on head='a-softmax'; it belongs to s-softmax, arc"),
        ({"margin_gradient": "detached"}, "margin_gradient: has no effect on head='auto'; it belongs to ga-softmax"),
        (
            {"head": "cosface", "similarity_power": 2},
            "similarity_power: has no effect on head='cosface'; it belongs to sphereface2",
        ),
    ],
)
def test_a_setting_of_another_head_is_told(options, text):
    with pytest.raises(UsageError, match=text):
        plan_conversion(plain(), **options)


def test_head_keep_leaves_the_classifier_and_says_so():
    model = sphereify(plain(), head="keep")
    assert type(model.fc) is nn.Linear
    assert {d.name: d.reason for d in model.conversion_plan.kept} == {"fc": "classifier: head='keep'"}


def test_the_head_takes_the_operator_of_the_body_or_its_own():
    assert type(sphereify(plain(), operator="linear").fc.operator) is LinearOperator
    model = sphereify(plain(), operator="sigmoid", k=0.2, head_operator="linear")
    assert type(model.fc.operator) is LinearOperator
    assert model.stem.operator.k == 0.2


@pytest.mark.parametrize(
    ("rescale", "rescaled"),
    [("auto", {"body", "bare", "neck"}), ("always", {"stem", "body", "bare", "neck"}), ("never", set())],
)
def test_rescaling_is_where_it_is_asked_for(rescale, rescaled):
    model = sphereify(plain(), rescale=rescale)
    layers = {name: layer for name, layer in angular_modules(model).items() if name != "fc"}
    assert {name for name, layer in layers.items() if layer.beta is not None} == rescaled
    assert {name for name, layer in layers.items() if layer.gamma is not None} == rescaled - {"body", "neck"}  # biased
    assert all(d.reason for d in model.conversion_plan.decisions)


# A layer without bias and rescaling must not return the very tensor that its backward pass needs.
@pytest.mark.parametrize("rescale", ["auto", "always", "never"])
@pytest.mark.parametrize("operator", ["linear", "cosine", "sigmoid", "learnable-sigmoid"])
def test_a_network_with_in_place_activations_trains_whatever_the_rescaling(rescale, operator):
    model = sphereify(plain(), rescale=rescale, operator=operator)
    model(images()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_norm_replace_drops_the_batch_norms_and_their_layers_rescale_themselves():
    plan = plan_conversion(plain(), norm="replace")
    assert {d.name: d.norm for d in plan.decisions if d.drops_norm} == {"stem": "norm"}
    assert {d.name: d.rescale for d in plan.decisions}["stem"] is True
    assert "in place of norm" in next(d.reason for d in plan.decisions if d.drops_norm)


# ------------------------------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("options", "converted"),
    [
        ({"include": "b*"}, {"body", "bare"}),
        ({"include": ["stem", "neck"]}, {"stem", "neck"}),
        ({"include": "re:b.*e"}, {"bare"}),
        ({"include": "re:b(ody|are)"}, {"body", "bare"}),
        ({"include": "b???"}, {"body", "bare"}),
        ({"exclude": "b*"}, {"stem", "neck", "fc"}),
        ({"exclude": ["stem", "re:(neck|fc)"]}, {"body", "bare"}),
        ({"exclude": "re:b(are)?"}, {"stem", "body", "neck", "fc"}),
        ({"include": "b*", "exclude": "bare"}, {"body"}),
        ({"include": "b*", "overrides": {"stem": {"rescale": "always"}}}, {"stem", "body", "bare"}),
        ({"exclude": "*", "overrides": {"neck": {"operator": "linear"}}}, {"neck"}),
        ({"overrides": {"bare": "keep"}}, {"stem", "body", "neck", "fc"}),
        ({"overrides": {"bare": {"operator": "linear"}, "b*": "keep"}}, {"stem", "bare", "neck", "fc"}),
        ({"overrides": {"b*": "keep", "bare": {"operator": "linear"}}}, {"stem", "neck", "fc"}),
        ({"include": "stem", "head": "w-softmax"}, {"stem", "fc"}),
    ],
)
def test_patterns_choose_the_layers(options, converted):
    assert {d.name for d in plan_conversion(plain(), **options).converted} == converted


def test_a_pattern_over_names_matches_whole_names_only():
    with pytest.raises(UsageError, match="pattern 'bod' matches no"):
        plan_conversion(plain(), include="bod")


def test_an_override_sets_what_it_names_for_the_layers_it_matches():
    model = sphereify(
        plain(),
        operator="sigmoid",
        k=0.4,
        overrides={"body": {"operator": "linear", "rescale": "never"}, "re:bare|neck": {"k": 0.9}, "stem": "keep"},
    )
    assert type(model.stem) is nn.Conv2d
    assert (type(model.body.operator), model.body.beta) == (LinearOperator, None)
    assert [layer.operator.k for layer in (model.bare, model.neck, model.fc)] == [0.9, 0.9, 0.4]
    assert {d.name: d.reason for d in model.conversion_plan.kept} == {"stem": "an override keeps it"}


def test_an_override_with_an_operator_wins_over_skipping_shortcuts():
    model = sphereify(residual(), skip_shortcuts=True, overrides={"block.conv1": {"operator": "linear"}})
    assert type(model.block.conv1.operator) is LinearOperator


def test_another_operator_in_an_override_takes_its_own_default_k():
    model = sphereify(plain(), operator="sigmoid", k=0.9, overrides={"body": {"operator": "learnable-sigmoid"}})
    torch.testing.assert_close(model.body.operator.k, torch.full((6,), 0.5))


def test_eps_reaches_every_layer():
    model = sphereify(plain(), eps=1e-3)
    assert {layer.eps for layer in angular_modules(model).values() if isinstance(layer, AngularLayer)} == {1e-3}


# ----------------------------------------------------------------------------------------------------------- plain data


@pytest.mark.parametrize("make", [plain, residual, Mlp, lambda: pyramid("F.interpolate")])
@pytest.mark.parametrize(
    "options",
    [{}, {"operator": "learnable-sigmoid", "share_k": "network", "k": 0.3}, {"head": "s-softmax", "rescale": "always"}],
    ids=["default", "learnable", "s-softmax"],
)
def test_a_plan_goes_to_json_and_back(make, options):
    plan = plan_conversion(make(), **options)
    back = ConversionPlan.from_json(plan.to_json())
    assert back == plan
    assert back.to_json() == plan.to_json()
    assert json.loads(plan.to_json())["decisions"][0]["name"] == plan.decisions[0].name


def test_a_printed_plan_names_every_layer_with_what_it_becomes_and_why(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    plan = plan_conversion(residual(), skip_shortcuts=True)
    lines = str(plan).splitlines()
    for decision in plan.decisions:
        becomes = decision.operator if decision.action == "convert" else "kept"
        assert any(re.match(rf"{re.escape(decision.name)} .*{becomes}.*{re.escape(decision.reason)}", line)
                   for line in lines)  # fmt: skip
    assert plan.summary() == "3 convolutions converted, 1 shortcut kept, the head swapped for w-softmax"
    assert lines[-1] == plan.size()


def test_a_printed_plan_is_as_wide_as_the_terminal(monkeypatch):
    layers = {
        f"a_block_with_a_long_name{i}": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv1d(4, 4, 1)) for i in "12"
    }
    plan = plan_conversion(nn.ModuleDict({"the_encoder_of_the_network": nn.ModuleDict(layers)}), exclude="*1.2")
    for columns in (60, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        _, *lines, _ = str(plan).splitlines()
        rows = lines[: -len(plan.notes)]
        assert max(map(len, rows)) <= columns
        assert any("kept" in row for row in rows)
    assert "the_encoder_of_the_network.a_block_with_a_long_name1.0" in str(plan)


def test_the_size_of_a_plan_is_that_of_the_network():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    x = torch.randn(1, 3, 8, 8)
    products = 36 * 4 * 27, 4 * 36 * 5
    plan = plan_conversion(model, head="keep", example_inputs=x)
    assert plan.parameters == 4 * 27 + 4 * 36 * 5 + 5
    assert plan.angular_share == pytest.approx(products[0] / sum(products))
    assert plan.size() == f"833 parameters; {products[0] / sum(products):.1%} of the multiplications are angular"
    back = ConversionPlan.from_json(plan.to_json())
    assert back.size() == plan.size()
    old = {key: value for key, value in json.loads(plan.to_json()).items() if key not in ("costs", "parameters")}
    told = "the share of the multiplications that are angular is unknown: "
    assert ConversionPlan.from_json(json.dumps(old)).size() == f"{told}this plan does not count them"
    assert ConversionPlan.from_json(json.dumps(old | {"inputs": ""})).size() == f"{told}the model was not run"


@pytest.mark.parametrize("text", ["{", "[]", "null", "{}", '{"version": 1}', '{"version": 1, "decisions": [{}]}'])
def test_a_text_that_is_no_plan_is_refused(text):
    with pytest.raises(ArtifactError, match="not a conversion plan in JSON"):
        ConversionPlan.from_json(text)


def test_a_plan_of_a_newer_version_asks_for_an_upgrade():
    newer = json.loads(plan_conversion(plain()).to_json()) | {"version": 99}
    with pytest.raises(ArtifactError, match=r"version 99 is newer.*pip install --upgrade sphereify"):
        ConversionPlan.from_json(json.dumps(newer))


def test_an_operator_object_must_be_put_back_after_json_and_then_works():
    model, x = plain().eval(), images()
    plan = plan_conversion(model, operator=Power(2))
    back = ConversionPlan.from_json(plan.to_json())
    with pytest.raises(UsageError, match=r"operator object .*Power.*plan\.objects\["):
        apply_plan(model, back)
    back.objects.update(plan.objects)
    torch.testing.assert_close(apply_plan(model, back)(x), apply_plan(model, plan)(x), rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------------- what is wrong

WRONG_OPTIONS = {
    "unknown operator": ({"operator": "cosin"}, "operator: got 'cosin', expected one of .*Did you mean 'cosine'"),
    "operator of another type": ({"operator": 5}, "operator: got 5, expected a name or a callable"),
    "unknown head operator": ({"head_operator": "liner"}, "^head_operator: got 'liner'.*Did you mean 'linear'"),
    "k zero": ({"operator": "sigmoid", "k": 0}, "k: got 0, expected a positive"),
    "k negative": ({"operator": "learnable-sigmoid", "k": -0.3}, "k: got -0.3, expected a positive"),
    "k not a number": ({"operator": "sigmoid", "k": float("nan")}, "k: got nan"),
    "k for an operator without": ({"operator": "cosine", "k": 0.3}, "k: got 0.3 for the cosine operator"),
    "learnable k below its floor": ({"operator": "learnable-sigmoid", "k": 0.01}, "expected a value above 0.05"),
    "margin below one": ({"margin": 0.5}, "margin: got 0.5, expected a number of at least 1"),
    "scale zero": ({"scale": 0}, "scale: got 0, expected a number above 0"),
    "margin of arcface too large": (
        {"head": "arcface", "margin": 4.0}, "margin: got 4.0, expected a number of at least 0 and at most 1.5",
    ),
    "margin of cosface below zero": ({"head": "cosface", "margin": -0.1}, "margin: got -0.1, expected a number of at"),
    "margin that is no number": ({"head": "arcface", "margin": "big"}, "margin: got 'big', expected a number of at l"),
    "margin gradient": (
        {"head": "arcface", "margin_gradient": "none"}, "margin_gradient: got 'none', expected one of true, detached",
    ),
    "similarity power below one": (
        {"head": "sphereface2", "similarity_power": 0.5}, "similarity_power: got 0.5, expected a number of at least 1",
    ),
    "positive weight of one": (
        {"head": "sphereface2", "positive_weight": 1}, "positive_weight: got 1, expected a number above 0 and below 1",
    ),
    "eps zero": ({"eps": 0.0}, "eps: got 0.0, expected a number above 0"),
    "unknown head": ({"head": "w-sofmax"}, "head: got 'w-sofmax', expected one of auto.*Did you mean 'w-softmax'"),
    "unknown rescale": ({"rescale": "alway"}, "rescale: got 'alway', expected one of auto.*Did you mean 'always'"),
    "unknown norm": ({"norm": "drop"}, "norm: got 'drop', expected one of keep, replace"),
    "unknown share_k": ({"share_k": "filters"}, "share_k: got 'filters'.*Did you mean 'filter'"),
    "pattern without a match": ({"exclude": "boddy"}, "exclude: pattern 'boddy' matches no .*body"),
    "second pattern without a match": ({"include": ["body", "8"]}, "include: pattern '8' matches no .*names look like"),
    "override without a match": ({"overrides": {"bdy": "keep"}}, "overrides: pattern 'bdy' matches no .*body"),
    "not a regular expression": ({"include": "re:("}, r"include: 're:\(' is not a regular expression"),
    "pattern of another type": ({"include": [5]}, "include: got 5, expected a glob"),
    "everything excluded": ({"exclude": "*"}, r"nothing to convert: all 5 layers would be kept \(5 × excluded"),
    "override with an unknown key": (
        {"overrides": {"body": {"oprator": 1}}}, r"overrides\['body'\].*Did you mean 'operator'",
    ),
    "override of another type": ({"overrides": {"body": 5}}, r"overrides\['body'\]: got 5, expected 'keep' or a dict"),
    "override with an unknown rescale": (
        {"overrides": {"body": {"rescale": "no"}}}, r"overrides\['body'\]: rescale: got 'no'",
    ),
    "override with an unknown operator": (
        {"overrides": {"body": {"operator": "cosin"}}}, r"^overrides\['body'\]: operator: got 'cosin'",
    ),
    "override with k zero": ({"operator": "sigmoid", "overrides": {"body": {"k": 0}}}, "^overrides: body.*: k: got 0"),
    "override with a k that the operator does not take": (
        {"overrides": {"body": {"k": 0.3}}}, r"^overrides: body.*: k: got 0\.3 for the cosine operator",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_OPTIONS)
def test_a_wrong_option_is_one_clear_error_and_changes_nothing(wrong):
    options, text = WRONG_OPTIONS[wrong]
    model = plain()
    types = [type(module) for module in model.modules()]
    with pytest.raises(UsageError, match=text) as caught:
        sphereify(model, inplace=True, **options)
    assert caught.value.exit_code == 2
    assert [type(module) for module in model.modules()] == types


def test_an_unknown_option_is_named():
    with pytest.raises((UsageError, TypeError), match="opperator"):
        plan_conversion(plain(), opperator="cosine")


def test_a_pattern_that_names_a_container_suggests_its_content():
    with pytest.raises(UsageError, match=re.escape("did you mean 'block.*'?")):
        plan_conversion(residual(), exclude="block")


def test_a_head_without_a_classifier_is_an_error_that_offers_keep():
    model = Net(lambda n, x: n.b(n.a(x).relu()).cumsum(1), a=conv(3, 4), b=conv(4, 4))
    with pytest.raises(UsageError, match=r"head='w-softmax': no classifier was found in Net.*head='keep'"):
        plan_conversion(model, head="w-softmax")
    assert "no head swapped" in plan_conversion(model).summary()


@pytest.mark.parametrize("model", [nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), nn.Identity()])
def test_a_model_without_convolutions_and_linear_maps_is_refused(model):
    with pytest.raises(UsageError, match=r"has no convolution or linear layer.*nothing to convert"):
        sphereify(model)


def test_something_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"^model: got str, expected a torch.nn.Module$") as caught:
        sphereify("resnet18")
    assert isinstance(caught.value, ArgumentTypeError)


def _compiled_in_place():
    model = plain()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda: nn.DataParallel(plain()), "the model is DataParallel"),
        (lambda: nn.Sequential(nn.DataParallel(plain())), "0 is DataParallel"),
        (lambda: torch.compile(plain(), backend="eager"), "the model is OptimizedModule"),
        (_compiled_in_place, "the model is compiled in place"),
    ],
    ids=["DataParallel", "DataParallel inside", "torch.compile", "compile method"],
)
def test_a_wrapped_model_is_told_to_convert_first_and_wrap_afterwards(wrap, name):
    with pytest.raises(UnsupportedModelError, match=f"{name}.*convert the plain model first") as caught:
        sphereify(wrap())
    assert caught.value.exit_code == 2


def test_lazy_layers_are_named_with_the_remedy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that lazy modules may change
        model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.LazyLinear(4))
    with pytest.raises(UnsupportedModelError, match=r"0 \(LazyConv2d\) is lazy.*run one forward pass"):
        sphereify(model)


def _quantized():
    from torch.ao.nn.quantized import dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to move quantization elsewhere
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), dynamic.Linear(4, 3))


def test_a_quantized_layer_is_named_with_the_remedy():
    with pytest.raises(UnsupportedModelError, match=r"2 \(Linear\) is quantized.*keep it with exclude='2'"):
        plan_conversion(_quantized(), head="keep")


def test_a_quantized_layer_can_be_kept_as_its_message_says():
    plan = plan_conversion(_quantized(), head="keep", exclude="2")
    assert [d.name for d in plan.converted] == ["0"]


# --------------------------------------------------------------------------------------------- a plan for another model


def _wider():
    model = plain()
    model.neck = nn.Linear(6, 9)
    return model


def _deeper():
    model = plain()
    model.extra = nn.Linear(CLASSES, CLASSES)
    return model


def _shallower():
    model = plain()
    model.neck = nn.Identity()
    return model


def _other_kind():
    model = plain()
    model.body = nn.Conv1d(4, 6, 3)
    return model


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (_wider, r"neck: the plan expects a linear with weight \(8, 6\), Sequential has a linear with weight \(9, 6\)"),
        (_deeper, "extra: Sequential has this layer, the plan for .*Sequential has not"),
        (_shallower, "neck: the plan for .*Sequential has this layer, Sequential has not"),
        (_other_kind, r"body: the plan expects a conv2d with weight \(6, 4, 3, 3\), .* conv1d with weight \(6, 4, 3\)"),
    ],
)
def test_a_plan_for_another_architecture_names_the_layer_and_leaves_the_model_alone(other, text):
    model = other()
    types = [type(module) for module in model.modules()]
    with pytest.raises(PlanMismatchError, match=text):
        apply_plan(model, plan_conversion(plain()), inplace=True)
    assert [type(module) for module in model.modules()] == types
    assert not hasattr(model, "conversion_plan")


def test_a_plan_is_not_applied_twice():
    plan = plan_conversion(plain())
    with pytest.raises(PlanMismatchError, match="stem: the plan converts this layer, but it is angular already"):
        apply_plan(apply_plan(plain(), plan), plan)


def test_every_error_is_one_of_the_package():
    assert all(issubclass(cls, SphereifyError) for cls in (UsageError, UnsupportedModelError, PlanMismatchError))


# ------------------------------------------------------------------------------------------------------------ depthwise


def separable():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, groups=1),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def test_depthwise_convolutions_are_those_of_one_channel_a_group_and_can_be_kept():
    x = torch.randn(2, 1, 12, 12)
    plan = plan_conversion(separable(), example_inputs=x)
    assert all(d.action == "convert" for d in plan.decisions)
    (note,) = plan.notes
    elements = [144 + 400, 400 + 512, 512 + 512, 512 + 288, 8 + 3]  # of inputs and outputs, an image
    assert note.startswith("1 depthwise convolution: ")
    assert f"about {elements[1] / sum(elements):.0%} of the time" in note
    plan = plan_conversion(separable(), example_inputs=x, skip_depthwise=True)
    assert {d.name: d.reason for d in plan.kept} == {"1": "depthwise convolution: skip_depthwise"}
    assert plan.notes == []
    override = {"1": {"operator": "linear"}}
    asked = plan_conversion(separable(), example_inputs=x, skip_depthwise=True, overrides=override)
    assert not asked.kept

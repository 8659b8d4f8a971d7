"""The pooled radius in a conversion: options, overrides, the plan, its notes and its JSON, and what takes no radius."""

import copy
import itertools
import json
import math

import pytest
import torch
from torch import nn

from sphereify import ConversionOptions, ConversionPlan, apply_plan, fold, load, plan_conversion, save, sphereify
from sphereify.errors import PlanMismatchError, UsageError
from sphereify.nn import SphereConv2d
from tests.convert.models import CLASSES, Mlp, Net, OwnWeight, conv, images, plain
from tests.grids import grid


def radii(model):
    return {name: m.radius_value for name, m in model.named_modules() if hasattr(m, "radius_value")}


def test_every_convolution_has_the_radius_and_no_linear_map():
    model = sphereify(plain(), radius=2.0)
    assert radii(model) == {"stem": 2.0, "body": 2.0, "bare": 2.0}
    neck = next(d for d in model.conversion_plan.decisions if d.name == "neck")
    assert (neck.radius, neck.learn_radius) == (0.0, False)
    assert neck.reason.endswith("no radius: a linear map has no patches to pool")
    assert radii(sphereify(plain())) == {"stem": 0.0, "body": 0.0, "bare": 0.0}


def test_the_output_does_not_see_the_length_of_an_image():
    model = sphereify(plain(), radius=2.0, eps=1e-12, head="w-softmax").eval()
    with torch.no_grad():
        torch.testing.assert_close(model.stem(0.01 * images()), model.stem(images()), rtol=1e-4, atol=1e-5)


def test_a_radius_of_zero_plans_as_if_there_were_none():
    assert plan_conversion(plain(), radius=0) == plan_conversion(plain())
    assert not any("radius" in note for note in plan_conversion(plain()).notes)
    assert "ρ" not in str(plan_conversion(plain()))


def test_overrides_set_the_radius_of_single_layers():
    model = sphereify(plain(), radius=2.0, overrides={"body": {"radius": 4}, "bare": {"radius": 0}})
    assert radii(model) == {"stem": 2.0, "body": 4.0, "bare": 0.0}
    assert radii(sphereify(plain(), overrides={"b*": {"radius": 1.5}})) == {"stem": 0.0, "body": 1.5, "bare": 1.5}


def test_an_override_of_zero_is_not_learned():
    model = sphereify(plain(), radius=2.0, learn_radius=True, overrides={"bare": {"radius": 0}})
    names = {name for name, _ in model.named_parameters() if name.endswith("log_radius")}
    assert names == {"stem.log_radius", "body.log_radius"}


def test_a_learned_radius_is_a_parameter_of_each_layer_and_gets_a_gradient():
    model = sphereify(plain(), radius=2.0, learn_radius=True)
    assert [d.learn_radius for d in model.conversion_plan.converted if d.kind == "conv2d"] == [True] * 3
    model(images()).square().sum().backward()
    for layer in (model.stem, model.body, model.bare):
        torch.testing.assert_close(layer.log_radius.detach(), torch.tensor([math.log(2.0)]))
        assert layer.log_radius.grad.abs() > 0
    assert "body.log_radius" in model.state_dict()


def test_a_functional_call_pools():
    model = sphereify(OwnWeight(), radius=2.0, learn_radius=True, head="keep").eval()
    assert list(radii(model).values()) == [2.0, 2.0]
    call = model.angular_calls["kernel"]
    x = images()
    with torch.no_grad():
        inner = model.stem(x).relu()
        expected = SphereConv2d(4, 6, 3, padding=1, bias=False, radius=2.0, rescale=True)
        expected.weight.copy_(model.kernel), expected.beta.copy_(call.beta)
        torch.testing.assert_close(model(x), model.fc(expected(inner).relu().mean((2, 3))))
    with torch.no_grad():
        call.log_radius.fill_(math.log(8.0))
        assert not torch.allclose(model(x), model.fc(expected(inner).relu().mean((2, 3))))


def test_the_notes_count_layers_with_a_radius_and_those_without():
    (note,) = plan_conversion(plain(), radius=2.0).notes
    assert note == "pooled radius: 3 convolutions; without: 1 linear map (no patches to pool)"
    (note,) = plan_conversion(plain(), overrides={"body": {"radius": 1}}).notes
    assert note == (
        "pooled radius: 1 convolution; without: 1 linear map (no patches to pool), 2 convolutions (not asked for)"
    )
    assert plan_conversion(nn.Sequential(conv(3, 4), conv(4, 4)), radius=1).notes == ["pooled radius: 1 convolution"]


def test_the_printed_plan_has_the_radius_only_where_there_is_one():
    lines = str(plan_conversion(plain(), radius=2.0)).splitlines()
    assert [("ρ=2" in line) for line in lines if " conv2d " in line] == [True, True, True]
    assert not any("ρ" in line for line in lines if " linear " in line)


def test_a_plan_with_a_radius_goes_to_json_and_back():
    plan = plan_conversion(plain(), radius=2.0, learn_radius=True)
    again = ConversionPlan.from_json(plan.to_json())
    assert again == plan
    assert {d["name"]: (d["radius"], d["learn_radius"]) for d in json.loads(plan.to_json())["decisions"]} == {
        "stem": (2.0, True), "body": (2.0, True), "bare": (2.0, True), "neck": (0.0, False), "fc": (0.0, False),
    }  # fmt: skip
    assert radii(apply_plan(plain(), again)) == {"stem": 2.0, "body": 2.0, "bare": 2.0}


def test_options_with_a_radius_go_to_json_and_back():
    options = ConversionOptions(radius=2.0, learn_radius=True, overrides={"body": {"radius": 3.0}})
    assert ConversionOptions.from_json(options.to_json()) == options


@pytest.mark.parametrize("learn", [False, True])
def test_an_artifact_comes_back_with_its_radius(learn, tmp_path):
    model = sphereify(plain(), radius=2.0, learn_radius=learn).eval()
    if learn:
        with torch.no_grad():
            model.body.log_radius.fill_(math.log(3.0))
    save(model, tmp_path / "a")
    loaded = load(tmp_path / "a", factory=plain).eval()
    assert radii(loaded) == radii(model)
    assert loaded.body.radius_value == pytest.approx(3.0 if learn else 2.0)
    with torch.no_grad():
        assert torch.equal(loaded(images()), model(images()))
    assert loaded.conversion_plan == model.conversion_plan


@pytest.mark.parametrize("learn", [False, True])
def test_a_second_conversion_leaves_the_radius_of_the_first(learn, tmp_path):
    first = sphereify(plain(), radius=2.0, learn_radius=learn, exclude="bare")
    save(first, tmp_path / "a")
    second = sphereify(load(tmp_path / "a", factory=plain), radius=4.0)
    assert radii(second) == pytest.approx({"stem": 2.0, "body": 2.0, "bare": 4.0})
    assert {d.name: d.radius for d in second.conversion_plan.converted if d.radius} == {
        "stem": 2.0, "body": 2.0, "bare": 4.0,
    }  # fmt: skip
    save(second, tmp_path / "b")
    assert radii(load(tmp_path / "b", factory=plain)) == pytest.approx(radii(second))


@pytest.mark.parametrize("operator", ["cosine", "learnable-sigmoid"])
@pytest.mark.parametrize("learn", [False, True])
def test_a_folded_network_computes_the_same_with_a_radius(operator, learn):
    model = sphereify(plain(), operator=operator, radius=2.0, learn_radius=learn)
    model.train()
    for seed in range(3):
        model(images(batch=4, seed=seed))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(fold(model)(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_a_plan_that_learns_a_radius_does_not_fit_what_is_angular_already():
    plan = plan_conversion(plain(), radius=2.0, learn_radius=True)
    with pytest.raises(PlanMismatchError, match="angular already"):
        apply_plan(sphereify(plain()), plan)


@pytest.mark.parametrize(
    ("make", "learn"),
    grid(itertools.product((plain, OwnWeight), (False, True)), lambda make, learn: make is plain and learn),
)
def test_a_network_with_a_radius_compiles_without_breaks(make, learn):
    torch._dynamo.reset()
    model = sphereify(make(), radius=2.0, learn_radius=learn)
    x = images()
    for network in (model.train(), model.eval()):
        reference = copy.deepcopy(network)
        y, expected = torch.compile(network, fullgraph=True, backend="aot_eager")(x), reference(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        network.zero_grad()
        y.square().sum().backward(), expected.square().sum().backward()
        for one, other in zip(network.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "2", True, [1.0]])
def test_a_radius_that_is_no_number_of_at_least_zero_is_refused(value):
    with pytest.raises(UsageError, match=r"^radius: got .*, expected a number of at least 0"):
        ConversionOptions(radius=value)
    with pytest.raises(UsageError, match=r"overrides\['body'\]: radius: got .*, expected a number of at least 0"):
        ConversionOptions(overrides={"body": {"radius": value}})


def test_learning_needs_a_start():
    with pytest.raises(UsageError, match=r"learn_radius.*starts from radius, whose gradient is 0 at 0.*radius=1\.0"):
        plan_conversion(plain(), learn_radius=True)


@pytest.mark.parametrize("model", [lambda: Mlp(), lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))])
def test_a_radius_of_linear_maps_alone_is_refused(model):
    with pytest.raises(UsageError, match=r"radius=2\.0: has no effect.*linear maps have no patches"):
        plan_conversion(model(), radius=2.0)


def test_a_radius_for_a_linear_map_by_name_is_refused():
    for pattern in ("neck", "fc", "re:neck|fc"):
        with pytest.raises(UsageError, match=r"overrides\[.*\]: radius has no effect on (neck|fc)"):
            plan_conversion(plain(), overrides={pattern: {"radius": 2.0}})
    plan = plan_conversion(plain(), overrides={"*": {"radius": 2.0}})  # some of what it matches are convolutions
    assert {d.name for d in plan.converted if d.radius} == {"stem", "body", "bare"}


def test_attention_has_no_radius():
    class Attentive(Net):
        pass

    model = Attentive(
        lambda n, x: n.fc(n.attention(*[n.stem(x).flatten(2).mT] * 3)[0].mean(1)),
        stem=conv(3, 4), attention=nn.MultiheadAttention(4, 2, batch_first=True), fc=nn.Linear(4, CLASSES),
    )  # fmt: skip
    plan = plan_conversion(model, radius=2.0, attention="convert")
    assert {d.name: d.radius for d in plan.converted if d.radius} == {"stem": 2.0}
    apply_plan(model, plan)(images()).sum().backward()

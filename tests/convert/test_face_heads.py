"""Networks with the heads of face recognition are planned, saved, folded, exported and calibrated as others are."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from sphereify import ConversionPlan, apply_plan, export, fold, load, plan_conversion, save, sphereify
from sphereify.choices import OPERATORS
from sphereify.convert.options import ConversionOptions
from sphereify.errors import UsageError
from sphereify.nn import AngularHead, AngularOutput
from tests.grids import grid

KINDS = {
    "arcface": {"margin": 0.3, "scale": 20.0, "margin_gradient": "detached"},
    "cosface": {"margin": 0.2, "scale": 20.0},
    "sphereface2": {"margin": 0.3, "scale": 30.0, "similarity_power": 2.5, "positive_weight": 0.6,
                    "margin_gradient": "detached"},
}  # fmt: skip


def plain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
    model.example_input_array = inputs(2)  # a plan takes what the model declares before it tries the usual sizes
    return model


def inputs(count=6, seed=1):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def settings(head):
    names = ("kind", "margin", "scale", "margin_gradient", "similarity_power", "positive_weight")
    return {name: getattr(head, name) for name in names}


@pytest.mark.parametrize("setting", [{"magnitude": "tanh"}, {"weighted": True}, {"k": 0.2, "rescale": "always"}])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_classifier_does_not_have_is_refused_by_its_name(kind, setting):
    text = rf"overrides\['4'\]: {list(setting)[-1]} has no effect on the classifier 4, whose kind is head='{kind}'"
    with pytest.raises(UsageError, match=text):
        plan_conversion(plain(), head=kind, operator="sigmoid", overrides={"4": setting})
    assert plan_conversion(plain(), head=kind, operator="sigmoid", overrides={"*": setting}).decisions[1].head == kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_names_the_head_and_its_numbers_and_comes_back_from_json(kind):
    plan = plan_conversion(plain(), head=kind, **KINDS[kind])
    decision = plan.decisions[-1]
    assert decision.head == kind
    assert {name: getattr(decision, name) for name in KINDS[kind]} == KINDS[kind]
    again = ConversionPlan.from_json(plan.to_json())
    assert again == plan
    assert f"the head swapped for {kind}" in plan.summary()
    head = apply_plan(plain(), again)[-1]
    expected = AngularHead(128, 5, kind=kind, **KINDS[kind])
    assert settings(head) == settings(expected)


@pytest.mark.parametrize(("kind", "margin", "scale"), [("arcface", 0.5, 64), ("cosface", 0.35, 64),
                                                        ("sphereface2", 0.4, 40), ("ga-softmax", 4, None)])  # fmt: skip
def test_what_is_not_given_is_what_the_papers_take(kind, margin, scale):
    decision = plan_conversion(plain(), head=kind).decisions[-1]
    assert (decision.margin, decision.scale, decision.margin_gradient) == (margin, scale, None)
    assert (decision.similarity_power, decision.positive_weight) == (
        (3, 0.7) if kind == "sphereface2" else (None, None)
    )


def test_options_come_back_from_json_and_those_of_earlier_versions_are_read():
    options = ConversionOptions(head="sphereface2", **KINDS["sphereface2"])
    assert ConversionOptions.from_json(options.to_json()) == options
    names = {"margin_gradient", "similarity_power", "positive_weight"}
    for head in ("auto", "w-softmax", "s-softmax", "a-softmax"):
        keywords = {k: v for k, v in json.loads(ConversionOptions(head=head).to_json()).items() if k not in names}
        before = ConversionOptions.from_json(json.dumps({**keywords, "margin": 4.0, "scale": 30.0}))
        assert plan_conversion(plain(), **before.keywords()) == plan_conversion(plain(), head=head)


@pytest.mark.parametrize(
    ("kind", "operator"),
    grid([(kind, name) for kind in KINDS for name in OPERATORS], lambda _, operator: operator in ("cosine", "sigmoid")),
)
def test_in_eval_mode_it_returns_logits_that_are_saved_and_folded(kind, operator, tmp_path):
    model, x = sphereify(plain(), head=kind, operator=operator, **KINDS[kind]), inputs()
    head = model[-1]
    if kind == "sphereface2":
        head.common_bias.data.fill_(-1.5)
    assert isinstance(model.train()(x), AngularOutput)
    logits = model.eval()(x)
    torch.testing.assert_close(head.logits(model[:-1](x)), logits, rtol=0, atol=0)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", factory=plain).eval()
    assert settings(loaded[-1]) == settings(head)
    torch.testing.assert_close(loaded(x), logits, rtol=0, atol=0)
    folded = fold(model, x)
    assert "common_bias" not in folded.state_dict()
    torch.testing.assert_close(folded(x), logits, rtol=1e-4, atol=1e-4)
    save(folded, tmp_path / "folded")
    torch.testing.assert_close(load(tmp_path / "folded", factory=plain)(x), folded(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", grid(KINDS, lambda kind: kind == "sphereface2"))
@pytest.mark.export
@pytest.mark.parametrize(("name", "format"), [("model.pt2", "torch-export"), ("model.onnx", "onnx")])
def test_an_exported_file_is_checked_against_the_model(kind, name, format, tmp_path):
    model = sphereify(plain(), head=kind, **KINDS[kind]).eval()
    export(model, tmp_path / name, example_inputs=inputs(), format=format)
    assert (tmp_path / name).stat().st_size > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_calibration_keeps_the_classes(kind):
    original, held_out = plain(), inputs(512, seed=2)
    options = {"head": kind, **KINDS[kind]}
    copied, calibrated = sphereify(plain(), **options), sphereify(plain(), **options, calibration=[inputs(1024)])

    @torch.no_grad()
    def agreement(model):
        return (model.eval()(held_out).argmax(1) == original(held_out).argmax(1)).float().mean()

    assert agreement(calibrated) > agreement(copied) + 0.1


def test_every_number_of_a_head_is_an_option_and_a_part_of_the_plan():
    from sphereify.convert.plan import Decision
    from sphereify.head_numbers import HEAD_NUMBERS

    options, decision = ({f.name for f in dataclasses.fields(c)} for c in (ConversionOptions, Decision))
    assert {*HEAD_NUMBERS, "margin_gradient"} <= options & decision

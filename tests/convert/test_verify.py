"""Proof by running: which sites a pass through the model calls."""

import contextlib
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sphereify import ConversionPlan, cli, plan_conversion, sphereify
from sphereify.errors import UsageError
from tests.convert.models import (
    Net,
    PreActNet,
    ValueGate,
    WithAuxiliary,
    classifier_of,
    conv,
    gated_block,
    images,
    plain,
)


def called(plan):
    return {d.name: d.called for d in plan.decisions}


def with_unused():
    """`spare` is there and never called; `hidden` too, but in a part that no trace can follow."""
    model = Net(
        lambda n, x: n.fc(n.gate(n.stem(x)).mean((2, 3))),
        stem=conv(3, 4), spare=conv(4, 4), gate=ValueGate(), fc=nn.Linear(6, 5),
    )  # fmt: skip
    model.gate.hidden = nn.Linear(4, 4)
    return model


MODELS = {
    "plain": plain,
    "pre-activation": PreActNet,
    "gated": lambda: classifier_of(gated_block()),
    "untraceable part": lambda: classifier_of(ValueGate()),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_site_of_a_model_that_calls_all_is_called_before_and_after_the_conversion(name):
    model, x = MODELS[name](), images()
    plan = plan_conversion(model)
    for running in (model, sphereify(model), sphereify(model, operator="learnable-sigmoid", rescale="always")):
        proved = plan.verify(running, x)
        assert set(called(proved).values()) == {True}
        # In another order, perhaps: a real pass goes where shapes alone do not.
        assert sorted((d.name, d.action, d.reason) for d in proved.decisions) == sorted(
            (d.name, d.action, d.reason) for d in plan.decisions
        )


@pytest.mark.parametrize("converted", [False, True])
def test_a_module_that_is_never_called_is_reported_and_not_counted(converted):
    model = with_unused()
    plan = plan_conversion(model)
    running = sphereify(model) if converted else model
    proved = plan.verify(running, images())
    assert {name for name, was in called(proved).items() if not was} == {"spare", "gate.hidden"}
    for name in ("spare", "gate.hidden"):
        [decision] = [d for d in proved.decisions if d.name == name]
        assert decision.action == "keep"
        assert "never called" in decision.reason
    assert len(proved.converted) == 3
    assert "2 convolutions converted, 2 layers kept" in proved.summary()


# A plan that was made where the model could not be run counts on the proof.
def test_what_a_plan_took_for_converted_is_corrected_by_the_run():
    model = Net(
        lambda n, x: n.fc((n.stem(x) if float(x.sum()) > -1e9 else n.never(x)).mean((2, 3))),
        stem=conv(3, 4), never=conv(3, 4), fc=nn.Linear(4, 5),
    )  # fmt: skip
    plan = plan_conversion(model)
    assert {d.name for d in plan.converted} == {"stem", "never", "fc"}
    proved = plan.verify(model, images())
    assert called(proved) == {"stem": True, "never": False, "fc": True}
    assert {d.name for d in proved.converted} == {"stem", "fc"}


def test_the_auxiliary_head_is_seen_although_it_runs_in_training_only():
    model = WithAuxiliary()
    plan = plan_conversion(model)
    proved = plan.verify(model, images())
    assert called(proved) == {"stem": True, "aux_conv": True, "aux": True, "fc": True}
    assert [d.name for d in proved.kept] == ["aux"]
    model.aux_conv = nn.Conv2d(4, 4, 1)
    assert called(plan.verify(sphereify(model), images())) == called(proved)


def test_a_functional_call_is_proved_by_its_weight():
    model = Net(
        lambda n, x: n.fc(F.linear(x, n.used.weight).relu()),
        used=nn.Linear(4, 4), unused=nn.Linear(4, 4), fc=nn.Linear(4, 2),
    )  # fmt: skip
    x = torch.randn(3, 4)
    plan = plan_conversion(model, example_inputs=x)
    for running in (model, sphereify(model, example_inputs=x)):
        proved = plan.verify(running, x)
        assert called(proved) == {"used": True, "unused": False, "fc": True}
        assert [d.name for d in proved.kept] == ["unused"]


def test_inputs_that_do_not_fit_are_refused_rather_than_ignored():
    model = Net(lambda n, x: n.fc(F.linear(x, n.used.weight).relu()), used=nn.Linear(4, 4), fc=nn.Linear(4, 2))
    with pytest.raises(UsageError, match="example_inputs: Net does not run with these inputs: RuntimeError"):
        plan_conversion(model, example_inputs=torch.randn(3, 7))


@pytest.mark.parametrize("converted", [False, True])
def test_attention_counts_as_called_when_it_is(converted):
    model = Net(
        lambda n, x: n.fc(n.attention(n.embed(x), n.embed(x), n.embed(x))[0].mean(1)),
        embed=nn.Linear(4, 8), attention=nn.MultiheadAttention(8, 2, batch_first=True),
        idle=nn.MultiheadAttention(8, 2, batch_first=True), fc=nn.Linear(8, 2),
    )  # fmt: skip
    x = torch.randn(2, 3, 4)
    plan = plan_conversion(model, attention="convert", example_inputs=x)
    running = sphereify(model, attention="convert", example_inputs=x) if converted else model
    found = called(plan.verify(running, x))
    assert {name for name, was in found.items() if not was} == {"idle.in_proj_weight", "idle.out_proj"}


def test_several_inputs_are_passed_as_a_tuple():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.fc = nn.Linear(3, 4), nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, a, b):
            return self.fc(self.left(a).relu() * self.right(b))

    model, x = Two(), (torch.randn(2, 3), torch.randn(2, 5))
    proved = plan_conversion(model, example_inputs=x).verify(model, x)
    assert set(called(proved).values()) == {True}


def test_verifying_changes_nothing_in_the_model():
    model = plain().train()
    model.body.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    plan_conversion(model).verify(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_order_of_the_report_follows_execution():
    model = Net(lambda n, x: n.a(n.b(n.c(x).relu()).relu()).mean((2, 3)), a=conv(4, 5), b=conv(4, 4), c=conv(3, 4))
    assert [d.name for d in plan_conversion(model).decisions] == ["c", "b", "a"]


def test_a_functional_call_of_the_model_itself_has_its_place_in_the_order():
    model = Net(
        lambda n, x: n.fc(F.linear(n.first(x).relu(), n.used.weight).relu()),
        used=nn.Linear(4, 4), fc=nn.Linear(4, 2), first=nn.Linear(4, 4),
    )  # fmt: skip
    model.used = nn.ParameterDict({"weight": model.used.weight})
    found = [d.name for d in plan_conversion(model, example_inputs=torch.randn(3, 4)).decisions]
    assert found == ["first", "used.weight", "fc"]


# A trace leaves the gate out, and a run on shapes cannot pass it; a run on values can.
def test_the_order_of_a_verified_report_follows_execution_through_what_cannot_be_traced():
    model = classifier_of(Net(lambda n, x: n.gate(n.b(x)), gate=ValueGate(), b=conv(4, 4)))
    proved = plan_conversion(model).verify(model, images())
    assert [d.name for d in proved.decisions] == ["stem", "block.b", "block.gate.conv", "fc"]


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (torch.randn(2, 5, 8, 8), r"verify: Sequential does not run with these inputs: .*channels"),
        ((torch.randn(2, 3, 8, 8),) * 2, r"verify: Sequential does not run with these inputs: .*argument"),
    ],
)
def test_inputs_that_do_not_fit_are_one_clear_error(inputs, text):
    model = plain()
    with pytest.raises(UsageError, match=text):
        plan_conversion(model).verify(model, inputs)


def test_the_proof_survives_json():
    proved = plan_conversion(with_unused()).verify(with_unused(), images())
    assert ConversionPlan.from_json(proved.to_json()) == proved


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("as_json", [True, False])
def test_inspect_verify_runs_the_model(model, as_json, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sphereify", "inspect", model, "--verify", *(["--json"] if as_json else [])])
    with contextlib.suppress(SystemExit):
        cli.main()
    out, err = capsys.readouterr()
    assert not err
    if as_json:
        decisions = json.loads(out)["decisions"]
        assert len(decisions) > 5
        assert all(d["called"] is True for d in decisions)
    else:
        assert "never called" not in out
        assert "converted" in out

"""Plans that the first version of the format wrote: each is read as it was and still makes its network."""

import json
from pathlib import Path

import pytest
import timm
import torch

from sphereify import ConversionPlan, apply_plan, plan_conversion
from sphereify.nn.functional_calls import AngularCall
from sphereify.nn.layers import AngularLayer

DATA = Path(__file__).parents[1] / "data"
BUILDERS = {
    "plan-v1-test_vit.json": lambda: timm.create_model("test_vit"),
    "plan-v1-beit.json": lambda: timm.create_model(
        "beitv2_base_patch16_224", embed_dim=48, depth=2, num_heads=2, num_classes=7
    ),
}
OPTIONS = {
    "plan-v1-test_vit.json": {"head": "s-softmax", "scale": 16.0},
    "plan-v1-beit.json": {"operator": "sigmoid", "k": 0.2},
}
RENAMED = {"only_read": "output_read_only"}
LATER = {
    "radius": 0.0,
    "learn_radius": False,
    "margin_gradient": None,
    "similarity_power": None,
    "positive_weight": None,
}
"""Fields that plans of that time do not have, with the values that mean what was then."""
LATER_OF_CALLS = {"part": ""}
"""The same for the functional call of a decision."""


def written(name):
    return json.loads((DATA / name).read_text())


@pytest.mark.parametrize("name", BUILDERS)
def test_an_old_plan_is_read_decision_by_decision(name):
    old, plan = written(name), ConversionPlan.from_json((DATA / name).read_text())
    assert (plan.model, plan.notes) == (old["model"], old["notes"])
    assert len(plan.decisions) == len(old["decisions"])
    new = json.loads(plan.to_json())["decisions"]
    for before, after in zip(old["decisions"], new, strict=True):
        if before["call"] is not None:
            before["call"] = LATER_OF_CALLS | before["call"]
        assert after == LATER | {RENAMED.get(field, field): value for field, value in before.items()}


@pytest.mark.parametrize("name", BUILDERS)
def test_an_old_plan_decides_as_the_planner_does_today(name):
    with torch.device("meta"):
        model = BUILDERS[name]()
    assert plan_conversion(model, **OPTIONS[name]) == ConversionPlan.from_json((DATA / name).read_text())


@pytest.mark.parametrize("name", BUILDERS)
def test_an_old_plan_is_applied_to_a_fresh_model(name):
    torch.manual_seed(0)
    model = apply_plan(BUILDERS[name](), ConversionPlan.from_json((DATA / name).read_text()), inplace=True).eval()
    modules = dict(model.named_modules())
    decisions = [d for d in written(name)["decisions"] if d["action"] == "convert" and d["call"] is None]
    layers = [modules[d["name"]] for d in decisions if d["head"] is None]
    assert layers
    assert all(isinstance(layer, AngularLayer) for layer in layers)
    calls = [d for d in written(name)["decisions"] if d["action"] == "convert" and d["call"] is not None]
    assert sum(isinstance(module, AngularCall) for module in modules.values()) == len(calls)
    with torch.no_grad():
        assert model(torch.randn(1, *model.pretrained_cfg["input_size"])).isfinite().all()

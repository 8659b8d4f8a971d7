"""The choice of a radius by the agreement with the original on held-out inputs."""

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sphereify import plan_conversion, sphereify
from sphereify.calibration.agreement import LADDER, RadiusSearch, Trial, choose_radius, plan_with_radius
from sphereify.calibration.batches import checked_batches
from sphereify.calibration.held_out import HeldOut, divide
from sphereify.convert.plan import ConversionPlan
from sphereify.errors import SphereifyWarning, UsageError
from tests.calibration.networks import Residual, smooth_images, trained_statistics


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(7)
    return trained_statistics(Residual())


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(8)
    return smooth_images(256)


@pytest.fixture
def short_ladder(monkeypatch):
    """Two radii in place of six."""
    monkeypatch.setattr("sphereify.calibration.agreement.LADDER", (0.0, 1.0))


@torch.no_grad()
def share_of_same_classes(converted: nn.Module, original: nn.Module, x: torch.Tensor) -> float:
    return float((converted.eval()(x).argmax(1) == original.eval()(x).argmax(1)).float().mean())


# ------------------------------------------------------------------------------------------------ what is held out


@pytest.mark.parametrize(("number", "size"), [(16, 4), (9, 3), (1, 8), (3, 40)])
def test_the_three_parts_hold_each_input_once(number, size):
    rows = torch.arange(number * size).view(-1, 1)
    parts = divide(checked_batches(rows.split(size)), "test")
    values = [torch.cat([batch.first for batch in part]).flatten() for part in (parts.fit, parts.choice, parts.report)]
    assert torch.equal(torch.cat(values), rows.flatten())
    assert len(values[0]) >= 0.7 * len(rows)
    assert all(len(part) for part in values)


@pytest.mark.parametrize("batches", [[torch.zeros(7, 3)], [torch.zeros(1, 3), torch.zeros(9, 3)]])
def test_inputs_that_are_too_few_are_an_error(batches):
    with pytest.raises(UsageError, match="fewer than 8"):
        divide(checked_batches(batches), "agreement")


def test_the_agreement_is_that_of_the_network_on_inputs_that_nothing_else_has_used(network, inputs, short_ladder):
    choice = choose_radius(network, inputs.split(64), agreement=0.9)
    fit, for_choice, for_report = inputs[:192], inputs[192:224], inputs[224:]
    assert choice.inputs == (len(fit), len(for_choice), len(for_report))
    assert choice.agreement == pytest.approx(share_of_same_classes(choice.network, network, for_report))
    assert choice.chosen.agreement == pytest.approx(share_of_same_classes(choice.network, network, for_choice))
    assert choice.reached
    assert list(choice.calibration.r2) == ["stem", "a", "b", "fc"]
    scrambled = torch.cat([fit, for_choice, torch.randn_like(for_report)])
    other = choose_radius(network, scrambled.split(64), agreement=0.9)
    assert other.trials == choice.trials  # the choice has not seen the inputs of the report


# ----------------------------------------------------------------------------------------------------- the search


class Answers:
    """Inputs held out, as far as the search asks about them."""

    has_classes, count = True, 100


def search_among(curve, goal, r2=lambda radii: {}, contrast=lambda radii: 0.9):
    """A search whose networks agree with the original as `curve(radii)` says."""

    class Search(RadiusSearch):
        def _tried(self, radii):
            self.trials.append(Trial(radii, curve(radii), contrast(radii), r2(radii)))
            return self.trials[-1], None, None

    return Search(None, None, ["a", "b"], [], Answers(), goal)


@given(st.lists(st.floats(0.5, 1), min_size=6, max_size=6), st.floats(0.5, 0.9), st.floats(0, 0.09))
def test_a_higher_agreement_never_takes_a_smaller_radius(shares, goal, more):
    def curve(radii):  # not monotone itself
        radius = radii["a"]
        return shares[min(range(6), key=lambda i: abs(LADDER[i] - radius))]

    chosen = []
    for share in (goal, goal + more):
        search = search_among(curve, share)
        trial = search.smallest()
        assert trial in search.trials
        assert len(search.trials) <= 5
        chosen.append((trial, share))
    (low, _), (high, share) = chosen
    if high.agreement >= share:
        assert low.radius <= high.radius or low.agreement < goal


@given(st.floats(0.01, 7.5))
def test_the_smallest_radius_that_is_enough_is_found_up_to_a_factor(threshold):
    search = search_among(lambda radii: float(radii["a"] >= threshold), 0.9)
    radius = search.smallest().radius
    assert threshold <= radius <= max(0.5, threshold * 2)


def test_a_larger_radius_that_agrees_more_is_not_needed():
    search = search_among(lambda radii: 0.8 + 0.03 * radii["a"], 0.8)
    assert search.smallest().radius == pytest.approx(2**0.5)


def test_where_no_radius_is_enough_the_one_that_agrees_most_is_taken():
    search = search_among(lambda radii: 0.8 - abs(radii["a"] - 4) / 100, 0.9)
    assert search.smallest().radius == 4


def test_a_share_that_is_just_reached_where_it_was_chosen_is_not_enough():
    search = search_among(lambda radii: 0.9 if radii["a"] < 2 else 0.95, 0.9)
    assert search.smallest().radius > 1


@pytest.mark.parametrize(("gain", "loss", "own"), [(0.05, 0.0, True), (0.0, 0.0, False), (0.05, 0.1, False)])
def test_radii_of_the_layers_own_are_taken_if_they_keep_more_at_equal_contrast(gain, loss, own):
    def is_own(radii):
        return radii["a"] != radii["b"]

    search = search_among(
        lambda radii: 0.7 + gain * is_own(radii),
        0.9,
        r2=lambda radii: {"a": 0.9, "b": 0.9 if radii["b"] == 4 else 0.5},
        contrast=lambda radii: 0.9 - loss * is_own(radii),
    )
    search.smallest()
    search.with_own_radii()
    assert search.trials[-1].radii == {"a": 1.0, "b": 4.0}  # 0 was not tried: nothing was enough
    assert search.best[0].is_uniform != own


# --------------------------------------------------------------------------------------------- in the conversion


@pytest.mark.parametrize(("radius", "told"), [(0.0, False), (2.0, True)])
def test_the_plan_of_a_trial_tells_of_the_radii_that_it_has(network, inputs, radius, told):
    plan, names = plan_with_radius(network, inputs[:2], {})
    search = RadiusSearch(network, plan, names, [], HeldOut(network, checked_batches([inputs[:8]]), "test"), 0.9)
    tried = search._plan_with(dict.fromkeys(names, radius))
    assert any("pooled radius" in note for note in plan.notes)
    assert any("pooled radius" in note for note in tried.notes) == told
    assert {decision.radius for decision in tried.decisions if decision.name in names} == {radius}


def test_the_options_and_the_plan_of_a_choice_give_the_same_network_again(network, inputs):
    given_ = {"overrides": {"b": {"operator": "linear"}, "stem": {"radius": 3.0}}, "learn_radius": True}
    choice = choose_radius(network, inputs.split(64), agreement=0.97, **given_)
    assert set(choice.chosen.radii) == {"a", "b"}  # the stem has its radius
    again = plan_conversion(network, **choice.options)
    assert [(d.name, d.radius, d.operator) for d in again.decisions] == [
        (d.name, d.radius, d.operator) for d in choice.plan.decisions
    ]
    assert again.decisions[0].radius == 3.0
    assert "radius chosen by agreement: ρ" in choice.plan.notes[-1]
    restored = ConversionPlan.from_json(choice.plan.to_json())
    assert restored.decisions == choice.plan.decisions


def test_radii_of_the_layers_own_become_overrides_and_keep_the_given_ones(network):
    from sphereify.calibration.agreement import options_with

    given_ = {"overrides": {"[ab]": {"operator": "linear"}}}
    options = options_with(given_, {"stem": 0.0, "a": 1.0, "b": 2.0})
    plan = plan_conversion(network, **options)
    settings = {d.name: (d.operator, d.radius) for d in plan.decisions if d.name != "fc"}
    assert settings == {"stem": ("cosine", 0.0), "a": ("linear", 1.0), "b": ("linear", 2.0)}


@pytest.mark.exhaustive
def test_a_conversion_to_an_agreement_in_place_is_that_of_a_copy(network, inputs, short_ladder):
    batches = inputs.split(64)
    copied = sphereify(network, calibration=batches, agreement=0.9)
    model = copy.deepcopy(network)
    changed = sphereify(model, calibration=batches, agreement=0.9, inplace=True)
    assert changed is model
    assert copied.conversion_plan == changed.conversion_plan
    torch.testing.assert_close(changed(inputs), copied(inputs))
    assert share_of_same_classes(changed, network, inputs) >= 0.9


def test_an_agreement_that_no_radius_reaches_is_told_with_what_was_reached(network, inputs, monkeypatch, short_ladder):
    monkeypatch.setattr("sphereify.calibration.held_out.HeldOut.agreement", lambda self, converted: 0.75)
    with pytest.warns(
        SphereifyWarning, match=r"an agreement of 99.9% was not reached; ρ = 0: 75.0% of 8 held-out inputs"
    ):
        sphereify(network, calibration=[inputs[:64]], agreement=0.999, calibration_steps=1)


LINEAR = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
DENSE = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        *((Residual(), {"agreement": share}, "agreement: got") for share in (0, 1, -0.5, 1.5, float("nan"), "a", True)),
        (Residual(), {"agreement": 0.9, "calibration": None}, "agreement: has no effect without calibration"),
        (Residual(), {"agreement": 0.9, "radius": 2.0}, "radius=2.0: agreement chooses the radius"),
        (Residual(), {"agreement": 0.9, "exclude": ["stem", "a", "b"]}, "agreement: has no effect, since there is no"),
        (LINEAR, {"agreement": 0.9, "calibration": [torch.randn(16, 6)]}, "linear maps have no patches"),
        (DENSE, {"agreement": 0.9}, "agreement: needs class scores of shape (B, K), K > 1"),
        (Residual(), {"agreement": 0.9, "calibration": [smooth_images(4)]}, "agreement: got fewer than 8 inputs"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_refused_before_anything_is_changed(model, options, told):
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(UsageError, match=re.escape(told)):
        sphereify(model, **{"calibration": [smooth_images(16)], "inplace": True, **options})
    assert [type(module) for module in model.modules()] == kinds

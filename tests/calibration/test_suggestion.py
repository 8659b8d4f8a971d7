"""Suggestions of layers to exclude."""

import pytest
import torch

from sphereify import plan_conversion, sphereify, suggest
from sphereify.errors import UsageError
from tests.calibration.networks import Residual, smooth_images, trained_statistics


@pytest.mark.exhaustive
def test_suggestions_exclude_the_least_explained_layers_until_the_networks_agree():
    torch.manual_seed(7)
    original = trained_statistics(Residual())
    x = smooth_images(256)
    suggestion = suggest(original, x.split(32), loss=0.001, overrides={"[ab]": {"radius": 0}, "stem": {"radius": 0}})
    assert suggestion.radius is None  # the overrides leave none to choose
    assert [layer.after for layer in suggestion.layers] == sorted(layer.after for layer in suggestion.layers)
    assert suggestion.exclude == [layer.name for layer in suggestion.layers][: len(suggestion.exclude)]
    assert suggestion.trials[0] < suggestion.goal  # all converted is not enough here, or the test shows nothing
    assert suggestion.exclude
    model = sphereify(original, exclude=suggestion.exclude, calibration=x.split(32)[:6])
    with torch.no_grad():
        same = (model(x).argmax(1) == original(x).argmax(1)).float()
    assert float(same[192:224].mean()) == pytest.approx(suggestion.trials[len(suggestion.exclude)])
    assert float(same[224:].mean()) == pytest.approx(suggestion.agreement)


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"*": {"operator": "linear"}}, marks=pytest.mark.exhaustive),
        {"a": {"k": 0.4}, "b": {"operator": "linear"}},
    ],
)
def test_the_suggested_options_keep_the_layers_in_spite_of_the_overrides_that_were_given(overrides, monkeypatch):
    monkeypatch.setattr("sphereify.calibration.agreement.LADDER", (0.1,))  # not enough
    torch.manual_seed(7)
    original = trained_statistics(Residual())
    x = smooth_images(256)
    suggestion = suggest(original, x.split(32), loss=0.001, operator="sigmoid", overrides=overrides)
    assert suggestion.exclude
    assert suggestion.radius == 0.1
    assert suggestion.options["radius"] == 0.0  # each convolution that could take it is kept
    assert list(suggestion.options["overrides"])[: len(suggestion.exclude)] == suggestion.exclude
    plan = plan_conversion(original, **suggestion.options)
    assert {d.name for d in plan.decisions if d.action == "keep"} == set(suggestion.exclude)
    model = sphereify(original, **suggestion.options, calibration=x.split(32)[:6])
    with torch.no_grad():
        agreed = (model(x[224:]).argmax(1) == original(x[224:]).argmax(1)).float().mean()
    assert float(agreed) == pytest.approx(suggestion.agreement)


def test_nothing_to_exclude_leaves_the_options_as_they_were_given(monkeypatch):
    torch.manual_seed(7)
    monkeypatch.setattr("sphereify.calibration.agreement.LADDER", (0.0, 1.0))
    suggestion = suggest(trained_statistics(Residual()), smooth_images(64).split(8), loss=0.9, exclude="stem")
    assert suggestion.reached
    assert suggestion.exclude == []
    assert suggestion.radius == 0
    assert suggestion.options == {"exclude": "stem", "learn_radius": False}


def test_a_radius_that_is_enough_leaves_nothing_to_exclude(monkeypatch):
    torch.manual_seed(7)
    original = trained_statistics(Residual())
    monkeypatch.setattr(
        "sphereify.calibration.held_out.HeldOut.agreement", lambda self, model: 0.5 + 0.5 * (model.stem.radius >= 2)
    )
    monkeypatch.setattr("sphereify.calibration.agreement.LADDER", (0.0, 2.0))
    suggestion = suggest(original, smooth_images(64).split(8), loss=0.02)
    assert suggestion.exclude == []
    assert suggestion.radius == 2
    assert suggestion.options == {"radius": 2}


def test_a_radius_that_was_given_is_left():
    torch.manual_seed(7)
    suggestion = suggest(trained_statistics(Residual()), smooth_images(64).split(8), loss=0.9, radius=3.0)
    assert suggestion.radii == []
    assert suggestion.options == {"radius": 3.0}


@pytest.mark.parametrize("loss", [0.0, 1.0, -1])
def test_a_share_that_is_none_is_an_error(loss):
    with pytest.raises(UsageError, match=r"loss: got .*, expected a share above 0 and below 1"):
        suggest(Residual(), [smooth_images()], loss=loss)

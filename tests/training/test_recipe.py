"""Recipes: what settings leave open depends on what the network knows already."""

import pytest

from sphereify.training import Settings, with_recipe
from sphereify.training.recipe import (
    DEFAULT_RATE,
    GENTLE_ADAPTIVE_RATE,
    Recipe,
    recipe,
)

CPU = {"device": "cpu"}


def test_a_trained_network_takes_smaller_steps_than_a_new_one():
    new, trained = recipe(Settings(**CPU)), recipe(Settings(**CPU), trained=True)
    assert (new.opt, new.lr) == ("adamw", DEFAULT_RATE)
    assert trained.opt == "sgd"
    assert trained.weight_decay < new.weight_decay
    assert recipe(Settings(opt="lamb", **CPU), trained=True).lr == GENTLE_ADAPTIVE_RATE < DEFAULT_RATE


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_given_stays(trained):
    given = Settings(opt="SGD", lr=0.3, weight_decay=0.0, epochs=4, **CPU)
    assert recipe(given, trained=trained) == Recipe("SGD", 0.3, 0.0)
    assert with_recipe(given, trained=trained) == given


@pytest.mark.parametrize("trained", [True, False])
def test_settings_with_a_recipe_are_complete(trained):
    settings = with_recipe(Settings(**CPU), trained=trained)
    assert None not in (settings.opt, settings.lr, settings.weight_decay)
    assert with_recipe(settings, trained=not trained) == settings

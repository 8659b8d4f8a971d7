"""Recipes: what settings leave open depends on what the network knows already."""

import pytest
from torch import nn

from sphereify.training import Settings, with_recipe
from sphereify.training.recipe import (
    DEFAULT_RATE,
    GENTLE_ADAPTIVE_RATE,
    GENTLE_RADIUS,
    Recipe,
    recipe,
    with_radius,
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


def test_a_trained_network_gets_a_radius_where_a_convolution_may_pool():
    pooling = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    assert with_radius(pooling, {"operator": "linear"}) == {"operator": "linear", "radius": GENTLE_RADIUS}
    assert with_radius(pooling, {"radius": 0.0}) == {"radius": 0.0}
    linear = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert with_radius(linear, {"radius": None}) == {"radius": None}

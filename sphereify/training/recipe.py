"""The recipe of a training: radius, optimizer, learning rate and weight decay for what the network knows already.

Options that are None are taken from here. A network with fresh weights wants large, adaptive steps. One that keeps
what a trained network knew is close to a good solution, and what brings it nearer without throwing it away first are
small steps of stochastic gradient descent; see `benchmarks/finetuning.py`.
"""

import dataclasses
from dataclasses import dataclass

from sphereify.training.settings import Settings

GENTLE_RADIUS = 4.0
"""Pooled radius with which a network that is trained already is converted and then fine-tuned."""

DEFAULT_RATE = 1e-3
GENTLE_RATES = {"sgd": 0.01, "momentum": 0.01}
"""Peak rates for batches of 64 images and a network that is trained already; the other optimizers are adaptive."""
GENTLE_ADAPTIVE_RATE = 2e-4


@dataclass(frozen=True)
class Recipe:
    """The optimizer of timm, its peak learning rate, and its weight decay."""

    opt: str
    lr: float
    weight_decay: float


def recipe(settings: Settings, *, trained: bool = False) -> Recipe:
    """The optimizer, rate and decay of the settings, with a choice for those that are None.

    Args:
        settings: of a training.
        trained: True if the network keeps what a trained one knew.
    """
    name = settings.opt or ("sgd" if trained else "adamw")
    gentle = trained and name.lower() in GENTLE_RATES
    rate = GENTLE_RATES.get(name.lower(), GENTLE_ADAPTIVE_RATE) if trained else DEFAULT_RATE
    return Recipe(
        opt=name,
        lr=rate if settings.lr is None else settings.lr,
        weight_decay=(5e-4 if gentle else 0.05) if settings.weight_decay is None else settings.weight_decay,
    )


def with_recipe(settings: Settings, *, trained: bool = False) -> Settings:
    """The settings with the values of their `recipe`."""
    return dataclasses.replace(settings, **vars(recipe(settings, trained=trained)))

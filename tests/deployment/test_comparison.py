"""The check of a folded model refuses what is wrong, and neither chance nor rounding that the network amplifies."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from sphereify import fold, sphereify
from sphereify.errors import UnsupportedModelError, UsageError
from tests.nn.oracle import normal

X = normal(4, 6, dtype=torch.float32)


class Net(nn.Module):
    def __init__(self, finish):
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.scores = nn.Linear(6, 6), nn.Linear(6, 3)
        self.finish = finish

    def forward(self, x):
        return self.finish(self.scores(self.hidden(x)))


def converted(finish):
    return sphereify(Net(finish), head="keep", example_inputs=X).eval()


def test_a_network_that_is_random_in_evaluation_is_folded_and_leaves_the_generator_alone():
    model = converted(lambda y: y + torch.randn_like(y) * nn.functional.dropout(torch.ones_like(y)))
    state = torch.get_rng_state()
    assert "hidden" in fold(model, X).folding.layers
    assert torch.equal(torch.get_rng_state(), state)


def test_rounding_that_the_network_amplifies_is_no_difference():
    model = converted(lambda y: (3e6 * y).sin())
    assert (model(X) - model.double()(X.double())).abs().max() > 0.1  # in fp32 no digit is left
    assert "hidden" in fold(model.float(), X).folding.layers


def test_a_forward_that_fixes_a_dtype_is_compared_in_its_own():
    def fixed(y):
        return y @ torch.eye(3, dtype=torch.float32)

    assert "hidden" in fold(converted(fixed), X).folding.layers


def test_scores_that_are_masked_out_agree():
    mask = torch.tensor([False, True, False])
    model = converted(lambda y: (y.masked_fill(mask, -torch.inf), torch.full((2,), torch.nan), y.argmax(1), y[:0]))
    assert fold(model, X)(X)[0][:, 1].eq(-torch.inf).all()


def test_a_network_without_a_finite_output_is_refused():
    model = converted(lambda y: y * torch.nan)
    with pytest.raises(UnsupportedModelError, match="the outputs of Net on example_inputs are not finite"):
        fold(model, X)


class Reads(Net):
    def forward(self, x):
        y = super().forward(x)
        return y.masked_fill(self.hidden.weight.norm() > 2.6, torch.inf)


def test_other_places_of_what_is_not_finite_are_a_difference():
    model = sphereify(Reads(nn.Identity()), head="keep", example_inputs=X).eval()
    assert model(X).isfinite().all()
    with pytest.raises(UnsupportedModelError, match="would change"):
        fold(model, X)


@pytest.mark.parametrize(
    "draw", [lambda: 100 ** float(np.random.rand()), lambda: 100 ** random.random()], ids=["numpy", "python"]
)
def test_all_generators_are_seeded_for_both_passes_and_left_as_they_were(draw):
    model = converted(lambda y: y * draw())
    before = random.getstate(), np.random.get_state()[1].tolist()
    assert "hidden" in fold(model, X).folding.layers
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_outputs_that_no_seed_repeats_are_not_taken_for_a_change():
    passes = itertools.count()
    model = converted(lambda y: y + next(passes))
    with pytest.raises(UnsupportedModelError, match="differ from pass to pass, so there is nothing to compare"):
        fold(model, X)
    assert "hidden" in fold(model).folding.layers


def test_complex_outputs_are_compared_as_numbers():
    model = converted(lambda y: torch.complex(y, 1 + y))
    torch.testing.assert_close(fold(model, X)(X), model(X))


def test_masks_that_are_finite_hide_no_difference():
    mask = torch.tensor([False, True, False])

    class Doubles(Net):
        def forward(self, x):
            y = super().forward(x) * self.hidden.weight.norm()
            return y.masked_fill(mask, torch.finfo(y.dtype).min)

    model = sphereify(Doubles(nn.Identity()), head="keep", example_inputs=X).eval()
    with pytest.raises(UnsupportedModelError, match="would change"):
        fold(model, X)


def test_inputs_with_which_the_model_does_not_run_are_named():
    model = converted(nn.Identity())
    with pytest.raises(UsageError, match=r"example_inputs: Net does not run with these inputs: .*'other'"):
        fold(model, {"other": X})

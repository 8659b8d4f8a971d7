"""The learning rate over the steps of a run, and the weights that decay."""

import math

import pytest
from torch import Tensor

from sphereify.training import Settings, finetune
from tests.training.small import CPU, images, net, same, state


def test_the_rate_rises_over_a_tenth_of_the_steps_and_falls_along_a_cosine_to_nothing(optimizer):
    finetune(net(), images(24), Settings(epochs=20, batch_size=8, lr=0.02, **CPU))
    assert all(len(rates) == 1 for rates in optimizer["rates"])
    rates = [rate for (rate,) in optimizer["rates"]]
    assert len(rates) == 60
    expected = [
        0.02 * t / 6 if t < 6 else 0.01 * (1 + math.cos(math.pi * t / 60)) for t in (i + 0.5 for i in range(60))
    ]
    assert rates == pytest.approx(expected)  # of the middle of each step
    assert 0 < rates[-1] < 0.02 / 1000


def test_one_single_step_has_a_rate(optimizer):
    finetune(net(), images(8), Settings(epochs=1, batch_size=8, lr=0.5, **CPU))
    ((rate,),) = optimizer["rates"]
    assert rate == pytest.approx(0.25)  # in the middle of a cosine from 0.5 to 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sched": "step", "decay_epochs": 2, "decay_rate": 0.5}, [1] * 6 + [0.5] * 6 + [0.25] * 3),
        # timm's multistep falls one step before the epoch is over
        ({"sched": "multistep", "milestones": (1, 4)}, [1] * 2 + [0.1] * 9 + [0.01] * 4),
    ],
)
def test_the_rate_falls_where_it_is_told_to(optimizer, settings, expected):
    finetune(net(), images(24), Settings(epochs=5, batch_size=8, lr=1.0, warmup_epochs=0, **settings, **CPU))
    assert [rate for (rate,) in optimizer["rates"]] == pytest.approx(expected)


def test_a_run_counted_in_iterations_has_as_many_steps_tests_and_falls_of_the_rate_as_asked(optimizer):
    told = []
    settings = Settings(
        epochs=4, epoch_batches=5, batch_size=4, lr=1.0, sched="multistep", milestones=(2, 3), warmup_epochs=0, **CPU
    )
    result = finetune(net(), images(26), settings, on_step=told.append)
    assert [epoch.step for epoch in result.epochs] == [5, 10, 15, 20]
    assert len(told) == 20
    rates = [rate for rates in optimizer["rates"] for rate in rates]
    assert rates == pytest.approx([1.0] * 9 + [0.1] * 5 + [0.01] * 6)  # timm falls with the last step of an epoch


def test_angular_weights_are_not_decayed_and_plain_ones_are(optimizer):
    model = net(exclude="3")
    finetune(model, images(), Settings(epochs=1, weight_decay=0.3, **CPU))
    decayed = {id(p): group["weight_decay"] for group in optimizer["groups"] for p in group["params"]}
    assert decayed[id(model[3].weight)] == 0.3
    assert {name for name, p in model.named_parameters() if decayed[id(p)] == 0} == {
        name for name, _ in model.named_parameters()
    } - {"3.weight"}
    assert len(decayed) == len(list(model.parameters()))


@pytest.mark.parametrize("kept", [None, "3"])
def test_weight_decay_changes_a_network_with_plain_weights_only(kept):
    def trained(decay: float) -> dict[str, Tensor]:
        model = net(exclude=kept)
        finetune(model, images(), Settings(epochs=1, batch_size=8, weight_decay=decay, **CPU))
        return state(model)

    assert same(trained(0.0), trained(5.0)) == (kept is None)

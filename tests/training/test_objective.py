"""The objective: the loss of the head, auxiliary outputs, and regularizers."""

import copy
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.nn import HypersphericalEnergy
from sphereify.training import Objective, Settings, Terms, evaluate, finetune
from sphereify.training.checkpoint import checkpoints, read_checkpoint
from tests.training.small import CPU, dropout_net, images, net, state, usual


@pytest.mark.parametrize(
    ("terms", "options"),
    [
        ({"mhe_s": 2.0, "mhe_distance": "angular"}, {"s": 2.0, "distance": "angular"}),
        ({"mhe_hidden": 0.0, "mhe_output": 3.0}, {"hidden_weight": 0.0, "output_weight": 3.0}),
        ({"mhe_half_space": True}, {"half_space": True}),
        ({"mhe_energy": "separation", "mhe_distance": "angular"}, {"energy": "separation", "distance": "angular"}),
        ({"mhe_energy": "determinant", "mhe_gamma": 2.0}, {"energy": "determinant", "gamma": 2.0}),
        (
            {"mhe_energy": "compressive", "mhe_dimensions": 5, "mhe_projections": 3},
            {"energy": "compressive", "dimensions": 5, "projections": 3},
        ),
    ],
)
def test_the_energy_of_the_objective_is_the_one_asked_for(terms, options):
    model, output, targets = net(head="keep"), torch.randn(4, 3), torch.arange(4) % 3
    plain = Objective(model, Terms())(output, targets)
    torch.manual_seed(0)
    total = Objective(model, Terms(mhe=0.25, **terms))(output, targets)
    torch.manual_seed(0)
    torch.testing.assert_close(total - plain, 0.25 * HypersphericalEnergy(**options)(model))


Outputs = namedtuple("Outputs", "logits aux2 aux1")


class WithAuxiliary(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.main, self.aux = nn.Linear(72, 3), nn.Linear(72, 3)
        self.make = make

    def forward(self, x: Tensor):
        x = x.flatten(1)
        return self.make(self.main(x), self.aux(x)) if self.training else self.main(x)


@pytest.mark.parametrize(
    "make",
    [lambda main, aux: (main, aux), lambda main, aux: Outputs(main, aux, None)],
    ids=["tuple", "named, one None"],
)
def test_auxiliary_outputs_count_three_tenths(make):
    model, data, heard = WithAuxiliary(make), images(24), []
    before = state(model)
    x, y = data.train.tensors
    with torch.no_grad():
        main, aux = (F.cross_entropy(layer(x.flatten(1)), y).item() for layer in (model.main, model.aux))
    finetune(model, data, Settings(epochs=1, batch_size=24, **CPU), on_step=lambda step: heard.append(step.loss))
    assert heard == [pytest.approx(main + 0.3 * aux, rel=1e-5)]
    assert not torch.equal(before["aux.weight"], model.aux.weight)


class WithLogits(nn.Module):
    """Returns what models of Transformers return."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor):
        return SimpleNamespace(loss=None, logits=self.model(x))


@pytest.mark.parametrize("head", ["w-softmax", "a-softmax"])
def test_a_model_whose_output_has_logits_trains_and_is_evaluated_like_one_that_returns_them(head):
    plain, data, settings = net(head=head), images(24), Settings(epochs=2, batch_size=24, **CPU)
    wrapped = WithLogits(copy.deepcopy(plain))
    expected, got = (finetune(model, data, settings) for model in (plain, wrapped))
    assert [epoch.loss for epoch in got.epochs] == [epoch.loss for epoch in expected.epochs]
    assert evaluate(wrapped, data).top1 == evaluate(plain, data).top1
    for name, value in state(plain).items():
        torch.testing.assert_close(state(wrapped)[f"model.{name}"], value, rtol=0, atol=0)


def test_the_margin_comes_in_by_steps_and_not_by_batches(tmp_path):
    finetune(dropout_net(head="a-softmax"), images(24), usual(epochs=1, accumulate=3), output=tmp_path)
    last = read_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])
    assert (last["step"], int(last["objective"]["loss.annealing.calls"])) == (2, 6)
    model = dropout_net(head="a-softmax")
    assert Objective(model, Terms(), accumulate=3).loss.annealing.every == 3

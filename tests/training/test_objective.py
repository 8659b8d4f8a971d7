"""The objective: the loss of the head, auxiliary outputs, and regularizers."""

from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.nn import HypersphericalEnergy
from sphereify.training import Objective, Settings, Terms, finetune
from sphereify.training.checkpoint import checkpoints, read_checkpoint
from tests.training.small import CPU, dropout_net, images, net, state, usual


@pytest.mark.parametrize(
    ("terms", "options"),
    [
        ({"mhe_s": 2.0, "mhe_distance": "angular"}, {"s": 2.0, "distance": "angular"}),
        ({"mhe_hidden": 0.0, "mhe_output": 3.0}, {"hidden_weight": 0.0, "output_weight": 3.0}),
        ({"mhe_half_space": True}, {"half_space": True}),
    ],
)
def test_the_energy_of_the_objective_is_the_one_asked_for(terms, options):
    model, output, targets = net(head="keep"), torch.randn(4, 3), torch.arange(4) % 3
    plain = Objective(model, Terms())(output, targets)
    total = Objective(model, Terms(mhe=0.25, **terms))(output, targets)
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


def test_the_margin_comes_in_by_steps_and_not_by_batches(tmp_path):
    finetune(dropout_net(head="a-softmax"), images(24), usual(epochs=1, accumulate=3), output=tmp_path)
    last = read_checkpoint(checkpoints(tmp_path / "checkpoints")[-1])
    assert (last["step"], int(last["objective"]["loss.annealing.calls"])) == (2, 6)
    model = dropout_net(head="a-softmax")
    assert Objective(model, Terms(), accumulate=3).loss.annealing.every == 3

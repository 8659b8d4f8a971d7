"""What looking at a model leaves as it is."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from sphereify import apply_plan, plan_conversion, save, sphereify
from tests.convert.models import same_tensors


class Counted(nn.Module):
    """A parametrization that counts how often it computes in training."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, weight):
        if self.training:
            self.count += 1
        return weight


def counted(layer):
    parametrize.register_parametrization(layer, "weight", Counted())
    return layer


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(spectral_norm(nn.Linear(4, 5)), nn.ReLU(), spectral_norm(nn.Linear(5, 3))), (2, 4)),
        (nn.Sequential(spectral_norm(nn.Conv2d(2, 4, 3)), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)), (2, 2, 6, 6)),
        (nn.Sequential(spectral_norm(nn.Conv1d(2, 4, 3)), nn.Conv1d(4, 4, 1)), (2, 2, 6)),
        (nn.Sequential(spectral_norm(nn.Embedding(9, 4)), nn.Flatten(), nn.Linear(8, 3)), None),
        (nn.Sequential(counted(nn.Linear(4, 5)), counted(nn.LayerNorm(5)), nn.Linear(5, 3)), (2, 4)),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_planning_in_training_computes_no_weight_of_the_users_model(model, x, given):
    before = copy.deepcopy(model.state_dict())
    inputs = torch.randn(x) if x else torch.tensor([[1, 2], [3, 4]])
    plan = plan_conversion(model.train(), example_inputs=inputs if given else None)
    apply_plan(model, plan)
    assert all(module.training for module in model.modules())
    assert same_tensors(model.state_dict(), before)


def test_saving_in_training_computes_no_weight(tmp_path):
    model = sphereify(nn.Sequential(spectral_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 3))).train()
    before = copy.deepcopy(model.state_dict())
    save(model, tmp_path)
    assert same_tensors(model.state_dict(), before)

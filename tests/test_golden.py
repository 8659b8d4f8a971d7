"""Artifacts that an earlier version wrote still load, and compute the same."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sphereify import load
from sphereify.deployment.folding import is_folded

DATA = Path(__file__).parent / "data"
ARTIFACTS = ["artifact-v1", "folded-artifact-v1"]
OUTPUTS = json.loads((DATA / "artifact-v1-outputs.json").read_text())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.expand = nn.Parameter(torch.randn(12, 8))
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = self.depthwise(x).mean((2, 3))
        return self.head(F.linear(x, self.expand))


@pytest.mark.parametrize("name", ARTIFACTS)
def test_an_artifact_of_the_first_format_loads_and_computes_the_same(name):
    model = load(DATA / name, factory=Net).double()  # in fp32, machines differ by more than the tolerance
    with torch.no_grad():
        outputs = model(torch.tensor(OUTPUTS["inputs"], dtype=torch.float64))
    torch.testing.assert_close(outputs, torch.tensor(OUTPUTS["outputs"], dtype=torch.float64), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_its_plan_says_what_was_converted_and_how(name):
    model = load(DATA / name, factory=Net)
    decisions = {d.name: (d.kind, d.action, d.operator, d.rescale, d.head) for d in model.conversion_plan.decisions}
    assert decisions == {
        "stem": ("conv2d", "convert", "learnable-sigmoid", False, None),
        "depthwise": ("conv2d", "convert", "linear", True, None),
        "expand": ("linear", "convert", "learnable-sigmoid", True, None),
        "head": ("linear", "convert", "learnable-sigmoid", False, "ga-softmax"),
    }
    assert is_folded(model) == name.startswith("folded")

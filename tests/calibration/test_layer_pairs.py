"""Converted layers next to their originals: functional calls, and what layers share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from sphereify import calibrate, sphereify
from tests.calibration.networks import Residual, error, smooth_images


class Functional(nn.Module):
    """qkv as a call of F.linear, with a bias that is put together."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.qkv = nn.Parameter(torch.randn(24, 8) / 3)
        self.q_bias = nn.Parameter(torch.randn(8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = F.linear(x, self.qkv, torch.cat([self.q_bias, torch.zeros(16)])).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v)
        return self.fc((x + self.attention(x, x, x)[0]).mean(1))


@pytest.mark.parametrize("operator", ["cosine", "learnable-sigmoid"])
def test_functional_calls_are_calibrated(operator):
    torch.manual_seed(2)
    original = Functional().eval()
    x = torch.randn(200, 10, 6) * torch.rand(200, 10, 1).mul(2).exp()
    copied = sphereify(original, operator=operator, attention="convert", head="keep")
    model = sphereify(original, operator=operator, attention="convert", head="keep")
    calibration = calibrate(model, original, x.split(50))
    assert {"embed", "qkv", "attention.in_proj_weight", "attention.out_proj"} == set(calibration.layers)
    assert not torch.equal(model.qkv, original.qkv)
    fresh = torch.randn(100, 10, 6) * torch.rand(100, 10, 1).mul(2).exp()
    assert error(model, original, fresh) < error(copied, original, fresh)


def test_computed_and_tied_filters_keep_their_direction():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(12, 8)
            self.normed = weight_norm(nn.Linear(8, 8))
            self.out = nn.Linear(8, 12, bias=False)
            self.out.weight = self.table.weight
            self.last = nn.Linear(12, 3)

        def forward(self, tokens):
            return self.last(self.out(self.normed(self.table(tokens))).mean(1))

    torch.manual_seed(3)
    original = Tied().eval()
    tokens = torch.randint(0, 12, (64, 7))
    model = sphereify(original, example_inputs=tokens)
    calibration = calibrate(model, original, [tokens])
    assert model.out.weight is model.table.weight
    torch.testing.assert_close(model.table.weight, original.table.weight, rtol=0, atol=0)
    assert "something else uses them" in calibration.layers["out"].note
    assert calibration.layers["normed"].after > calibration.layers["normed"].before


def test_a_norm_that_serves_two_layers_is_kept_and_this_is_said():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.two(self.norm(self.one(x)).relu()))

    torch.manual_seed(0)
    network = Twice().eval()
    converted = sphereify(network)
    calibration = calibrate(converted, network, [torch.randn(8, 3, 12, 12)])
    assert all("serves other layers" in calibration.layers[name].note for name in ("one", "two"))
    assert torch.equal(converted.norm.weight, network.norm.weight)


def test_a_k_of_the_whole_network_stays():
    original = Residual()
    model = sphereify(original, operator="learnable-sigmoid", share_k="network")
    before = model.a.operator.p.clone()
    calibrate(model, original, [smooth_images(32)])
    assert torch.equal(model.a.operator.p, before)

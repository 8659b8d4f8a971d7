"""The multiplications of a network, counted by hand."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sphereify import ConversionPlan, apply_plan, plan_conversion
from sphereify.convert.costs import costs, multiplications
from sphereify.convert.multiplied import Costs


class Mixed(nn.Module):
    """Each kind of product once: modules, functional calls, attention, and what no site makes."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, stride=2, groups=2)
        self.rnn = nn.LSTM(8, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up = nn.ConvTranspose1d(16, 6, 3)
        self.table = nn.Parameter(torch.randn(5, 6))
        self.unused = nn.Linear(6, 6)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        y = self.rnn(self.conv(x).mT)[0]
        y = self.attention(y, y, y)[0]
        y = F.linear(self.up(y.mT).mT, self.table)
        return self.head(y.mean(1))


MIXED = {  # of two inputs of 11 positions, 5 after the convolution and 7 after the transposed one
    "conv": 2 * 5 * 8 * (2 * 3),
    "rnn": 2 * 5 * 4 * 16 * (8 + 16),
    "attention.in_proj_weight": 2 * 5 * 16 * 48,
    "attention.out_proj": 2 * 5 * 16 * 16,
    "up": 2 * 5 * 16 * 6 * 3,
    "table": 2 * 7 * 6 * 5,
    "head": 2 * 5 * 3,
    "unused": 0,
}
SCORES = 2 * 2 * 5 * 5 * 8 * 2
"""Two samples, two heads: queries with keys, and with values."""


def test_the_multiplications_of_each_kind_of_site_are_those_counted_by_hand():
    plan = plan_conversion(Mixed(), example_inputs=torch.randn(2, 4, 11))
    assert multiplications(plan) == MIXED
    assert plan.costs.other == SCORES
    angular = MIXED["conv"] + MIXED["table"] + MIXED["head"]
    assert plan.angular_share == angular / (sum(MIXED.values()) + SCORES)


def test_the_order_is_that_of_the_plan():
    plan = plan_conversion(Mixed(), example_inputs=torch.randn(2, 4, 11))
    assert list(multiplications(plan)) == [decision.name for decision in plan.decisions]


def test_a_tied_weight_and_a_module_under_two_names_are_counted_where_they_are_used():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(10, 4)
            self.body = nn.Linear(4, 4)
            self.again = self.body
            self.scores = nn.Linear(4, 10, bias=False)
            self.scores.weight = self.words.weight

        def forward(self, tokens):
            return self.scores(self.again(self.body(self.words(tokens))))

    found = multiplications(Tied(), torch.zeros(1, 3, dtype=torch.long))
    assert found == {"words": 0, "body": 2 * 3 * 16, "scores": 3 * 40}


def test_a_converted_model_has_the_costs_of_its_plan_and_else_those_of_a_run():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    plan = plan_conversion(plain, example_inputs=torch.randn(1, 3, 4, 4))
    converted = apply_plan(plain, plan)
    expected = {"0": 16 * 4 * 27, "3": 128}
    assert multiplications(converted) == expected
    converted.conversion_plan = replace(plan, costs=Costs())
    assert multiplications(converted, torch.randn(1, 3, 4, 4)) == expected


def test_the_costs_survive_json_and_an_earlier_plan_has_none():
    plan = plan_conversion(Mixed(), example_inputs=torch.randn(2, 4, 11))
    assert ConversionPlan.from_json(plan.to_json()).costs == plan.costs
    plain = json.loads(plan.to_json())
    del plain["costs"]
    before = ConversionPlan.from_json(json.dumps(plain))
    assert before == plan
    assert before.costs == Costs()
    assert before.angular_share is None


def test_a_model_that_does_not_run_has_no_costs():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            raise RuntimeError("no")

    plan = plan_conversion(Broken())
    assert costs(plan) == Costs({"conv": 0}, 0)
    assert plan.angular_share is None


@pytest.mark.parametrize("batch", [1, 5])
def test_verifying_a_plan_counts_the_run_with_its_inputs(batch):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 2))
    plan = plan_conversion(plain, example_inputs=torch.randn(2, 3, 4, 4))
    assert plan.verify(plain, torch.randn(batch, 3, 4, 4)).costs.sites == {"0": batch * 1728, "2": batch * 128}

"""The count that the sweep over other libraries compares plans with, and what the sweep notices."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from sphereify import plan_conversion
from tests import strangers
from tests.convert.models import Net
from tests.operands import products_of


def counted(model, x):
    products, _ = products_of(model, lambda network: network(x))
    return {"+".join(sorted(behind)) for behind in products}


def test_layers_count_once_however_often_they_run_and_those_that_do_not_run_do_not():
    net = Net(lambda n, x: n.a(n.a(x)), a=nn.Linear(4, 4), spare=nn.Linear(4, 4))
    assert counted(net, torch.randn(2, 3, 4)) == {"a.weight"}


def test_a_computed_weight_counts_by_the_parameters_behind_it():
    net = Net(lambda n, x: n.a(x).sum(), a=weight_norm(nn.Conv2d(3, 4, 3)))
    assert counted(net, torch.randn(2, 3, 5, 5)) == {
        "a.parametrizations.weight.original0+a.parametrizations.weight.original1"
    }


def test_products_of_data_alone_and_of_parameters_alone_do_not_count():
    code = nn.ParameterList([torch.ones(1, 5)])
    net = Net(
        lambda n, x: F.linear(x @ x.mT, n.maker(n.code[0]).view(4, 4)) + n.table(torch.arange(4)) @ x,
        maker=nn.Linear(5, 16, bias=False),
        table=nn.Embedding(4, 4),
        code=code,
    )
    assert counted(net, torch.randn(2, 4, 4)) == {"code.0+maker.weight", "table.weight"}


def test_slices_casts_and_einsums_of_a_parameter_are_seen():
    net = Net(
        lambda n, x: torch.einsum("bi,io->bo", x, n.w[0][1].double().float().T),
        w=nn.ParameterList([torch.ones(2, 3, 4)]),
    )
    assert counted(net, torch.randn(2, 4)) == {"w.0"}


def test_what_runs_in_training_only_is_counted_too():
    net = Net(lambda n, x: n.a(x) if n.training else n.b(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    assert counted(net, torch.randn(2, 4)) == {"a.weight", "b.weight"}


def without_a_site(plan):
    return dataclasses.replace(plan, decisions=[d for d in plan.decisions if d.name != "up"])


def said_not_to_run(plan):
    def change(d):
        return dataclasses.replace(d, action="keep", called=False, reason="never called") if d.name == "up" else d

    return dataclasses.replace(plan, decisions=list(map(change, plan.decisions)))


@pytest.mark.parametrize(
    ("change", "noticed"), [(without_a_site, "not in the plan: up.weight"), (said_not_to_run, "is said not to: up")]
)
def test_the_sweep_notices_a_wrong_plan(change, noticed, monkeypatch):
    monkeypatch.setattr(strangers, "plan_conversion", lambda *args, **given: change(plan_conversion(*args, **given)))
    outcome = strangers.convert("by_hand", "zero-start")
    assert any(noticed in problem for problem in outcome.wrong)


def test_the_sweep_notices_layers_that_are_not_angular(monkeypatch):
    monkeypatch.setattr(strangers, "apply_plan", lambda model, plan: model)
    outcome = strangers.convert("by_hand", "zero-start")
    assert any("filters times 3" in problem for problem in outcome.wrong)


def test_the_sweep_goes_the_whole_way_with_a_network():
    outcome = strangers.convert("by_hand", "zero-start")
    assert str(outcome).startswith("right     by_hand/zero-start: 7 linear maps converted")

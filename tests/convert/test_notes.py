"""What a plan says beside its decisions: the inputs of the run, one note for each kind, and the details."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sphereify import ConversionPlan, apply_plan, plan_conversion, sphereify
from sphereify.errors import UsageError
from tests.convert.models import Net


class Branching(nn.Module):
    """Cannot be traced: its control flow depends on values."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if x.sum() < 1e9 else x


def several(number=5, **more):
    parts = {f"part{i}": Branching() for i in range(number)}

    def forward(n, x):
        for name in parts:
            x = getattr(n, name)(x)
        return n.last(x)

    return Net(forward, **parts, last=nn.Linear(4, 2), **more)


def test_modules_that_are_not_traced_are_one_note_with_their_number():
    plan = plan_conversion(several(), example_inputs=torch.randn(3, 4))
    (note,) = plan.notes
    assert note.startswith("5 modules: not traced (part0 and others: ")
    assert len(note) < 250
    assert [line.partition(":")[0] for line in plan.details] == [f"part{i}" for i in range(5)]


@pytest.mark.parametrize("given", [True, False])
def test_no_note_says_that_roles_come_from_names_where_a_run_gave_them(given):
    plan = plan_conversion(several(), example_inputs=torch.randn(3, 4) if given else None)
    assert plan.inputs == ("float32 3×4" if given else "assumed inputs: float32 2×4")
    assert not any("names" in note for note in plan.notes)
    assert {d.name: d.role for d in plan.decisions}["last"] == "classifier"


def test_a_plan_without_a_run_says_why_and_that_roles_come_from_names():
    def refuse(n, x):
        raise RuntimeError(f"not {x.sum() if False else 'today'}")

    plan = plan_conversion(Net(refuse, fc=nn.Linear(4, 2), used=Branching()))
    assert plan.inputs == ""
    assert "names and shapes" in plan.notes[0]
    assert "not run (RuntimeError: not today); a run with other inputs would show" in plan.notes[1]


def test_a_plan_without_a_run_says_so_where_a_trace_shows_all_layers_too():
    def forward(n, x):
        return n.fc(F.conv2d(x, n.maker(n.code[0]).view(4, 3, 3, 3)).mean((2, 3)))

    hyper = Net(forward, maker=nn.Linear(5, 108), fc=nn.Linear(4, 2), code=nn.ParameterList([torch.ones(1, 5)]))
    plan = plan_conversion(hyper)
    assert [d.name for d in plan.decisions] == ["maker", "fc"]
    (note,) = plan.notes
    assert ": not run (" in note
    assert note.endswith("a run with other inputs would show products whose weights are computed")
    assert "computed" in {d.name for d in plan_conversion(hyper, example_inputs=torch.randn(2, 3, 8, 8)).decisions}


class Parts(nn.Module):
    """Runs without its second argument, cannot be traced, and makes a functional call with it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.own = nn.Parameter(torch.ones(4, 4))

    def forward(self, x, more=None):
        x = self.a(x) if x.shape[0] < 1000 else self.b(x)
        return x if more is None else self.c(x) + F.linear(self.b(more), self.own)


def test_what_was_not_given_in_the_run_is_said_once():
    x = torch.randn(2, 4)
    plan = plan_conversion(Parts(), example_inputs=x)
    assert {d.name for d in plan.kept} >= {"b", "c"}
    note = next(note for note in plan.notes if "run without" in note)
    assert note == (
        "Parts: run without more, for which 2 layers may wait; what else would be called is not in the plan"
    )
    whole = plan_conversion(Parts(), example_inputs=(x, x))
    assert "own" in {d.name for d in whole.decisions}
    assert not any("run without" in note for note in whole.notes)


class _Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.ones(4, 3, 5)), nn.Parameter(torch.ones(2, 3))

    def forward(self, x):
        if x.shape != (6, 5):
            raise ValueError("not six")
        return F.linear(F.linear(x, self.weight[0]).relu(), self.last)


def test_nothing_to_convert_is_said_of_a_model_that_was_not_run_with_what_a_run_would_show():
    with pytest.raises(UsageError, match=r"not run \(ValueError: not six\).*seen in a run, for which example_inputs"):
        plan_conversion(_Bare())
    assert plan_conversion(_Bare(), example_inputs=torch.randn(6, 5)).decisions
    with pytest.raises(UsageError, match=r"nothing to convert$"):
        plan_conversion(nn.ReLU())


def test_inputs_and_details_survive_json_and_a_plan_without_them_is_read():
    plan = plan_conversion(several(), example_inputs=torch.randn(3, 4))
    again = ConversionPlan.from_json(plan.to_json())
    assert (again, again.inputs, again.details) == (plan, plan.inputs, plan.details)
    assert "run on float32 3×4" in str(plan)


class Attention(nn.Module):
    """Query, key and value are slices of one parameter."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Parameter(torch.randn(12, 4)), nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = (F.linear(x, w) for w in self.qkv.chunk(3))
        return self.out(F.scaled_dot_product_attention(q, k, v))


def test_slices_are_named_by_the_parameter_that_they_come_from():
    model = Net(lambda n, x: n.fc(n.b(n.a(x))), a=Attention(), b=Attention(), fc=nn.Linear(4, 3))
    x = torch.randn(2, 5, 4)
    plan = plan_conversion(model, example_inputs=x)
    slices = [f"{owner}.qkv.slice{i}" for owner in "ab" for i in range(3)]
    assert [d.name for d in plan.decisions if d.kind == "linear" and not d.type] == slices
    assert all(d.called for d in plan.verify(model, x).decisions)
    plan_conversion(model, example_inputs=x, exclude="a.qkv.slice1")  # a pattern without a match would be an error


def test_a_single_slice_is_converted_by_its_name_and_from_the_plan_in_json():
    torch.manual_seed(0)
    model = Net(lambda n, x: n.fc(F.linear(x, n.weight[2:6]).relu()), fc=nn.Linear(4, 3))
    model.weight = nn.Parameter(torch.randn(8, 4))
    x = torch.randn(6, 4)
    converted = sphereify(model, example_inputs=x)
    assert [d.name for d in converted.conversion_plan.converted] == ["weight.slice0", "fc"]
    again = apply_plan(model, ConversionPlan.from_json(converted.conversion_plan.to_json()))
    torch.testing.assert_close(again(x), converted(x))
    with torch.no_grad():
        converted.weight.mul_(3)
    torch.testing.assert_close(converted(x), again(x), rtol=1e-3, atol=1e-3)

import pytest
import torch
from torch import nn

from sphereify import param_groups
from sphereify.errors import UsageError
from sphereify.nn import AngularHead, LearnableSigmoidOperator, SphereConv2d, SphereLinear

DECAYED = {"stem.weight", "fc.weight"}


def make_model():
    """A plain stem and linear layer, every kind of angular layer, norms, biases, an embedding-like parameter."""
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "conv": SphereConv2d(4, 4, 3, operator="learnable-sigmoid", rescale=True, bias=False),
            "linear": SphereLinear(4, 4, operator="linear", rescale=True),
            "layernorm": nn.LayerNorm(4),
            "fc": nn.Linear(4, 4),
            "head": AngularHead(4, 2, operator="learnable-sigmoid", bias=True),
        }
    )


def by_name(model, groups):
    """Each group as (weight decay, names of its parameters)."""
    names = {id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=True)}
    return [(group["weight_decay"], [names[id(p)] for p in group["params"]]) for group in groups]


def test_only_plain_weights_are_decayed():
    model = make_model()
    (decay, decayed), (none, kept) = by_name(model, param_groups(model, weight_decay=0.1))
    assert (decay, none) == (0.1, 0.0)
    assert set(decayed) == DECAYED
    assert {"conv.weight", "conv.operator.p", "conv.beta", "conv.gamma", "linear.bias", "head.operator.p"} <= set(kept)
    assert {"linear.weight", "head.weight", "head.bias", "stem.bias", "norm.weight", "layernorm.bias"} <= set(kept)


def test_every_trained_parameter_is_listed_exactly_once():
    model = make_model()
    listed = [name for _, names in by_name(model, param_groups(model, 0.1)) for name in names]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())


def test_frozen_parameters_are_absent():
    model = make_model()
    for name in ("stem.weight", "conv.weight", "norm.bias"):
        model.get_parameter(name).requires_grad_(False)
    listed = {name for _, names in by_name(model, param_groups(model, 0.1)) for name in names}
    assert not listed & {"stem.weight", "conv.weight", "norm.bias"}
    assert "fc.weight" in listed


def test_group_without_parameters_is_left_out():
    assert [g["weight_decay"] for g in param_groups(nn.Linear(2, 2, bias=False), 0.1)] == [0.1]
    assert [g["weight_decay"] for g in param_groups(SphereLinear(2, 2), 0.1)] == [0.0]
    assert param_groups(nn.ReLU(), 0.1) == []


def test_shared_parameters_are_listed_once_and_an_angular_user_spares_them_the_decay():
    operator = LearnableSigmoidOperator()
    plain = nn.Linear(4, 4)
    model = nn.ModuleDict(
        {
            "plain": plain,
            "twin": SphereLinear.from_linear(plain, operator=operator),
            "other": SphereLinear(4, 4, operator=operator),
        }
    )
    ((decay, names),) = by_name(model, param_groups(model, 0.1))
    assert decay == 0.0
    assert sorted(names) == ["other.bias", "other.weight", "plain.bias", "plain.weight", "twin.operator.p"]


def test_torch_optimizers_take_the_groups_and_decay_accordingly():
    model = make_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=0.5), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.5 if name in DECAYED else 1.0
        torch.testing.assert_close(parameter, factor * before[name], msg=name)


def test_default_decays_nothing():
    assert {group["weight_decay"] for group in param_groups(make_model())} == {0.0}


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan")])
def test_negative_weight_decay_is_refused(weight_decay):
    with pytest.raises(UsageError, match=f"weight_decay: got {weight_decay}, expected a number ≥ 0"):
        param_groups(make_model(), weight_decay)

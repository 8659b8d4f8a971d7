"""Layers that do not train: by glob, by regular expression, with all that is inside them."""

import pytest
import torch
from torch import nn

from sphereify.errors import UsageError
from sphereify.training import finetune
from sphereify.training.freezing import frozen
from tests.training.small import images, net, state, usual


def nested() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("freeze", "names"),
    [
        ("0", {"0.0", "0.1"}),
        ("0.*", {"0.0", "0.1"}),
        ("re:.*1", {"0.1", "1"}),
        (["re:0[.]0", "1"], {"0.0", "1"}),
        ((), set()),
    ],
)
def test_a_pattern_freezes_the_layers_that_match_and_all_inside_them(freeze, names):
    model = nested()
    expected = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] in names}
    with frozen(model, freeze):
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == expected
    assert all(p.requires_grad for p in model.parameters())


def test_what_did_not_train_before_does_not_train_afterwards():
    model = nested()
    model[1].bias.requires_grad_(False)
    with frozen(model, "0"):
        pass
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["1.bias"]


@pytest.mark.parametrize(
    ("freeze", "text"),
    [
        ("stem", "freeze: pattern 'stem' matches no layer; names look like"),
        (["0", "re:block"], "freeze: pattern 're:block' matches no layer"),
        ("re:(", "freeze: 're:\\(' is not a regular expression"),
    ],
)
def test_a_pattern_that_matches_no_layer_is_an_error(freeze, text):
    with pytest.raises(UsageError, match=text), frozen(nested(), freeze):
        pass


def test_a_run_leaves_layers_that_match_a_regular_expression_as_they_are():
    model = net()
    before = state(model)
    finetune(model, images(), usual(epochs=1, freeze="re:[01]"))
    assert all(torch.equal(state(model)[name], before[name]) for name in before if name[0] in "01")
    assert not torch.equal(model[3].weight, before["3.weight"])
    assert all(parameter.requires_grad for parameter in model.parameters())

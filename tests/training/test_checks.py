"""Requests that are refused before anything is moved, changed or trained."""

import pytest
import torch
from torch import nn

from sphereify import fold
from sphereify.errors import DataError, UnsupportedModelError, UsageError
from sphereify.training import Settings, finetune
from tests.training.small import CPU, dropout_net, images, net, same, state, usual


@pytest.mark.parametrize("classes", [2, 5])
def test_other_classes_than_the_data_has_are_told_before_training(classes):
    model = net()
    before = state(model)
    text = rf"the model has 3 classes, patterns has {classes}: convert it again with num_classes={classes}"
    with pytest.raises(DataError, match=text):
        finetune(model, images(classes=classes), Settings(epochs=1, **CPU))
    assert same(before, state(model))


@pytest.mark.parametrize(
    ("last", "kind"),
    [(nn.Unflatten(1, (3, 1)), r"Tensor of shape \(1, 3, 1\)"), (nn.LSTM(3, 3), "tuple")],
    ids=["three dimensions", "tuple"],
)
def test_a_model_that_returns_no_logits_is_an_error(last, kind):
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 3), last)
    with pytest.raises(DataError, match=rf"the model returns {kind}, expected logits of shape \(batch, classes\)"):
        finetune(model, images(), Settings(epochs=1, **CPU))


def test_a_teacher_of_other_classes_is_told():
    with pytest.raises(DataError, match="the teacher has 2 classes, patterns has 3"):
        finetune(dropout_net(), images(), usual(), teacher=nn.Sequential(nn.Flatten(), nn.Linear(72, 2)))


def test_one_class_is_nothing_to_learn():
    with pytest.raises(DataError, match="has one class only, class 0"):
        finetune(nn.Sequential(nn.Flatten(), nn.Linear(72, 1)), images(classes=1), usual())


def test_mixing_needs_two_images():
    with pytest.raises(UsageError, match="need pairs of images; take batch_size=2 or more"):
        finetune(dropout_net(), images(), usual(mixup=0.2, batch_size=1))


REFUSALS = [
    ({"freeze": "nothing"}, "matches no layer"),
    ({"freeze": "*"}, "freeze: nothing is left to train"),
    ({"opt": "adahessian"}, "opt: adahessian needs second derivatives"),
    ({"opt": "newton"}, "opt: got 'newton', expected an optimizer of timm"),
    ({"sched": "sine"}, "sched: "),
    ({"layer_decay": 0.5}, "layer_decay: Sequential does not say what its layers are"),
    ({"fsdp": True}, "fsdp: needs several processes"),
    ({"mixup": 0.2, "batch_size": 1}, "mixup, cutmix: need pairs of images"),
]


@pytest.mark.parametrize(("settings", "text"), REFUSALS)
@pytest.mark.parametrize("output", [True, False])
def test_a_refused_model_is_as_it_was_and_nothing_is_written(tmp_path, settings, text, output):
    model = net()
    model[0].eval()
    model[3].bias = nn.Parameter(torch.zeros(4), requires_grad=False)
    before, random = state(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    started = []
    settings = usual(**{"freeze": "0", "channels_last": True, "seed": 5, **settings})
    with pytest.raises(UsageError, match=text):
        finetune(
            model,
            images(),
            settings,
            output=tmp_path / "run" if output else None,
            on_start=lambda: started.append(True),
        )
    assert same(state(model), before)
    assert model[0].weight.is_contiguous()
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert torch.equal(torch.get_rng_state(), random)
    assert not started
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused_before_the_model_is_touched(tmp_path):
    finetune(net(), images(), usual(epochs=1), output=tmp_path)
    model, random = net(), torch.get_rng_state()
    before = state(model)
    for refused, more in (("holds a run already", {}), ("cannot be continued", {"resume": True})):
        with pytest.raises(UsageError, match=refused):
            finetune(model, images(), usual(epochs=2, channels_last=True), output=tmp_path, **more)
    assert model[0].weight.is_contiguous()
    assert torch.equal(torch.get_rng_state(), random)
    assert same(state(model), before)


def test_a_folded_model_is_refused():
    model = fold(net().eval())
    with pytest.raises(UnsupportedModelError, match="this Sequential is folded for inference"):
        finetune(model, images(), usual(epochs=1))

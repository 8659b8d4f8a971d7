"""Requests that are refused before anything is moved, changed or trained."""

import pytest
from torch import nn

from sphereify.errors import DataError, UsageError
from sphereify.training import (
    Settings,
    finetune,
)
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

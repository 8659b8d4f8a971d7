"""Inputs that are assumed for a model that comes without any."""

import pytest
import timm
import torch
from torch import nn

from sphereify.convert.assumed_inputs import assumed_inputs, runnable_inputs
from sphereify.convert.input_channels import input_channels
from sphereify.errors import UsageError
from tests.convert.models import Net


@pytest.mark.parametrize(
    ("model", "channels"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)), 1),
        (nn.Conv2d(8, 8, 3, groups=4), 8),
        (nn.Sequential(nn.Linear(5, 5), nn.Conv2d(2, 4, 3)), 2),
        (nn.Sequential(nn.LSTM(5, 5), nn.Conv2d(2, 4, 3)), 2),
        (nn.Linear(5, 5), 3),
    ],
)
def test_the_channels_of_a_model_are_those_of_its_first_convolution(model, channels):
    assert input_channels(model) == channels


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(arguments.first.shape) for arguments in assumed_inputs(model)]


@pytest.mark.parametrize(
    ("model", "first"),
    [
        (nn.Sequential(nn.Linear(7, 3)), [(2, 7), (2, 16, 7)]),
        (nn.Conv1d(2, 4, 3), [(2, 2, 224), (2, 224, 2), (2, 2, 16000)]),
        (nn.Conv2d(3, 4, 3), [(2, 3, 224, 224), (2, 3, 299, 299), (2, 3, 32, 32)]),
        (nn.Conv3d(1, 4, 3), [(2, 1, 16, 112, 112), (2, 16, 1, 112, 112)]),
        (nn.Embedding(9, 4), [(2, 16), (2, 8)]),
        (nn.LSTM(5, 4), [(2, 16, 5)]),
        (nn.TransformerEncoderLayer(8, 2), [(2, 16, 8)]),
    ],
)
def test_inputs_are_assumed_by_the_first_layer(model, first):
    assert shapes(model)[: len(first)] == first


def test_the_size_of_a_timm_model_is_tried_before_that_of_its_pretrained_weights():
    with torch.device("meta"):
        model = timm.create_model("test_vit", img_size=64)
    assert [shape[-1] for shape in shapes(model)][:2] == [64, 160]


def test_images_are_assumed_for_a_model_that_cuts_them_into_patches_before_a_linear_layer():
    with torch.device("meta"):
        model = timm.create_model("naflexvit_base_patch16_parfac_gap")
    assert shapes(model)[:2] == [(2, 768), (2, 3, 384, 384)]


def test_a_forward_of_two_arguments_is_given_two():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, first, second, scale=1.0):
            return self.conv(first) - self.conv(second)

    assert {len(arguments.args) for arguments in assumed_inputs(Pair())} == {2}


def test_runnable_inputs_have_the_dtype_of_the_model_and_the_same_values_each_time():
    first, second = (runnable_inputs(nn.Linear(4, 2).bfloat16()).first for _ in range(2))
    assert first.dtype == torch.bfloat16
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_model_that_runs_on_no_usual_input_is_refused_with_the_reason():
    model = Net(lambda n, x: n.fc(x[..., :3]), fc=nn.Linear(4, 2))
    with pytest.raises(UsageError, match=r"Net does not run on inputs of a usual shape \(RuntimeError: .*shapes"):
        runnable_inputs(model)


def test_runnable_inputs_have_as_many_rows_as_are_asked_for():
    assert runnable_inputs(nn.Linear(4, 2), 5).first.shape == (5, 4)

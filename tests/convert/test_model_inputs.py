"""The inputs that a model takes, and runs of it that leave nothing behind."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from sphereify.convert.model_inputs import (
    arguments_of,
    assumed_inputs,
    data_config,
    evaluating,
    fresh,
    input_channels,
    runnable_inputs,
    tensors_in,
    unchanged,
)
from sphereify.errors import UsageError
from tests.convert.models import Net, images, plain


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


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (nn.Sequential(nn.Linear(7, 3)), [(2, 7)]),
        (nn.Conv1d(2, 4, 3), [(2, 2, 224), (2, 3, 224)]),
        (nn.Conv2d(3, 4, 3), [(2, 3, 224, 224), (2, 3, 299, 299)]),
        (nn.Conv3d(1, 4, 3), [(2, 1, 16, 112, 112), (2, 1, 16, 224, 224), (2, 3, 16, 112, 112), (2, 3, 16, 224, 224)]),
    ],
)
def test_inputs_are_assumed_by_the_first_layer(model, shapes):
    assert [arguments[0].shape for arguments in assumed_inputs(model)] == [torch.Size(shape) for shape in shapes]


def test_the_size_of_a_timm_model_is_tried_before_that_of_its_pretrained_weights():
    with torch.device("meta"):
        model = timm.create_model("test_vit", img_size=64)
    assert [x.shape[-1] for (x,) in assumed_inputs(model)] == [64, 160]


def test_images_are_assumed_for_a_model_that_cuts_them_into_patches_before_a_linear_layer():
    with torch.device("meta"):
        model = timm.create_model("naflexvit_base_patch16_parfac_gap")
    assert [x.shape for (x,) in assumed_inputs(model)] == [(2, 768), (2, 3, 384, 384)]


def test_a_forward_of_two_arguments_is_given_two():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, first, second, scale=1.0):
            return self.conv(first) - self.conv(second)

    assert {len(arguments) for arguments in assumed_inputs(Pair())} == {2}


def test_runnable_inputs_have_the_dtype_of_the_model_and_the_same_values_each_time():
    first, second = (runnable_inputs(nn.Linear(4, 2).bfloat16()) for _ in range(2))
    assert first[0].dtype == torch.bfloat16
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_model_that_runs_on_no_usual_input_is_refused_with_the_reason():
    model = Net(lambda n, x: n.fc(x[:, :3]), fc=nn.Linear(4, 2))
    with pytest.raises(UsageError, match=r"Net does not run on inputs of a usual shape \(RuntimeError: .*shapes"):
        runnable_inputs(model)


def test_runnable_inputs_have_as_many_rows_as_are_asked_for():
    assert runnable_inputs(nn.Linear(4, 2), 5)[0].shape == (5, 4)


def test_the_data_configuration_is_that_of_the_library():
    with torch.device("meta"):
        own = timm.create_model("test_resnet")
        torchvisions = torchvision.models.resnet18()
    assert data_config(own) == own.pretrained_cfg
    assert data_config(torchvisions)["mean"] == (0.485, 0.456, 0.406)
    assert data_config(plain()) == {}
    data_config(torchvisions)["mean"] = None  # the answer belongs to the caller
    assert data_config(torchvisions)["mean"] == (0.485, 0.456, 0.406)


def test_one_tensor_is_one_argument_and_a_tuple_several():
    x = torch.zeros(2)
    assert arguments_of(x) == (x,)
    assert arguments_of((x, 3)) == (x, 3)


def test_fresh_arguments_can_be_written_to():
    x = torch.zeros(2)
    copied, number = fresh((x, 3))
    copied.add_(1)
    assert number == 3
    assert x.tolist() == [0, 0]


def test_tensors_are_listed_from_containers_and_objects():
    class Output:
        def __init__(self):
            self.scores, self.names = torch.ones(1), ["a"]

    a, b = torch.zeros(1), torch.zeros(2)
    assert [t.shape[0] for t in tensors_in({"x": [a, (b, None)], "y": Output()})] == [1, 2, 1]


def test_each_module_is_put_back_into_its_own_mode():
    model = plain().train()
    model.norm.eval()
    with pytest.raises(RuntimeError), evaluating(model):
        model(images(size=0))
    assert model.training
    assert not model.norm.training
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert model.training


def test_what_a_forward_pass_leaves_in_a_module_is_gone_afterwards():
    model = plain()
    model.cache = {"mask": 1}
    model.counts = 0
    with unchanged(model):
        model.cache["mask"] = 2
        model.counts = 7
        model.body.proxy = object()
    assert model.cache == {"mask": 1}
    assert model.counts == 0
    assert not hasattr(model.body, "proxy")

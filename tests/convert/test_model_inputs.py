"""The inputs that a model takes, and runs of it that leave nothing behind."""

import pytest
import timm
import torch
import torchvision

from sphereify.convert.model_inputs import data_config, evaluating, tensors_in, unchanged
from tests.convert.models import images, plain


def test_the_data_configuration_is_that_of_the_library():
    with torch.device("meta"):
        own = timm.create_model("test_resnet")
        torchvisions = torchvision.models.resnet18()
    assert data_config(own) == own.pretrained_cfg
    assert data_config(torchvisions)["mean"] == (0.485, 0.456, 0.406)
    assert data_config(plain()) == {}
    data_config(torchvisions)["mean"] = None  # the answer belongs to the caller
    assert data_config(torchvisions)["mean"] == (0.485, 0.456, 0.406)


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

"""Tools that merge layers into one another are refused on angular layers, where the result would be another network."""

import copy
import pickle

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from sphereify import plan_conversion, sphereify
from sphereify.errors import UnsupportedModelError
from sphereify.nn import AngularHead, SphereConv2d, SphereLinear
from tests.nn.oracle import normal

X = normal(2, 3, 6, 6, dtype=torch.float32)


class Branches(nn.Module):
    """Two parallel convolutions that become one for deployment, as in RepVGG."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.wide(x) if self.narrow is None else self.wide(x) + self.narrow(x)

    @torch.no_grad()
    def switch_to_deploy(self):
        self.wide.weight += nn.functional.pad(self.narrow.weight, (1, 1, 1, 1))
        self.wide.bias += self.narrow.bias
        self.narrow = None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches, self.fc = Branches(), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.merge(self.branches(x), x.mean()))

    def merge(self, x, y):  # of the forward, and nothing to do with layers
        return x.mean((2, 3)) + y


def test_methods_that_merge_are_named_in_the_plan_and_refused_after_the_conversion():
    net = Net()
    (note,) = [n for n in plan_conversion(net, example_inputs=X).notes if "merge" in n]
    assert note == (
        "Net: branches.switch_to_deploy() would merge converted layers with others, which changes what they compute, "
        "and will be refused. To merge, do it first, then convert"
    )
    model = sphereify(net, example_inputs=X)
    for converted in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(UnsupportedModelError, match=r"branches\.switch_to_deploy\(\): merges layers.*then convert"):
            converted.branches.switch_to_deploy()
    torch.testing.assert_close(model(X), copy.deepcopy(model)(X))


def test_layers_that_are_kept_may_merge():
    net = Net()
    plan = plan_conversion(net, exclude="branches.*", example_inputs=X)
    assert not [n for n in plan.notes if "merge" in n]
    model = sphereify(net, exclude="branches.*", example_inputs=X)
    expected = model(X)
    model.branches.switch_to_deploy()
    torch.testing.assert_close(model(X), expected)


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "repvit_m0_9", "fastvit_t8"])
def test_timm_reparameterizes_before_a_conversion_and_is_refused_after_it(name):
    plain = timm.create_model(name, num_classes=5).eval()
    model = sphereify(plain)
    assert [n for n in model.conversion_plan.notes if "would merge converted layers" in n]
    with pytest.raises(UnsupportedModelError, match="merges layers with one another"):
        reparameterize_model(model)
    sphereify(reparameterize_model(plain))


@pytest.mark.parametrize("bias", [False, True])
def test_torch_refuses_to_fuse_a_batch_norm_into_an_angular_layer(bias):
    conv, linear = SphereConv2d(3, 4, 3, bias=bias).eval(), SphereLinear(3, 4, bias=bias).eval()
    with pytest.raises(UnsupportedModelError, match=r"SphereConv2d: another layer.*sphereify\.fold"):
        fuse_conv_bn_eval(conv, nn.BatchNorm2d(4).eval())
    with pytest.raises(UnsupportedModelError, match="SphereLinear: another layer"):
        fuse_linear_bn_eval(linear, nn.BatchNorm1d(4).eval())
    with pytest.raises(UnsupportedModelError, match="AngularHead: another layer"):
        fuse_linear_bn_eval(AngularHead(3, 4, bias=bias).eval(), nn.BatchNorm1d(4).eval())


def test_a_new_weight_and_then_a_bias_that_there_was_not_are_refused():
    conv = SphereConv2d(3, 4, 3, bias=False)
    conv.weight = nn.Parameter(2 * conv.weight.detach())
    with pytest.raises(UnsupportedModelError, match="SphereConv2d: another layer"):
        conv.bias = nn.Parameter(torch.zeros(4))


def test_parameters_may_be_replaced():
    for layer in (SphereConv2d(3, 4, 3), SphereLinear(3, 4, bias=False), AngularHead(3, 4, bias=True)):
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))
        layer.load_state_dict({n: p.clone() for n, p in layer.state_dict().items()}, assign=True)
        if layer.bias is not None:
            layer.bias = nn.Parameter(torch.zeros(4))
    bare = SphereLinear(3, 4, bias=False)
    bare.bias = nn.Parameter(torch.ones(4))
    torch.testing.assert_close(bare(torch.zeros(1, 3)), torch.ones(1, 4))


@pytest.mark.parametrize("name", ["fuse_convs", "fuse_projections", "convert_to_deploy", "merge_bn", "merge_kernel"])
def test_other_usual_names_of_such_methods_are_refused_too(name):
    class Named(Branches):
        pass

    setattr(Named, name, Branches.switch_to_deploy)
    net = Net()
    net.branches = Named()
    with pytest.raises(UnsupportedModelError, match=rf"branches\.{name}\(\): merges layers"):
        getattr(sphereify(net, example_inputs=X).branches, name)()

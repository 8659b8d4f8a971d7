"""Tools that trace with torch.fx take a converted model as they took the original: angular layers are leaves."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from sphereify import fold, sphereify
from sphereify.errors import UnsupportedModelError
from sphereify.nn import SphereConv2d
from tests.nn.oracle import normal


@fx.wrap
def projected(x, weight):
    return F.linear(x, weight)


class Calls(nn.Module):
    """Makes its calls in a forward that torch.fx can follow, or inside a function that it cannot."""

    def __init__(self, hidden):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.norm = nn.LayerNorm(6)
        self.hidden = hidden

    def forward(self, x):
        x = projected(x, self.weight) if self.hidden else F.linear(x, self.weight)
        return self.norm(torch.addmm(torch.zeros(6), x, self.matrix))


class Net(nn.Module):
    def __init__(self, hidden=False):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.calls, self.fc = Calls(hidden), nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(self.calls(self.bn(self.conv(x)).relu().mean((2, 3))))


X = normal(2, 3, 6, 6, dtype=torch.float32)


@pytest.mark.parametrize("head", ["w-softmax", "ga-softmax"])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_symbolic_trace_computes_what_the_model_does_and_trains_the_same_parameters(hidden, head):
    model = sphereify(Net(hidden), head=head, example_inputs=X)
    assert len(model.conversion_plan.converted) == 4
    traced = fx.symbolic_trace(model)
    for training in (False, True):
        output, expected = (net.train(training)(X) for net in (traced, model))
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
    leaves = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    inner = {"calls"} if hidden else {"calls.angular_calls.weight", "calls.angular_calls.matrix", "calls.norm"}
    assert leaves == {"conv", "bn", "fc"} | inner
    scores = traced(X) if head == "w-softmax" else traced(X).logits
    scores.square().sum().backward()
    assert all(p.grad is not None for p in traced.parameters())
    assert traced.calls.weight is model.calls.weight or hidden


def test_node_names_of_feature_extractors_stay():
    plain = torchvision.models.resnet18(num_classes=4)
    model = sphereify(plain).eval()
    assert get_graph_node_names(model) == get_graph_node_names(plain)
    extractor = create_feature_extractor(model, {"layer2": "features", "fc": "scores"}).eval()
    x = normal(1, 3, 32, 32, dtype=torch.float32)
    torch.testing.assert_close(extractor(x)["scores"], model(x), rtol=0, atol=0)
    folded = fold(extractor)
    torch.testing.assert_close(folded(x)["scores"], model(x), rtol=1e-4, atol=1e-4)
    assert len(folded.folding.layers) == 21


def test_a_folded_model_is_traced():
    model = fold(sphereify(Net(), example_inputs=X).eval())
    torch.testing.assert_close(fx.symbolic_trace(model)(X), model(X), rtol=0, atol=0)
    extractor = create_feature_extractor(model, ["calls", "fc"])
    torch.testing.assert_close(extractor(X)["fc"], model(X), rtol=0, atol=0)
    assert not extractor.training
    for folded in (model, extractor):
        with pytest.raises(UnsupportedModelError, match=r"train\(\): this model is folded"):
            folded.train()


def test_what_a_graph_would_make_plain_is_refused():
    class Root(Calls):
        pass

    model = sphereify(Root(hidden=True), example_inputs=normal(2, 6, dtype=torch.float32))
    with pytest.raises(UnsupportedModelError, match=r"Root makes its angular call with weight where torch\.fx"):
        fx.symbolic_trace(model)
    with pytest.raises(UnsupportedModelError, match=r"SphereConv2d is one node of a torch\.fx graph"):
        fx.symbolic_trace(SphereConv2d(3, 4, 3))

"""Embeddings: the input of the classifier, whatever the network is made of."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sphereify import fold, sphereify
from sphereify.errors import DataError, TrainingError, UnsupportedModelError, UsageError
from sphereify.nn import AngularHead
from sphereify.training import Settings
from sphereify.training.embeddings import embeddings
from tests.training.small import CPU

SIZE = (3, 9, 9)


def pictures(number: int = 7) -> Tensor:
    return torch.randn(number, *SIZE, generator=torch.Generator().manual_seed(0))


def of(model: nn.Module, layer: str | None = None, x: Tensor | None = None, **settings):
    x = pictures() if x is None else x
    return embeddings(
        model, TensorDataset(x, x[:, 0, 0, 0]), SIZE, Settings(batch_size=3, **CPU, **settings), layer=layer
    )


class Net(nn.Module):
    """A network whose classifier a subclass defines."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.9)
        self.make()

    def make(self) -> None:
        self.fc = nn.Linear(8, 5)

    def maps(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()

    def features(self, x: Tensor) -> Tensor:
        return self.drop(self.maps(x).mean((2, 3)))

    def forward(self, x: Tensor):
        return self.fc(self.features(x))


class InAFunction(Net):
    def make(self) -> None:
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor):
        return F.linear(self.features(x), self.weight)


class Transposed(Net):
    def make(self) -> None:
        self.weight = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor):
        return self.features(x) @ self.weight


class AsAConvolution(Net):
    """The classifier of SqueezeNet: at each position, then averaged."""

    def make(self) -> None:
        self.fc = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor):
        return self.fc(self.maps(x)).mean((2, 3))


class OfTokens(Net):
    """Scores of each token, then averaged."""

    def forward(self, x: Tensor):
        return self.fc(self.maps(x).flatten(2).mT).mean(1)


class ByKeyword(Net):
    def forward(self, x: Tensor):
        return {"logits": self.fc(input=self.features(x)), "loss": None}


class Angular(Net):
    def make(self) -> None:
        self.fc = AngularHead(8, 5, kind="ga-softmax")


class Auxiliary(Net):
    def make(self) -> None:
        self.fc, self.side = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor):
        x = self.features(x)
        return (self.fc(x), self.side(x)) if self.training else self.fc(x)


NETS = [Net, InAFunction, Transposed, AsAConvolution, OfTokens, ByKeyword, Angular, Auxiliary]


def made(net: type[Net]) -> Net:
    torch.manual_seed(0)
    model = net()
    nn.init.normal_(model.norm.running_mean, std=0.1)
    return model


@pytest.mark.parametrize("net", NETS)
def test_it_is_what_the_classifier_takes_of_plain_and_converted_networks(net):
    for model in (made(net), sphereify(made(net)), sphereify(made(net), head="keep")):
        found = of(model.train())
        assert not model.training
        wanted = F.normalize(model.features(pictures())).detach()
        torch.testing.assert_close(found.vectors, wanted, rtol=1e-5, atol=1e-6)
        assert found.rows.tolist() == list(range(7))
        assert found.vectors.dtype == torch.float32


@pytest.mark.parametrize(
    "name",
    ["test_resnet", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("test_convnext", "test_vit"))],
)
def test_it_is_what_timm_hands_to_its_classifiers(name):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=5)
    x, size = torch.randn(2, 3, 160, 160), (3, 160, 160)
    for model in (plain.eval(), sphereify(plain).eval()):
        found = embeddings(model, TensorDataset(x, x), size, Settings(batch_size=2, **CPU))
        wanted = model.forward_head(model.forward_features(x), pre_logits=True).detach()
        torch.testing.assert_close(found.vectors, F.normalize(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["auto", "keep", "ga-softmax", "a-softmax", "s-softmax"])
def test_it_does_not_depend_on_the_kind_of_head_and_is_the_same_when_folded(head):
    model = sphereify(made(Net).eval(), head=head).eval()
    before = of(model).vectors
    torch.testing.assert_close(of(fold(model)).vectors, before, rtol=1e-5, atol=1e-5)


def test_nothing_of_the_model_changes():
    model = made(InAFunction)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keys, hooks = set(vars(model)), [len(m._forward_pre_hooks) for m in model.modules()]
    of(model)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert set(vars(model)) == keys
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_a_layer_may_be_named():
    model = made(Net).eval()
    torch.testing.assert_close(of(model, "norm").vectors, F.normalize(model.conv(pictures()).mean((2, 3))).detach())
    body = nn.Sequential(made(Net), nn.Identity())
    torch.testing.assert_close(of(body, "1").vectors, F.normalize(body(pictures())).detach())
    with pytest.raises(UsageError, match=r"embedding_layer: the model has no layer 'head'; its last ones are .*norm"):
        of(model, "head")


class Body(Net):
    def forward(self, x: Tensor):
        return self.features(x)


class TwoHeads(Auxiliary):
    def forward(self, x: Tensor):
        x = self.features(x)
        return (self.fc(x) + self.side(x.sin())) / 2


def test_a_model_without_one_classifier_is_refused():
    for model in (made(Body), sphereify(made(Body)), nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1))):
        with pytest.raises(UnsupportedModelError, match=r"has no classifier; .* Name the layer .* embedding_layer"):
            of(model)
    with pytest.raises(UnsupportedModelError, match="TwoHeads has 2 classifiers: fc, side; "):
        of(made(TwoHeads))


def test_images_that_the_model_does_not_take_are_refused():
    with pytest.raises(DataError, match="the model does not take images of 3 × 9 × 9"):
        of(nn.Sequential(nn.Flatten(), nn.Linear(7, 3)))


class Mixing(Net):
    """A network that pairs the images of a batch."""

    def forward(self, x: Tensor):
        return self.fc(self.features(x).repeat(2, 1))[: len(x)]


def test_an_input_that_is_no_features_of_the_images_is_refused():
    with pytest.raises(
        DataError, match=r"fc: takes a tensor of shape \(6, 8\), expected .* \(3, features\) for 3 images"
    ):
        of(made(Mixing), "fc")


def test_features_that_are_not_finite_end_it_with_the_layer():
    x = pictures()
    model = made(Net)
    with torch.no_grad():
        model.norm.weight[0] = torch.inf
    with pytest.raises(TrainingError, match=r"fc: its input, .* not finite .* is norm \(its weight\)"):
        of(model, x=x)


def test_features_of_zero_stay_zero():
    model = made(Net)
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.zero_()
    assert not of(model).vectors.any()


class Broken(TensorDataset):
    def __getitem__(self, row):
        if row in (1, 4, 5, 6):
            raise DataError(f"picture {row}: cannot be read")
        return super().__getitem__(row)


def test_images_that_cannot_be_read_are_counted_and_leave_the_others_their_numbers():
    model, x = made(Net), pictures()
    settings = Settings(batch_size=2, **CPU)
    seen = []
    found = embeddings(model, Broken(x, x), SIZE, settings, on_images=lambda *now: seen.append(now))
    assert (found.rows.tolist(), found.skipped) == ([0, 2, 3], 4)
    torch.testing.assert_close(found.vectors, of(model).vectors[[0, 2, 3]])
    assert seen == [(2, 7), (4, 7), (6, 7), (7, 7)]
    with pytest.raises(DataError, match="picture 1: cannot be read"):
        embeddings(model, Broken(x, x), SIZE, Settings(batch_size=2, strict=True, **CPU))

"""Small networks, their inputs, and measures of how well a calibration did."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.nn import SphereConv1d, SphereConv2d, SphereConv3d

OPERATORS = ("cosine", "linear", "sigmoid")
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SPHERE = {1: SphereConv1d, 2: SphereConv2d, 3: SphereConv3d}
GEOMETRIES = [
    pytest.param({"padding": 1}, id="padding"),
    pytest.param({"stride": 2}, id="stride"),
    pytest.param({"groups": 2, "padding": 1}, id="groups"),
    pytest.param({"dilation": 2}, id="dilation"),
    pytest.param({"dilation": 2, "padding": "same"}, id="same"),
    pytest.param({"padding": "valid", "bias": False}, id="valid"),
    pytest.param({"padding": 1, "padding_mode": "reflect"}, id="reflect"),
    pytest.param({"padding": 2, "padding_mode": "circular", "stride": 2, "groups": 4}, id="circular"),
    pytest.param({"kernel_size": 2, "padding": "same", "padding_mode": "replicate"}, id="even-same"),
]


def images(dim: int, number: int = 48, channels: int = 4, size: int | None = None) -> Tensor:
    return torch.randn(number, channels, *[size or {1: 24, 2: 9, 3: 6}[dim]] * dim)


def conv(dim: int, kinds: dict = PLAIN, **geometry) -> nn.Module:
    return kinds[dim](4, 8, **{"kernel_size": 3, **geometry})


def hidden(*layers: nn.Module) -> nn.Sequential:
    """The layers and an identity: a convolution that ends in the model's output would be kept as its classifier."""
    return nn.Sequential(*layers, nn.LeakyReLU(1.0))


def rows(output: Tensor) -> Tensor:
    """(B, C, …) -> (positions, C)"""
    return output.detach().movedim(1, -1).flatten(0, -2)


@torch.no_grad()
def r_squared(y: Tensor, target: Tensor) -> float:
    return 1 - float((y - target).square().sum() / (target - target.mean(0)).square().sum())


def error(model: nn.Module, original: nn.Module, x: Tensor) -> float:
    """Of the outputs, as a share of their variance."""
    with torch.no_grad():
        y, target = model.eval()(x), original.eval()(x)
    return float((y - target).square().mean() / target.var())


def smooth_images(number: int = 96, channels: int = 3, size: int = 12) -> Tensor:
    return F.interpolate(torch.randn(number, channels, size // 2, size // 2), size=size, mode="bilinear")


class Residual(nn.Module):
    """Two blocks whose sums pass a ReLU; the second `+=` and an in-place ReLU."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.na, self.nb = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.na(self.a(x)) + x).relu()
        y = self.nb(self.b(x))
        y += x
        return self.fc(F.relu(y, inplace=True).mean((2, 3)))


def trained_statistics(net: nn.Module) -> nn.Module:
    net.train()
    with torch.no_grad():
        for _ in range(40):
            net(smooth_images(32))
    return net.eval()


def conv_norm_net(bias: bool) -> nn.Sequential:
    """Convolutions and BatchNorms with the statistics of `smooth_images`, some of the scales negative."""
    layers: list[nn.Module] = []
    for before, after in ((3, 8), (8, 12), (12, 16)):
        norm = nn.BatchNorm2d(after)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias, std=0.3)
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=bias), norm, nn.ReLU()]
    net = nn.Sequential(*layers[:-1]).train()
    with torch.no_grad():
        for _ in range(60):
            net(smooth_images(32))
    return net.eval()


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 5)
    )


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}

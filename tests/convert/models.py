"""Small hand-written networks, each with one thing that is easy to get wrong."""

import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 5


def conv(inputs: int, outputs: int, size: int = 3, **given: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **given)


class Net(nn.Module):
    """The modules given by name, wired by `wiring(net, x)`."""

    def __init__(self, wiring: Callable[["Net", Any], Any], **modules: nn.Module):
        super().__init__()
        self.wiring = wiring
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.wiring(self, x)


def classifier_of(block: nn.Module, channels: int = 6) -> nn.Sequential:
    """A stem, the block (4 channels to `channels`) and a classifier, for images of 3 channels."""
    return nn.Sequential(
        OrderedDict(
            stem=conv(3, 4),
            block=block,
            act=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(channels, CLASSES),
        )
    )


def plain() -> nn.Sequential:
    """Each kind of site once or twice: followed by a norm, not followed, with and without bias; 3×8×8 images."""
    return nn.Sequential(
        OrderedDict(
            stem=conv(3, 4, bias=False),
            norm=nn.BatchNorm2d(4),
            act=nn.ReLU(),
            body=conv(4, 6),
            act2=nn.ReLU(inplace=True),
            bare=conv(6, 6, bias=False),
            act3=nn.ReLU(inplace=True),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            neck=nn.Linear(6, 8),
            act4=nn.ReLU(),
            fc=nn.Linear(8, CLASSES),
        )
    )


class OwnWeight(nn.Module):
    """Passes a weight of its own to F.conv2d."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 4)
        self.kernel = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.fc(F.conv2d(self.stem(x).relu(), self.kernel, padding=1).relu().mean((2, 3)))


def images(*, size: int = 8, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ residual blocks

ADDITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": operator.add,
    "+=": operator.iadd,
    "torch.add": torch.add,
    "Tensor.add": lambda a, b: a.add(b),
    "Tensor.add_": lambda a, b: a.add_(b),
    "scaled": lambda a, b: 0.5 * a + b,
}


def misnamed_block(add: Callable[[Tensor, Tensor], Tensor]) -> Net:
    """`downsample` is a 1×1 convolution of the main path, `conv1` is the shortcut."""
    return Net(
        lambda n, x: add(n.middle(n.downsample(x).relu()), n.conv1(x)),
        downsample=conv(4, 4, 1),
        middle=conv(4, 6),
        conv1=conv(4, 6, 1),
    )


def shortcut_block(dims: int) -> Net:
    """The same residual block over 1, 2 or 3 dimensions; the shortcut is pooled first and normalized after."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    pool = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    return Net(
        lambda n, x: n.main(x) + n.side(x),
        main=nn.Sequential(kind(4, 6, 3, stride=2, padding=1, bias=False), norm(6)),
        side=nn.Sequential(pool(2), kind(4, 6, 1, bias=False), norm(6)),
    )


class PreActBlock(nn.Module):
    """The block of He et al. 2016: the norm comes first, and the shortcut starts behind it."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, outputs, stride=stride, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv(outputs, outputs, bias=False)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class PreActNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 4, bias=False)
        self.layer1 = PreActBlock(4, 4, 1)
        self.layer2 = PreActBlock(4, 8, 2)
        self.linear = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.conv1(x)))
        return self.linear(x.mean((2, 3)))


def gated_block() -> Net:
    """Squeeze-and-excitation: its two 1×1 convolutions are multiplied, not added."""
    return Net(
        lambda n, x: n.side(x) + n.main(x) * n.expand(n.reduce(n.main(x).mean((2, 3), keepdim=True)).relu()).sigmoid(),
        main=conv(4, 6),
        side=conv(4, 6, 1),
        reduce=conv(6, 2, 1),
        expand=conv(2, 6, 1),
    )


UPSAMPLINGS: dict[str, Callable[[], nn.Module]] = {
    "F.interpolate": lambda: Net(lambda n, x: F.interpolate(x, scale_factor=2.0)),
    "nn.Upsample": lambda: nn.Upsample(scale_factor=2),
    "transposed": lambda: nn.ConvTranspose2d(6, 6, 2, stride=2),
}


def pyramid(upsampling: str) -> Net:
    """A feature pyramid of two levels; `lateral1` meets an upsampled map."""

    def wiring(n: Net, x: Tensor) -> Tensor:
        fine = n.level1(x).relu()
        coarse = n.level2(fine).relu()
        merged = n.lateral1(fine) + n.up(n.lateral2(coarse))
        return n.fc(n.smooth(merged).relu().mean((2, 3)))

    return Net(
        wiring,
        level1=conv(3, 4),
        level2=conv(4, 8, stride=2),
        lateral1=conv(4, 6, 1),
        lateral2=conv(8, 6, 1),
        up=UPSAMPLINGS[upsampling](),
        smooth=conv(6, 6),
        fc=nn.Linear(6, CLASSES),
    )


# ---------------------------------------------------------------------------------------------- odd modules and wirings


class ValueGate(nn.Module):
    """Cannot be traced: its way depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 6, bias=False)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x if x.mean() > 100 else x.relu()


class UntraceableNet(nn.Module):
    """Roles can be found by names and shapes only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.body = conv(4, 4)
        self.downsample = conv(4, 4, 1)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x))
        if x.mean() > 100:
            x = x / 2
        x = self.body(x).relu() + self.downsample(x)
        return self.fc(x.mean((2, 3)))


class WithAuxiliary(nn.Module):
    """An auxiliary classifier that runs in training only, as GoogLeNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.aux_conv = conv(4, 4, 1)
        self.aux = nn.Linear(4, CLASSES)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x).relu()
        logits = self.fc(x.mean((2, 3)))
        if self.training:
            return logits, self.aux(self.aux_conv(x).relu().mean((2, 3)))
        return logits


class CastingConv2d(nn.Conv2d):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2)


class UnfoldingConv2d(nn.Conv2d):
    """A subclass whose forward calls no convolution."""

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, self.kernel_size, padding=self.padding)
        out = torch.einsum("of,bfl->bol", self.weight.flatten(1), patches)
        return out.unflatten(2, x.shape[2:])


class NormLinear(nn.Linear):
    """A linear map with an unlucky name: it is no normalization."""


class OwnNorm(nn.Module):
    """A normalization of the user's own, with a scale."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.weight.view(-1, 1, 1)


class Mlp(nn.Module):
    """Two layers that share one weight, and a classifier; vectors of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.a(x).relu()).relu())


class Power(nn.Module):
    """An operator of a user's own: sign(cos)·|cos|^exponent."""

    def __init__(self, exponent: float):
        super().__init__()
        self.exponent = nn.Parameter(torch.tensor(float(exponent)))

    def forward(self, cos: Tensor) -> Tensor:
        return cos.sign() * (cos.abs() + 1e-6) ** self.exponent


class Casting(nn.Module):
    """A linear map in the usual idiom of mixed precision: the weight follows the input's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class GuessedNorm(nn.Module):
    """Cannot be traced, and its BatchNorm is registered behind the convolution but does not run behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) == 0:
            return self.fc(x[:, :, 0, 0])
        return self.fc(self.bn(F.relu(self.conv(x), inplace=True)).mean((2, 3)))


def same_tensors(one, other) -> bool:
    """True if two state dicts hold equal tensors under equal names."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

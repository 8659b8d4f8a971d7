"""Small networks, trained by a plain loop, that the benchmarks convert.

    python -m benchmarks.plain_networks --data CIFAR10
    python -m benchmarks.plain_networks --data CIFAR10 --networks resnet20     # some of them
    python -m benchmarks.plain_networks --data CIFAR10 --device cuda

CIFAR10 is a folder with train/ and test/, each with one folder of images a class. The ViT is trained on scikit-learn's
digits, which need no folder. A network whose file is there is not trained again. Four hours on two cores, of which the
MobileNet takes two and the ResNet-20 half an hour (estimated from the time of a step).
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sphereify.files import replacing


class Images(NamedTuple):
    """Images in [-1, 1] of shape (B, 3, 32, 32) and their classes."""

    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet20(nn.Module):
    """The network of He et al. 2016, section 4.2, with 1×1 convolutions where a shortcut changes its width."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.blocks = nn.Sequential(*(Block(i, o, 1 if i == o else 2) for i, o in itertools.pairwise(widths)))
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


def vgg(classes: int = 10) -> nn.Module:
    """Seven convolutions with BatchNorm; the resolution is halved three times."""
    layers: list[nn.Module] = []
    inputs = 3
    for width in (32, 32, 0, 64, 64, 0, 128, 128, 128, 0):
        if width:
            layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            inputs = width
        else:
            layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """A vision transformer: patches of 4×4 pixels, four blocks of width 64, the mean of the tokens."""

    def __init__(self, classes: int = 10, width: int = 64):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, 4) for _ in range(4)))
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.fc(self.norm(self.blocks(tokens)).mean(1))


class InvertedResidual(nn.Module):
    """Sandler et al. 2018: expand, depthwise 3×3, project; a shortcut where the shapes allow it."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int = 4):
        super().__init__()
        inner = inputs * expansion
        self.shortcut = stride == 1 and inputs == width
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(),
            nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.shortcut else self.layers(x)


def mobilenet(classes: int = 10) -> nn.Module:
    """A small MobileNetV2: nine inverted residuals of width 24 to 96."""
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6()]
    inputs = 24
    for width, stride in ((24, 1), (24, 1), (32, 2), (32, 1), (32, 1), (64, 2), (64, 1), (64, 1), (96, 1)):
        layers.append(InvertedResidual(inputs, width, stride))
        inputs = width
    layers += [nn.Conv2d(inputs, 256, 1, bias=False), nn.BatchNorm2d(256), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, classes))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Liu et al. 2022: depthwise 7×7, LayerNorm, a linear map to four times the width and back."""

    def __init__(self, width: int):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.project = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.project(F.gelu(self.expand(inner))).permute(0, 3, 1, 2)


def convnext(classes: int = 10) -> nn.Module:
    """A small ConvNeXt: blocks of width 48, 96 and 192 behind 2×2 patches."""
    layers: list[nn.Module] = [nn.Conv2d(3, 48, 2, 2), ChannelNorm(48)]
    inputs = 48
    for width, depth in ((48, 2), (96, 2), (192, 2)):
        if width != inputs:
            layers += [ChannelNorm(inputs), nn.Conv2d(inputs, width, 2, 2)]
        layers += [ConvNeXtBlock(width) for _ in range(depth)]
        inputs = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(inputs), nn.Linear(inputs, classes)
    )


EPOCHS = {"vgg": 40, "vit": 40}
"""Length of the training of a network, if it is not 20."""
NETWORKS = {"resnet20": ResNet20, "vgg": vgg, "mobilenet": mobilenet, "convnext": convnext, "vit": SmallViT}


def weights_of(name: str, folder: Path) -> Path:
    """The file of the weights that this program has trained.

    Raises:
        SystemExit: it has not.
    """
    file = folder / f"{name}.pt"
    if not file.is_file():
        raise SystemExit(f"error: {file}: no such file; python -m benchmarks.plain_networks trains it")
    return file


def trained(name: str, file: Path) -> nn.Module:
    """A network with the weights of a file, in eval mode."""
    network = NETWORKS[name]()
    network.load_state_dict(torch.load(file))
    return network.eval()


def cifar(folder: Path) -> Images:
    """The images of a folder, decoded once."""
    parts = []
    for part in ("train", "test"):
        files = sorted((folder / part).glob("*/*"))
        classes = sorted({file.parent.name for file in files})
        pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
        parts += [torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)]
        parts += [torch.tensor([classes.index(file.parent.name) for file in files])]
    return Images(*parts)


def digits() -> Images:
    """scikit-learn's handwritten digits, every fifth for testing."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = torch.from_numpy(raw.images).float().div(8).sub(1).unsqueeze(1)
    images = F.interpolate(pixels, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    classes = torch.from_numpy(raw.target)
    test = torch.arange(len(images)) % 5 == 0
    return Images(images[~test], classes[~test], images[test], classes[test])


def shifted(images: Tensor) -> Tensor:
    """Shift each image by up to 4 pixels and mirror half of them."""
    padded = F.pad(images, (4, 4, 4, 4))
    moves = torch.randint(0, 9, (2,)).tolist()
    images = padded[:, :, moves[0] : moves[0] + 32, moves[1] : moves[1] + 32]
    mirrored = torch.rand(len(images), device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def train(network: nn.Module, images: Images, *, epochs: int, lr: float, adam: bool = False, move: bool = True) -> None:
    """Train by one cycle of SGD with momentum, or of AdamW."""
    weights = list(network.parameters())
    optimizer = (
        torch.optim.AdamW(weights, lr=lr, weight_decay=0.05)
        if adam
        else torch.optim.SGD(weights, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    )
    steps = epochs * (len(images.train) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        began = time.perf_counter()
        network.train()
        order = torch.randperm(len(images.train)).to(images.train.device)
        for rows in order.split(128)[: len(images.train) // 128]:
            x = shifted(images.train[rows]) if move else images.train[rows]
            loss = F.cross_entropy(network(x), images.train_classes[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: {accuracy(network, images):.2%}, {time.perf_counter() - began:.0f} s", flush=True)


@torch.no_grad()
def accuracy(network: nn.Module, images: Images) -> float:
    """Share of the test images that are classified correctly."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    right = sum(
        int((network(x).argmax(1) == y).sum())
        for x, y in zip(images.test.split(500), images.test_classes.split(500), strict=True)
    )
    for module, training in modes.items():
        module.training = training
    return right / len(images.test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--output", type=Path, default=Path("data/plain"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--epochs", type=int, help="default: 20; VGG and ViT: 40")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        file = options.output / f"{name}.pt"
        if file.is_file():
            print(f"{name}: {file} is there; remove it to train another")
            continue
        torch.manual_seed(0)
        network = NETWORKS[name]().to(options.device)
        print(name, flush=True)
        images = Images(*(t.to(options.device) for t in (digits() if name == "vit" else cifar(options.data))))
        adam, epochs = name in ("vit", "convnext"), options.epochs or EPOCHS.get(name, 20)
        rate = 2e-3 if adam else 0.2 if name == "resnet20" else 0.1
        train(network, images, epochs=epochs, lr=rate, adam=adam, move=name != "vit")
        with replacing(file) as aside:
            torch.save(network.cpu().state_dict(), aside)


if __name__ == "__main__":
    main()

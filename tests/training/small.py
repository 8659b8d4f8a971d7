"""Networks, images and settings for runs of a second."""

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from sphereify import sphereify
from sphereify.datasets import Data
from sphereify.training import Settings

CPU = {"device": "cpu"}
IMAGES = torch.zeros(2, 2, 6, 6)
"""What the networks take, so that a conversion need not try the usual sizes, which costs more than a small run."""


def images(number: int = 26, classes: int = 3, seed: int = 0) -> Data:
    """Noise around one pattern a class: easy to tell apart."""
    draw = torch.Generator().manual_seed(seed)
    patterns = torch.randn(classes, 2, 6, 6, generator=draw)

    def part(number: int) -> TensorDataset:
        targets = torch.arange(number) % classes
        return TensorDataset(patterns[targets] + 0.3 * torch.randn(number, 2, 6, 6, generator=draw), targets)

    return Data("patterns", part(number), part(12), [f"class {i}" for i in range(classes)], (2, 6, 6))


def plain_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def net(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return sphereify(plain_net(), inplace=True, example_inputs=IMAGES, **options)


class Layered(nn.Sequential):
    def group_matcher(self, coarse: bool = False) -> dict:
        return {"stem": r"^0", "blocks": r"^(\d+)"}


def plain_dropout_net() -> nn.Module:
    return Layered(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(4, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def dropout_net(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return sphereify(plain_dropout_net(), inplace=True, example_inputs=IMAGES, **options)


def linear_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 3))


def usual(**settings) -> Settings:
    """Six batches an epoch, and a checkpoint after each step."""
    return Settings(**{"epochs": 3, "batch_size": 4, "checkpoint_minutes": 0, "device": "cpu", "lr": 0.01, **settings})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Augmented(Dataset):
    """Random at each access, as an image folder is."""

    def __init__(self, part: TensorDataset):
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self.part[index]
        return image + torch.randn(()), target


class Crash(Exception):
    pass


def crash_at(step: int):
    """Before the checkpoint of that step."""

    def on_step(now) -> None:
        if now.number == step:
            raise Crash

    return on_step

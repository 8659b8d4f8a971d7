"""Networks of pytorchcv."""

from collections.abc import Callable
from typing import Any

from torch import nn

from tests.architectures.architecture import Architecture, get, image


def built(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: get("pytorchcv.model_provider", "get_model")(name, pretrained=False, **settings)


ARCHITECTURES = {
    name: Architecture(built(name), image(2, 3, size, size))
    for name, size in {
        "resnet20_cifar10": 32,
        "preresnet20_cifar10": 32,
        "sepreresnet20_cifar10": 32,
        "diaresnet20_cifar10": 32,
        "shakeshakeresnet20_2x16d_cifar10": 32,
        "nin_cifar10": 32,
        "shufflenetv2_wd2": 224,
        "fdmobilenet_wd4": 224,
    }.items()
}

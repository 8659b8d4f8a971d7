"""A plain network for 32×32 images, for the command line: `sphereify compare examples/cnn.py:small --data FOLDER`."""

from collections import OrderedDict

from torch import nn


def small(num_classes: int = 10, in_chans: int = 3, width: int = 16) -> nn.Sequential:
    """Six convolutions in three stages, the average of the last maps, a linear classifier."""
    layers: list[tuple[str, nn.Module]] = []
    for stage, factor in enumerate((1, 2, 4), start=1):
        layers += _stage(stage, 2, in_chans, factor * width)
        in_chans = factor * width
    layers += [("average", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]
    return nn.Sequential(OrderedDict([*layers, ("classifier", nn.Linear(in_chans, num_classes))]))


def _stage(stage: int, convolutions: int, inputs: int, filters: int) -> list[tuple[str, nn.Module]]:
    layers: list[tuple[str, nn.Module]] = []
    for number in range(1, convolutions + 1):
        name = f"{stage}_{number}"
        layers += [(f"conv{name}", nn.Conv2d(inputs, filters, 3, padding=1, bias=False))]
        layers += [(f"norm{name}", nn.BatchNorm2d(filters)), (f"relu{name}", nn.ReLU())]
        inputs = filters
    return [*layers, (f"pool{stage}", nn.MaxPool2d(2))]

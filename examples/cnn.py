"""Plain networks for 32×32 images, for the command line: `sphereify compare examples/cnn.py:small --data FOLDER`."""

from collections import OrderedDict

from torch import nn

AUTHORS: dict[str, float] = {"eps": 1e-3, "momentum": 0.001}
"""BatchNorm as the authors' code has it: its averages are those of the last thousand steps."""


def small(num_classes: int = 10, in_chans: int = 3, width: int = 16) -> nn.Sequential:
    """Six convolutions in three stages, the average of the last maps, a linear classifier."""
    layers: list[tuple[str, nn.Module]] = []
    for stage, factor in enumerate((1, 2, 4), start=1):
        layers += _stage(stage, 2, in_chans, factor * width, {})
        in_chans = factor * width
    layers += [("average", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]
    return nn.Sequential(OrderedDict([*layers, ("classifier", nn.Linear(in_chans, num_classes))]))


def cnn9(num_classes: int = 10, in_chans: int = 3, norm: bool = True) -> nn.Sequential:
    """CNN-9 of "Deep Hyperspherical Learning" (NIPS 2017, table 4), with plain convolutions.

    Three stages of three 3×3 convolutions with 64, 96 and 128 filters, a 2×2 max-pooling after each, a layer of 256
    outputs over the 4×4 maps, normalized and without a ReLU, and a classifier without bias.

    Args:
        norm: whether BatchNorm follows each layer.
    """
    layers: list[tuple[str, nn.Module]] = []
    for stage, filters in enumerate((64, 96, 128), start=1):
        layers += _stage(stage, 3, in_chans, filters, AUTHORS if norm else None)
        in_chans = filters
    layers += [("flatten", nn.Flatten()), ("fc6", nn.Linear(16 * in_chans, 256, bias=False))]
    if norm:
        layers += [("norm6", nn.BatchNorm1d(256, **AUTHORS))]
    return nn.Sequential(OrderedDict([*layers, ("classifier", nn.Linear(256, num_classes, bias=False))]))


def _stage(
    stage: int, convolutions: int, inputs: int, filters: int, norm: dict[str, float] | None
) -> list[tuple[str, nn.Module]]:
    layers: list[tuple[str, nn.Module]] = []
    for number in range(1, convolutions + 1):
        name = f"{stage}_{number}"
        layers += [(f"conv{name}", nn.Conv2d(inputs, filters, 3, padding=1, bias=False))]
        if norm is not None:
            layers += [(f"norm{name}", nn.BatchNorm2d(filters, **norm))]  # type: ignore[arg-type]
        layers += [(f"relu{name}", nn.ReLU())]
        inputs = filters
    return [*layers, (f"pool{stage}", nn.MaxPool2d(2))]

"""The plain networks of the papers, and their conversions.

    python -m examples.papers.plain_cnn -o out/plain_cnn

`cnn` is the VGG-like network of three stages (CNN-3, 9, 18, 45, 60, 69), `resnet32` the residual one. Nothing in them
is hyperspherical: SphereNet and SphereResNet v1 and v2 are conversions. The program converts each of them and lists
what became of its layers; it trains nothing, and needs no data.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from examples.papers.report import finish, markdown, parse, picture
from sphereify import sphereify
from sphereify.convert import ConversionPlan

BATCHNORM = {"eps": 1e-3}
"""The authors' BatchNorm, except for the running averages: theirs have a momentum of .001 (in torch's sense) and lag a
thousand steps behind the weights, so that tests before the first fall of the rate say little. Here it is 0.1."""


def cnn(
    classes: int = 10,
    *,
    depth: int = 9,
    filters: Sequence[int] = (64, 96, 128),
    features: int = 256,
    norm: bool = True,
    relu: bool = True,
) -> nn.Sequential:
    """Three stages of depth/3 convolutions of 3×3 and a 2×2 max-pooling, a layer over the 4×4 maps, a classifier.

    Args:
        classes: outputs of the classifier, which has no bias.
        depth: convolutions of the stages; a multiple of 3.
        filters: of each convolution, a number a stage.
        features: outputs of the layer before the classifier, which has no ReLU.
        norm, relu: whether BatchNorm and ReLU follow each convolution.

    Shape:
        images (B, 3, 32, 32) -> logits (B, classes)
    """
    layers: list[tuple[str, nn.Module]] = []
    inputs = 3
    for stage, outputs in enumerate(filters, start=1):
        for number in range(1, depth // 3 + 1):
            name = f"{stage}_{number}"
            layers += [(f"conv{name}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))]
            layers += [(f"norm{name}", nn.BatchNorm2d(outputs, **BATCHNORM))] if norm else []
            layers += [(f"relu{name}", nn.ReLU())] if relu else []
            inputs = outputs
        layers += [(f"pool{stage}", nn.MaxPool2d(2))]
    layers += [("flatten", nn.Flatten()), ("fc6", nn.Linear(16 * inputs, features, bias=False))]
    layers += [("norm6", nn.BatchNorm1d(features, **BATCHNORM))] if norm else []
    network = nn.Sequential(OrderedDict([*layers, ("classifier", nn.Linear(features, classes, bias=False))]))
    return _started(network)


class Unit(nn.Module):
    """Two 3×3 convolutions around a shortcut, which is a 1×1 convolution where width or resolution changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs, **BATCHNORM)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs, **BATCHNORM)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


class ResNet32(nn.Module):
    """A convolution, three stages of five units, the average of the maps, a classifier.

    Shape:
        images (B, 3, 32, 32) -> logits (B, classes)
    """

    def __init__(self, classes: int, filters: Sequence[int]):
        super().__init__()
        self.conv = nn.Conv2d(3, filters[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(filters[0], **BATCHNORM)
        units, inputs = [], filters[0]
        for stage, outputs in enumerate(filters):
            for number in range(5):
                units += [Unit(inputs, outputs, stride=2 if stage and not number else 1)]
                inputs = outputs
        self.units = nn.Sequential(*units)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.units(F.relu(self.norm(self.conv(x))))
        return self.classifier(maps.mean((2, 3)))


def resnet32(classes: int = 10, *, filters: Sequence[int] = (96, 192, 384)) -> nn.Module:
    """`ResNet32` with the widths of the authors' code."""
    return _started(ResNet32(classes, filters))


def _started(network: nn.Module) -> nn.Module:
    """Draw filters from N(0, 2/fan_in), as the authors do."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    return network


def wide(filters: Sequence[int], factor: float) -> tuple[int, ...]:
    """The numbers of filters times a factor; at least two."""
    return tuple(max(2, round(factor * number)) for number in filters)


NETWORKS = {f"CNN-{depth}": partial(cnn, depth=depth) for depth in (3, 9, 18, 45, 60, 69)} | {"ResNet-32": resnet32}
CONVERSIONS = {"v1": {"operator": "cosine"}, "v2": {"operator": "cosine", "skip_shortcuts": True}}
"""Options of the two versions in section 4.6, which differ where a shortcut has a convolution."""


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, argv, needs_data=False)
    rows, document, counts = [], {}, {}
    for name, build in NETWORKS.items():
        network = build(filters=(4, 6, 8)) if args.scale == "quick" else build()
        for version, options in CONVERSIONS.items():
            if version == "v2" and name != "ResNet-32":
                continue  # no shortcuts: the same as v1
            plan: ConversionPlan = sphereify(network, **options).conversion_plan
            kept = [d.name for d in plan.decisions if d.action == "keep"]
            own = sum(p.numel() for p in network.parameters())
            label = f"{name} {version}" if name == "ResNet-32" else name
            rows += [[label, f"{own / 1e6:.2f}", str(len(plan.converted)), ", ".join(kept) or "none"]]
            document[label] = {"parameters": own, "converted": [d.name for d in plan.converted], "kept": kept}
            counts[label] = len(plan.converted)
    table = markdown(["", "parameters, millions", "layers converted", "layers kept"], rows)
    figure, axes = picture(height=3)
    axes.barh(list(counts), list(counts.values()))
    axes.invert_yaxis()
    axes.set_xlabel("layers converted")
    finish(args, "plain_cnn", table, figure, {"networks": document})


if __name__ == "__main__":
    main()

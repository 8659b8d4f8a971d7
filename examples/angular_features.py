"""The effect of an angular margin on features, drawn in a plane.

A small CNN squeezes handwritten digits through two numbers before it classifies them. Its plain softmax classifier is
converted into angular heads, every network is trained in the same way from the same start, and the two numbers of each
test image are drawn: a panel for each head, a colour for each class, a ray along each class weight.

    python examples/angular_features.py                 # five heads, three seeds; draws angular_features.png
    python examples/angular_features.py --imbalanced    # two rare classes, with and without hyperspherical energy
    python examples/angular_features.py --quick         # two epochs, one seed: shows that it runs
"""

import argparse
import math
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify import AngularLoss, HypersphericalEnergy, param_groups, sphereify
from sphereify.datasets import load_data
from sphereify.nn import AngularHead, MarginAnnealing
from sphereify.plots import new_figure, save_figure

HEADS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "W-Softmax, cosine": {"head": "w-softmax"},
    "A-Softmax, m=4": {"head": "a-softmax", "margin": 4},
    "W-Softmax, linear": {"head": "w-softmax", "operator": "linear"},
    "GA-Softmax, linear, m=4": {"head": "ga-softmax", "operator": "linear", "margin": 4},
}
ON_OUTPUT = HypersphericalEnergy(hidden_weight=0, output_weight=1)
ON_ALL = HypersphericalEnergy(hidden_weight=1, output_weight=10)
HEADS_AND_ENERGIES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax, energy on output": {"energy": ON_OUTPUT},
    "W-Softmax": {"head": "w-softmax"},
    "W-Softmax, energy on output": {"head": "w-softmax", "energy": ON_OUTPUT},
    "W-Softmax, energy on all layers": {"head": "w-softmax", "energy": ON_ALL},
}
RARE = 2  # the classes 0 and 1, which keep a tenth of their training images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imbalanced", action="store_true", help="two rare classes, with and without energy")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3, help="train each variant so many times")
    parser.add_argument("--quick", action="store_true", help="the same as --epochs 2 --seeds 1")
    parser.add_argument("-o", "--output", default="angular_features.png", help="where the picture goes")
    args = parser.parse_args()
    epochs, seeds = (2, 1) if args.quick else (args.epochs, args.seeds)

    data = load_data("digits", channels=1, img_size=16)
    images, classes = data.train[:]
    variants, columns = HEADS, ["test accuracy, %", "within, °", "between, °"]
    if args.imbalanced:
        variants, columns = HEADS_AND_ENERGIES, ["test accuracy, %", "of rare classes, %", "least weight angle, °"]
        kept = some_rare(classes)
        images, classes = images[kept], classes[kept]

    print(f"| epochs: {epochs}, seeds: {seeds} | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    models = {}
    for name, options in variants.items():
        trained = [train(images, classes, epochs, seed, **options) for seed in range(seeds)]
        measured = [measure(model, *data.test[:]) for model in trained]
        cells = [mean_and_spread([run[column] for run in measured]) for column in columns]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        models[name] = trained[0]
    print(f"drawn: {draw(models, *data.test[:], args.output)}")


class PlaneNet(nn.Module):
    """Three convolutions, two features, ten classes; nothing angular."""

    def __init__(self, width: int = 16):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
            convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.PReLU(outputs)]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * width * 4, 2))
        self.classifier = nn.Linear(2, 10, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def some_rare(classes: Tensor) -> Tensor:
    """The mask of the training images to use: all of the common classes, every tenth of each rare one."""
    kept = classes >= RARE
    for rare in range(RARE):
        kept[(classes == rare).nonzero()[::10]] = True
    return kept


def train(
    images: Tensor, classes: Tensor, epochs: int, seed: int, energy: nn.Module | None = None, **head: Any
) -> PlaneNet:
    torch.manual_seed(seed)
    model: Any = PlaneNet()
    if head:
        model = sphereify(model, include="classifier", **head)  # the convolutions stay as they are
    margin = isinstance(model.classifier, AngularHead) and model.classifier.has_margin
    loss = AngularLoss(model, annealing=MarginAnnealing(start=100, floor=1) if margin else None)

    # Weight decay keeps the features short: long ones make every loss small, whatever the angles.
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.5))
    steps = math.ceil(len(images) / 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, epochs=epochs, steps_per_epoch=steps, pct_start=0.1)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            shift = torch.randint(-1, 2, (2,)).tolist()
            total = loss(model(images[batch].roll(shift, (2, 3))), classes[batch])
            if energy is not None:
                total = total + energy(model)
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def measure(model: PlaneNet, images: Tensor, classes: Tensor) -> dict[str, float]:
    """Accuracies in percent; angles in degrees. A class's direction is the mean of its features at unit length."""
    features = F.normalize(model.features(images))
    right = (model(images).argmax(1) == classes).float()
    directions = F.normalize(torch.stack([features[classes == c].mean(0) for c in range(10)]))
    return {
        "test accuracy, %": 100 * right.mean().item(),
        "of rare classes, %": 100 * right[classes < RARE].mean().item(),
        "within, °": degrees((features * directions[classes]).sum(1)).mean().item(),
        "between, °": nearest(directions).mean().item(),
        "least weight angle, °": nearest(F.normalize(model.classifier.weight)).min().item(),
    }


def nearest(directions: Tensor) -> Tensor:
    """The angle between each direction and the nearest other one."""
    return degrees((directions @ directions.T).fill_diagonal_(-1)).min(1).values


def degrees(cos: Tensor) -> Tensor:
    return cos.clamp(-1, 1).acos().rad2deg()


def mean_and_spread(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


@torch.no_grad()
def draw(models: dict[str, PlaneNet], images: Tensor, classes: Tensor, path: str) -> Any:
    figure, panels = new_figure(width=3 * len(models), height=3.3, ncols=len(models))
    for panel, (name, model) in zip(panels, models.items(), strict=True):
        features = model.features(images)
        reach = features.norm(dim=1).max().item()
        for c, direction in enumerate(F.normalize(model.classifier.weight)):
            x, y = (reach * direction).tolist()
            panel.plot([0, x], [0, y], color=f"C{c}", linewidth=0.8)
            panel.text(1.1 * x, 1.1 * y, str(c), color=f"C{c}", ha="center", va="center")
            panel.scatter(*features[classes == c].T, s=4, color=f"C{c}", linewidths=0)
        panel.set(title=name, aspect="equal", xlim=(-1.2 * reach, 1.2 * reach), ylim=(-1.2 * reach, 1.2 * reach))
        panel.axis("off")
    return save_figure(figure, path)


if __name__ == "__main__":
    main()

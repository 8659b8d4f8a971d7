"""Hyperspherical energy on a plain network: nothing is converted, one term is added to the loss.

A plain CNN learns handwritten digits from few images, once without and once with the energy of its convolutions and its
classifier (MHE, NIPS 2018) beside the cross-entropy. The same start and the same batches for both, several seeds.

    python examples/energy_alone.py            # five seeds
    python examples/energy_alone.py --quick    # one seed, two epochs: shows that it runs
"""

import argparse
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify import HypersphericalEnergy
from sphereify.datasets import load_data

ENERGY = HypersphericalEnergy(s=1, hidden_weight=1, output_weight=1)
WEIGHTS = (0.0, 1.0)  # weight of the energy in the loss
TRAINING_IMAGES = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5, help="train each so many times")
    parser.add_argument("--quick", action="store_true", help="the same as --epochs 2 --seeds 1")
    args = parser.parse_args()
    epochs, seeds = (2, 1) if args.quick else (args.epochs, args.seeds)

    data = load_data("digits", channels=1, img_size=16)
    images, classes = (part[:TRAINING_IMAGES] for part in data.train[:])
    layers = [row.layer for row in ENERGY.report(plain_network(0)).layers]
    print(f"| epochs: {epochs}, seeds: {seeds} | test accuracy, % | {' | '.join(f'energy of {n}' for n in layers)} |")
    print("|---" * (2 + len(layers)) + "|")
    for weight in WEIGHTS:
        models = [train(images, classes, weight, epochs, seed) for seed in range(seeds)]
        accuracies = [100 * (m(data.test[:][0]).argmax(1) == data.test[:][1]).float().mean().item() for m in models]
        energies = [{row.layer: row.energy for row in ENERGY.report(m).layers} for m in models]
        cells = [mean_and_spread(accuracies)] + [f"{mean(run[n] for run in energies):.3f}" for n in layers]
        print(f"| {'with' if weight else 'without'} | {' | '.join(cells)} |", flush=True)


def plain_network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 32), (32, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def train(images: Tensor, classes: Tensor, weight: float, epochs: int, seed: int) -> nn.Module:
    model = plain_network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(50):
            loss = F.cross_entropy(model(images[batch]), classes[batch])
            if weight:
                loss = loss + weight * ENERGY(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def mean_and_spread(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()

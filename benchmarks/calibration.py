"""How much a converted network keeps of a trained one: without training, with steps, and in the first iterations.

    python benchmarks/plain_networks.py --data CIFAR10 --output data/plain        # trains the networks, once
    python benchmarks/calibration.py --data CIFAR10 --plain data/plain            # the tables
    python benchmarks/calibration.py --data CIFAR10 --plain data/plain --finetune --networks resnet20
    python benchmarks/calibration.py --resnet18                                   # time and memory at 224 pixels

Calibration images are training images; accuracies are of the test images. Seconds in the tables are those of the
processor, all cores together, which other work on the machine changes little.
"""

import argparse
import copy
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from plain_networks import NETWORKS, Images, accuracy, cifar, digits, shifted
from torch import nn

from sphereify import calibrate, param_groups, sphereify
from sphereify.calibration.distillation import distill


def statistics_only(network: nn.Module, batches: list[torch.Tensor]) -> None:
    """Take the BatchNorm statistics of the inputs, and change nothing else."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    network.train()
    with torch.no_grad():
        for batch in batches:
            network(batch)
    network.eval()


def table(
    name: str, network: nn.Module, images: Images, batches: list[torch.Tensor], options: argparse.Namespace
) -> None:
    original = accuracy(network, images)
    print(f"\n{name}: original {original:.2%}, {sum(map(len, batches))} calibration images")
    print("| operator | copied | statistics | least squares | + steps | share kept | CPU seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for operator in options.operators:
        copied = sphereify(network, operator=operator)
        plain = accuracy(copied, images)
        statistics_only(copied, batches)
        renewed = accuracy(copied, images)
        converted = sphereify(network, operator=operator)
        began = time.process_time()
        calibrate(converted, network, batches)
        first = time.process_time() - began
        solved = accuracy(converted, images)
        began = time.process_time()
        distill(converted, network, batches, steps=options.steps)
        second = first + time.process_time() - began
        stepped = accuracy(converted, images)
        print(f"| {operator} | {plain:.2%} | {renewed:.2%} | {solved:.2%} | {stepped:.2%} | "
              f"{solved / original:.1%}, {stepped / original:.1%} | {first:.0f}, {second:.0f} |",
              flush=True)  # fmt: skip


def finetuning(network: nn.Module, images: Images, batches: list[torch.Tensor], options: argparse.Namespace) -> None:
    """Accuracy in the first iterations of training, from copied weights and from a calibration."""
    print("\n| start | seed | " + " | ".join(f"{n} iterations" for n in options.iterations) + " |", flush=True)
    for start, calibration in (("copied", None), ("calibrated", batches)):
        ready = sphereify(network, operator=options.operators[0], calibration=calibration)
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            model = copy.deepcopy(ready).train()
            optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), lr=options.lr)
            told = []
            order = torch.randperm(len(images.train)).split(128)
            for iteration in range(max(options.iterations)):
                rows = order[iteration % len(order)]
                loss = F.cross_entropy(model(shifted(images.train[rows])), images.train_classes[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if iteration + 1 in options.iterations:
                    told.append(f"{accuracy(model, images):.2%}")
            print(f"| {start} | {seed} | " + " | ".join(told) + " |", flush=True)


def resnet18(images: int) -> None:
    from torchvision.models import resnet18 as make

    torch.manual_seed(0)
    network = make().eval()
    batches = list(torch.randn(images, 3, 224, 224).split(32))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    began = time.perf_counter()
    calibration = calibrate(sphereify(network), network, batches, on_layer=lambda name, r2: print(f"{name}: {r2:.3f}"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"resnet18, {images} images at 224: {len(calibration.layers)} layers, {time.perf_counter() - began:.0f} s, "
          f"peak {peak:.1f} GiB of the process, {before:.1f} GiB before")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10")
    parser.add_argument("--plain", type=Path, default=Path("data/plain"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--operators", nargs="+", default=["cosine", "linear", "sigmoid"])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--finetune", action="store_true")
    parser.add_argument("--iterations", nargs="+", type=int, default=[50, 100, 200, 390])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--resnet18", action="store_true")
    options = parser.parse_args()
    if options.resnet18:
        resnet18(min(options.images, 512))
        return
    for name in options.networks:
        images = digits() if name == "vit" else cifar(options.data)
        network = NETWORKS[name]()
        network.load_state_dict(torch.load(options.plain / f"{name}.pt"))
        network.eval()
        drawn = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))[: options.images]
        batches = list(images.train[drawn].split(128))
        if options.finetune:
            finetuning(network, images, batches, options)
        else:
            table(name, network, images, batches, options)


if __name__ == "__main__":
    main()

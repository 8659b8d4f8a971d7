"""Fine-tuning of a trained network and of its conversions, alike: accuracy in the first iterations and at the end.

    python -m benchmarks.plain_networks --data CIFAR10 --output data/plain              # trains the networks, once
    python -m benchmarks.finetuning --data CIFAR10 --plain data/plain --output data/finetuned
    python -m benchmarks.finetuning … --device cuda --jobs 12      # all runs side by side on a GPU

Each variant is trained from the same weights with the same batches: SGD with momentum or AdamW, a short warm-up, a
cosine schedule, flips and shifts. "original" is the plain network, "standardised" the same behind per-image contrast
standardisation, the rest are conversions; those that are "morphed" start as the original and move to the conversion
over 60 % of the steps. A finished run is not repeated; the table is made from all of them.
"""

import argparse
import copy
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.plain_networks import NETWORKS, Images, accuracy, cifar, shifted, trained, weights_of
from benchmarks.record import check_setting
from sphereify import calibrate, param_groups, sphereify
from sphereify.files import write_text
from sphereify.training.corruptions import corrupt
from sphereify.training.morph import Morph, start_as_original
from sphereify.training.robustness import ContrastStandardized

VARIANTS = {
    # name: (conversion or None, calibrated, further settings)
    "original": (None, False, {}),
    "standardised": (None, False, {}),
    "copied ρ=0": ({"radius": 0.0}, False, {}),
    "copied ρ=2": ({"radius": 2.0}, False, {}),
    "copied ρ=4": ({"radius": 4.0}, False, {}),
    "calibrated ρ=0": ({"radius": 0.0}, True, {}),
    "calibrated ρ=2": ({"radius": 2.0}, True, {}),
    "calibrated ρ=4": ({"radius": 4.0}, True, {}),
    "calibrated ρ learned": ({"radius": 2.0, "learn_radius": True}, True, {}),
    "calibrated ρ=2, teacher": ({"radius": 2.0}, True, {"teacher": True}),
    "calibrated ρ=2, half the rate": ({"radius": 2.0}, True, {"rate": 0.5}),
    "calibrated ρ=4, half the rate": ({"radius": 4.0}, True, {"rate": 0.5}),
    "calibrated ρ=2, decayed filters": ({"radius": 2.0}, True, {"decay": True}),
    "morphed ρ=0": ({"radius": 0.0}, False, {"morph": 0.6}),
    "morphed ρ=2": ({"radius": 2.0}, False, {"morph": 0.6}),
    "morphed ρ=4": ({"radius": 4.0}, False, {"morph": 0.6}),
    "calibrated tanh ρ=1": ({"magnitude": "tanh"}, True, {}),
    "morphed tanh ρ=1": ({"magnitude": "tanh"}, False, {"morph": 0.6}),
}
SETTING = ("data", "epochs", "lr", "warmup", "decay", "adam", "train_images", "test_images", "images")
"""Options on which an accuracy depends that the name of its run does not tell."""
CHECKPOINTS = (50, 100, 200)
PROBES = {"contrast .2": ("contrast", 3), "noise .06": ("noise", 2), "blur .6": ("blur", 2)}


def start(variant: str, network: nn.Module, images: Images, options: argparse.Namespace) -> nn.Module:
    """The network of a variant before fine-tuning; a calibration is kept in the output folder."""
    conversion, calibrated, _ = VARIANTS[variant]
    if conversion is None:
        if variant == "original":
            return copy.deepcopy(network)
        centred = images.train[::10] - images.train[::10].mean((2, 3), keepdim=True)
        deviation = float(centred.square().mean((1, 2, 3)).sqrt().mean())
        return ContrastStandardized(copy.deepcopy(network), deviation)
    model = sphereify(network, operator=options.operator, **conversion)
    if not calibrated:
        return model
    file = options.output / f"{options.network}-{options.operator}-{variant.partition(',')[0]}.pt".replace(" ", "_")
    if not file.exists():
        drawn = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))[: options.images]
        calibrate(model, network, list(images.train[drawn].split(128)))
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file))
    return model


def finetune(variant: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Accuracies of one run: at checkpoints, after each epoch, and under the probes at the end."""
    images = load_images(options)
    network = trained(options.network, weights_of(options.network, options.plain))
    model = start(variant, network, images, options)
    settings = VARIANTS[variant][2]
    if settings.get("morph"):
        start_as_original(model, network, images.train[:256].split(64))
    model = model.to(options.device)
    images = Images(*(tensor.to(options.device) for tensor in images))
    accuracies = {"start": accuracy(model, images)}
    teacher = network.to(options.device) if settings.get("teacher") else None
    rate = options.lr * settings.get("rate", 1.0)
    groups = list(model.parameters()) if settings.get("decay") else param_groups(model, weight_decay=options.decay)
    if options.adam:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=options.decay)
    else:
        decay = options.decay if settings.get("decay") else 0.0  # groups of `param_groups` have their own
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, weight_decay=decay)
    per_epoch = len(images.train) // 128
    steps, warmup = options.epochs * per_epoch, options.warmup
    morph = Morph([model], settings.get("morph", 0) * steps)

    def schedule(step: int) -> float:
        rise = min(1.0, (step + 1) / (warmup * steps)) if warmup else 1.0
        return rise * 0.5 * (1 + math.cos(math.pi * step / steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    torch.manual_seed(seed)
    began, step = time.perf_counter(), 0
    for epoch in range(options.epochs):
        order = torch.randperm(len(images.train)).to(options.device)
        for rows in order.split(128)[:per_epoch]:
            model.train()
            x = shifted(images.train[rows])
            logits = model(x)
            loss = F.cross_entropy(logits, images.train_classes[rows])
            if teacher is not None:
                with torch.no_grad():
                    target = (teacher(x) / 2).softmax(1)
                loss = 0.5 * loss + 0.5 * 4 * F.kl_div((logits / 2).log_softmax(1), target, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            morph.advance(step)
            if step in CHECKPOINTS:
                accuracies[f"{step} iterations"] = accuracy(model, images)
        accuracies[f"epoch {epoch + 1}"] = accuracy(model, images)
        print(f"{variant}, seed {seed}: {accuracies}, {time.perf_counter() - began:.0f} s", flush=True)
    accuracies["seconds"] = time.perf_counter() - began
    pixels = images.test.cpu().add(1).div(2)
    for name, (corruption, strength) in PROBES.items():
        probe = corrupt(pixels, corruption, strength).mul(2).sub(1).to(options.device)
        accuracies[name] = accuracy(model, Images(images.train, images.train_classes, probe, images.test_classes))
    return accuracies


def load_images(options: argparse.Namespace) -> Images:
    """The images that the options ask for, decoded once and kept as bytes in the output folder."""
    file = options.output / "images.pt"
    if not file.exists():
        images = cifar(options.data)
        torch.save([t.add(1).mul(127.5).round().byte() if t.dim() > 1 else t for t in images], file)
    stored = Images(*torch.load(file))
    train, test = (
        torch.randperm(len(all_), generator=torch.Generator().manual_seed(1))[:number] if number else slice(None)
        for all_, number in ((stored.train, options.train_images), (stored.test, options.test_images))
    )
    return Images(
        stored.train[train].float().div(127.5).sub(1),
        stored.train_classes[train],
        stored.test[test].float().div(127.5).sub(1),
        stored.test_classes[test],
    )


def table(options: argparse.Namespace) -> str:
    """Mean and spread over the seeds of each variant that has been run."""
    rows = []
    for variant in options.variants:
        runs = [
            json.loads(f.read_text()) for seed in range(options.seeds) if (f := result(variant, seed, options)).exists()
        ]
        if not runs:
            continue
        if not rows:
            rows = [f"| start | seeds | {' | '.join(runs[0])} |", f"|{'---|' * (2 + len(runs[0]))}"]
        cells = []
        for name in runs[0]:
            values = [run[name] for run in runs]
            spread = f" ± {torch.tensor(values).std():.2%}" if len(values) > 1 and name != "seconds" else ""
            mean = sum(values) / len(values)
            cells.append(f"{mean:.0f}" if name == "seconds" else f"{mean:.2%}{spread}")
        rows.append(f"| {variant} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def result(variant: str, seed: int, options: argparse.Namespace) -> Path:
    return options.output / f"{options.network}-{options.operator}-{variant}-{seed}.json".replace(" ", "_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--plain", type=Path, default=Path("data/plain"))
    parser.add_argument("--output", type=Path, default=Path("data/finetuned"))
    parser.add_argument("--network", choices=[name for name in NETWORKS if name != "vit"], default="resnet20")
    parser.add_argument("--operator", default="cosine")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the run in which the rate rises")
    parser.add_argument("--decay", type=float, default=5e-4)
    parser.add_argument("--adam", action="store_true", help="AdamW in place of SGD with momentum")
    parser.add_argument("--train-images", type=int, help="number of images to train on; default: all")
    parser.add_argument("--test-images", type=int, help="number of images to test on; default: all")
    parser.add_argument("--images", type=int, default=2048, help="for the calibration")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each in a process")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help="run this one only")
    parser.add_argument("--prepare", action="store_true", help="decode the images and calibrate only")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.one:
        variant, seed = options.one[0], int(options.one[1])
        write_text(result(variant, seed, options), json.dumps(finetune(variant, seed, options), indent=1) + "\n")
        return
    network = trained(options.network, weights_of(options.network, options.plain))
    file = options.output / "setting.json"
    kept = sorted(set(options.output.iterdir()) - {file})
    check_setting(file, options, SETTING, {options.network: network}, kept)
    images = load_images(options)
    for variant in options.variants:
        start(variant, network, images, options)
    if options.prepare:
        return
    waiting = [(v, s) for s, v in itertools.product(range(options.seeds), options.variants)
               if not result(v, s, options).exists()]  # fmt: skip
    running: list[subprocess.Popen] = []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            variant, seed = waiting.pop(0)
            call = [sys.executable, "-m", "benchmarks.finetuning", *sys.argv[1:], "--one", variant, str(seed)]
            running.append(subprocess.Popen(call))
        running = [process for process in running if process.poll() is None]
        time.sleep(0.2)
    print(table(options))


if __name__ == "__main__":
    main()

"""How much a converted network keeps of a trained one: without training, with steps, and in the first iterations.

    python -m benchmarks.plain_networks --data CIFAR10 --output data/plain        # the networks, once
    python -m benchmarks.calibration --data CIFAR10 --plain data/plain            # the table, resumable, hours
    python -m benchmarks.calibration --data CIFAR10 --test-images 2000 --strengths 3 --results data/short.json
    python -m benchmarks.calibration --data CIFAR10 --plain data/plain --finetune --networks resnet20
    python -m benchmarks.calibration --resnet18                                   # time and memory at 224 pixels

Calibration images are training images without their labels; accuracies are of test images. Each network and operator
has a row for a radius of 0, one for the radius that an agreement of 0.98 chooses, and one for this with some steps.
The rival is the original behind a standardisation of each image's contrast. Networks with depthwise convolutions have
further rows in which these are kept. Seconds are those of the processor, all cores together, which other work on the
machine changes little. Finished rows are kept in a JSON file and are not computed again.
"""

import argparse
import copy
import itertools
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_networks import NETWORKS, Images, accuracy, cifar, digits, shifted, trained, weights_of
from benchmarks.record import check_setting
from sphereify import calibrate, param_groups, sphereify
from sphereify.calibration.agreement import choose_radius
from sphereify.calibration.distillation import distill
from sphereify.training.corruptions import CORRUPTIONS, corrupt
from sphereify.training.robustness import ContrastStandardized, deviations_of

OPERATORS = ("cosine", "linear", "sigmoid", "learnable-sigmoid")
HARD_CONTRAST = 3
"""The strength of the corruption that leaves a fifth of the contrast."""
Row = dict[str, Any]
SETTING = ("images", "clean_images", "test_images", "strengths", "agreement")
"""Options on which a row depends that its name does not tell; and the data, where a network needs a folder."""


class Benchmark:
    """The rows of the table, computed once and kept in a file."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.rows: dict[str, Row] = json.loads(options.results.read_text()) if options.results.exists() else {}

    def run(self, name: str, network: nn.Module, images: Images, batches: list[Tensor]) -> None:
        """All rows of a network."""
        tests = Tests(images, self.options)
        deviation = float(deviations_of(torch.cat(batches)).mean())
        self.row(f"{name} original", lambda: tests.of(network))
        self.row(f"{name} standardised", lambda: tests.of(ContrastStandardized(network, deviation)))
        separable = any(getattr(module, "groups", 1) > 1 for module in network.modules())
        for operator, kept in itertools.product(self.options.operators, (False, True) if separable else (False,)):
            how = {"operator": operator, "skip_depthwise": kept}
            title = f"{name} {operator}" + ", depthwise kept," * kept
            self.row(f"{title} ρ=0", lambda how=how: self.calibrated(network, batches, how, tests))
            chosen = f"{title} ρ chosen"
            self.row(chosen, lambda how=how, key=chosen: self.chosen(network, batches, how, tests, key))
            for jitter in (False, True) if self.options.steps else ():
                self.row(
                    f"{title} + {self.options.steps} steps" + " with contrast jitter" * jitter,
                    lambda key=chosen, jitter=jitter: self.stepped(network, batches, tests, key, jitter),
                )

    def row(self, key: str, compute: Callable[[], Row]) -> None:
        """Compute a row unless it is there already."""
        if key not in self.rows:
            self.rows[key] = compute()
            self.options.results.parent.mkdir(parents=True, exist_ok=True)
            self.options.results.write_text(json.dumps(self.rows, indent=1, ensure_ascii=False))
            print(key, {k: v for k, v in self.rows[key].items() if k != "trials"}, flush=True)

    def calibrated(self, network: nn.Module, batches: list[Tensor], how: Row, tests: "Tests") -> Row:
        """A radius of 0."""
        converted = sphereify(network, **how)
        began = time.process_time()
        calibration = calibrate(converted, network, batches)
        seconds = time.process_time() - began
        return {**tests.of(converted), "seconds": seconds, "r2": mean(calibration.r2)}

    def chosen(self, network: nn.Module, batches: list[Tensor], how: Row, tests: "Tests", key: str) -> Row:
        """The radius that agreement chooses."""
        began = time.process_time()
        choice = choose_radius(network, batches, agreement=self.options.agreement, **how)
        seconds = time.process_time() - began
        torch.save((choice.options, choice.network.state_dict()), self.file(key))
        return {
            **tests.of(choice.network),
            "seconds": seconds,
            "radius": choice.radius,
            "own radii": not choice.chosen.is_uniform,
            "agreement": choice.agreement,
            "r2": mean(choice.calibration.r2),
            "trials": [(t.described, t.agreement, t.contrast, mean(t.r2)) for t in choice.trials],
        }

    def stepped(self, network: nn.Module, batches: list[Tensor], tests: "Tests", key: str, jitter: bool) -> Row:
        """The network of the chosen radius after optimizer steps."""
        chosen, state = torch.load(self.file(key), weights_only=False)
        converted = sphereify(network, **chosen)
        converted.load_state_dict(state)
        began = time.process_time()
        distill(converted, network, batches, steps=self.options.steps, contrast_jitter=jitter)
        seconds = self.rows[key]["seconds"] + time.process_time() - began
        return {**tests.of(converted), "seconds": seconds, "radius": self.rows[key]["radius"]}

    def file(self, key: str) -> Path:
        return self.options.results.with_name(f"{self.options.results.stem}-{key.replace(' ', '-')}.pt")

    def print(self) -> None:
        """The table of all rows so far; shares in brackets are of the original's accuracy on clean images."""
        names = list(CORRUPTIONS)
        print(
            f"\n| network | ρ | clean | contrast .2 | mean of {len(names)} | {' | '.join(names)} | agreement | CPU s |"
        )
        print("|---" * (7 + len(names)) + "|")
        for key, row in self.rows.items():
            original = self.rows[f"{key.split()[0]} original"]["clean"]
            share = "" if key.endswith("original") else f" ({row['clean'] / original:.1%})"
            radius = f"{row['radius']:.3g}" + ("*" if row.get("own radii") else "") if "radius" in row else ""
            numbers = [f"{row[name]:.1%}" for name in ("contrast .2", "mean", *names)]
            agreement = f"{row['agreement']:.1%}" if "agreement" in row else ""
            seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
            print(f"| {key} | {radius} | {row['clean']:.2%}{share} | {' | '.join(numbers)} | {agreement} | {seconds} |")
        print("* the largest of the radii of the layers' own")


class Tests:
    """Clean and corrupted test images, the same ones for each network."""

    def __init__(self, images: Images, options: argparse.Namespace):
        order = torch.randperm(len(images.test), generator=torch.Generator().manual_seed(1))
        clean, few = order[: options.clean_images], order[: options.test_images]
        self.clean = images.test[clean], images.test_classes[clean]
        pixels, self.classes = (images.test[few] + 1) / 2, images.test_classes[few]
        strengths = {(name, strength) for name in CORRUPTIONS for strength in options.strengths}
        self.strengths = options.strengths
        self.corrupted = {
            (name, strength): corrupt(pixels, name, strength) * 2 - 1
            for name, strength in sorted({*strengths, ("contrast", HARD_CONTRAST)})
        }

    def of(self, network: nn.Module) -> Row:
        """Accuracies: of clean images, at a fifth of the contrast, of each corruption, and their mean."""
        shares = {k: accuracy(network, _images(x, self.classes)) for k, x in self.corrupted.items()}
        rows = {name: mean({s: shares[name, s] for s in self.strengths}) for name in CORRUPTIONS}
        return {
            "clean": accuracy(network, _images(*self.clean)),
            "contrast .2": shares["contrast", HARD_CONTRAST],
            **rows,
            "mean": mean(rows),
        }


def _images(x: Tensor, classes: Tensor) -> Images:
    return Images(x[:0], classes[:0], x, classes)


def mean(values: dict[Any, float]) -> float:
    return sum(values.values()) / len(values)


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
    parser.add_argument(
        "--data", type=Path, help="folder of CIFAR-10, or a file of its images as torch.save wrote them"
    )
    parser.add_argument("--plain", type=Path, default=Path("data/plain"))
    parser.add_argument("--results", type=Path, default=Path("data/calibration.json"), help="finished rows")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--images", type=int, default=2048, help="for calibration")
    parser.add_argument("--clean-images", type=int, default=None, help="test images without corruption; default: all")
    parser.add_argument("--test-images", type=int, default=None, help="test images to corrupt; default: all")
    parser.add_argument("--strengths", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="of the corruptions")
    parser.add_argument("--agreement", type=float, default=0.98)
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
    benchmark = Benchmark(options)
    networks = {name: trained(name, weights_of(name, options.plain)) for name in options.networks}
    if not options.finetune:
        names = (*SETTING, "data") if options.data else SETTING
        file = options.results.with_suffix(".setting.json")
        check_setting(file, options, names, networks, [options.results])
    for name, network in networks.items():
        images = digits() if name == "vit" else cifar10(options.data)
        drawn = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))[: options.images]
        batches = list(images.train[drawn].split(64))
        if options.finetune:
            finetuning(network, images, batches, options)
        else:
            benchmark.run(name, network, images, batches)
    if not options.finetune:
        benchmark.print()


def cifar10(path: Path) -> Images:
    """The images of a folder, or of a file that holds them as pixels from 0 to 255."""
    if path.is_dir():
        return cifar(path)
    stored = torch.load(path)
    train, test = (stored[part].float().div_(127.5).sub_(1) for part in ("train", "test"))
    return Images(train, stored["train_classes"], test, stored["test_classes"])


if __name__ == "__main__":
    main()

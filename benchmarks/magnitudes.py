"""What each magnitude h(‖x‖) keeps of a trained network, and what it costs; and the magnitudes from scratch.

    python -m benchmarks.magnitudes --data CIFAR10 --plain data/plain          # the table, resumable, half an hour
    python -m benchmarks.magnitudes --data CIFAR10 --cost --results cost.json  # only the cost of a step
    python -m benchmarks.magnitudes --data CIFAR10 --scratch -o out/magnitudes # CNN-9 from scratch, resumable, hours

The ResNet-20 of `plain_networks.py`, converted to cosine with each magnitude and calibrated on training images without
labels: accuracy on clean test images, at a fifth of the contrast, and under seven corruptions, of random test images;
and the processor time of a training step beside that of the original, in rounds that take turns. Finished rows are kept
in a JSON file. `finetuning.py` has the variants that start as the original and move away from it (`morph`).
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.calibration import Tests, cifar10, mean
from benchmarks.plain_networks import trained, weights_of
from benchmarks.record import check_setting
from sphereify import calibrate, sphereify

ROWS: dict[str, dict[str, Any]] = {
    "sphere": {},
    "sphere, radius 1": {"radius": 1.0},
    "sphere, radius 2": {"radius": 2.0},
    "sphere, radius 4": {"radius": 4.0},
    **{
        f"{form}, ρ = {rho:g}{', of the data' if mean == 'data' else ''}": {
            "magnitude": form,
            "magnitude_radius": rho,
            "magnitude_mean": mean,
        }
        for mean in ("input", "data")
        for form in ("ball", "tanh", "segment", "log", "mix")
        for rho in (1.0, 2.0)
    },
    "log": {"magnitude": "log"},
    "mix": {"magnitude": "mix"},
    "linear": {"magnitude": "linear"},
    "linear, weighted": {"magnitude": "linear", "weighted": True},
    **{
        f"{form}, ρ = {rho:g}, radius 2": {"magnitude": form, "magnitude_radius": rho, "radius": 2.0}
        for form in ("ball", "tanh")
        for rho in (1.0, 2.0)
    },
}
"""Name -> options of the conversion."""
SCRATCH = (
    *("sphere", "sphere, radius 2", "ball, ρ = 1", "ball, ρ = 2", "tanh, ρ = 1", "tanh, ρ = 2", "segment, ρ = 1"),
    *("log", "mix", "linear", "linear, weighted", "tanh, ρ = 1, of the data", "tanh, ρ = 1, radius 2"),
)
"""The rows that are trained from scratch."""
ROUNDS, BATCH = 7, 64
SETTING = ("data", "operator", "cost", "images", "clean_images", "test_images", "strengths")
"""Options on which a row depends that its name does not tell."""


def table(options: argparse.Namespace) -> None:
    """All rows that are not there yet, and the table."""
    rows: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    network = trained("resnet20", weights_of("resnet20", options.plain))
    file = options.results.with_suffix(".setting.json")
    check_setting(file, options, SETTING, {"resnet20": network}, [options.results])
    images = cifar10(options.data)
    drawn = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))[: options.images]
    batches = list(images.train[drawn].split(128))
    tests = None if options.cost else Tests(images, options)
    for name, conversion in {"original": None, **{name: ROWS[name] for name in options.rows}}.items():
        if name in rows:
            continue
        model = network
        row: dict[str, Any] = {"cost": 1.0}
        if conversion is not None:
            model = sphereify(network, operator=options.operator, **conversion)
            row["cost"] = cost(model, network, images.train[:BATCH])
        if tests is not None:
            if conversion is not None:
                row["r2"] = mean(calibrate(model, network, batches).r2)
            row |= tests.of(model)
        rows[name] = row
        options.results.parent.mkdir(parents=True, exist_ok=True)
        options.results.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        print(name, {key: round(value, 4) for key, value in row.items()}, flush=True)
    print("\n| magnitude | clean | contrast .2 | seven corruptions | R² | training step |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        shares = [f"{row[key]:.1%}" if key in row else "" for key in ("clean", "contrast .2", "mean")]
        r2 = f"{row['r2']:.3f}" if "r2" in row else ""
        print(f"| {name} | {' | '.join(shares)} | {r2} | {row['cost']:.2f} |")


def cost(model: nn.Module, network: nn.Module, x: Tensor) -> float:
    """Median over rounds of the processor time of a training step, divided by that of the original in that round."""
    classes = torch.zeros(len(x), dtype=torch.long)
    modes = [(module, module.training) for one in (model, network) for module in one.modules()]
    states = [{name: tensor.clone() for name, tensor in one.state_dict().items()} for one in (model, network)]
    ratios = []
    for turn in range(ROUNDS + 1):
        seconds = []
        for one in (model, network):
            one.train()
            began = time.process_time()
            F.cross_entropy(one(x), classes).backward()
            seconds.append(time.process_time() - began)
            one.zero_grad(set_to_none=True)
        if turn:  # the first one warms up
            ratios.append(seconds[0] / seconds[1])
    for one, state in zip((model, network), states, strict=True):
        one.load_state_dict(state)
    for module, training in modes:
        module.training = training
    return statistics.median(ratios)


def scratch(argv: list[str]) -> None:
    """CNN-9 with a quarter of the filters, trained from scratch with each magnitude on 20,000 images."""
    from examples.papers.cells import CPU, Cell, Experiment, Scale, run
    from examples.papers.operators_and_losses import options_of, terms_of
    from examples.papers.plain_cnn import cnn, wide

    def cells(scale: Scale) -> list[Cell]:
        build = partial(cnn, filters=wide((64, 96, 128), scale.width), features=wide((256,), scale.width)[0])
        common = options_of("cosine", "softmax") or {}
        plain = Cell("CNN-9", "plain", build, None, terms_of("plain"))
        return [plain, *(Cell("CNN-9", n, build, {**common, **ROWS[n]}, terms_of("cosine")) for n in SCRATCH)]

    scale = replace(CPU, width=1 / 4, train_images=20_000, seeds=3, tests=16)
    run(Experiment("magnitudes", __doc__, cells, cpu=scale), argv)


def main() -> None:
    if "--scratch" in sys.argv:
        return scratch([word for word in sys.argv[1:] if word != "--scratch"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10, or a file with its images")
    parser.add_argument("--plain", type=Path, default=Path("data/plain"))
    parser.add_argument("--results", type=Path, default=Path("data/magnitudes.json"), help="finished rows")
    parser.add_argument("--operator", default="cosine")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--cost", action="store_true", help="only the cost of a step, without any calibration")
    parser.add_argument("--images", type=int, default=2048, help="for the calibration")
    parser.add_argument("--clean-images", type=int, default=4000)
    parser.add_argument("--test-images", type=int, default=1000, help="for each corruption")
    parser.add_argument("--strengths", type=int, nargs="+", default=[3])
    return table(parser.parse_args())


if __name__ == "__main__":
    main()

"""Verification of classes that a network has never seen, by the head that it was trained with.

    python -m benchmarks.verification --data digits -o out/verification-digits                # minutes
    python -m benchmarks.verification --data CIFAR10 -o out/verification-cifar10 [--epochs 20 --train-images 10000]
    python -m benchmarks.verification --data digits -o out/verification-digits --heads softmax a-softmax --seeds 1

Five of ten classes are left out of training, and a small network learns the others with each head, with its
convolutions as they are and with angular ones. ga-softmax has the linear operator, all else the cosine. All images of
the classes left out are compared in pairs. Heads that this version does not have are passed over; what has finished is
not repeated. Writes table.md and results.json.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from examples.cnn import small
from examples.papers.report import hardware, markdown
from sphereify import choices
from sphereify.class_splits import choose_classes, only_classes, without_classes
from sphereify.datasets import Data, choose_images, load_data
from sphereify.errors import SphereifyError
from sphereify.files import write_text
from sphereify.sources import versions
from sphereify.training import Settings, Variant, train_once, trained
from sphereify.training.verification import FALSE_ACCEPT_RATES, verification, write_verification

SOFTMAX = "softmax"
HEADS = (SOFTMAX, "w-softmax", "a-softmax", "ga-softmax", "arcface", "cosface", "sphereface2")
PLAIN, ANGULAR = "plain", "cosine"
CLASSIFIER = "classifier"
"""Name of the classifier in the network of `examples/cnn.py`."""
Row = dict[str, Any]


def variant(convolutions: str, head: str) -> Variant:
    """The network with convolutions and a head of a kind."""
    name = f"{convolutions} {head}"
    if head == SOFTMAX:
        return Variant(name, None if convolutions == PLAIN else {"operator": ANGULAR, "head": "keep"})
    only = {"include": CLASSIFIER} if convolutions == PLAIN else {}
    # With the cosine, ga-softmax is a-softmax.
    curve = {"head_operator": "linear"} if head == "ga-softmax" else {}
    return Variant(name, {"operator": ANGULAR, "head": head, **only, **curve})


def load(options: argparse.Namespace) -> tuple[Data, Data]:
    """The images to train on, and those of the classes that are left out."""
    is_digits = options.data == "digits"
    data = load_data(options.data, channels=1 if is_digits else 3, img_size=options.img_size, in_memory=not is_digits)
    held_out = choose_classes(data.classes, options.hold_out_classes, options.hold_out_seed)
    train, test = without_classes(data, held_out), only_classes(data, held_out)
    if options.train_images:
        train = choose_images(train, "train", options.train_images)
    if options.verified_images:
        test = choose_images(test, "test", options.verified_images)
    return train, test


def run(data: Data, held_out: Data, one: Variant, seed: int, options: argparse.Namespace) -> Row:
    """The results of a network with a seed; they are kept in the folder of its run."""
    folder = options.output / "runs" / f"{one.name}-seed{seed}".replace(" ", "-")
    build = partial(small, num_classes=len(data.classes), in_chans=data.image_size[0], width=options.width)
    settings = Settings(
        epochs=options.epochs, lr=options.lr, batch_size=options.batch_size, opt="adamw", weight_decay=options.decay,
        seed=seed, device=options.device,
    )  # fmt: skip
    result = train_once(build, data, one, settings, output=folder)
    file = folder / "verification.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    if found.get("images") != len(held_out.test):  # type: ignore[arg-type]
        write_verification(verification(trained(build, one, folder), held_out, settings), folder)
        found = json.loads(file.read_text())
    return {
        "seed": seed,
        "accuracy": result.accuracy,
        **{f"TAR at {rate:g}": found["tar"][f"{rate:g}"] for rate in FALSE_ACCEPT_RATES},
        "EER": found["eer"],
        "nearest neighbour": found["neighbour_accuracy"],
    }


def table(found: dict[str, list[Row]]) -> str:
    """Means and standard deviations over the seeds in %, a network in each line."""
    columns = [name for name in next(iter(found.values()))[0] if name != "seed"]
    rows = []
    for name, runs in found.items():
        convolutions, _, head = name.partition(" ")
        rows.append([convolutions, head, *(cell([one[column] for one in runs]) for column in columns)])
    return markdown(["convolutions", "head", *columns], rows)


def cell(shares: list[float | None]) -> str:
    """Mean and standard deviation in %; empty where there are too few pairs."""
    known = [100 * share for share in shares if share is not None]
    if len(known) < len(shares):
        return ""
    deviation = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{deviation}"


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    heads = [head for head in options.heads if head == SOFTMAX or head in choices.HEAD_KINDS]
    absent = [head for head in options.heads if head not in heads]
    if absent:
        print(f"passed over, since this version does not have them: {', '.join(absent)}", file=sys.stderr)
    try:
        data, held_out = load(options)
        found: dict[str, list[Row]] = {}
        for one in (variant(convolutions, head) for convolutions in options.convolutions for head in heads):
            for seed in range(options.seeds):
                found.setdefault(one.name, []).append(run(data, held_out, one, seed, options))
                print(f"{one.name}, seed {seed}: {found[one.name][-1]}", flush=True)
    except SphereifyError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    about = {"arguments": {k: str(v) for k, v in vars(options).items()}, "held_out": held_out.classes,
             "hardware": hardware(), "versions": versions()}  # fmt: skip
    write_text(options.output / "results.json", json.dumps({**about, "networks": found}, indent=1) + "\n")
    write_text(options.output / "table.md", table(found))
    print(table(found), end="")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, or a folder with train/ and test/")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=HEADS)
    parser.add_argument("--convolutions", nargs="+", default=[PLAIN, ANGULAR], choices=(PLAIN, ANGULAR))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hold-out-classes", type=int, default=5)
    parser.add_argument("--hold-out-seed", type=int, help="default: the last classes")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=16, help="filters of the first stage")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--train-images", type=int, help="default: all")
    parser.add_argument("--verified-images", type=int, help="of the classes left out; default: all")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()

"""The first experiment of "Deep Hyperspherical Learning" (NIPS 2017): CNN-9 on CIFAR-10, plain against angular.

    python examples/paper_cifar10.py --data CIFAR10 -o paper                    # table 4: five operators, batch 128
    python examples/paper_cifar10.py --data CIFAR10 -o paper-16 --batch-size 16 # figure 5: BatchNorm, SphereNorm, both
    python examples/paper_cifar10.py --data CIFAR10 -o paper-4 --batch-size 4

CIFAR10 is a folder with train/ and test/, one folder a class. The schedule is the authors', scaled: Adam with 1e-3,
divided by ten after 34/64 and 54/64 of the iterations. What has finished is not repeated when the command is given
again. On a GPU: about 20,000 iterations × 15 runs; on a CPU take --iterations 200 to see that it runs.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cnn import cnn9

from sphereify.datasets import load_data
from sphereify.finetune import Settings, Terms, Variant, compare

OPERATORS = {
    "plain": None,
    "cosine": {"operator": "cosine"},
    "linear": {"operator": "linear"},
    "sigmoid, k=0.3": {"operator": "sigmoid", "k": 0.3},
    "learnable sigmoid": {"operator": "learnable-sigmoid"},
}
NORMS = {
    "plain, BatchNorm": None,
    "linear, BatchNorm": {"operator": "linear", "rescale": "never"},
    "linear, SphereNorm": {"operator": "linear", "norm": "replace"},
    "linear, both": {"operator": "linear", "rescale": "always"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--batch-size", type=int, default=128, help="below 128 the normalizations are compared")
    parser.add_argument("--iterations", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--train-images", type=int)
    parser.add_argument("--test-images", type=int)
    args = parser.parse_args()

    data = load_data(args.data, img_size=32, train_images=args.train_images, test_images=args.test_images)
    epochs = max(1, round(args.iterations / (len(data.train) // args.batch_size)))  # type: ignore[arg-type]
    settings = Settings(
        epochs=epochs,
        batch_size=args.batch_size,
        opt="adam",
        lr=1e-3,
        sched="multistep",
        milestones=(max(1, round(epochs * 34 / 64)), max(1, round(epochs * 54 / 64))),
        warmup_epochs=0,
        weight_decay=5e-4,
        workers=args.workers,
        terms=Terms(label_smoothing=0.01, orthogonality=1e-4),
    )
    chosen = OPERATORS if args.batch_size >= 128 else NORMS
    found = compare(
        partial(cnn9, len(data.classes)), data, [Variant(name, options) for name, options in chosen.items()], settings,
        output=args.output, seeds=args.seeds,
        on_run=lambda name, seed: print(f"{name}, seed {seed}", flush=True),
        on_epoch=lambda epoch: print(f"  epoch {epoch.number}/{epochs}  {epoch.accuracy:.2%}", flush=True),
    )  # fmt: skip
    print(found.markdown())


if __name__ == "__main__":
    main()

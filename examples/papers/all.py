"""Every experiment, one after another, those first that say most for their time.

    python -m examples.papers.all --full --jobs 6 --workers 2 --data CIFAR10 -o out

Takes the options of the experiments; what has finished is not repeated. One that fails does not stop the others.
"""

import sys
from importlib import import_module

from examples.papers.report import parse

ORDER = ("plain_cnn", "conditioning", "operators_and_losses", "batch_size", "depth", "sphere_resnet",
         "minimum_energy", "width", "without_relu", "learnable_k", "gan_energy", "fourier")  # fmt: skip
UNTRAINED = ("plain_cnn", "conditioning", "gan_energy", "fourier")
"""Programs without options such as --jobs, which train no networks of cells."""


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, argv, trains=True)
    scale = [] if args.scale == "cpu" else [f"--{args.scale}"]
    training = [word for name in ("iterations", "seeds", "jobs", "workers") if (value := getattr(args, name))
                for word in (f"--{name}", str(value))]  # fmt: skip
    failed = []
    for name in ORDER:
        given = [*scale, "--data", args.data, "-o", str(args.output / name)]
        print(f"\n{name}", flush=True)
        try:
            import_module(f"examples.papers.{name}").main(given + ([] if name in UNTRAINED else training))
        except SystemExit as error:
            if error.code and isinstance(error.code, int) and error.code > 128:
                raise  # a signal
            failed += [name]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()

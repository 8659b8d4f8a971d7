"""Every experiment, one after another, those first that say most for their time.

    python -m examples.papers.all --full --jobs 6 --workers 2 --data CIFAR10 -o out

Takes the options of the experiments; what has finished is not repeated. One that fails does not stop the others.
"""

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from examples.papers.report import parse

ORDER = ("plain_cnn", "conditioning", "operators_and_losses", "batch_size", "depth", "sphere_resnet",
         "minimum_energy", "width", "without_relu", "learnable_k", "gan_energy", "fourier")  # fmt: skip
UNTRAINED = ("plain_cnn", "conditioning", "gan_energy", "fourier")
"""Programs without options such as --jobs, which train no networks of cells."""


def main(argv: list[str] | None = None) -> None:
    run_programs("examples.papers", ORDER, __doc__, argv, untrained=UNTRAINED)


def run_programs(
    package: str, order: Sequence[str], about: str | None, argv: list[str] | None, *, untrained: Sequence[str] = ()
) -> None:
    """Run the programs of a package, each in a folder of its own below the output.

    Args:
        package: the package of the programs.
        order: their names.
        about: what they do, for the help.
        argv: the words of the command line; None: those that Python was called with.
        untrained: those that do not take the options of a training.
    """
    args = parse(about, argv, trains=True)
    scale = [] if args.scale == "cpu" else [f"--{args.scale}"]
    training = [word for name in ("iterations", "seeds", "jobs", "workers") if (value := getattr(args, name))
                for word in (f"--{name}", str(value))]  # fmt: skip
    training += ["--report"] if args.report else []
    failed = []
    for name in order:
        if args.report and name in untrained:
            continue
        given = [*scale, "--data", args.data, "-o", str(args.output / name)]
        print(f"\n{name}", flush=True)
        try:
            import_module(f"{package}.{name}").main(given + ([] if name in untrained else training))
        except SystemExit as error:
            if isinstance(error.code, int) and error.code > 128:
                raise  # a signal
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
            failed += [name] if error.code else []
        except Exception:  # a fault of one program
            traceback.print_exc()
            failed += [name]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()

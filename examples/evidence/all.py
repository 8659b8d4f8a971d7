"""Every program of this folder, one after another, those first that say most for their time.

    python -m examples.evidence.all --data CIFAR10 -o out --jobs 2

Takes the options of the programs; what has finished is not repeated. One that fails does not stop the others.
"""

from importlib.util import find_spec

from examples.papers.all import run_programs

ORDER = ("contrast", "small_batches", "depth", "heads", "operators", "quantization", "transfer", "energy")
"""All programs, those first that say most for their time."""


def main(argv: list[str] | None = None) -> None:
    package = "examples.evidence"
    run_programs(package, [name for name in ORDER if find_spec(f"{package}.{name}")], __doc__, argv)


if __name__ == "__main__":
    main()

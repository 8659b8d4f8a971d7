"""The arguments and the results of the programs in this folder: a table, a picture, a JSON file."""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sphereify.errors import SphereifyError
from sphereify.plots import new_figure, save_figure
from sphereify.sources import versions

PICTURES = ("figure.png", "second.png", "third.png")
"""Names of the pictures of a program."""
NO_RESULT = "No result yet.\n"
"""What stands in the place of a table without rows."""
picture = new_figure


def parse(
    about: str | None,
    argv: list[str] | None,
    *,
    needs_data: bool = True,
    trains: bool = False,
    further: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """The arguments of a program, with `scale`: "quick", "cpu" or "full".

    Args:
        about: what the program does, for its help.
        argv: the words of the command line; None: those that Python was called with.
        needs_data: whether --data must be given.
        trains: whether there are the options of a training.
        further: arguments that only this program has, by name, each with what argparse takes.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument("--quick", dest="scale", action="store_const", const="quick", help="whether it runs: seconds")
    scale.add_argument("--full", dest="scale", action="store_const", const="full", help="as the papers, for a GPU")
    parser.set_defaults(scale="cpu")
    parser.add_argument("--data", required=needs_data, help="folder with train/ and test/, one folder a class")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder; what has finished is not repeated")
    if trains:
        parser.add_argument("--iterations", type=int, help="of each run; the schedule is scaled")
        parser.add_argument("--seeds", type=int, help="runs of each network")
        parser.add_argument("--jobs", type=int, default=1, help="networks that are trained at the same time")
        parser.add_argument("--workers", type=int, default=0, help="processes that load images, for each of them")
        parser.add_argument("--report", action="store_true", help="train nothing: results of what has finished so far")
    for name, how in (further or {}).items():
        parser.add_argument(name, **how)
    return parser.parse_args(argv)


@contextmanager
def told_errors() -> Iterator[None]:
    """An error of the package, such as bad data, ends the program with a line instead of a traceback."""
    try:
        yield
    except SphereifyError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def finish(args: Any, name: str, table: str, figure: Any, document: dict[str, Any]) -> None:
    """Write table.md, figure.png (unless `figure` is None: it is drawn) and results.json, and print the table.

    The last line names these files, and further pictures that the program has drawn in its folder.
    """
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "table.md").write_text(table, encoding="utf-8")
    if figure is not None:
        save_figure(figure, args.output / PICTURES[0])
    about = {"experiment": name, "scale": args.scale, "arguments": {k: str(v) for k, v in vars(args).items()}}
    document = {**about, "hardware": hardware(), "versions": {**versions(), "python": platform.python_version()},
                **document}  # fmt: skip
    (args.output / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table, end="")
    pictures = [name for name in PICTURES if (args.output / name).is_file()]
    print(f"written: {args.output}/{', '.join(['table.md', *pictures, 'results.json'])}", file=sys.stderr)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; without rows it says that there is no result yet."""
    if not rows:
        return NO_RESULT
    return "".join(f"| {' | '.join(row)} |\n" for row in [columns, ["---"] * len(columns), *rows])


def hardware() -> dict[str, Any]:
    """Versions and hardware on which the program runs."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"cpu": model or platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "gpus": gpus}  # fmt: skip

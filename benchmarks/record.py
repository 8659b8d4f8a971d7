"""The numbers of a benchmark in a JSON file, written after each cell: an interrupted run can be read, and resumed."""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sphereify.files import write_text
from sphereify.fingerprint import fingerprint

Cell = dict[str, Any]


def check_setting(
    file: Path, options: Namespace, names: Sequence[str], networks: Mapping[str, nn.Module], kept: Sequence[Path]
) -> None:
    """Make sure that what has been kept was measured with these options and networks, and note them in a file.

    Args:
        file: where they are noted; networks that it does not have are new.
        options: those of the program.
        names: the options on which the results depend.
        networks: the networks that are measured, by name.
        kept: the results that there may be.

    Raises:
        SystemExit: they are of other options or weights, or nobody knows of which.
    """
    there = [path for path in kept if path.exists()]
    mend = f"Name another place for the results, or remove them together with {file.name}."
    if there and not file.is_file():
        raise SystemExit(f"error: {there[0]}: nothing tells with which options and weights it was measured\n{mend}")
    before = json.loads(file.read_text()) if file.is_file() else {}
    weights = {f"weights of {name}": fingerprint(network.state_dict()) for name, network in networks.items()}
    values = {name: getattr(options, name) for name in names}
    places = {name: str(value.resolve()) for name, value in values.items() if isinstance(value, Path)}
    now = json.loads(json.dumps({**values, **places, **weights}))
    changed = [f"{name}: {before[name]}, now: {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    if changed:
        raise SystemExit(f"error: {file}: was measured with another {'; '.join(changed)}\n{mend}")
    write_text(file, json.dumps({**before, **now}, indent=1) + "\n")


class Record:
    """The setting of a run, and its cells by network and column; without a path it is not written."""

    def __init__(self, path: Path | None, setting: str):
        self.path = path
        self.data: dict[str, Any] = {"setting": setting}
        if path is not None and path.exists():
            before = json.loads(path.read_text())
            if before.get("setting") != setting:
                raise SystemExit(
                    f"error: {path}: was measured with another setting: {before.get('setting')}\nnow: {setting}\n"
                    f"Name another file with --json, or remove this one."
                )
            self.data = before

    def cells(self, network: str) -> dict[str, Cell]:
        return self.data.setdefault("networks", {}).setdefault(network, {})

    def has(self, network: str, columns: tuple[str, ...]) -> bool:
        """True if these columns are measured; what failed is not."""
        cells = self.cells(network)
        return all(column in cells and "error" not in cells[column] for column in columns)

    def put(self, network: str, column: str, cell: Cell) -> None:
        self.cells(network)[column] = cell
        self.write()

    def put_part(self, part: str, rows: Any) -> None:
        self.data[part] = rows
        self.write()

    def write(self) -> None:
        if self.path is not None:
            write_text(self.path, json.dumps(self.data, indent=2, ensure_ascii=False) + "\n")

"""Shared by the tests of the command line: names of files and networks, and what a terminal shows as plain words."""

import re
from pathlib import Path

TINY = "test_resnet"
FILES = {"model.safetensors", "conversion.json"}


def written(folder: Path) -> set[str]:
    """All files and folders below a folder, by their relative paths."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def one_line(text: str) -> str:
    """Boxes and line breaks of the terminal taken out."""
    return " ".join(re.sub(r"[─│╭╮╰╯┃━]", " ", text).split())


def words(options: dict) -> list[str]:
    """Options by their Python names as a user types them."""
    typed = []
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            typed += [option if value else f"--no-{option[2:]}"]
        else:
            typed += [word for item in (value if isinstance(value, tuple) else [value]) for word in (option, str(item))]
    return typed

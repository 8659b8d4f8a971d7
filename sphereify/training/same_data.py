"""Telling whether a data set is the one that a run began with, wherever it lies now."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from torchvision.datasets import DatasetFolder

from sphereify.datasets import Data

CONTENTS = 256
"""Number of files, spread over the data set, whose contents are compared; of all others the names are."""


def identity_of(data: Data) -> dict[str, Any]:
    """The facts that tell a data set from others, as plain JSON values: its name, the classes that were left out, if
    there are any, and, of folders of images, place and files."""
    parts = [_files_of(part) for part in (data.train, data.test)]
    left_out = {"held_out": list(data.held_out)} if data.held_out else {}
    if any(part is None for part in parts):
        return {"name": data.name, "places": None, "files": None, **left_out}
    places = [os.path.realpath(root) for root, _ in parts]  # type: ignore[misc]
    return {"name": data.name, "places": places, "files": _fingerprint(data.classes, parts), **left_out}


def is_same(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """True if two identities are those of one data set: in the same place or with the same files, if it consists of
    files; else of the same name. The same classes must have been left out."""
    if before.get("held_out") != now.get("held_out"):
        return False
    if not (before.get("files") and now["files"]):
        return bool(before.get("name") == now["name"])
    return before["places"] == now["places"] or before["files"] == now["files"]


_Files = tuple[str, list[tuple[str, int]]]
"""The folder of one part of a data set, and the files that are its images, each with the number of its class."""


def _files_of(images: Any) -> _Files | None:
    """The files of a part; None if it does not consist of files."""
    if isinstance(images, Subset):
        whole = _files_of(images.dataset)
        return None if whole is None else (whole[0], [whole[1][row] for row in images.indices])
    return (str(images.root), images.samples) if isinstance(images, DatasetFolder) else None


def _fingerprint(classes: list[str], parts: list[Any]) -> str:
    digest = hashlib.sha256(json.dumps(classes).encode())
    for root, files in parts:
        for path, target in files:
            digest.update(f"{os.path.relpath(path, root)}\0{target}\0".encode())
        for path, _ in files[:: max(1, 2 * len(files) // CONTENTS)]:
            digest.update(_content(Path(path)))
        digest.update(b"\1")
    return digest.hexdigest()


def _content(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError:
        return b"?"

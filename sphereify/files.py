"""Replacing a file whole: at any moment, and after a power cut, it is the old one or the new one."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sphereify.errors import ArtifactError, wrong_type


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which takes the place of `path` when the block ends without an error.

    The folder is made if it is missing. The content reaches the disk before it gets its name, and the name before the
    block is left. After an error, what was written is removed and `path` is what it was. Several files change together
    as nested blocks: the innermost is moved first.

    Raises:
        OSError: a folder or a file that cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{uuid.uuid4().hex}.partial")  # not longer than a name may be, whatever that of `path`
    try:
        yield aside
        _flush(aside)
        os.replace(aside, path)
        _flush(path.parent)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


@contextmanager
def replacing_with_companions(path: Path, companions: tuple[str, ...]) -> Iterator[Path]:
    """A path of the same name in a new folder, whose files take their places when the block ends without an error.

    A program may then write further files beside its own and refer to them by name. They move first, and `path` last.
    If one of them cannot be moved, all that had moved is taken back; after any error, what was written is removed.

    Args:
        path: the file.
        companions: the ends that such further files add to its name. What lies at `path` may have some, too: those that
            the new file does not have are removed with it.

    Raises:
        OSError: a folder or a file that cannot be written, or a file that is in the way of a further one and does not
            belong to a file at `path`.
    """
    folder = path.with_name(f".{uuid.uuid4().hex}.partial")
    folder.mkdir()
    try:
        (folder / "new").mkdir()
        (folder / "old").mkdir()
        yield folder / "new" / path.name
        _exchange(path, [path.with_name(path.name + end) for end in companions], folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exchange(path: Path, companions: list[Path], folder: Path) -> None:
    """Move the files in folder/new to the place of `path`, after those that lie there have moved to folder/old."""
    new, old = folder / "new", folder / "old"
    written = sorted(new.iterdir(), key=lambda file: file.name == path.name)
    for file in written:
        _flush(file)
        place = path.with_name(file.name)
        if place != path and place.exists() and not path.exists():
            raise FileExistsError(17, f"{place} is in the way, and belongs to no {path.name}")
    gone = [place for place in companions if place.is_file() and path.exists()]
    moves = [(place, old / place.name) for place in gone]
    moves += [(file, path.with_name(file.name)) for file in written]
    done: list[tuple[Path, Path]] = []
    try:
        for start, end in moves:
            os.replace(start, end)
            done.append((start, end))
    except OSError:
        for start, end in reversed(done):
            os.replace(end, start)
        raise
    _flush(path.parent)


def as_path(name: str, value: object) -> Path:
    """The path that an argument names.

    Raises:
        ArgumentTypeError: it is neither text nor a path.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise wrong_type(name, value, "a path")
    return Path(value)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        ArtifactError: it cannot be written.
    """
    try:
        with replacing(path) as aside:
            aside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror or error})") from error


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder."""
    for leftover in folder.glob(".*.partial"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Let a file or a folder survive a power cut from here on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Reading a checkpoint of another tool without running code from it: its tensors, lists, dictionaries and plain values.

A torch file is read with `weights_only=True`. Objects of other classes, as training scripts keep their arguments and
metrics beside the tensors, are read as empty stand-ins: their classes are neither imported nor called.
"""

import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from sphereify.errors import ArtifactError, first_line, without_colours


class StandIn:
    """An object of a class that was not imported; the names of that class's module and its own are in `path`."""

    path = ""

    def __new__(cls, *arguments: Any) -> "StandIn":
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"{self.path}()"

    def __hash__(self) -> int:  # it may have been the key of a dictionary
        return id(self)


class _Items:
    """A class whose objects hold items, such as a subclass of dict: they are read as a plain dictionary."""

    def __new__(cls, *arguments: Any) -> Any:
        return OrderedDict()


class _Elements:
    """A class whose objects hold elements, such as a subclass of list: they are read as a plain list."""

    def __new__(cls, *arguments: Any) -> Any:
        return []


def read_checkpoint_file(path: Path) -> Any:
    """The content of a safetensors file or of a torch file, on the CPU, with a `StandIn` for each foreign object.

    Raises:
        ArtifactError: no such file, or one that cannot be read so, with the reason.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return _read_torch(path)
    except Exception as error:  # safetensors and torch raise many kinds for a damaged file
        raise unreadable(path, _reason(error)) from error


def unreadable(path: Path, reason: str) -> ArtifactError:
    """The error for a file that does not hold tensors, or holds what is not read."""
    return ArtifactError(f"{path}: cannot be read as a checkpoint of tensors ({reason})")


def foreign_classes(content: Any) -> list[str]:
    """The classes of all stand-ins in the content of a file, each once."""
    return list(dict.fromkeys(item.path for item in _items(content) if isinstance(item, StandIn)))


def _items(content: Any) -> Iterator[Any]:
    yield content
    values = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    for value in values:
        yield from _items(value)


_UNKNOWN = re.compile(r"Unsupported global: GLOBAL (\S+) was not an allowed global")
_WITH_CONTENT = re.compile(r"Can only (SETITEM|append).* but got <class '.*(_StandIn\d+)'>", re.IGNORECASE)


def _read_torch(path: Path) -> Any:
    """Read again with one more stand-in for each class that torch refuses, until it refuses none."""
    stand_ins: dict[str, type] = {}
    for name in _foreign_names(path):
        stand_ins[name] = _stand_in(name, len(stand_ins))
    while True:
        classes = [(cls, name) for name, cls in {**_of_numpy(), **stand_ins}.items()]
        try:
            with torch.serialization.safe_globals(classes):  # type: ignore[arg-type]
                return torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            if (match := _UNKNOWN.search(str(error))) and match[1] not in stand_ins:
                name = match[1] if "." in match[1] else f"builtins.{match[1]}"
                stand_ins[name] = _stand_in(name, len(stand_ins))
            elif match := _WITH_CONTENT.search(str(error)):
                name = next(name for name, cls in stand_ins.items() if cls.__name__ == match[2])
                kind = _Items if match[1] == "SETITEM" else _Elements
                stand_ins[name] = type(match[2], (kind,), {})
            else:
                raise


def _foreign_names(path: Path) -> list[str]:
    """The classes and functions that torch would refuse; of a file in the old format, only reading it tells."""
    try:
        with torch.serialization.safe_globals([(thing, name) for name, thing in _of_numpy().items()]):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError):
        return []


def _stand_in(path: str, number: int) -> type:
    return type(f"_StandIn{number}", (StandIn,), {"path": path})


def _of_numpy() -> dict[str, Any]:
    """The functions and types that numpy's scalars and arrays are made with, under its names of both major versions."""
    core = getattr(np, "_core", None) or np.core  # type: ignore[attr-defined]
    makers = {"scalar": core.multiarray.scalar, "_reconstruct": core.multiarray._reconstruct}
    named = {f"numpy.{home}.multiarray.{n}": maker for home in ("core", "_core") for n, maker in makers.items()}
    kinds = {f"numpy.dtypes.{name}": kind for name, kind in vars(np.dtypes).items() if isinstance(kind, type)}
    import _codecs

    return {**named, **kinds, "numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype, "_codecs.encode": _codecs.encode}


def _reason(error: Exception) -> str:
    """The cause alone, where torch wraps it into advice of many lines."""
    text = without_colours(str(error))
    match = re.search(r"WeightsUnpickler error:\s*(\S.*)", text)
    return match[1].strip() if match else first_line(error)

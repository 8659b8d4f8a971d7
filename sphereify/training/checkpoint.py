"""The state of a run in one file of tensors, whole or not there at all."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sphereify.errors import ArtifactError, first_line

KEPT = 2
"""How many checkpoints stay: the last, and the one before it."""


def write_checkpoint(folder: Path, step: int, state: Any) -> Path:
    """Write `state` (nested lists, tuples and dictionaries of tensors and JSON values) as the checkpoint of a step.

    The file gets its name when it is complete and on the disk.

    Raises:
        ArtifactError: it cannot be written, as on a full disk. Earlier checkpoints stay.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_pack(state, tensors))
    path, aside = folder / f"{step:09d}.safetensors", folder / f".{step:09d}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside, {"state": text})
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        for old in checkpoints(folder)[:-KEPT]:
            old.unlink()
    except Exception as error:  # OSError, or safetensors' own for the same
        aside.unlink(missing_ok=True)
        raise ArtifactError(
            f"{path}: cannot be written ({first_line(error)}). Earlier checkpoints are kept."
        ) from error
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the latest last; what a killed run left half-written is removed."""
    for leftover in folder.glob(".*.partial"):
        leftover.unlink(missing_ok=True)
    return sorted(folder.glob("[0-9]*.safetensors"))


def read_checkpoint(path: Path) -> Any:
    """What `write_checkpoint` was given; tensors on the CPU.

    Raises:
        ArtifactError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})["state"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
        return _unpack(json.loads(text), tensors)
    except Exception as error:  # safetensors raises many kinds for a damaged file
        raise ArtifactError(f"{path}: cannot be read as a checkpoint ({first_line(error)})") from error


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON in which tensors are numbers, and containers say what they are."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"dict": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__ if type(value) in (list, tuple) else "tuple": [_pack(v, tensors) for v in value]}
    return value


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}
    items = [_unpack(v, tensors) for v in content]
    return items if kind == "list" else tuple(items)

"""Checkpoints: the state of a run in one file of tensors, whole or not there at all."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sphereify.errors import ArtifactError, first_line
from sphereify.files import remove_partial, replacing

LAST = 2
"""Number of checkpoints that stay: the last, and the one before it."""


def write_checkpoint(folder: Path, step: int, state: Any) -> Path:
    """Write `state` (nested lists, tuples and dictionaries of tensors and JSON values) as the checkpoint of a step.

    The file gets its name when it is complete and on the disk. The oldest checkpoints beyond `LAST` are removed.

    Raises:
        ArtifactError: it cannot be written, as on a full disk. Earlier checkpoints stay.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_pack(state, tensors))
    path = folder / f"{step:09d}.safetensors"
    try:
        with replacing(path) as aside:
            save_file(tensors, aside, {"state": text})
        for old in checkpoints(folder)[:-LAST]:
            old.unlink()
    except Exception as error:  # OSError, or safetensors' own for the same
        raise ArtifactError(
            f"{path}: cannot be written ({first_line(error)}). Earlier checkpoints are kept."
        ) from error
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the latest last. Half-written files of a killed run are removed."""
    remove_partial(folder)
    return sorted(folder.glob("[0-9]*.safetensors"))


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written."""
    return int(checkpoint.stem)


def read_checkpoint(path: Path) -> Any:
    """The state that `write_checkpoint` was given; tensors are on the CPU.

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


def read_last_checkpoint(folder: Path) -> tuple[Path, Any]:
    """The latest checkpoint in a folder: its file and its state.

    Raises:
        ArtifactError: there is none, or the latest is damaged; then the one before it is named.
    """
    files = checkpoints(folder)
    if not files:
        raise ArtifactError(f"{folder.parent}: there is no checkpoint to continue from")
    try:
        return files[-1], read_checkpoint(files[-1])
    except ArtifactError as error:
        older = f". Remove it to go on from step {step_of(files[-2])}" if len(files) > 1 else ""
        raise ArtifactError(f"{error}{older}") from error


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON in which tensors are numbers of `tensors`, and containers carry their type."""
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
    """The value that `_pack` was given."""
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

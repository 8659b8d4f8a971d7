"""The folder of a run: the names of all that lies in it, whether it is free, and how a new run makes room."""

import json
import os
import shutil
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sphereify.annotations import PLAN
from sphereify.artifact import save
from sphereify.datasets import TIMM_READERS
from sphereify.errors import ArtifactError, UsageError, first_line, option, refused
from sphereify.files import as_path, replacing, write_text
from sphereify.timm_folders import LOCAL_DIR
from sphereify.training.checkpoint import checkpoints
from sphereify.training.settings import WITHOUT_EFFECT


def default_run_folder(model: str) -> Path:
    """The folder of a run whose user names none: the last part of the model's name, and "finetuned"."""
    return Path(f"{Path(model.rpartition(':')[2]).name}-finetuned")


class RunFolder:
    """The folder of a run.

    checkpoints/        the states to continue from; see `checkpoint.py`
    last, best          the models after the last and after the best epoch; see `save_model`
    metrics.jsonl       a line of JSON for each epoch; metrics.csv is the same as a table
    curves.png          loss, accuracy, rate, k and energies over the epochs
    tensorboard/        the same as events
    summary.json        the result; a folder without it holds a run that is not complete
    run.json            the options with which the command line began the run
    variant.json        the network and the settings of a run that belongs to a comparison
    """

    def __init__(self, path: str | Path):
        self.path = as_path("output", path)
        self.checkpoints = self.path / "checkpoints"
        self.last = self.path / "last"
        self.best = self.path / "best"
        self.metrics = self.path / "metrics.jsonl"
        self.metrics_table = self.path / "metrics.csv"
        self.curves = self.path / "curves.png"
        self.tensorboard = self.path / "tensorboard"
        self.summary = self.path / "summary.json"
        self.options = self.path / "run.json"
        self.variant = self.path / "variant.json"

    def __str__(self) -> str:
        return str(self.path)

    def clear(self) -> None:
        """Remove the run in this folder, and leave all else in it."""
        for folder in (self.checkpoints, self.last, self.best, self.tensorboard):
            shutil.rmtree(folder, ignore_errors=True)
        models = (state_file(self.last), state_file(self.best))
        for file in (self.summary, self.metrics, self.metrics_table, self.curves, *models):
            file.unlink(missing_ok=True)

    def check_free(self) -> None:
        """Make sure that no run lies in this folder.

        Raises:
            UsageError: there are checkpoints in it.
        """
        if checkpoints(self.checkpoints):
            raise UsageError(
                f"{self}: holds a run already; resume it, remove its {self.checkpoints.name}/, or name another folder"
            )

    def write_options(self, options: Mapping[str, Any]) -> None:
        """Write the options with which the command line begins the run: plain JSON values by name.

        The working directory is written with them, to which their paths are relative.

        Raises:
            ArtifactError: they cannot be written.
        """
        document = {**options, _WORKING_DIRECTORY: [os.getcwd(), os.path.relpath(os.getcwd(), self.path)]}
        write_text(self.options, json.dumps(document, indent=1) + "\n")

    def read_options(self) -> dict[str, Any]:
        """The options that `write_options` wrote.

        Raises:
            UsageError: there are none.
            ArtifactError: they are damaged.
        """
        if not self.options.is_file():
            raise refused("resume", f"{self} is not the folder of a run, there is no {self.options.name} in it")
        try:
            options: dict[str, Any] = json.loads(self.options.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(
                f"{self.options}: cannot be read ({error}); the checkpoints beside it hold the weights"
            ) from None
        options.pop(_WORKING_DIRECTORY, None)
        return options

    def working_directories(self) -> list[Path]:
        """The folders to which the paths among the options of this run may be relative: the one in which it began, and
        that which lies now where it lay as seen from this folder, if both were moved."""
        absolute, relative = json.loads(self.options.read_text(encoding="utf-8")).get(_WORKING_DIRECTORY, (".", None))
        moved = [] if relative is None else [(self.path / relative).resolve()]
        return [folder for folder in (Path(absolute), *moved) if folder.is_dir()]

    def options_to_resume(self, given: Mapping[str, Any], names: Container[str] | None = None) -> dict[str, Any]:
        """The options with which the run goes on: its own, with those of `given` that change no result.

        Paths of the run are found from any working directory. The data may have moved; whether it is the same is for
        `check_same_run` to tell.

        Args:
            given: options that are given anew, as plain JSON values by name.
            names: the options that there are; default: any.

        Raises:
            UsageError: an option of `given` that would change the result, with both values; or as `read_options`.
            ArtifactError: the run has an option that is not among `names`, without which it would be another run; or
                as `read_options`.
        """
        before = self.read_options()
        unknown = [name for name in before if names is not None and name not in names]
        if unknown:
            raise ArtifactError(
                f"{self.options}: holds {', '.join(unknown)}, which this version does not have; continue the run with "
                f"the version that began it"
            )
        bases = self.working_directories()
        located = {name: locate(value, bases) if name in PLACES else value for name, value in before.items()}
        free = (*WITHOUT_EFFECT, *MOVABLE)
        changes = [
            f"{option(name)}: {before.get(name)} before, {given[name]} now"
            for name in sorted(given)
            if name not in free and given[name] != before.get(name)
            if name not in PLACES or locate(given[name], [Path.cwd()]) != located.get(name)
        ]
        if changes:
            raise UsageError(f"{self}: cannot be continued otherwise than it began: {'; '.join(changes)}")
        own = before if bases[:1] == [Path.cwd()] else located
        return {**own, **{name: given[name] for name in free if name in given}}


_WORKING_DIRECTORY = "working_directory"
MOVABLE = ("data", "data_root")
"""Options that say where the data lies, which may move while a run is paused."""
PLACES = (*MOVABLE, "model", "factory", "weights", "teacher", "teacher_weights")
"""Options whose value may name a file or a folder."""


def locate(value: Any, bases: Iterable[Path]) -> Any:
    """The value of an option with an absolute path, if it names a file or a folder in one of `bases`.

    A value is a path, "file.py:factory" or "local-dir:path"; any other, such as the name of a model, stays as it is.
    """
    if not isinstance(value, str) or not value or value in ("digits", "original") or value.startswith(TIMM_READERS):
        return value
    start = LOCAL_DIR if value.startswith(LOCAL_DIR) else ""
    path, colon, factory = value.rpartition(":") if ".py:" in value else (value.removeprefix(start), "", "")
    places = (base / path for base in bases)
    place = next((place for place in places if place.exists()), None)
    return value if place is None else f"{start}{os.path.realpath(place)}{colon}{factory}"


def state_file(path: Path) -> Path:
    """The file that stands for the artifact `path` where a model was not converted."""
    return path.with_suffix(".safetensors")


def save_model(model: nn.Module, path: Path, training: dict[str, Any]) -> Path:
    """Save a converted model as the artifact `path`; of any other, write the state dict to `state_file(path)`.

    Args:
        training: plain JSON values to keep with it.

    Raises:
        ArtifactError: it cannot be written.
    """
    if PLAN.of(model) is not None:
        return save(model, path, training=training)
    file = state_file(path)
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    try:
        with replacing(file) as aside:
            save_file(tensors, aside, {"training": json.dumps(training)})
    except Exception as error:  # OSError, or safetensors' own for the same
        raise ArtifactError(f"{file}: cannot be written ({first_line(error)})") from error
    return file

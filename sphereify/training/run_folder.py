"""What a run leaves in its folder besides checkpoints: models, metrics, curves, a summary."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sphereify.artifact import save
from sphereify.errors import ArtifactError
from sphereify.sources import versions


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        ArtifactError: it cannot be written.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ArtifactError(f"{path}: cannot be written ({error.strerror or error})") from error


def save_model(model: nn.Module, path: Path, training: dict[str, Any]) -> Path:
    """An artifact of a converted model; of any other, `path` with .safetensors holds its state dict."""
    if getattr(model, "conversion_plan", None) is not None:
        return save(model, path, training=training)
    whole = path.with_suffix(".safetensors")
    aside = whole.with_name(f".{whole.name}.partial")
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in model.state_dict().items()
    }
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, aside, {"training": json.dumps(training)})
        os.replace(aside, whole)
    except Exception as error:  # OSError, or safetensors' own for the same
        aside.unlink(missing_ok=True)
        raise ArtifactError(f"{whole}: cannot be written ({error})") from error
    return whole


class Record:
    """The metrics of a run: metrics.jsonl, metrics.csv, events for TensorBoard if installed, curves, a summary."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings
        self.rows: list[dict[str, Any]] = []
        self.board: Any = None

    def epochs(self, rows: list[dict[str, Any]]) -> None:
        """All epochs so far; files are written anew, so that a continued run leaves none twice."""
        self.rows = rows
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        flat = [{key: value for key, value in row.items() if not isinstance(value, dict)} for row in rows]
        text = io.StringIO()
        table = csv.DictWriter(text, list(flat[0]))
        table.writeheader()
        table.writerows(flat)
        write_text(self.folder / "metrics.csv", text.getvalue())
        self.board = self.board or _tensorboard(self.folder / "tensorboard")
        if self.board is not None:
            for key, value in flat[-1].items():
                self.board.add_scalar(key, value, rows[-1]["step"])
            self.board.flush()

    def close(self, best: int, data: str, peak_memory: int | None) -> None:
        """The summary and the curves."""
        summary = {
            "data": data, "epochs": len(self.rows), "accuracy": self.rows[-1]["accuracy"],
            "best_epoch": best, "best_accuracy": self.rows[best - 1]["accuracy"], "peak_memory": peak_memory,
            "images_per_second": sum(row["images_per_second"] for row in self.rows) / len(self.rows),
            "settings": self.settings, "versions": versions(),
        }  # fmt: skip
        write_text(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        if self.board is not None:
            self.board.close()
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return  # pictures are an extra
        from sphereify.plots import plot_run

        plot_run(self.rows, self.folder / "curves.png")


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))

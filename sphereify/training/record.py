"""The record of a run: its metrics, curves and summary, in its folder."""

import csv
import importlib.util
import io
import json
from collections.abc import Iterator
from typing import Any

from sphereify.files import write_text
from sphereify.sources import versions
from sphereify.training.run_folder import RunFolder


class RunRecord:
    """Metrics as JSON, as a table and, if it is installed, as events of TensorBoard; curves and a summary at the end.

    Args:
        folder: the folder of the run.
        settings: the settings as plain JSON values, for the summary.
    """

    def __init__(self, folder: RunFolder, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings
        self.rows: list[dict[str, Any]] = []
        self.board: Any = None

    def write_epochs(self, rows: list[dict[str, Any]]) -> None:
        """Write all epochs so far anew, so that a run that is continued leaves none twice.

        Raises:
            ArtifactError: a file cannot be written.
        """
        self.rows = rows
        write_text(self.folder.metrics, "".join(json.dumps(row) + "\n" for row in rows))
        flat = [{key: value for key, value in row.items() if not isinstance(value, dict)} for row in rows]
        text = io.StringIO()
        table = csv.DictWriter(text, list(flat[0]))
        table.writeheader()
        table.writerows(flat)
        write_text(self.folder.metrics_table, text.getvalue())
        self.board = self.board or _tensorboard(self.folder)
        if self.board is not None:
            for tag, value in _scalars(rows[-1]):
                self.board.add_scalar(tag, value, rows[-1]["step"])
            self.board.flush()

    def close(self, best: int, data: str, peak_memory: int | None) -> None:
        """Write the summary, and draw the curves where matplotlib is installed.

        Args:
            best: number of the best epoch.
            data: name of the data set.
            peak_memory: in bytes on the GPU; None on a CPU.

        Raises:
            ArtifactError: a file cannot be written.
        """
        summary = {
            "data": data,
            "epochs": len(self.rows),
            "accuracy": self.rows[-1]["accuracy"],
            "best_epoch": best,
            "best_accuracy": self.rows[best - 1]["accuracy"],
            "peak_memory": peak_memory,
            "images_per_second": sum(row["images_per_second"] for row in self.rows) / len(self.rows),
            "settings": self.settings,
            "versions": versions(),
        }
        write_text(self.folder.summary, json.dumps(summary, indent=1) + "\n")
        if self.board is not None:
            self.board.close()
        if importlib.util.find_spec("matplotlib") is not None:
            from sphereify.plots import plot_run

            plot_run(self.rows, self.folder.curves)


def _scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The measurements of an epoch by tag; those of a layer are "k/layer", "radius/layer" and so on."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{layer}", number) for layer, number in value.items())
        else:
            yield name, value


def _tensorboard(folder: RunFolder) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder.tensorboard))

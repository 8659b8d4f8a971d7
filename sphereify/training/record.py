"""The record of a run: its metrics, curves and summary, in its folder."""

import csv
import importlib.util
import io
import json
from collections.abc import Iterator
from typing import Any

from sphereify.files import write_text
from sphereify.options import from_json, to_json
from sphereify.training.results import Epoch, Result, Summary
from sphereify.training.run_folder import RunFolder
from sphereify.training.settings import Settings


class RunRecord:
    """Metrics as JSON, as a table and, if it is installed, as events of TensorBoard; curves and a summary at the end.

    Args:
        folder: the folder of the run.
        settings: the settings of the run, for the summary.
    """

    def __init__(self, folder: RunFolder, settings: Settings):
        self.folder, self.settings = folder, settings
        self.board: Any = None

    def write_epochs(self, epochs: list[Epoch]) -> None:
        """Write all epochs so far anew, so that a run that is continued leaves none twice.

        Raises:
            ArtifactError: a file cannot be written.
        """
        rows = [to_json(epoch) for epoch in epochs]
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
                self.board.add_scalar(tag, value, epochs[-1].step)
            self.board.flush()

    def close(self, result: Result, data: str) -> None:
        """Write the summary, and draw the curves where matplotlib is installed.

        Args:
            result: of the whole run.
            data: name of the data set.

        Raises:
            ArtifactError: a file cannot be written.
        """
        summary = to_json(Summary.of(result, data, self.settings))
        write_text(self.folder.summary, json.dumps(summary, indent=1) + "\n")
        if self.board is not None:
            self.board.close()
        if importlib.util.find_spec("matplotlib") is not None:
            from sphereify.plots import plot_run

            plot_run([to_json(epoch) for epoch in result.epochs], self.folder.curves)


def read_result(folder: RunFolder) -> Result:
    """The result of a run that is complete, of this machine or another one."""
    epochs = [from_json(Epoch, json.loads(line)) for line in folder.metrics.read_text().splitlines()]
    return Result(epochs, json.loads(folder.summary.read_text())["peak_memory"])


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

"""Pictures, each written to a file."""

from pathlib import Path
from typing import Any

from sphereify.errors import UsageError
from sphereify.nn.regularizers import EnergyReport


def plot_energy(report: EnergyReport, path: str | Path) -> Path:
    """The energy of each layer as a dot, with the least possible one as a mark where it is known.

    Args:
        report: from `HypersphericalEnergy.report`.
        path: the picture's file; its ending says the format.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    names = [row.layer for row in report.layers]
    figure, axes = new_figure(height=max(2.5, 0.22 * len(names)))
    places = list(range(len(names)))
    colours = ["tab:orange" if row.is_output else "tab:blue" for row in report.layers]
    known = [(place, row.least, row.energy) for place, row in enumerate(report.layers) if row.least is not None]
    if known:
        at, least, reached = zip(*known, strict=True)
        axes.hlines(at, least, reached, color="tab:gray", linewidth=1)
        axes.scatter(least, at, color="black", marker="|", s=50, label="least possible")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8)
    axes.scatter([row.energy for row in report.layers], places, color=colours, s=18, zorder=3)
    axes.grid(axis="y", linewidth=0.4)
    axes.set_yticks(places, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"mean pair energy ({report.measure}); output layer in orange")
    return save_figure(figure, path)


def new_figure(*, width: float = 7.0, height: float = 4.0, **subplots: Any) -> tuple[Any, Any]:
    """A figure and its axes, drawn without a display; width and height in inches."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("pictures need matplotlib: pip install 'sphereify[plots]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**subplots)


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write the picture to `path`; the format follows its ending."""
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # no such folder; an ending that is no format
        raise UsageError(f"{path}: cannot write the picture ({error})") from error
    return Path(path)

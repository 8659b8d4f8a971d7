"""Pictures, each written to a file."""

from pathlib import Path
from typing import Any

from sphereify.errors import UsageError
from sphereify.nn.regularizers import EnergyReport


def plot_energy(report: EnergyReport, path: str | Path) -> Path:
    """The energy of each layer as a bar, with the least possible one as a mark where it is known.

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
    axes.barh(places, [row.energy for row in report.layers], color=colours, height=0.7)
    known = [(place, row.least) for place, row in enumerate(report.layers) if row.least is not None]
    if known:
        at, least = zip(*known, strict=True)
        axes.scatter(least, at, color="black", marker="|", s=60, label="least possible", zorder=3)
        axes.legend(loc="lower right")
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

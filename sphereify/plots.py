"""Plots, each written to a picture file."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sphereify.errors import UsageError
from sphereify.nn.energy_report import EnergyReport


def plot_energy(report: EnergyReport, path: str | Path) -> Path:
    """Plot the energy of each layer, with the least possible energy as a mark where it is known.

    Args:
        report: from `HypersphericalEnergy.report`.
        path: file of the picture; its suffix gives the format.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    names = [row.layer for row in report.layers]
    figure, axes = new_figure(height=max(2.5, 0.22 * len(names)))
    places = list(range(len(names)))
    colours = ["tab:orange" if row.is_output else "tab:blue" for row in report.layers]
    bounded = [(place, row.least, row.energy) for place, row in enumerate(report.layers) if row.least is not None]
    if bounded:
        at, least, energies = zip(*bounded, strict=True)
        axes.hlines(at, least, energies, color="tab:gray", linewidth=1)
        axes.scatter(least, at, color="black", marker="|", s=50, label="least possible")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8)
    axes.scatter([row.energy for row in report.layers], places, color=colours, s=18, zorder=3)
    axes.grid(axis="y", linewidth=0.4)
    axes.set_yticks(places, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"hyperspherical energy ({report.measure}); output layer in orange")
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
    """Write the picture to `path`, in the format of its suffix.

    Raises:
        UsageError: a folder that does not exist, or a suffix that is not a format of matplotlib.
    """
    try:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:  # no such folder; no such format
        raise UsageError(f"{path}: cannot write the picture ({error})") from error
    return Path(path)


def plot_run(rows: list[dict[str, Any]], path: str | Path) -> Path:
    """Plot the curves of a run: loss, accuracy, and, if there are any, the learned k and ρ, and the energies.

    Args:
        rows: the epochs, as in `metrics.jsonl`.
        path: file of the picture.
    """
    layered = [name for name in ("k", "radius", "energy") if rows[-1].get(name)]
    figure, axes = new_figure(width=3.6 * (2 + len(layered)), height=3.2, ncols=2 + len(layered))
    numbers = [row["number"] for row in rows]
    style = {"marker": "." if len(rows) < 30 else ""}
    axes[0].plot(numbers, [row["loss"] for row in rows], **style)
    axes[0].set_title("training loss")
    axes[1].plot(numbers, [100 * row["accuracy"] for row in rows], **style)
    axes[1].set_title("test accuracy, %")
    titles = {
        "k": "learned k (mean of a layer)",
        "radius": "learned radius ρ",
        "energy": "hyperspherical energy (s=1)",
    }
    for axis, name in zip(axes[2:], layered, strict=True):
        layers = list(rows[-1][name])
        colours = colour_ramp(len(layers))
        for layer, colour in zip(layers, colours, strict=True):
            axis.plot(numbers, [row[name].get(layer, math.nan) for row in rows], color=colour, linewidth=1)
        axis.set_title(f"{titles[name]}\ndark: {layers[0]}, bright: {layers[-1]}", fontsize=8)
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(linewidth=0.4)
    return save_figure(figure, path)


def plot_confusion(confusion: Any, classes: list[str], path: str | Path) -> Path:
    """Plot a confusion matrix in shares of each true class, with the counts for up to 20 classes."""
    count = len(classes)
    shares = confusion.double() / confusion.sum(1, keepdim=True).clamp_min(1)
    side = min(12.0, 2.5 + 0.4 * count)
    figure, axes = new_figure(width=side + 1, height=side)
    picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the class")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if count <= 60:
        axes.set_xticks(range(count), classes, rotation=90, fontsize=7)
        axes.set_yticks(range(count), classes, fontsize=7)
    for row in range(count if count <= 20 else 0):
        for column in range(count):
            if (number := int(confusion[row, column])) > 0:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(number), ha="center", va="center", fontsize=6, color=colour)
    return save_figure(figure, path)


def plot_comparison(curves: dict[str, list[list[dict[str, Any]]]], path: str | Path) -> Path:
    """Plot the test accuracy over optimizer steps: a colour per variant, a thin line per seed, and their thick mean."""
    return plot_panels({"": curves}, path)


def plot_panels(
    panels: dict[str, dict[str, list[list[dict[str, Any]]]]],
    path: str | Path,
    *,
    values: Sequence[str] = ("accuracy",),
) -> Path:
    """Plot several comparisons side by side, at most four in a row, with the same colour for the same variant.

    Args:
        panels: title -> variant -> runs, each a list of tests with "step" and the values.
        path: file of the picture.
        values: what to plot over the steps, "accuracy" or "loss", each in rows of its own.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = 7 if columns == 1 else 4.2 * columns
    size = {"width": width, "height": 4.2 * rows * len(values)}
    shared = True if len(values) == 1 else "row"
    figure, grid = new_figure(**size, nrows=rows * len(values), ncols=columns, squeeze=False, sharey=shared)
    colours = _distinct(len(names))
    for number, value in enumerate(values):
        places = grid[number * rows : (number + 1) * rows].flat
        for axes in places[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, curves) in zip(places, panels.items(), strict=False):
            for name, runs in curves.items():
                _draw_runs(axes, name, runs, colours[names.index(name)], value)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("optimizer steps")
            axes.set_ylabel(_VALUES[value][0])
            axes.grid(linewidth=0.4)
            if curves:
                axes.legend(fontsize=8)
    return save_figure(figure, path)


_VALUES = {"accuracy": ("test accuracy, %", 100), "loss": ("training loss", 1)}
"""Values that are plotted over steps, each with the name of its axis and the factor of its unit."""


def plot_robustness(networks: dict[str, dict[str, Any]], chance: float, path: str | Path) -> Path:
    """Plot the accuracy over the strength of corruptions: a panel for each corruption, a line for each network.

    Args:
        networks: name -> "clean" and "corrupted", as in robustness.json; strength 0 is the clean accuracy.
        chance: accuracy of guessing, in [0, 1]; a dotted line.
        path: file of the picture.
    """
    kinds = list(next(iter(networks.values()))["corrupted"])
    columns = min(4, len(kinds) + 1)  # the last panel holds the legend
    rows = math.ceil((len(kinds) + 1) / columns)
    size = {"width": 3 * columns, "height": 2.6 * rows}
    figure, grid = new_figure(**size, nrows=rows, ncols=columns, squeeze=False, sharex=True, sharey=True)
    colours = _distinct(len(networks))
    for axes, kind in zip(grid.flat, kinds, strict=False):
        for (name, accuracies), colour in zip(networks.items(), colours, strict=True):
            shares = [accuracies["clean"], *accuracies["corrupted"][kind]]
            axes.plot(range(len(shares)), [100 * share for share in shares], ".-", color=colour, label=name)
        axes.axhline(100 * chance, color="tab:gray", linestyle=":", linewidth=1, label="chance")
        axes.set_title(kind, fontsize=10)
        axes.grid(linewidth=0.4)
        axes.set_ylim(0, 100)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy, %")
    for axes in grid.flat[len(kinds) :]:
        axes.axis("off")
    figure.supxlabel("strength of the corruption; 0: none", fontsize=10)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    grid.flat[len(kinds)].legend(handles, labels, loc="center", frameon=False, fontsize=9)
    return save_figure(figure, path)


def plot_verification(results: dict[str, Any], path: str | Path) -> Path:
    """Plot the ROC over false accept rates in logarithmic scale, and the scores of both kinds of pairs.

    Args:
        results: as in verification.json.
        path: file of the picture.
    """
    figure, (curve, scores) = new_figure(width=9, height=3.8, ncols=2)
    rates = results["roc"]["false_accepts"]
    curve.plot(rates, [100 * share for share in results["roc"]["true_accepts"]], drawstyle="steps-post")
    told = {float(rate): share for rate, share in results["tar"].items() if share is not None}
    curve.plot(list(told), [100 * share for share in told.values()], "o", color="tab:blue", clip_on=False)
    few = min(told, default=1.0)
    if rates[0] < few:
        curve.axvspan(rates[0], few, color="tab:gray", alpha=0.15, linewidth=0, label="few pairs: imprecise")
    curve.plot(rates, [100 * rate for rate in rates], ":", color="tab:gray", label="chance")
    eer = results["eer"]
    curve.plot([eer], [100 - 100 * eer], "x", color="black", label=f"equal error rate {eer:.2%}")
    curve.set_xscale("log")
    curve.set_xlim(min(rates[0], few), 1)
    curve.set_ylim(0, 101)
    curve.set_xlabel("false accept rate")
    curve.set_ylabel("true accept rate, %")
    curve.grid(linewidth=0.4)
    curve.legend(fontsize=8)
    histograms = {name: results["scores"][name] for name in _KINDS}
    bins = len(histograms["same"])
    lowest = min(next(place for place, count in enumerate(counts) if count) for counts in histograms.values())
    together = 4 if bins - lowest >= 160 else 2 if bins - lowest >= 80 else 1  # bins that are drawn as one
    width = 2 * together / bins
    for name, (colour, label) in _KINDS.items():
        counts = [sum(histograms[name][place : place + together]) for place in range(0, bins, together)]
        edges = [-1 + width * place for place in range(len(counts) + 1)]
        shares = [count / sum(counts) / width for count in counts]
        scores.stairs(shares, edges, fill=True, alpha=0.5, color=colour, label=f"{label}, {sum(counts):,} pairs")
    scores.set_xlim(max(-1.0, -1.05 + 2 * lowest / bins), 1)
    scores.set_xlabel("score: cosine of two embeddings")
    scores.set_ylabel("density")
    scores.grid(linewidth=0.4)
    scores.legend(fontsize=8)
    return save_figure(figure, path)


_KINDS = {"different": ("tab:orange", "two identities"), "same": ("tab:blue", "one identity")}
"""Kinds of pairs, with their colours and names."""


def _draw_runs(axes: Any, name: str, runs: list[list[dict[str, Any]]], colour: Any, value: str) -> None:
    factor = _VALUES[value][1]
    for rows in runs:
        axes.plot([r["step"] for r in rows], [factor * r[value] for r in rows], color=colour, linewidth=0.6, alpha=0.5)
    shortest = min(len(rows) for rows in runs)
    mean = [factor * sum(rows[i][value] for rows in runs) / len(runs) for i in range(shortest)]
    axes.plot([r["step"] for r in runs[0][:shortest]], mean, color=colour, linewidth=2, label=name)


def _distinct(count: int) -> list[Any]:
    """Colours that can be told apart; they repeat after twenty."""
    from matplotlib import colormaps

    colours = colormaps["tab10" if count <= 10 else "tab20"]
    return [colours(number % colours.N) for number in range(count)]


def colour_ramp(count: int) -> list[Any]:
    """A number of colours from dark to bright."""
    from matplotlib import colormaps

    return [colormaps["viridis"](0.9 * place / max(1, count - 1)) for place in range(count)]

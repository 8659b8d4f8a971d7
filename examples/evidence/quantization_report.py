"""The tables and the picture of `quantization.py`."""

import re
from collections.abc import Sequence
from typing import Any

from examples.papers.report import markdown, picture
from examples.papers.results import difference, mean_percent

ORIGINAL, CONVERTED = "original", "converted"
COLOURS = {ORIGINAL: "tab:blue", "original, contrast standardised": "tab:gray", CONVERTED: "tab:orange"}


def tables(
    results: dict[str, Any], networks: Sequence[str], settings: Sequence[str], seeds: int, minutes: float
) -> str:
    """Two tables: accuracy and what quantization costs, and accuracy over exposure."""
    lost = "lost = points of accuracy lost to the quantization"
    return (
        f"Accuracy in %, mean ± standard deviation over {seeds} draws of calibration images; {minutes:.0f} minutes of "
        f"a core.\n\n### Quantization\n\n{lost}; saved = the original's loss less the conversion's, "
        "bold if chance does not explain it.\n\n"
        f"{_quantization(results['quantization'], networks, settings)}\n### Exposure\n\n"
        f"{_exposure(results['exposure'])}"
    )


def _quantization(found: list[dict[str, Any]], networks: Sequence[str], settings: Sequence[str]) -> str:
    rows = []
    for network in networks:
        for setting in ("fp32", *settings):
            shares = {variant: {run["draw"]: run[setting] for run in found
                                if (run["network"], run["variant"]) == (network, variant)}
                      for variant in (ORIGINAL, CONVERTED)}  # fmt: skip
            losses = {variant: {run["draw"]: run["fp32"] - run[setting] for run in found
                                if (run["network"], run["variant"]) == (network, variant)}
                      for variant in (ORIGINAL, CONVERTED)}  # fmt: skip
            both = losses[ORIGINAL].keys() & losses[CONVERTED].keys()
            saved = [losses[ORIGINAL][draw] - losses[CONVERTED][draw] for draw in sorted(both)]
            if not any(shares.values()):
                continue
            is_fp32 = setting == "fp32"
            cells = [cell for variant in (ORIGINAL, CONVERTED)
                     for cell in (mean_percent(shares[variant].values()),
                                  "" if is_fp32 else mean_percent(losses[variant].values()))]  # fmt: skip
            rows += [[network, setting, *cells, "" if is_fp32 else difference(saved)]]
    columns = ["network", "quantization", ORIGINAL, "lost", CONVERTED, "lost", "saved"]
    return markdown(columns, rows)


def _exposure(found: list[dict[str, Any]]) -> str:
    rows = []
    for network in dict.fromkeys(run["network"] for run in found):
        runs = [run for run in found if run["network"] == network]
        for noise in runs[0][ORIGINAL]:
            for title in COLOURS:
                columns = zip(*(run[title][noise] for run in runs), strict=True)
                rows += [[network, noise, title, *(mean_percent(shares) for shares in columns)]]
    factors = [f"×{factor:g}" for factor in found[0]["factors"]] if found else []
    return markdown(["network", "noise", "", *factors], rows)


def draw(results: dict[str, Any], networks: Sequence[str]) -> Any:
    """Above accuracy over the bits of a quantization, below over exposure; a column for each network."""
    figure, axes = picture(width=4 * len(networks), height=6.4, nrows=2, ncols=len(networks), squeeze=False)
    for column, network in enumerate(networks):
        above, below = axes[0, column], axes[1, column]
        for variant in (ORIGINAL, CONVERTED):
            runs = [run for run in results["quantization"] if (run["network"], run["variant"]) == (network, variant)]
            _draw_bits(above, variant, runs)
        _draw_exposure(below, [run for run in results["exposure"] if run["network"] == network])
        above.set_title(network, fontsize=10)
        above.set_xlabel("bits (products, per channel)")
        below.set_xlabel("exposure (dashed: with noise)")
        for axis in (above, below):
            axis.set_ylabel("test accuracy, %")
            axis.grid(linewidth=0.4)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=7)
    return figure


def _draw_bits(axis: Any, variant: str, runs: list[dict[str, Any]]) -> None:
    """A line for each way to find the ranges, through the means over the draws."""
    if not runs:
        return
    for method, style in (("MinMax", "-"), ("Percentile", "--")):
        points = {}
        for name in runs[0]:
            match = re.fullmatch(rf"(\d+) bits, products, {method}, per channel", name)
            if match:
                points[int(match[1])] = 100 * sum(run[name] for run in runs) / len(runs)
        if points:
            bits = sorted(points)
            axis.plot([str(b) for b in bits], [points[b] for b in bits], style, marker=".", color=COLOURS[variant],
                      label=f"{variant}, {method}")  # fmt: skip


def _draw_exposure(axis: Any, runs: list[dict[str, Any]]) -> None:
    for title, colour in COLOURS.items():
        for noise, style in zip(runs[0][title] if runs else (), ("-", "--"), strict=False):
            means = [
                100 * sum(shares) / len(shares) for shares in zip(*(run[title][noise] for run in runs), strict=True)
            ]
            factors = [f"×{factor:g}" for factor in runs[0]["factors"]]
            axis.plot(factors, means, style, marker=".", color=colour, label=title if style == "-" else None)

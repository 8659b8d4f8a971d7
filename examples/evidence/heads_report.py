"""The tables and the picture of `heads.py`."""

from typing import Any

from examples.papers.report import NO_RESULT, markdown, picture
from examples.papers.results import difference, finished, mean_percent, not_converged

MAIN = {"verification": ("EER", -1), "few images": ("rare by means", 1), "label noise": ("accuracy", 1)}
"""For each kind of panel the number that decides, and 1 if more of it is better, −1 if less."""
HIDDEN = ("goal", "failure")


def tables(panels: dict[str, Any], seeds: int, minutes: float) -> str:
    """A table for each panel: mean and standard deviation over the seeds in %, and the gain over the plain softmax.

    The gain is the mean of the differences of equal seeds, positive where the head is better; bold if chance does not
    explain it.
    """
    found = [
        f"Numbers are percentages, mean ± standard deviation over {seeds} seeds; {minutes:.0f} minutes of a core.\n"
    ]
    for panel, results in panels.items():
        found += [
            f"\n### {panel}\n\n",
            _table(panel, results["rows"], seeds) if results["rows"] else NO_RESULT,
        ]
    return "".join(found)


def main_number(panel: str) -> tuple[str, int]:
    return next(number for kind, number in MAIN.items() if panel.startswith(kind))


def _table(panel: str, rows: list[dict[str, Any]], seeds: int) -> str:
    measured = [name for row in rows for found in row["seeds"].values() for name in found]
    columns = [name for name in dict.fromkeys(measured) if name not in HIDDEN]
    main, sign = main_number(panel)
    base = rows[0]["seeds"] if (rows[0]["network"], rows[0]["head"]) == ("head alone", "softmax") else {}
    lines = []
    for row in rows:
        converged = {seed: found for seed, found in row["seeds"].items() if "failure" not in found}
        gains = [sign * (found[main] - base[seed][main]) for seed, found in converged.items()
                 if main in base.get(seed, {})] if row["seeds"] is not base else []  # fmt: skip
        told = ", ".join(f"{name} {value:g}" for name, value in row["numbers"].items())
        cells = [mean_percent(found[name] for found in converged.values()) for name in columns]
        network = _angular(row) + finished(row["seeds"], seeds) + not_converged(len(row["seeds"]) - len(converged))
        lines += [[network, row["head"], told, *cells, difference(gains)]]
    return markdown(["angular", "head", "chosen", *columns, f"gain in {main}"], lines)


def _angular(row: dict[str, Any]) -> str:
    """The angular part of a network."""
    if row["head"] != "softmax":
        return row["network"]
    return "nothing" if row["network"] == "head alone" else "convolutions"


def draw(panels: dict[str, Any]) -> Any:
    """The number that decides in each panel, a point for each seed and a bar for the mean, by head and network."""
    heads = list(dict.fromkeys(row["head"] for panel in panels.values() for row in panel["rows"])) or ["none yet"]
    figure, axes = picture(width=4 * len(panels), height=1.2 + 0.42 * len(heads), ncols=len(panels), squeeze=False)
    colours = {"head alone": ("tab:blue", -0.15), "whole network": ("tab:orange", 0.15)}
    for place, (axis, (panel, results)) in enumerate(zip(axes.flat, panels.items(), strict=True)):
        main, sign = main_number(panel)
        for row in results["rows"]:
            shares = [100 * found[main] for found in row["seeds"].values() if found.get(main) is not None]
            if not shares:
                continue
            colour, shift = colours[row["network"]]
            height = heads.index(row["head"]) + shift
            axis.scatter(shares, [height] * len(shares), s=14, color=colour, alpha=0.5, linewidths=0)
            mean = sum(shares) / len(shares)
            axis.plot([mean, mean], [height - 0.14, height + 0.14], color=colour, linewidth=2, label=row["network"])
            if (row["network"], row["head"]) == ("head alone", "softmax"):
                axis.axvline(mean, color="tab:gray", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(heads)), heads if place == 0 else [""] * len(heads))
        axis.set_ylim(len(heads) - 0.5, -0.5)
        axis.set_title(panel, fontsize=10)
        axis.set_xlabel(f"{main}, % ({'higher' if sign > 0 else 'lower'} is better)")
        axis.grid(axis="x", linewidth=0.4)
    named = dict(zip(*reversed(axes.flat[0].get_legend_handles_labels()), strict=True))
    if named:
        axes.flat[0].legend(named.values(), named.keys(), fontsize=8, loc="best")
    return figure

"""The picture of the idea, for light and dark pages: `python -m documentation.picture` writes it to docs/images/."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Arc, FancyArrowPatch, Rectangle

FOLDER = Path(__file__).parents[1] / "docs" / "images"
THEMES = {
    "light": {"text": "#1f2328", "faint": "#818b98", "x": "#0969da", "w": "#cf4a02", "panel": "#eef1f4"},
    "dark": {"text": "#e6edf3", "faint": "#8d96a0", "x": "#58a6ff", "w": "#ff9b50", "panel": "#262c36"},
}
"""Colours by the page's brightness: of text, of what is beside the point, of the patch, of the filter, of surfaces."""

PATCH = np.array([[0.15, 0.45, 0.9], [0.1, 0.7, 0.95], [0.35, 0.85, 0.6]])
FILTER = np.array([[-0.6, 0.1, 0.7], [-0.8, 0.2, 0.9], [-0.5, 0.5, 0.6]])
CONTRAST = 0.45
"""The contrast of the second patch, as a share of that of the first."""
W, X = np.deg2rad(68), np.deg2rad(22)
"""The directions of the filter and of the patch in the drawing."""


def draw(colours: dict[str, str]) -> Any:
    """The figure: a filter and two patches, their angle, and the functions of it."""
    figure = Figure(figsize=(10, 3.3))
    _pixels(figure.add_axes((0.01, 0.0, 0.25, 1.0)), colours)
    _angle(figure.add_axes((0.27, 0.02, 0.33, 0.96)), colours)
    _functions(figure.add_axes((0.69, 0.21, 0.29, 0.52)), colours)
    figure.text(0.835, 0.9, "convolution   ‖w‖ ‖x‖ cos θ", ha="center", color=colours["faint"], size=12.5)
    figure.text(0.835, 0.8, "sphereified   g(θ)", ha="center", weight="bold", size=12.5)
    return figure


def _pixels(axes: Any, colours: dict[str, str]) -> None:
    """The filter, the patch, and the same patch with less contrast."""
    axes.set(xlim=(0, 10), ylim=(0, 13.2), aspect="equal")
    axes.axis("off")
    for values, left, bottom, name, colour, ramp in (
        (FILTER / 1.2, 2.6, 8.2, "filter w", colours["w"], "PuOr_r"),
        (PATCH - 0.5, 0.2, 2.6, "patch x", colours["x"], "gray"),
        ((PATCH - 0.5) * CONTRAST, 5.4, 2.6, "less contrast", colours["x"], "gray"),
    ):
        size = 3.9
        extent = (left, left + size, bottom, bottom + size)
        axes.imshow(values, cmap=ramp, vmin=-0.75, vmax=0.75, extent=extent, interpolation="nearest", zorder=2)
        axes.add_patch(Rectangle((left, bottom), size, size, fill=False, edgecolor=colour, linewidth=2, zorder=3))
        axes.text(left + size / 2, bottom - 0.35, name, ha="center", va="top", color=colour)
    axes.set(xlim=(0, 10), ylim=(0, 13.2))


def _angle(axes: Any, colours: dict[str, str]) -> None:
    """The filter and the patches as arrows: one angle, whatever their lengths."""
    axes.set(xlim=(-0.25, 2.3), ylim=(-0.42, 1.95), aspect="equal")
    axes.axis("off")
    axes.add_patch(
        Arc((0, 0), 2, 2, theta1=-8, theta2=98, color=colours["faint"], linestyle=(0, (4, 3)), linewidth=1.2)
    )
    axes.text(1.03, -0.1, "unit sphere", ha="left", va="top", color=colours["faint"], size=9.5)
    for angle, length, colour, name in ((W, 1.62, colours["w"], "w"), (X, 2.1, colours["x"], "x")):
        end = length * np.array([np.cos(angle), np.sin(angle)])
        axes.add_patch(FancyArrowPatch((0, 0), end, color=colour, arrowstyle="-|>", mutation_scale=18, linewidth=2.4,
                                       shrinkA=0, shrinkB=0))  # fmt: skip
        place = end + 0.1 * np.array([np.cos(angle), np.sin(angle)])
        axes.text(*place, name, color=colour, ha="center", va="center", size=13, weight="bold")
    short = 2.1 * CONTRAST * np.array([np.cos(X), np.sin(X)])
    shift = np.array([0.035, -0.085])
    axes.add_patch(FancyArrowPatch(shift, short + shift, color=colours["x"], arrowstyle="-|>", mutation_scale=14,
                                   linewidth=1.6, shrinkA=0, shrinkB=0, alpha=0.75))  # fmt: skip
    degrees = np.rad2deg([X, W])
    axes.add_patch(Arc((0, 0), 1.0, 1.0, theta1=degrees[0], theta2=degrees[1], color=colours["text"], linewidth=1.6))
    axes.text(*(0.64 * np.array([np.cos((W + X) / 2), np.sin((W + X) / 2)])), "θ", ha="center", va="center", size=15)
    axes.text(1.02, -0.4, "the length changes, the angle stays", ha="center", va="bottom", size=10.5)


def _functions(axes: Any, colours: dict[str, str]) -> None:
    """The operators g over the angle."""
    theta, k = np.linspace(0, np.pi, 200), 0.3
    curves = {
        "cosine": np.cos(theta),
        "linear": 1 - 2 * theta / np.pi,
        "sigmoid": np.tanh((np.pi / 2 - theta) / (2 * k)) / np.tanh(np.pi / (4 * k)),
    }
    for (name, values), style in zip(curves.items(), ("-", "--", ":"), strict=True):
        axes.plot(theta, values, style, color=colours["text"], linewidth=2, label=name)
    axes.axhline(0, color=colours["faint"], linewidth=0.8, zorder=0)
    axes.set(xlim=(0, np.pi), ylim=(-1.08, 1.08), xlabel="θ", ylabel="g(θ)", facecolor="none")
    axes.set_xticks([0, np.pi / 2, np.pi], ["0", "π/2", "π"])
    axes.set_yticks([-1, 0, 1], ["−1", "0", "1"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(colours["faint"])
    axes.tick_params(color=colours["faint"])
    axes.legend(frameon=False, fontsize=9.5, loc="upper right", labelcolor=colours["text"], handlelength=2.2,
                borderaxespad=0)  # fmt: skip


def main(folder: Path = FOLDER) -> None:
    """Write the picture for light and for dark pages."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, colours in THEMES.items():
        of_text = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), colours["text"])
        # Letters as paths look alike everywhere; a fixed salt and no date give the same bytes each time.
        with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "sphereify", "font.size": 11, **of_text}):
            draw(colours).savefig(folder / f"idea-{name}.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()

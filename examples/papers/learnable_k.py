"""A learned k: figure 4 of "Deep Hyperspherical Learning".

    python -m examples.papers.learnable_k --data CIFAR10 -o out/learnable_k

CNN-9 with the cosine W-Softmax and the sigmoid operator, k fixed or learned from 0.5 for each filter, layer or network.
The second picture, second.png, is the histogram of k in conv1_1, conv2_1 and conv3_1 after training.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from examples.papers.cells import CPU, Cell, Experiment, Scale, run
from examples.papers.operators_and_losses import terms_of
from examples.papers.plain_cnn import cnn, wide
from sphereify.plots import new_figure, save_figure

PANEL = "cosine W-Softmax"
LEARNED: dict[str, Any] = {"operator": "learnable-sigmoid", "head_operator": "cosine"}
KINDS: dict[str, dict[str, Any]] = {
    "k = 0.3": {"operator": "sigmoid", "k": 0.3, "head_operator": "cosine"},
    "k of each filter": LEARNED,
    "k of each layer": {**LEARNED, "share_k": "layer"},
    "one k": {**LEARNED, "share_k": "network"},
}
FEW = {"quick": ("k of each filter",), "cpu": ("k = 0.3", "k of each filter")}
LAYERS = ("conv1_1", "conv2_1", "conv3_1")


def cells(scale: Scale) -> list[Cell]:
    build = partial(cnn, filters=wide((64, 96, 128), scale.width), features=wide((256,), scale.width)[0])
    return [Cell(PANEL, name, build, KINDS[name], terms_of("learnable")) for name in FEW.get(scale.name, KINDS)]


def draw_histogram(network_of: Callable[[str], Any], path: Path) -> None:
    """Draw a histogram of k for each layer."""
    network = network_of("k of each filter")
    figure, panels = new_figure(width=9, height=3, ncols=len(LAYERS), sharey=True)
    for axes, layer in zip(panels, LAYERS, strict=True):
        values = network.get_submodule(layer).operator.k.detach()
        axes.hist(values.tolist(), bins=20, range=(0, 1))
        axes.set(title=f"{layer}, {len(values)} filters", xlabel="k, started at 0.5")
    panels[0].set_ylabel("filters")
    save_figure(figure, path)


EXPERIMENT = Experiment(
    "learnable_k",
    __doc__,
    cells,
    {f"{PANEL}: k = 0.3": 91.22, f"{PANEL}: k of each filter": 91.64},
    "authors, section 4.3",
    cpu=replace(CPU, iterations=1_500, tests=16),
    draw=draw_histogram,
)


def main(argv: list[str] | None = None) -> None:
    run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()

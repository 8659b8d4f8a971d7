"""Depth without shortcuts: which networks train with BatchNorm and without it, and up to which learning rate?

    python -m examples.evidence.depth --data CIFAR10 -o out/depth --jobs 2

CNN-18, 45 and 69 (figure 3(d) of "Deep Hyperspherical Learning") with a sweep of learning rates. Without BatchNorm:
plain with He's initialisation, cosine with SphereNorm, rescaled, and the same with the pooled radius. With BatchNorm:
plain and cosine. A run has converged if its loss stayed finite and the network recognises at least twice as many test
images as guessing would (`CONVERGED`). The table tells how many seeds converged with each rate, their mean accuracy,
and the largest rate with which all did. At the scale for a CPU: an eighth of the filters, 1,000 iterations with batches
of 64, three seeds; six hours on two cores (estimated), half an hour on an H200 for one seed (`--jobs 8`, under MPS).
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from examples.evidence.networks import ANGULAR, plain_cnn
from examples.papers.cells import CPU, FULL, QUICK, RATE, Cell, Experiment, Scale, run
from examples.papers.operators_and_losses import terms_of
from examples.papers.report import markdown
from examples.papers.results import Outcome
from sphereify.plots import new_figure, save_figure

DEPTHS = {"quick": (18,), "cpu": (18, 45, 69), "full": (18, 45, 69)}
RATES = {"quick": (1e-3,), "cpu": (3e-4, 1e-3, 3e-3, 1e-2), "full": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
CONVERGED = 2.0
"""Least accuracy of a run that has converged, as a multiple of that of guessing. On 2,000 images of ten classes the
latter has a standard deviation of 0.07 times its mean."""
RESCALED: dict[str, Any] = {**ANGULAR, "rescale": "always"}


class Kind(NamedTuple):
    """What a network of any depth is made of."""

    norm: bool
    """True if a BatchNorm follows each convolution."""
    options: dict[str, Any] | None
    """Options of `sphereify`; None: the network stays plain."""


NETWORKS = {
    "plain": Kind(False, None),
    "SphereNorm": Kind(False, RESCALED),
    "SphereNorm, ρ = 2": Kind(False, {**RESCALED, "radius": 2.0}),
    "plain, BatchNorm": Kind(True, None),
    "cosine, BatchNorm": Kind(True, ANGULAR),
}
COLOURS = dict(zip(NETWORKS, ("tab:blue", "tab:orange", "tab:green", "tab:grey", "tab:red"), strict=True))


def cells(scale: Scale) -> list[Cell]:
    return [
        Cell(f"CNN-{depth}", f"{name}{RATE}{rate:g}", plain_cnn(scale.width, depth=depth, norm=kind.norm),
             kind.options, terms_of("plain" if kind.options is None else "cosine"), settings={"lr": rate})
        for rate in RATES[scale.name] for depth in DEPTHS[scale.name] for name, kind in NETWORKS.items()
    ]  # fmt: skip


def has_converged(outcome: Outcome) -> bool:
    """True if the loss stayed finite and the accuracy is clearly above that of guessing."""
    return outcome.accuracy is not None and outcome.accuracy >= CONVERGED / len(outcome.per_class)


def sweeps(
    cells: Sequence[Cell], outcomes: dict[str, list[Outcome]]
) -> dict[tuple[str, str], dict[float, list[Outcome]]]:
    """The outcomes of the seeds by depth and network, and by learning rate; rates without one are left out."""
    found: dict[tuple[str, str], dict[float, list[Outcome]]] = {}
    for cell in cells:
        if outcomes[cell.name]:
            name = cell.label.partition(RATE)[0]
            found.setdefault((cell.panel, name), {})[cell.settings["lr"]] = outcomes[cell.name]
    return dict(sorted(found.items(), key=lambda item: int(item[0][0].partition("-")[2])))


def largest_rate(sweep: dict[float, list[Outcome]], rates: Sequence[float], seeds: int) -> str:
    """The largest learning rate with which all seeds converged, as the table tells it.

    A rate is out as soon as one seed has failed with it. One with which none has failed, but of which seeds are
    missing, is undecided: the largest rate is then known as "or more", or not at all.

    Args:
        sweep: the outcomes by rate; those that are missing have not been run.
        rates: all learning rates of the sweep, in ascending order.
        seeds: the number of seeds of each.
    """
    undecided = False
    for rate in reversed(rates):
        runs = sweep.get(rate, [])
        if not all(map(has_converged, runs)):
            continue
        if len(runs) == seeds:
            return f"{rate:g} or more" if undecided else f"{rate:g}"
        undecided = True
    return "not decided" if undecided else "none"


def table(experiment: Experiment, cells: Sequence[Cell], outcomes: dict[str, list[Outcome]], scale: Scale) -> str:
    """How many seeds converged and the mean accuracy of these, by rate; the largest rate with which all did."""
    rates = RATES[scale.name]
    rows = []
    for (depth, name), sweep in sweeps(cells, outcomes).items():
        told = [_told(sweep.get(rate, [])) for rate in rates]
        rows += [[f"{depth}: {name}", *told, largest_rate(sweep, rates, scale.seeds)]]
    return markdown(["converged, test accuracy", *(f"rate {rate:g}" for rate in rates), "largest rate for all"], rows)


def _told(runs: list[Outcome]) -> str:
    sound = [100 * outcome.accuracy for outcome in runs if has_converged(outcome)]  # type: ignore[operator]
    if not runs:
        return ""
    spread = f" ± {statistics.stdev(sound):.1f}" if len(sound) > 1 else ""
    return f"{len(sound)} of {len(runs)}" + (f", {statistics.mean(sound):.1f}{spread} %" if sound else "")


def draw(cells: list[Cell], outcomes: dict[str, list[Outcome]], path: Path) -> None:
    """The accuracy of each run over its learning rate, a panel for each depth, a line through the means."""
    depths = list(dict.fromkeys(cell.panel for cell in cells))
    rates = sorted({cell.settings["lr"] for cell in cells})
    size = {"width": 4.0 * len(depths), "height": 3.8}
    figure, grid = new_figure(**size, ncols=len(depths), squeeze=False, sharey=True)
    for (depth, name), sweep in sweeps(cells, outcomes).items():
        axes = grid[0][depths.index(depth)]
        runs = {rate: [100 * (outcome.accuracy or 0.0) for outcome in sweep[rate]] for rate in sorted(sweep)}
        axes.plot(list(runs), [statistics.mean(shares) for shares in runs.values()], color=COLOURS[name], label=name)
        axes.plot(*zip(*((rate, share) for rate, shares in runs.items() for share in shares), strict=True), ".",
                  color=COLOURS[name], alpha=0.6)  # fmt: skip
        axes.set_title(depth, fontsize=10)
        axes.set_xscale("log")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.set_xlabel("learning rate")
        axes.grid(linewidth=0.4)
        axes.legend(fontsize=8)
    grid[0][0].set_ylabel("test accuracy, %; 0: the loss was not finite")
    save_figure(figure, path)


EXPERIMENT = Experiment(
    "depth",
    __doc__,
    cells,
    cpu=replace(CPU, iterations=1_000, batch_size=64, train_images=None, test_images=200, seeds=3, goals=(),
                last_images=2_000, tests=4),
    full=replace(FULL, iterations=5_000, goals=(), tests=16),
    quick=replace(QUICK, goals=()),
    table=table,
    figure=draw,
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    run(EXPERIMENT, argv)


if __name__ == "__main__":
    main()

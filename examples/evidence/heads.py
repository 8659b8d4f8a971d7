"""Do angular heads pay: for classes that were never seen, for classes with few images, under wrong labels?

    python -m examples.evidence.heads --data CIFAR10 -o out/heads --jobs 2
    python -m examples.evidence.heads --data digits -o out/heads-digits --panels verification --iterations 400
    python -m examples.evidence.heads --data CIFAR10 -o out/heads --report        # of what has finished

A small CNN is trained with each head, which alone is angular ("head alone") or together with the convolutions ("whole
network", cosine); ga-softmax has the linear operator, all else the cosine. Each network with each head has four tries
in every panel, on a task that resembles it: of softmax and w-softmax four learning rates, of the others margins with
rates or scales. One seed decides; the try that is best by the panel's measure is trained with all seeds.

verification  trained on half of the classes, all images of the other half compared in pairs; tried with the halves
              swapped, by the equal error rate
few images    a twentieth of the training images of three of ten classes; tried with three other classes, by the
              accuracy on training images that no run uses; by the classifier, and by the nearest mean embedding of a
              class, which decides, since a short training leaves rare classes to no classifier
label noise   a share of the training labels replaced at random, tests with true ones; tried with other wrong labels,
              by the accuracy on training images that no run uses
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from examples.evidence.heads_report import draw, tables
from examples.evidence.heads_runs import SPLITS, Network, train
from examples.evidence.work import Found, Piece, complete, cpu_minutes
from examples.papers.report import finish, parse

SOFTMAX = "softmax"
ALONE, WHOLE = "head alone", "whole network"
Numbers = dict[str, float]
"""The learning rate of a network, and the scale and the margin of its head."""
RATES = tuple({"lr": rate} for rate in (1e-3, 3e-3, 6e-3, 1e-2))
MULTIPLES = tuple({"lr": rate, "margin": margin} for rate in (3e-3, 6e-3) for margin in (2.0, 4.0))
"""Of the heads whose margin is a multiple of the angle."""


def _scaled(scales: tuple[float, ...], margins: tuple[float, ...]) -> tuple[Numbers, ...]:
    return tuple({"lr": 3e-3, "scale": scale, "margin": margin} for scale in scales for margin in margins)


TRIES: dict[str, tuple[Numbers, ...]] = {
    SOFTMAX: RATES,
    "w-softmax": RATES,
    "a-softmax": MULTIPLES,
    "ga-softmax": MULTIPLES,
    "arcface": _scaled((16.0, 30.0), (0.2, 0.35)),  # the paper's 64 learns too slowly for a short training
    "cosface": _scaled((16.0, 30.0), (0.2, 0.35)),
    "sphereface2": _scaled((20.0, 40.0), (0.2, 0.4)),
}
"""For each head the learning rates, scales and margins to choose from."""


@dataclass(frozen=True)
class Scale:
    """Size of the program."""

    iterations: int
    batch_size: int
    width: int
    """Filters of the first stage."""
    train_images: int
    """Number of training images, before any of them are left out; as many as there are if there are fewer."""
    held_out_images: int
    """Number of images on which tries are compared, and of images that are verified; fewer if there are fewer."""
    seeds: int
    heads: dict[str, tuple[str, ...]]
    """The heads of each kind of network."""
    noise: tuple[float, ...] = (0.4,)
    """Shares of wrong labels."""
    few: float = 1 / 20
    """Share of the images of classes with few."""
    tries: int = 4
    tests: int = 5


CPU = Scale(550, 64, 16, 10_000, 4_000, 3, {ALONE: tuple(TRIES), WHOLE: (SOFTMAX, "w-softmax", "cosface")})
FULL = replace(CPU, iterations=8_000, batch_size=128, width=64, train_images=45_000,
               heads={ALONE: tuple(TRIES), WHOLE: tuple(TRIES)}, noise=(0.0, 0.2, 0.4, 0.6), tests=20)  # fmt: skip
QUICK = Scale(2, 8, 2, 40, 40, 1, {ALONE: (SOFTMAX, "cosface"), WHOLE: ("w-softmax",)}, tries=2, tests=1)
SCALES = {"quick": QUICK, "cpu": CPU, "full": FULL}


def options_of(network: str, head: str, numbers: Numbers) -> dict[str, Any] | None:
    """The options of `sphereify` for a network with a head and its numbers."""
    if head == SOFTMAX:
        return None if network == ALONE else {"operator": "cosine", "head": "keep"}
    only = {"include": "classifier"} if network == ALONE else {}
    # With the cosine, ga-softmax is a-softmax.
    curve = {"head_operator": "linear"} if head == "ga-softmax" else {}
    own = {name: value for name, value in numbers.items() if name != "lr"}
    return {"operator": "cosine", "head": head, **only, **curve, **own}


def panels(scale: Scale, names: list[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The panels of a scale: for each the kind of its data, and what these depend on."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in names:
        if name == "label noise":
            found |= {f"{name} {share:g}": (name, {"share": share}) for share in scale.noise}
        else:
            found[name] = (name, {"share": scale.few} if name == "few images" else {})
    return found


class Panel:
    """The pieces of work of a panel and its results."""

    def __init__(self, name: str, kind: str, how: dict[str, Any], scale: Scale, args: Any):
        self.name, self.kind, self.how, self.scale, self.args = name, kind, how, scale, args
        self.networks = [(network, head) for network, heads in scale.heads.items() for head in heads]

    def piece(self, network: str, head: str, numbers: Numbers, *, seed: int = 0, tried: bool = False) -> Piece:
        """The training and test of a network with a head."""
        scale = self.scale
        told = "try " + ", ".join(f"{name}={value:g}" for name, value in numbers.items()) if tried else f"seed {seed}"
        options = options_of(network, head, numbers)
        built = Network(scale.width, scale.iterations, scale.batch_size, scale.tests, numbers["lr"], options)
        images = {"train_images": scale.train_images, "held_out_images": scale.held_out_images, **self.how}
        given = {"kind": self.kind, "network": built, "images": images, "seed": seed, "tried": tried}
        return Piece(f"{self.name}, {network}, {head}, {told}", partial(train, workers=self.args.workers), given)

    def results(self) -> dict[str, Any]:
        """The results of the tries, and for each network the numbers that they chose and its results by seed."""
        tries = {
            one: {self.piece(*one, numbers, tried=True): numbers for numbers in TRIES[one[1]][: self.scale.tries]}
            for one in self.networks
        }
        tried = complete([piece for some in tries.values() for piece in some], self.args)
        chosen = {
            one: numbers
            for one, some in tries.items()
            if (numbers := choose([(tried.get(piece.name), numbers) for piece, numbers in some.items()]))
        }
        seeds = range(self.scale.seeds)
        runs = {(one, seed): self.piece(*one, chosen[one], seed=seed) for seed in seeds for one in chosen}
        found = complete(list(runs.values()), self.args)
        rows = []
        for one, numbers in chosen.items():
            finished = {seed: found[runs[one, seed].name] for seed in seeds if runs[one, seed].name in found}
            if finished:
                rows += [{"network": one[0], "head": one[1], "numbers": numbers, "seeds": finished}]
        return {"tries": tried, "rows": rows}


def choose(tries: list[tuple[Found | None, Numbers]]) -> Numbers | None:
    """The numbers of the first try with the highest goal; None if one has not finished, or none of them converged."""
    if any(found is None for found, _ in tries):
        return None
    converged = [(found["goal"], numbers) for found, numbers in tries if found and "goal" in found]
    return max(converged, key=lambda one: one[0])[1] if converged else None


def main(argv: list[str] | None = None) -> None:
    further = {"--panels": {"nargs": "+", "choices": list(SPLITS), "default": list(SPLITS), "help": "default: all"}}
    args = parse(__doc__, argv, trains=True, further=further)
    given = {name: getattr(args, name) for name in ("iterations", "seeds") if getattr(args, name)}
    scale = replace(SCALES[args.scale], **given)
    found = {
        name: Panel(name, kind, how, scale, args).results() for name, (kind, how) in panels(scale, args.panels).items()
    }
    minutes = cpu_minutes(args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    document = {"settings": asdict(scale), "cpu_minutes": minutes, "panels": found}
    finish(args, "heads", tables(found, scale.seeds, minutes), draw(found), document)


if __name__ == "__main__":
    main()

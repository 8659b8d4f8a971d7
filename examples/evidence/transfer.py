"""What people really do: fine-tuning of a network that came trained, as it is, converted, and converted with a teacher.

    python -m examples.evidence.transfer --data CIFAR10 --plain data/plain/resnet20.pt -o out/transfer --jobs 2
    python -m examples.evidence.transfer --data CIFAR10 -o out/transfer --report          # of what has finished

other classes  a ResNet-20 that was trained on half of the classes here, for the other half, with 1,000 training images
same classes   the network in --plain (benchmarks/plain_networks.py), for all classes, with 1,000 images of those that it
               was trained on; without --plain a network is trained here first, as for the other task

The conversion is that of `sphereify finetune --pretrained`: cosine, a pooled radius of 4, calibrated on the training
images without labels, a w-softmax. The teacher is the network before its conversion; where the classes are new, after it
has been fine-tuned with the same images and seed.

Each network has the same learning rates to choose from, by one seed with other training images and by test images that
are not tested afterwards. The seeds then draw the training images, their order and new classifiers.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from examples.evidence.transfer_runs import OTHER, SAME, learn, source
from examples.evidence.work import Found, Piece, complete, cpu_minutes, percent
from examples.papers.report import finish, markdown, parse
from sphereify.plots import plot_panels
from sphereify.training.recipe import GENTLE_RADIUS

ORIGINAL, CONVERTED, TAUGHT = "original", "converted", "converted, teacher"
CONVERSION = {"operator": "cosine", "radius": GENTLE_RADIUS}
TASKS = (OTHER, SAME)
TRIED_SEED = 1_000
"""Seed of the tries of the learning rates."""


@dataclass(frozen=True)
class Scale:
    """Size of the program."""

    images: int
    """Number of training images of a task."""
    epochs: int
    source_epochs: int
    """Length of the training of a network that is transferred."""
    rates: tuple[float, ...]
    points: tuple[int, ...]
    """Epochs after which the table tells the accuracy."""
    seeds: int
    tried_images: int
    """Number of test images by which rates are chosen."""
    test_images: int
    """Number of other test images; as many as there are if there are fewer."""
    batch_size: int = 64


CPU = Scale(1_000, 10, 5, (3e-3, 1e-2, 3e-2, 1e-1), (1, 3, 10), 3, 1_000, 1_500)
FULL = replace(CPU, source_epochs=40, rates=(1e-3, *CPU.rates, 3e-1), test_images=8_000, tried_images=2_000, seeds=5)
QUICK = Scale(16, 2, 1, (1e-2, 3e-2), (1, 2), 1, 8, 8, batch_size=8)
SCALES = {"quick": QUICK, "cpu": CPU, "full": FULL}


class Pieces:
    """The pieces of work of a scale, which are made when what they build upon has finished."""

    def __init__(self, scale: Scale, args: Any):
        self.scale, self.args = scale, args

    def sources(self) -> list[Piece]:
        """The trainings of the networks that are transferred."""
        own = [OTHER] if self.args.plain else list(TASKS)
        return [Piece(f"source, {task}", source, {"task": task, "epochs": self.scale.source_epochs}) for task in own]

    def transfer(self, task: str, variant: str, rate: float, *, seed: int, teacher: Piece | None = None) -> Piece:
        """The fine-tuning of a network."""
        tried = seed == TRIED_SEED
        name = f"{task}, {variant}, rate {rate:g}" + ("" if tried else f", seed {seed}")
        start = self.args.plain if task == SAME else None
        output = self.args.output
        do = partial(learn, plain=start, output=output, taught_by=teacher.folder(output) if teacher else None)
        given = {
            "task": task, "options": None if variant == ORIGINAL else CONVERSION, "lr": rate, "seed": seed,
            "teacher": variant == TAUGHT, "tried": tried, "images": self.scale.images, "epochs": self.scale.epochs,
            "batch_size": self.scale.batch_size, "tried_images": self.scale.tried_images,
            "test_images": self.scale.test_images, "teacher_piece": teacher.name if teacher else "",
        }  # fmt: skip
        return Piece(name, do, given)

    def teacher(self, task: str, rate: float, seed: int) -> Piece | None:
        """The original that teaches: fine-tuned where the classes are new; None: as it came."""
        return self.transfer(task, ORIGINAL, rate, seed=seed) if task == OTHER else None

    def all_of(self, variants: tuple[str, ...], rates: dict[tuple[str, str], float]) -> tuple[dict, dict]:
        """The rates that the tries choose for some variants, and the results with all seeds: found, one by one seed.

        Args:
            rates: the rates that have been chosen before, by task and variant.
        """

        def make(task: str, variant: str, rate: float, seed: int) -> Piece | None:
            if variant != TAUGHT:
                return self.transfer(task, variant, rate, seed=seed)
            if (task, ORIGINAL) not in rates:
                return None  # with --report: there is no teacher yet
            teacher = self.teacher(task, rates[task, ORIGINAL], seed)
            return self.transfer(task, variant, rate, seed=seed, teacher=teacher)

        keys = [(task, variant) for task in TASKS for variant in variants]
        tries = {(*key, rate): make(*key, rate, TRIED_SEED) for key in keys for rate in self.scale.rates}
        tried = complete([piece for piece in tries.values() if piece], self.args)
        chosen = {}
        for key in keys:
            found = [(piece and tried.get(piece.name), rate) for rate in self.scale.rates if (piece := tries[*key, rate])]
            if (rate := best(found)) is not None:
                chosen[key] = rate
        runs = {(*key, seed): piece for seed in range(self.scale.seeds) for key, rate in chosen.items()
                if (piece := make(*key, rate, seed))}  # fmt: skip
        results = complete(list(runs.values()), self.args)
        return chosen, {key: results[piece.name] for key, piece in runs.items() if piece.name in results}


def best(tries: list[tuple[Found | None, float]]) -> float | None:
    """The rate of the try with the highest accuracy at the end, the smallest of equals; None if one has not finished."""
    if not tries or any(found is None for found, _ in tries):
        return None
    ends = [(found["accuracies"][-1], -rate) for found, rate in tries if found and "accuracies" in found]
    return -max(ends)[1] if ends else None


def main(argv: list[str] | None = None) -> None:
    further = {"--plain": {"type": Path, "help": "file of a ResNet-20 that was trained on all classes"}}
    args = parse(__doc__, argv, trains=True, further=further)
    if args.plain and not args.plain.is_file() and not args.report:
        raise SystemExit(f"{args.plain}: no such file; train the network with benchmarks/plain_networks.py")
    scale = replace(SCALES[args.scale], **({"seeds": args.seeds} if args.seeds else {}))
    pieces = Pieces(scale, args)
    sources = complete(pieces.sources(), args)
    rates, results = pieces.all_of((ORIGINAL, CONVERTED), {})
    taught_rates, taught = pieces.all_of((TAUGHT,), rates)
    rates, results = {**rates, **taught_rates}, {**results, **taught}
    rows = [{"task": task, "variant": variant, "rate": rates.get((task, variant)),
             "seeds": {seed: results[task, variant, seed] for seed in range(scale.seeds)
                       if (task, variant, seed) in results}}
            for task in TASKS for variant in (ORIGINAL, CONVERTED, TAUGHT)]  # fmt: skip
    minutes = cpu_minutes(args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    plot_panels(_curves(rows), args.output / "figure.png")
    document = {"settings": asdict(scale), "cpu_minutes": minutes, "sources": sources, "rows": rows}
    finish(args, "transfer", _table(rows, scale, minutes), None, document)


def _table(rows: list[dict[str, Any]], scale: Scale, minutes: float) -> str:
    lines = []
    for row in rows:
        found = {seed: run for seed, run in row["seeds"].items() if "failure" not in run}
        if not row["seeds"]:
            continue
        originals = next(one["seeds"] for one in rows if (one["task"], one["variant"]) == (row["task"], ORIGINAL))
        told = row["variant"] + (f" ({len(found)} of {scale.seeds} seeds)" if len(found) < scale.seeds else "")
        cells = [percent(run["accuracies"][point - 1] for run in found.values()) for point in scale.points]
        gains = [[run["accuracies"][point - 1] - originals[seed]["accuracies"][point - 1]
                  for seed, run in found.items() if "accuracies" in originals.get(seed, {})]
                 for point in (scale.points[0], scale.points[-1])]  # fmt: skip
        differences = ["" if row["variant"] == ORIGINAL else percent(some, signed=True) for some in gains]
        lines += [[row["task"], told, f"{row['rate']:g}", *cells, *differences]]
    points = [f"after {point} epoch{'s' * (point > 1)}" for point in scale.points]
    columns = ["task", "network", "learning rate", *points, f"gain, {points[0]}", f"gain, {points[-1]}"]
    about = (
        f"Test accuracy in %, mean ± standard deviation over {scale.seeds} seeds; gain = mean difference from the original "
        f"with the same seed; {minutes:.0f} minutes of a core.\n\n"
    )
    return about + (markdown(columns, lines) if lines else "No result yet.\n")


def _curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Accuracy over iterations, by task and network."""
    panels: dict[str, dict[str, Any]] = {task: {} for task in TASKS}
    for row in rows:
        runs = [[{"step": step, "accuracy": accuracy} for step, accuracy in zip(run["steps"], run["accuracies"], strict=True)]
                for run in row["seeds"].values() if "accuracies" in run]  # fmt: skip
        if runs:
            panels[row["task"]][row["variant"]] = runs
    return panels


if __name__ == "__main__":
    main()

"""What people really do: fine-tuning of a network that came trained, as it is, converted, and converted with a teacher.

    python -m examples.evidence.transfer --data CIFAR10 --plain data/plain -o out/transfer --jobs 2
    python -m examples.evidence.transfer --data CIFAR10 -o out/transfer --report          # of what has finished

other classes  a ResNet-20 that was trained on half of the classes here, for the other half, with 1,000 training images
same classes   resnet20.pt in the folder --plain (benchmarks/plain_networks.py), for all classes, with 1,000 images
               that it was trained on; where it is missing a network is trained here first, as for the other task

The conversion is that of `sphereify finetune --pretrained`: cosine, a pooled radius of 4, calibrated on the training
images without labels, a w-softmax. The teacher is the network before its conversion; where the classes are new, after
it has been fine-tuned with the same images and seed.

Each network has the same learning rates to choose from, by one seed with other training images and by test images that
are not tested afterwards. The seeds then draw the training images, their order and new classifiers.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from examples.evidence.transfer_runs import OTHER, SAME, learn, source
from examples.evidence.work import Found, Piece, complete, cpu_minutes
from examples.papers.report import finish, markdown, parse
from examples.papers.results import difference, finished, mean_percent, not_converged
from sphereify.plots import plot_panels
from sphereify.training.recipe import GENTLE_RADIUS

ORIGINAL, CONVERTED, TAUGHT = "original", "converted", "converted, teacher"
CONVERSION = {"operator": "cosine", "radius": GENTLE_RADIUS}
TASKS = (OTHER, SAME)
Key = tuple[str, str]
"""A task and a variant of the network."""
Rates = dict[Key, float]
"""Learning rates by task and variant."""
Results = dict[tuple[Key, int], Found]
"""Results by task and variant, and seed."""
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
    rates: dict[str, tuple[float, ...]]
    """Learning rates to choose from, by task: a network that knows its classes takes smaller steps."""
    points: tuple[int, ...]
    """Epochs after which the table tells the accuracy."""
    seeds: int
    tried_images: int
    """Number of test images by which rates are chosen."""
    test_images: int
    """Number of other test images; as many as there are if there are fewer."""
    batch_size: int = 64


CPU = Scale(1_000, 10, 4, {OTHER: (1e-2, 3e-2, 1e-1), SAME: (1e-3, 3e-3, 1e-2)}, (1, 3, 10), 3, 1_000, 1_000)
MANY = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FULL = replace(CPU, source_epochs=40, rates={OTHER: MANY, SAME: MANY}, test_images=8_000, tried_images=2_000, seeds=5)
QUICK = Scale(16, 2, 1, dict.fromkeys(TASKS, (1e-2, 3e-2)), (1, 2), 1, 8, 8, batch_size=8)
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
        return Piece(name, do, given, start)

    def teacher(self, task: str, rate: float, seed: int) -> Piece | None:
        """The original that teaches: fine-tuned where the classes are new; None: as it came."""
        return self.transfer(task, ORIGINAL, rate, seed=seed) if task == OTHER else None

    def all_of(self, variants: tuple[str, ...], known: Rates) -> tuple[Rates, Results]:
        """The rates that the tries choose for some variants, and the results with all seeds.

        Args:
            known: the rates that have been chosen before.
        """
        keys = [(task, variant) for task in TASKS for variant in variants]
        tries = {
            key: [(rate, self._piece(key, rate, TRIED_SEED, known)) for rate in self.scale.rates[key[0]]]
            for key in keys
        }
        tried = complete([piece for some in tries.values() for _, piece in some if piece], self.args)
        chosen: Rates = {}
        for key, some in tries.items():
            rate = best([(tried.get(piece.name) if piece else None, rate) for rate, piece in some])
            chosen |= {} if rate is None else {key: rate}
        wanted = [(key, seed) for seed in range(self.scale.seeds) for key in chosen]
        runs = {(key, seed): self._piece(key, chosen[key], seed, known) for key, seed in wanted}
        results = complete([piece for piece in runs.values() if piece], self.args)
        return chosen, {one: results[piece.name] for one, piece in runs.items() if piece and piece.name in results}

    def _piece(self, key: Key, rate: float, seed: int, known: Rates) -> Piece | None:
        """The fine-tuning of a network; None if the rate of its teacher has not been chosen, as with --report."""
        task, variant = key
        if variant != TAUGHT:
            return self.transfer(task, variant, rate, seed=seed)
        if (task, ORIGINAL) not in known:
            return None
        return self.transfer(task, variant, rate, seed=seed, teacher=self.teacher(task, known[task, ORIGINAL], seed))


def best(tries: list[tuple[Found | None, float]]) -> float | None:
    """The rate of the highest accuracy at the end, the smallest of equals; None if a try has not finished."""
    if not tries or any(found is None for found, _ in tries):
        return None
    ends = [(found["accuracies"][-1], -rate) for found, rate in tries if found and "accuracies" in found]
    return -max(ends)[1] if ends else None


def main(argv: list[str] | None = None) -> None:
    about = "folder with resnet20.pt, trained on all classes"
    further = {"--plain": {"type": Path, "default": Path("data/plain"), "help": about}}
    args = parse(__doc__, argv, trains=True, further=further)
    trained = args.plain / "resnet20.pt"
    args.plain = trained if trained.is_file() and args.scale != "quick" else None
    scale = replace(SCALES[args.scale], **({"seeds": args.seeds} if args.seeds else {}))
    pieces = Pieces(scale, args)
    sources = complete(pieces.sources(), args)
    rates, results = pieces.all_of((ORIGINAL, CONVERTED), {})
    taught_rates, taught = pieces.all_of((TAUGHT,), rates)
    rates, results = {**rates, **taught_rates}, {**results, **taught}
    rows = []
    for key in ((task, variant) for task in TASKS for variant in (ORIGINAL, CONVERTED, TAUGHT)):
        seeds = {seed: results[key, seed] for seed in range(scale.seeds) if (key, seed) in results}
        rows += [{"task": key[0], "variant": key[1], "rate": rates.get(key), "seeds": seeds}]
    minutes = cpu_minutes(args.output)
    args.output.mkdir(parents=True, exist_ok=True)
    plot_panels(_curves(rows), args.output / "figure.png")
    document = {"settings": asdict(scale), "cpu_minutes": minutes, "sources": sources, "rows": rows}
    finish(args, "transfer", _table(rows, scale, minutes), None, document)


def _table(rows: list[dict[str, Any]], scale: Scale, minutes: float) -> str:
    ends = (scale.points[0], scale.points[-1])
    lines = []
    for row in rows:
        if not row["seeds"]:
            continue
        found = _converged(row)
        originals = _converged(next(one for one in rows if (one["task"], one["variant"]) == (row["task"], ORIGINAL)))
        cells = [mean_percent(accuracies[point - 1] for accuracies in found.values()) for point in scale.points]
        both = [] if row["variant"] == ORIGINAL else sorted(found.keys() & originals.keys())
        gains = [[found[seed][end - 1] - originals[seed][end - 1] for seed in both] for end in ends]
        told = [difference(some) for some in gains]
        failed = len(row["seeds"]) - len(found)
        network = row["variant"] + finished(row["seeds"], scale.seeds) + not_converged(failed)
        lines += [[row["task"], network, f"{row['rate']:g}", *cells, *told]]
    points = [f"after {_epochs(point)}" for point in scale.points]
    columns = ["task", "network", "learning rate", *points, *(f"gain after {_epochs(end)}" for end in ends)]
    about = (
        f"Test accuracy in %, mean ± standard deviation over {scale.seeds} seeds; gain = mean difference from the "
        f"original with the same seed, bold if chance does not explain it; {minutes:.0f} minutes of a core.\n\n"
    )
    return about + markdown(columns, lines)


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count > 1)}"


def _converged(row: dict[str, Any]) -> dict[int, list[float]]:
    """The accuracies after each epoch by seed, of the runs that converged."""
    return {seed: run["accuracies"] for seed, run in row["seeds"].items() if "accuracies" in run}


def _curves(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Accuracy over iterations, by task and network."""
    panels: dict[str, dict[str, Any]] = {task: {} for task in TASKS}
    for row in rows:
        runs = []
        for run in row["seeds"].values():
            points = zip(run.get("steps", []), run.get("accuracies", []), strict=True)
            runs += [[{"step": step, "accuracy": accuracy} for step, accuracy in points]]
        if any(runs):
            panels[row["task"]][row["variant"]] = [run for run in runs if run]
    return panels


if __name__ == "__main__":
    main()

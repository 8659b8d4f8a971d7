"""The question that every user asks: is the angular network better than mine?"""

import dataclasses
import json
import statistics
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sphereify.artifact import load
from sphereify.conversion import sphereify
from sphereify.datasets import Data
from sphereify.errors import UsageError
from sphereify.sources import load_weights
from sphereify.training.checkpoint import checkpoints
from sphereify.training.run import Epoch, Result, Step, check_mixup, finetune
from sphereify.training.run_folder import write_text
from sphereify.training.settings import WITHOUT_EFFECT, Settings


@dataclass(frozen=True)
class Variant:
    """One network of a comparison."""

    name: str
    options: dict[str, Any] | None = field(default_factory=dict)
    """What `sphereify` takes; None: the network is left as it is."""


@dataclass(frozen=True)
class Runs:
    """The runs of a variant, one a seed."""

    name: str
    results: list[Result]

    @property
    def accuracies(self) -> list[float]:
        """After the last epoch, in [0, 1]."""
        return [result.accuracy for result in self.results]

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None for a single one."""
        return statistics.stdev(self.accuracies) if len(self.results) > 1 else None

    def steps_to(self, accuracy: float) -> float | None:
        """Mean over the seeds of the optimizer steps at the first test that reached it; None if a run never did."""
        firsts = [next((e.step for e in r.epochs if e.accuracy >= accuracy), None) for r in self.results]
        return None if None in firsts else statistics.mean(firsts)  # type: ignore[type-var]

    @property
    def images_per_second(self) -> float:
        """In training; the median over epochs and seeds."""
        return statistics.median(epoch.images_per_second for result in self.results for epoch in result.epochs)

    @property
    def peak_memory(self) -> int | None:
        """Bytes on the GPU; None on a CPU."""
        return max((r.peak_memory for r in self.results if r.peak_memory is not None), default=None)


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison, the accuracy that was asked for, and a table."""

    runs: list[Runs]
    reach: float
    """The accuracy to which steps are counted, in [0, 1]."""

    def markdown(self) -> str:
        """A table, one variant a line."""
        columns = self.columns()
        head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
        return head + "".join(f"| {' | '.join(row)} |\n" for row in self.rows())

    def columns(self) -> list[str]:
        """What `rows` holds; the memory of a GPU, if there was one."""
        memory = ["peak memory"] if self._on_gpu else []
        return ["", "test accuracy, %", f"steps to {self.reach:.1%}", "images/s", "ratio", *memory]

    @property
    def _on_gpu(self) -> bool:
        return any(runs.peak_memory is not None for runs in self.runs)

    def rows(self) -> list[list[str]]:
        """The cells of the table, a variant a row; the ratio is that of its images/s to the first variant's."""
        base = self.runs[0].images_per_second
        return [
            [
                runs.name,
                f"{100 * runs.mean:.2f}" + ("" if runs.deviation is None else f" ± {100 * runs.deviation:.2f}"),
                "not reached" if (steps := runs.steps_to(self.reach)) is None else f"{steps:.0f}",
                f"{runs.images_per_second:.0f}",
                f"{runs.images_per_second / base:.2f}",
                *([f"{(runs.peak_memory or 0) / 2**20:.0f} MiB"] if self._on_gpu else []),
            ]
            for runs in self.runs
        ]


def compare(
    build: Callable[[], nn.Module],
    data: Data,
    variants: Sequence[Variant],
    settings: Settings | None = None,
    *,
    output: str | Path,
    seeds: int = 1,
    reach: float | None = None,
    on_run: Callable[[str, int], None] = lambda name, seed: None,
    on_step: Callable[[Step], None] = lambda step: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Comparison:
    """Train each variant with the same seeds, order of images and budget.

    Args:
        build: makes the plain network; with the same seed it must draw the same weights.
        data: as `finetune`.
        variants: the first is what the others are compared with.
        output: a folder. Finished runs in it are not repeated, unfinished ones are continued.
        seeds: runs of each variant: settings.seed, settings.seed + 1, …
        reach: accuracy in (0, 1] to which steps are counted; default: 95 % of the first variant's mean.
        on_run, on_step, on_epoch: called before each run, and as `finetune` does.

    Writes comparison.md, comparison.json and comparison.png (with matplotlib) beside the folder of each run.

    Raises:
        UsageError: no variant, two of one name, fewer than one seed, or runs in `output` that were made otherwise.
    """
    settings = settings or Settings()
    folder = Path(output)
    names = [variant.name for variant in variants]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"variants: got {names}, expected at least one, and each name once")
    if seeds < 1:
        raise UsageError(f"--seeds: got {seeds}, expected at least 1")
    if reach is not None and not 0 < reach <= 1:
        raise UsageError(f"--reach: got {reach}, expected an accuracy above 0 and at most 1, such as 0.9")
    for variant in variants:  # what cannot be converted, or trained with these settings, is told before any training
        built(build, variant, settings)
    found = []
    for variant in variants:
        results = []
        for seed in range(settings.seed, settings.seed + seeds):
            on_run(variant.name, seed)
            own = dataclasses.replace(settings, seed=seed)
            place = folder / f"{variant.name}-seed{seed}"
            results.append(train_once(build, data, variant, own, output=place, on_step=on_step, on_epoch=on_epoch))
        found.append(Runs(variant.name, results))
    comparison = Comparison(found, 0.95 * found[0].mean if reach is None else reach)
    _write(comparison, folder)
    return comparison


def train_once(
    build: Callable[[], nn.Module],
    data: Data,
    variant: Variant,
    settings: Settings,
    *,
    output: str | Path,
    on_step: Callable[[Step], None] = lambda step: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Result:
    """Train one variant in the folder `output`, once: what is finished there is read, what is unfinished continued.

    Args:
        build, data, settings, on_step, on_epoch: as `compare`; the seed is settings.seed.

    Raises:
        UsageError: `output` holds a run that was made otherwise.
        TrainingError, Interrupted: as `finetune`.
    """
    folder = Path(output)
    model = built(build, variant, settings)
    lasting = {name: value for name, value in settings.to_json().items() if name not in WITHOUT_EFFECT}
    wanted = json.loads(json.dumps({
        **lasting, "data": data.name, "classes": data.classes, "image_size": data.image_size,
        "transform": str(getattr(data.train, "transform", "")), "conversion": repr(variant.options),
        "model": _fingerprint(model),
    }))  # fmt: skip
    known = folder / "variant.json"
    before = json.loads(known.read_text()) if known.is_file() else wanted
    if before != wanted:
        changed = ", ".join(name for name in wanted if before.get(name) != wanted[name])
        raise UsageError(f"{folder}: holds a run with another {changed}; take another --output, or remove it")
    if (folder / "summary.json").is_file():
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return Result([Epoch(**row) for row in rows], json.loads((folder / "summary.json").read_text())["peak_memory"])
    write_text(known, json.dumps(wanted, indent=1) + "\n")
    resume = bool(checkpoints(folder / "checkpoints"))
    return finetune(model, data, settings, output=folder, resume=resume, on_step=on_step, on_epoch=on_epoch)


def trained(build: Callable[[], nn.Module], variant: Variant, output: str | Path) -> nn.Module:
    """The network that `train_once` left in `output` after its last epoch, on the CPU, in eval mode.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    folder = Path(output)
    if variant.options is not None:
        return load(folder / "last", factory=build)
    model = build()
    load_weights(model, folder / "last.safetensors")
    return model.eval()


def built(build: Callable[[], nn.Module], variant: Variant, settings: Settings) -> nn.Module:
    """The network of a variant, as it is before training."""
    torch.manual_seed(settings.seed)
    model = build()
    if variant.options is not None:
        model = sphereify(model, inplace=True, **variant.options)
    check_mixup(model, settings)
    return model


def _fingerprint(model: nn.Module) -> int:
    """A checksum of the names, shapes and values of a model."""
    found = 0
    for name, tensor in model.state_dict().items():
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        found = zlib.crc32(values, zlib.crc32(f"{name} {tuple(tensor.shape)}".encode(), found))
    return found


def _write(comparison: Comparison, folder: Path) -> None:
    curves = {runs.name: [[dataclasses.asdict(e) for e in r.epochs] for r in runs.results] for runs in comparison.runs}
    write_text(folder / "comparison.md", comparison.markdown())
    write_text(folder / "comparison.json", json.dumps({"reach": comparison.reach, "runs": curves}, indent=1) + "\n")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return  # pictures are an extra
    from sphereify.plots import plot_comparison

    plot_comparison(curves, folder / "comparison.png")

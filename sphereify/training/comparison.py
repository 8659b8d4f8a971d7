"""Comparisons: networks are trained alike with several seeds, to answer whether the angular one is better."""

import dataclasses
import importlib.util
import json
import re
import statistics
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sphereify import choices
from sphereify.artifact import load
from sphereify.conversion import sphereify
from sphereify.datasets import Data, training_images
from sphereify.errors import UsageError, choose, option, wrong_type
from sphereify.files import write_text
from sphereify.nn.modules import check_module
from sphereify.options import checked_option, with_keywords_of
from sphereify.sources import load_weights
from sphereify.training.checkpoint import checkpoints
from sphereify.training.checks import check_model
from sphereify.training.comparison_options import ComparisonKeywords, ComparisonOptions
from sphereify.training.knowledge import LEARNED, NOTHING, keep_knowledge, summary
from sphereify.training.knowledge_options import KnowledgeOptions
from sphereify.training.morph import LENGTH_IMAGES, start_as_original
from sphereify.training.recipe import with_recipe
from sphereify.training.results import Epoch, Result, Step
from sphereify.training.robustness import Robustness, check_corruptible, corrupted_accuracies, rival_of
from sphereify.training.run import finetune
from sphereify.training.run_folder import RunFolder, state_file
from sphereify.training.same_data import identity_of, is_same
from sphereify.training.settings import WITHOUT_EFFECT, Settings
from sphereify.training.verification import Verification, check_identities, verification

if TYPE_CHECKING:
    from typing_extensions import Unpack

TOLD_RATE = 1e-2
"""The false accept rate whose true accept rate the table of a comparison tells."""
TAR_COLUMN = f"true accepts at FAR {TOLD_RATE:g}, %"


ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")
"""The part of a repr that is another one in each process."""


@dataclass(frozen=True)
class Variant:
    """One network of a comparison."""

    name: str
    options: Mapping[str, Any] | None = field(default_factory=dict)
    """Keyword arguments of `sphereify`; None: the network is left as it is."""


def variants(operators: str | Iterable[str], options: Mapping[str, Any] | None = None) -> list[Variant]:
    """The original network, and a conversion of it for each operator.

    Args:
        operators: names of operators, as a list or separated by commas.
        options: keyword arguments of `sphereify` that all conversions share.

    Raises:
        UsageError: no operator.

    >>> [variant.name for variant in variants("cosine, Learnable_Sigmoid")]
    ['original', 'cosine', 'learnable-sigmoid']
    """
    words = operators.split(",") if isinstance(operators, str) else operators
    names = [choices.canonical(word) for word in words if word.strip()]
    if not names:
        raise UsageError(
            f"{option('operators')}: got none, expected some of {', '.join(choices.OPERATORS)}", option="operators"
        )
    return [Variant("original", None), *(Variant(name, {**(options or {}), "operator": name}) for name in names)]


@dataclass(frozen=True)
class SeedRuns:
    """The runs of a variant, one for each seed."""

    name: str
    results: list[Result]

    @property
    def accuracies(self) -> list[float]:
        """Accuracy of each run after its last epoch, in [0, 1]."""
        return [result.accuracy for result in self.results]

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds."""
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the accuracy over the seeds; None for a single one."""
        return statistics.stdev(self.accuracies) if len(self.results) > 1 else None

    def steps_to(self, accuracy: float) -> float | None:
        """Mean over the seeds of the optimizer steps until a test first reached `accuracy`; None if a run never did."""
        firsts = [next((e.step for e in r.epochs if e.accuracy >= accuracy), None) for r in self.results]
        return None if None in firsts else statistics.mean(firsts)  # type: ignore[type-var]

    @property
    def images_per_second(self) -> float:
        """Training speed: the median over epochs and seeds."""
        return statistics.median(epoch.images_per_second for result in self.results for epoch in result.epochs)

    @property
    def peak_memory(self) -> int | None:
        """Largest memory in bytes on the GPU; None on a CPU."""
        return max((r.peak_memory for r in self.results if r.peak_memory is not None), default=None)


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison, and their table."""

    runs: list[SeedRuns]
    """The runs of each variant, in the order of the variants."""
    reach: float
    """The accuracy to which steps are counted, in [0, 1]."""
    robustness: list[Robustness] = field(default_factory=list)
    """Accuracies on corrupted images, for each seed, if they were asked for."""
    verification: list[dict[str, Verification]] = field(default_factory=list)
    """Results on held-out classes by the name of the variant, for each seed, if they were asked for."""

    def markdown(self) -> str:
        """The table in Markdown, a variant in each line."""
        columns = self.columns()
        head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
        return head + "".join(f"| {' | '.join(row)} |\n" for row in self.rows())

    def columns(self) -> list[str]:
        """The headings of `rows`."""
        memory = ["peak memory"] if self._on_gpu else []
        corrupted = ["under corruptions, %"] if self.robustness else []
        verified = [TAR_COLUMN, "equal error rate, %"] if self.verification else []
        return [
            "",
            "test accuracy, %",
            *corrupted,
            *verified,
            f"steps to {self.reach:.1%}",
            "images/s",
            "ratio",
            *memory,
        ]

    @property
    def _on_gpu(self) -> bool:
        return any(runs.peak_memory is not None for runs in self.runs)

    def rows(self) -> list[list[str]]:
        """The cells of the table, a variant in each row; "ratio" is its speed relative to the first variant's.

        With corruptions, a network that was not trained here, the original behind contrast standardisation, has a row
        with its accuracies alone.
        """
        names = [runs.name for runs in self.runs]
        others = [name for found in self.robustness[:1] for name in found.networks if name not in names]
        blank = [""] * (len(self.columns()) - 3)
        clean = {name: [found.networks[name].clean for found in self.robustness] for name in others}
        rows = [[name, _mean_and_deviation(clean[name]), *self._under_corruptions(name), *blank] for name in others]
        trained = self._trained_rows()
        return [*trained[:1], *rows, *trained[1:]]

    def _under_corruptions(self, name: str) -> list[str]:
        shares = [found.networks[name].mean for found in self.robustness]
        return [_mean_and_deviation(shares)] if shares else []

    def _on_held_out_classes(self, name: str) -> list[str]:
        if not self.verification:
            return []
        seeds = [found[name] for found in self.verification]
        shares = [share for found in seeds if (share := found.tar[TOLD_RATE]) is not None]
        told = _mean_and_deviation(shares) if len(shares) == len(seeds) else "too few pairs"
        return [told, _mean_and_deviation([found.eer for found in seeds])]

    def _trained_rows(self) -> list[list[str]]:
        base = self.runs[0].images_per_second
        return [
            [
                runs.name,
                _mean_and_deviation(runs.accuracies),
                *self._under_corruptions(runs.name),
                *self._on_held_out_classes(runs.name),
                "not reached" if (steps := runs.steps_to(self.reach)) is None else f"{steps:.0f}",
                f"{runs.images_per_second:.0f}",
                f"{runs.images_per_second / base:.2f}",
                *([f"{(runs.peak_memory or 0) / 2**20:.0f} MiB"] if self._on_gpu else []),
            ]
            for runs in self.runs
        ]


def _mean_and_deviation(shares: list[float]) -> str:
    """Mean and standard deviation in percent; the mean alone of a single share."""
    deviation = f" ± {100 * statistics.stdev(shares):.2f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.2f}{deviation}"


def default_comparison_folder(model: str) -> Path:
    """The folder of a comparison whose user names none: the last part of the model's name, and "compared"."""
    return Path(f"{Path(model.rpartition(':')[2]).name}-compared")


@with_keywords_of(ComparisonOptions)
def compare(
    build: Callable[[], nn.Module],
    data: Data,
    variants: Sequence[Variant],
    settings: Settings | None = None,
    *,
    output: str | Path,
    learned: str = NOTHING,
    calibration_images: int = KnowledgeOptions.calibration_images,
    held_out: Data | None = None,
    on_run: Callable[[str, int], None] = lambda name, seed: None,
    on_calibration: Callable[[str], None] = lambda line: None,
    on_step: Callable[[Step], None] = lambda step: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    **options: "Unpack[ComparisonKeywords]",
) -> Comparison:
    """Train each variant with the same seeds, order of images and budget.

    Args:
        build: makes the plain network; with the same random seed it must draw the same weights.
        data: as for `finetune`.
        variants: the networks; the first is what the others are compared with. See also `variants`.
        settings: how to train, as for `finetune`; what they leave open depends on `learned`, see `with_recipe`.
        output: a folder. Finished runs in it are not repeated, unfinished ones are continued.
        {options}
        learned: how much of what `build` makes has been trained: "nothing", "features" (all but the classifier) or
            "all". Conversions keep it by a calibration on training images, without their labels.
        calibration_images: number of these images, ≥ 0; 0: weights are copied, without a calibration.
        held_out: images of other classes than those of `data`, in its test part, on which the trained networks are
            verified; see `sphereify.class_splits.only_classes` and `verification`.
        on_run: called before each run with the name of its variant and its seed.
        on_calibration: called after each calibration with a line on it.
        on_step, on_epoch: called as by `finetune`.

    Writes comparison.md, comparison.json and comparison.png (with matplotlib) beside the folder of each run.

    Raises:
        UsageError: no variant, two of one name, fewer than one seed, or runs of another kind in `output`.
        ArgumentTypeError: `build` is no function, or returns no module.
        DataError: images that cannot be corrupted, with `corruptions`.
    """
    if isinstance(build, nn.Module) or not callable(build):
        raise wrong_type("build", build, "a function that returns the plain network")
    asked = ComparisonOptions(**options)
    settings = with_recipe(settings or Settings(), trained=learned != NOTHING)
    folder = Path(output)
    seeds = range(settings.seed, settings.seed + asked.seeds)
    names = [variant.name for variant in variants]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"variants: got {names}, expected at least one, and each name once")
    if learned not in LEARNED:
        raise choose("learned", learned, LEARNED)
    checked_option(KnowledgeOptions, "calibration_images", calibration_images)
    if asked.corruptions:
        check_corruptible(data)
    if held_out is not None:
        check_identities(held_out)
    kept: dict[str, Any] = {"learned": learned, "calibration_images": calibration_images}
    for variant in variants:  # one that cannot be converted, or trained with these settings, fails before any training
        build_variant(build, variant, settings)
    runs = []
    for variant in variants:
        results = []
        for seed in seeds:
            on_run(variant.name, seed)
            seeded = dataclasses.replace(settings, seed=seed)
            place = folder / f"{variant.name}-seed{seed}"
            heard: Any = {"on_step": on_step, "on_epoch": on_epoch, "on_calibration": on_calibration}
            results.append(train_once(build, data, variant, seeded, output=place, **kept, **heard))
        runs.append(SeedRuns(variant.name, results))
    found = []
    for seed in seeds if asked.corruptions else ():
        networks = {v.name: trained(build, v, folder / f"{v.name}-seed{seed}") for v in variants}
        if variants[0].options is None:
            networks[f"{names[0]}, contrast standardised"] = rival_of(networks[names[0]], data)
        found.append(corrupted_accuracies(networks, data, dataclasses.replace(settings, seed=seed)))
    verified = []
    if held_out is not None:
        for seed in seeds:
            networks = {v.name: trained(build, v, folder / f"{v.name}-seed{seed}") for v in variants}
            seeded = dataclasses.replace(settings, seed=seed)
            verified.append({name: verification(one, held_out, seeded) for name, one in networks.items()})
    comparison = Comparison(runs, 0.95 * runs[0].mean if asked.reach is None else asked.reach, found, verified)
    _write(comparison, folder)
    return comparison


def train_once(
    build: Callable[[], nn.Module],
    data: Data,
    variant: Variant,
    settings: Settings,
    *,
    output: str | Path,
    learned: str = NOTHING,
    calibration_images: int = KnowledgeOptions.calibration_images,
    teacher: nn.Module | None = None,
    on_calibration: Callable[[str], None] = lambda line: None,
    on_step: Callable[[Step], None] = lambda step: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Result:
    """Train a variant in the folder `output`, once: a run that is complete there is read, another one is continued.

    Args:
        build, data, settings, learned, calibration_images, on_calibration, on_step, on_epoch: as for `compare`; the
            seed is settings.seed.
        teacher: a trained network whose scores are followed as well, as for `finetune`.

    Raises:
        UsageError: `output` holds a run of another network, of other data, or with other settings or another teacher.
        TrainingError, Interrupted: as `finetune`.
    """
    folder = RunFolder(output)
    model = build_variant(build, variant, settings)
    settings = _settings_of(variant, settings)
    calibrated = variant.options is not None and learned != NOTHING and calibration_images > 0 and not settings.morph
    kept = {"learned": learned, "calibration_images": calibration_images} if calibrated else {}
    followed = {} if teacher is None else {"teacher": _fingerprint(teacher)}
    _check_same_variant(folder, {**_identity(model, data, variant, settings), **kept, **followed})
    if folder.summary.is_file():
        return _read_result(folder)
    resume = bool(checkpoints(folder.checkpoints))
    if settings.morph:
        original = build_variant(build, Variant("original", None), settings)
        start_as_original(model, original, training_images(data, LENGTH_IMAGES))
    if calibrated and not resume:
        original = build_variant(build, Variant("original", None), settings)
        device = settings.chosen_device
        result = keep_knowledge(model, original, data, learned, images=calibration_images, device=device)
        on_calibration(summary(result, learned, data, calibration_images))
    told: Any = {"on_step": on_step, "on_epoch": on_epoch}
    return finetune(model, data, settings, output=folder.path, resume=resume, teacher=teacher, **told)


def _identity(model: nn.Module, data: Data, variant: Variant, settings: Settings) -> dict[str, Any]:
    """All that the result of a run depends on, as plain JSON values."""
    options = repr(variant.options)
    lasting = {name: value for name, value in settings.to_json().items() if name not in WITHOUT_EFFECT}
    identity = {
        **lasting,
        "data": identity_of(data),
        "classes": data.classes,
        "image_size": data.image_size,
        "transform": ADDRESS.sub("", str(getattr(data.train, "transform", ""))),
        "conversion": ADDRESS.sub("", options),
        "model": _fingerprint(model),
        **({"operator": _curves(model)} if ADDRESS.search(options) else {}),
    }
    return json.loads(json.dumps(identity))  # type: ignore[no-any-return]


def _curves(model: nn.Module) -> list[str]:
    """Values of the operators that are functions or plain objects, whose names do not say what they compute."""
    operators = (getattr(module, "operator", None) for module in model.modules())
    cos = torch.linspace(-1, 1, 9, device="cpu").unsqueeze(1)
    with torch.no_grad():
        curves = [g(cos).flatten().tolist() for g in operators if callable(g) and not isinstance(g, nn.Module)]
    return sorted({" ".join(f"{value:.4f}" for value in curve) for curve in curves})


def _check_same_variant(folder: RunFolder, identity: dict[str, Any]) -> None:
    """Make sure that a folder holds this run or none, and write there which one it is."""
    before = json.loads(folder.variant.read_text()) if folder.variant.is_file() else identity
    data = before["data"] if isinstance(before.get("data"), dict) else {"name": before.get("data")}
    if is_same(data, identity["data"]):
        before["data"] = identity["data"]
    if before != identity:
        names = {**before, **identity}
        changed = ", ".join(name for name in names if before.get(name) != identity.get(name))
        raise UsageError(f"{folder}: holds a run with another {changed}; take another {option('output')}, or remove it")
    if not folder.variant.is_file():
        write_text(folder.variant, json.dumps(identity, indent=1) + "\n")


def _read_result(folder: RunFolder) -> Result:
    """The result of a run that is complete."""
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return Result([Epoch(**row) for row in rows], json.loads(folder.summary.read_text())["peak_memory"])


def trained(build: Callable[[], nn.Module], variant: Variant, output: str | Path) -> nn.Module:
    """The network that `train_once` left in `output` after its last epoch, on the CPU, in eval mode.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    folder = RunFolder(output)
    if variant.options is not None:
        return load(folder.last, factory=build)
    model = build()
    load_weights(model, state_file(folder.last))
    return model.eval()


def build_variant(build: Callable[[], nn.Module], variant: Variant, settings: Settings) -> nn.Module:
    """The network of a variant before training, with the weights that settings.seed draws.

    Raises:
        UsageError: it cannot be converted, or not be trained with these settings.
        ArgumentTypeError: `build` returns no module.
    """
    torch.manual_seed(settings.seed)
    model = build()
    check_module(model, "build()")
    if variant.options is not None:
        model = sphereify(model, inplace=True, **variant.options)
    check_model(model, _settings_of(variant, settings))
    return model


def _settings_of(variant: Variant, settings: Settings) -> Settings:
    """The settings of a variant: the original stays what it is, and its classifier computes all scores."""
    if variant.options is not None:
        return settings
    return dataclasses.replace(settings, morph=0.0, terms=dataclasses.replace(settings.terms, sampled_classes=None))


def _fingerprint(model: nn.Module) -> int:
    """A checksum of the names, shapes and values of a model."""
    checksum = 0
    for name, tensor in model.state_dict().items():
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        checksum = zlib.crc32(values, zlib.crc32(f"{name} {tuple(tensor.shape)}".encode(), checksum))
    return checksum


def _write(comparison: Comparison, folder: Path) -> None:
    curves = {runs.name: [[dataclasses.asdict(e) for e in r.epochs] for r in runs.results] for runs in comparison.runs}
    write_text(folder / "comparison.md", comparison.markdown())
    found = [seed.to_json() for seed in comparison.robustness]
    verified = [{name: one.to_json() for name, one in seed.items()} for seed in comparison.verification]
    results = {
        "reach": comparison.reach,
        "runs": curves,
        **({"robustness": found} if found else {}),
        **({"verification": verified} if verified else {}),
    }
    write_text(folder / "comparison.json", json.dumps(results, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        from sphereify.plots import plot_comparison

        plot_comparison(curves, folder / "comparison.png")

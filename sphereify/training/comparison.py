"""Comparisons: networks are trained alike with several seeds, to answer whether the angular one is better."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sphereify import choices
from sphereify.datasets import Data
from sphereify.errors import UsageError, choose, refused, wrong_type
from sphereify.files import write_text
from sphereify.options import checked_option, from_keywords, to_json, with_keywords_of
from sphereify.training.comparison_options import ComparisonKeywords, ComparisonOptions
from sphereify.training.comparison_results import Comparison, SeedRuns
from sphereify.training.knowledge import LEARNED, NOTHING
from sphereify.training.knowledge_options import KnowledgeOptions
from sphereify.training.recipe import with_recipe
from sphereify.training.results import Epoch, Step
from sphereify.training.robustness import check_corruptible, corrupted_accuracies, rival_of
from sphereify.training.settings import Settings
from sphereify.training.variant import Variant, build_variant
from sphereify.training.variant_runs import train_once, trained
from sphereify.training.verification import check_identities, verification

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        raise refused("operators", f"got none, expected some of {', '.join(choices.OPERATORS)}")
    return [Variant("original", None), *(Variant(name, {**(options or {}), "operator": name}) for name in names)]


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
    asked = from_keywords(ComparisonOptions, options, "compare")
    settings = with_recipe(settings or Settings(), trained=learned != NOTHING)
    folder = Path(output)
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
    for variant in variants:  # one that cannot be converted, or trained with these settings, fails before any training
        build_variant(build, variant, settings)
    seeds = range(settings.seed, settings.seed + asked.seeds)
    seeded = {seed: dataclasses.replace(settings, seed=seed) for seed in seeds}
    knowledge: Any = {"learned": learned, "calibration_images": calibration_images}
    listeners: Any = {"on_step": on_step, "on_epoch": on_epoch, "on_calibration": on_calibration}
    runs = []
    for variant in variants:
        results = []
        for seed, own in seeded.items():
            on_run(variant.name, seed)
            place = _run_folder(folder, variant, seed)
            results.append(train_once(build, data, variant, own, output=place, **knowledge, **listeners))
        runs.append(SeedRuns(variant.name, results))

    def networks_of(seed: int) -> dict[str, nn.Module]:
        return {variant.name: trained(build, variant, _run_folder(folder, variant, seed)) for variant in variants}

    robustness, verifications = [], []
    for seed, own in seeded.items() if asked.corruptions else ():
        networks = networks_of(seed)
        if variants[0].options is None:
            networks[f"{names[0]}, contrast standardised"] = rival_of(networks[names[0]], data)
        robustness.append(corrupted_accuracies(networks, data, own))
    if held_out is not None:
        for seed, own in seeded.items():
            verifications.append({name: verification(one, held_out, own) for name, one in networks_of(seed).items()})
    comparison = Comparison(
        runs, 0.95 * runs[0].mean if asked.reach is None else asked.reach, robustness, verifications
    )
    _write(comparison, folder)
    return comparison


def _run_folder(folder: Path, variant: Variant, seed: int) -> Path:
    """The folder of a variant's run with a seed, in that of the comparison."""
    return folder / f"{variant.name}-seed{seed}"


def _write(comparison: Comparison, folder: Path) -> None:
    curves = {
        runs.name: [[to_json(epoch) for epoch in result.epochs] for result in runs.results] for runs in comparison.runs
    }
    write_text(folder / "comparison.md", comparison.markdown())
    robustness = [seed.to_json() for seed in comparison.robustness]
    verifications = [{name: one.to_json() for name, one in seed.items()} for seed in comparison.verification]
    results = {
        "reach": comparison.reach,
        "runs": curves,
        **({"robustness": robustness} if robustness else {}),
        **({"verification": verifications} if verifications else {}),
    }
    write_text(folder / "comparison.json", json.dumps(results, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        from sphereify.plots import plot_comparison

        plot_comparison(curves, folder / "comparison.png")

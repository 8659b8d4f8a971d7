"""Runs of a variant: it is trained once in a folder, and opened from there."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sphereify.artifact import load
from sphereify.convert.options import ConversionKeywords
from sphereify.convert.planner import plan_conversion
from sphereify.datasets import Data, training_images
from sphereify.fingerprint import checksum
from sphereify.sources import load_weights
from sphereify.training.checkpoint import checkpoints
from sphereify.training.knowledge import NOTHING, keep_knowledge, summary
from sphereify.training.knowledge_options import KnowledgeOptions
from sphereify.training.morph import LENGTH_IMAGES, start_as_original
from sphereify.training.record import read_result
from sphereify.training.results import Epoch, Result, Step
from sphereify.training.run import finetune
from sphereify.training.run_folder import RunFolder, state_file
from sphereify.training.settings import Settings
from sphereify.training.variant import Variant, build_variant, settings_for
from sphereify.training.variant_identity import check_same_variant, variant_identity


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
    settings = settings_for(variant, settings)
    calibrated = variant.options is not None and learned != NOTHING and calibration_images > 0 and not settings.morph
    calibration = {"learned": learned, "calibration_images": calibration_images} if calibrated else {}
    followed = {} if teacher is None else {"teacher": checksum(teacher.state_dict())}
    check_same_variant(folder, {**variant_identity(model, data, variant, settings), **calibration, **followed})
    if folder.summary.is_file():
        return read_result(folder)
    resume = bool(checkpoints(folder.checkpoints))
    if settings.morph:
        original = build_variant(build, Variant("original", None), settings)
        start_as_original(model, original, training_images(data, LENGTH_IMAGES))
    if calibrated and not resume:
        original = build_variant(build, Variant("original", None), settings)
        device = settings.chosen_device
        result = keep_knowledge(model, original, data, learned, images=calibration_images, device=device)
        on_calibration(summary(result, learned, data, calibration_images))
    listeners: Any = {"on_step": on_step, "on_epoch": on_epoch}
    return finetune(model, data, settings, output=folder.path, resume=resume, teacher=teacher, **listeners)


def trained(build: Callable[[], nn.Module], variant: Variant, output: str | Path) -> nn.Module:
    """The network that `train_once` left in `output` after its last epoch, on the CPU, in eval mode.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    folder, model = RunFolder(output), build()
    if variant.options is not None:
        return load(folder.last, factory=lambda: model, objects=_operator_objects(model, variant.options))
    load_weights(model, state_file(folder.last))
    return model.eval()


def _operator_objects(model: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """The operator objects among the options of a conversion, by the names that a plan for the model gives them."""
    planned = {"example_inputs", *ConversionKeywords.__annotations__}
    return plan_conversion(model, **{name: value for name, value in options.items() if name in planned}).objects

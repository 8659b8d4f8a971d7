"""Refusals: everything that is refused before a model is moved, changed or trained."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.annotations import CALIBRATED, TRAINING_RECORD
from sphereify.datasets import Data
from sphereify.deployment.folding import is_folded
from sphereify.errors import DataError, UnsupportedModelError, UsageError, first_line, option, refused, wrong_type
from sphereify.models import untrained_part
from sphereify.nn.modules import check_module
from sphereify.training.distributed import Processes
from sphereify.training.freezing import frozen
from sphereify.training.loader import training_batches
from sphereify.training.morph import check_morph
from sphereify.training.objective import energy_of, logits_of, margin_head
from sphereify.training.optim import make_optimizer, make_schedule
from sphereify.training.run_folder import RunFolder
from sphereify.training.same_data import identity_of, is_same
from sphereify.training.settings import Settings, differences


def is_trained(model: nn.Module) -> bool:
    """True if a model keeps what a trained network knew: it was calibrated to one, or it is the artifact of a run."""
    return bool(CALIBRATED.of(model) or TRAINING_RECORD.of(model))


def check_run(
    model: nn.Module, data: Data, settings: Settings, processes: Processes, teacher: nn.Module | None
) -> None:
    """Make sure that `model` can be trained on `data` with these settings. Nothing is changed.

    Raises:
        DataError: images that the model or the teacher does not take, other classes, or too little data.
        UsageError: settings that do not go with the model, its filters, or the number of processes.
    """
    check_classes(model, data)
    if teacher is not None:
        check_module(teacher, "teacher", "a torch.nn.Module, as open_teacher returns it")
        check_classes(teacher, data, "the teacher")
    check_model(model, settings, teacher)
    _check_amount(data, processes)
    if settings.fsdp and processes.world == 1:
        raise refused("fsdp", "needs several processes; start it with torchrun --nproc-per-node N")
    with frozen(model, settings.freeze):
        _check_optimizer(model, data, settings, processes)


def check_model(model: nn.Module, settings: Settings, teacher: nn.Module | None = None) -> None:
    """Make sure that settings go with a model, its head and its filters, which takes no data.

    Raises:
        NoEffectError, UsageError: they do not.
    """
    check_mixup(settings)
    check_sampling(model, settings, teacher)
    if settings.terms.mhe:
        energy_of(settings.terms).check(model, "mhe_dimensions")
    if settings.morph:
        check_morph(model)


def check_arguments(model: object, data: object, settings: object = None) -> None:
    """Make sure that the arguments of a training or a test are of the types that they should be.

    Raises:
        ArgumentTypeError: one is not.
    """
    check_module(model)
    if not isinstance(data, Data):
        raise wrong_type("data", data, "a Data, as sphereify.datasets.load_data returns it")
    if settings is not None and not isinstance(settings, Settings):
        raise wrong_type("settings", settings, "Settings")


def check_trainable(model: object) -> None:
    """Make sure that a model can be trained at all.

    Raises:
        UnsupportedModelError: a folded model.
    """
    if is_folded(model):
        raise UnsupportedModelError(
            f"finetune: this {type(model).__name__} is folded for inference; train the model that it was folded from"
        )


def check_classes(model: nn.Module, data: Data, who: str = "the model") -> None:
    """Make sure that a model takes the images of `data` and returns one score for each class, by running it on one.

    Raises:
        DataError: it does not.
    """
    logits = logits_of(check_images(model, data.image_size, who))
    if logits.dim() != 2:
        shape = tuple(logits.shape)
        raise DataError(f"{who} returns Tensor of shape {shape}, expected logits of shape (batch, classes)")
    if logits.shape[1] != len(data.classes):
        raise DataError(
            f"{who} has {logits.shape[1]} classes, {data.name} has {len(data.classes)}: {_remedy(model, data)}"
        )


def _remedy(model: nn.Module, data: Data) -> str:
    """The advice on a model of another number of classes than the data."""
    record = TRAINING_RECORD.of(model) or {}
    left_out = record.get("held_out_classes", ())
    if left_out and {*left_out, *record.get("classes", ())} == {*data.classes, *data.held_out}:
        return f"its training left out {', '.join(left_out[:5])}; leave out the same classes as there"
    return (
        f"convert it again with {option('num_classes', len(data.classes))}, for which weights of other classes serve "
        f"as well, all but those of the classifier"
    )


def check_images(model: nn.Module, image_size: tuple[int, int, int], who: str = "the model") -> Any:
    """The output of a model for one image, in eval mode.

    Raises:
        DataError: it does not take such images.
    """
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    try:
        with torch.no_grad(), _eval_mode(model):
            return model(torch.zeros(1, *image_size, device=device))
    except DataError:
        raise
    except Exception as error:  # a model may refuse a size in its own way
        raise DataError(
            f"{who} does not take images of {' × '.join(map(str, image_size))} (channels, height, width): "
            f"{first_line(error)}. Try another {option('img_size')}."
        ) from error


def check_trained(model: nn.Module, data: Data, model_option: str, weights_option: str) -> None:
    """Make sure that a model that was opened by name to be tested has a classifier that was trained.

    Args:
        model_option, weights_option: the options that name the model and its weights.

    Raises:
        UsageError: its weights are for other classes, which left the classifier new.
    """
    if why := untrained_part(model):
        raise refused(
            model_option,
            f"{why}; {data.name} has {len(data.classes)} classes. Bring weights that were trained on it with "
            f"{option(weights_option)}",
        )


def check_record(record: dict[str, Any] | None, data: Data) -> None:
    """Make sure that a model was trained on the classes of `data`, by the training record of its artifact.

    Another number of classes is left to `check_classes`, which knows the remedy.

    Raises:
        DataError: as many classes, but other ones, or in another order.
    """
    classes = (record or {}).get("classes", data.classes)
    if classes != data.classes and len(classes) == len(data.classes):
        odd = sorted({*classes} ^ {*data.classes}) or ["in another order"]
        raise DataError(f"the model was trained on other classes than {data.name} has: {', '.join(odd[:5])}")


def check_unseen(record: dict[str, Any] | None, held_out: Sequence[str]) -> None:
    """Make sure that a model was not trained on classes that are left out, by the training record of its artifact.

    Raises:
        DataError: it was.
    """
    seen = [name for name in held_out if name in (record or {}).get("classes", ())]
    if seen:
        before = (record or {}).get("held_out_classes", ())
        raise DataError(
            f"{option('hold_out_classes')}: leaves out {', '.join(held_out[:5])}, but the model was trained on "
            f"{', '.join(seen[:5])}. Its training left out {', '.join(before[:5]) or 'no classes'}."
        )


def check_mixup(settings: Settings) -> None:
    """Make sure that images can be mixed, if they are to be.

    Raises:
        UsageError: batches of one image.
    """
    if (settings.mixup or settings.cutmix) and settings.batch_size < 2:
        raise UsageError(
            f"{option('mixup')}, {option('cutmix')}: need pairs of images; take {option('batch_size', 2)} or more",
            option="mixup" if settings.mixup else "cutmix",
        )


def check_sampling(model: nn.Module, settings: Settings, teacher: nn.Module | None) -> None:
    """Make sure that a step can compute the scores of some classes only, if it is to.

    Raises:
        UsageError: a head without a margin, which computes all scores itself; or a teacher, which needs them all.
    """
    sampled = settings.terms.sampled_classes
    if sampled is None:
        return
    if margin_head(model) is None:
        raise refused(
            "sampled_classes", f"needs a head with a margin, such as {option('head', 'cosface')}", value=sampled
        )
    if teacher is not None:
        raise refused(
            "sampled_classes", f"does not go with {option('teacher')}, which is followed in all scores", value=sampled
        )


def check_same_run(
    folder: RunFolder,
    checkpoint: Path,
    saved: dict[str, Any],
    model: nn.Module,
    data: Data,
    settings: Settings,
    processes: Processes,
) -> None:
    """Make sure that a run is continued as it began.

    Args:
        folder: the folder of the run.
        checkpoint: the file from which it is continued.
        saved: the content of that file.

    Raises:
        UsageError: other settings, data, number of processes, or another model.
    """
    changes = differences(Settings.from_json(saved["settings"]), settings)
    before, now = saved.get("data_identity") or {"name": saved["data"]}, identity_of(data)
    if not is_same(before, now):
        others = " with other classes or files" if before.get("files") and now["files"] else ""
        changes.append(f"{option('data')}: {saved['data']} before, {data.name} now{others}")
    if saved["world"] != processes.world:
        changes.append(f"processes: {saved['world']} before, {processes.world} now")
    if changes:
        raise UsageError(f"{folder}: cannot be continued otherwise than it began: {'; '.join(changes)}")
    _check_same_model(model, saved["model"], checkpoint)


def _check_same_model(model: nn.Module, saved: dict[str, Tensor], checkpoint: Path) -> None:
    own = model.state_dict()
    odd = [
        name
        for name in sorted({*own, *saved})
        if name not in own or name not in saved or own[name].shape != saved[name].shape
    ]
    if odd:
        raise UsageError(f"{checkpoint}: belongs to another model; the two differ in {', '.join(odd[:3])}")


def _check_amount(data: Data, processes: Processes) -> None:
    train, test = len(data.train), len(data.test)  # type: ignore[arg-type]
    if train < processes.world or not test:
        raise DataError(f"{data.name}: {train} training and {test} test images are too few")
    if len(data.classes) < 2:
        raise DataError(f"{data.name}: has one class only, {data.classes[0]}; there is nothing to tell apart")


def _check_optimizer(model: nn.Module, data: Data, settings: Settings, processes: Processes) -> None:
    """Build the optimizer and the schedule once on trial: timm knows best what it refuses."""
    batches = training_batches(data, settings, processes)
    make_schedule(make_optimizer(model, settings), settings, batches.steps(settings.accumulate))


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the block in eval mode and restore each module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

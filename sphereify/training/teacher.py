"""Teachers: trained networks whose scores a run follows besides the labels."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.annotations import UNTRAINED
from sphereify.artifact import load
from sphereify.errors import option, refused
from sphereify.sources import accepts, build_model, find_model
from sphereify.training.objective import logits_of
from sphereify.weights.loading import load_weights

ORIGINAL = "original"
"""The teacher's name that stands for the network before its conversion."""


@dataclass(frozen=True)
class Original:
    """The plain network before its conversion, and the origin of its weights."""

    model: nn.Module
    pretrained: bool = False
    """True if its weights are the library's own."""
    weights: Path | None = None
    """The file that its weights come from."""
    has_new_classifier: bool = False
    """True if its weights are for other classes than those of the data, so that its classifier is not trained."""


def open_teacher(
    name: str | None, classes: int, *, weights: str | Path | None = None, original: Original | None = None
) -> nn.Module | None:
    """A teacher by name, whose classifier has been trained for the classes of the data.

    Args:
        name: "original", the folder of an artifact, or a model as `sphereify.sources.find_model` takes it. None: there
            is no teacher.
        classes: number of classes of the data, with which a model is built by name.
        weights: file of its weights; default: the library's pretrained ones. Not for an original or an artifact.
        original: the network that "original" means; None: there is none, as for an artifact that is trained further.

    Raises:
        UsageError: no original, a network that has not been trained, a classifier for another number of classes, or
            weights where none belong.
    """
    if weights is not None and name in (None, ORIGINAL):
        raise refused(
            "teacher_weights", f"belong to a {option('teacher')} by name; the original has those of {option('weights')}"
        )
    if name is None:
        return None
    if name == ORIGINAL:
        return _checked_original(original, classes)
    if Path(name).is_dir():
        return load(name)
    if weights is None and ":" in name and not name.startswith("torchvision:"):
        raise refused("teacher", f"{name} needs {option('teacher_weights')}")
    sizes = {"num_classes": classes} if accepts(name, "num_classes") else {}
    model = build_model(find_model(name, **sizes), pretrained=weights is None)
    if weights is None:
        check_classifier(model, classes)
    else:
        load_weights(model, weights)
    return model


def _checked_original(original: Original | None, classes: int) -> nn.Module:
    if original is None:
        raise refused(
            "teacher",
            "an artifact does not hold what it was before. Give the plain model to finetune with the options of "
            "convert, or name the teacher",
            value=ORIGINAL,
        )
    if not original.pretrained and original.weights is None:
        raise refused("teacher", f"it has not been trained; bring its weights with {option('weights')}", value=ORIGINAL)
    if original.pretrained:
        check_classifier(original.model, classes)
    if original.has_new_classifier:
        raise refused(
            "teacher",
            f"{original.weights} has other classes than the data, so its classifier is new and knows nothing. Train it "
            f"first, and bring its weights with {option('weights')}",
            value=ORIGINAL,
        )
    return original.model


def check_classifier(model: nn.Module, classes: int) -> None:
    """Make sure that a pretrained model's classifier has been trained: that its weights are for `classes` classes.

    Raises:
        UsageError: pretrained weights for another number of classes, which leave the classifier untrained.
    """
    pretrained = (getattr(model, "pretrained_cfg", None) or {}).get("num_classes", classes)
    why = f"its pretrained weights are for {pretrained} classes, the data has {classes}"
    if pretrained == classes:
        why = UNTRAINED.of(model) or ""
    if why:
        raise refused(
            "teacher",
            f"{why}: its classifier is new and knows nothing. Train it first, and bring its weights with "
            f"{option('weights')}",
        )


def distillation(logits: Tensor, teacher: nn.Module, images: Tensor, temperature: float) -> Tensor:
    """Hinton's distillation loss: the divergence from the teacher's scores at a temperature, times its square.

    Args:
        logits: of the network that learns, of shape (B, classes).
        teacher: in eval mode.
        images: of shape (B, C, H, W).
    """
    with torch.no_grad():
        targets = logits_of(teacher(images))
    divergence = F.kl_div(
        F.log_softmax(logits.float() / temperature, 1),
        F.log_softmax(targets / temperature, 1),
        log_target=True,
        reduction="batchmean",
    )
    return temperature**2 * divergence

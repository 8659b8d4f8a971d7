"""The trainings of `transfer.py`: networks that are transferred, and their fine-tuning."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from benchmarks.plain_networks import ResNet20
from examples.evidence.images import shuffled, whole
from examples.evidence.work import Found, Piece
from sphereify.class_splits import without_classes
from sphereify.datasets import Data
from sphereify.training import Settings, Variant, train_once, trained
from sphereify.weights.loading import load_weights

OTHER, SAME = "other classes", "same classes"
CLASSIFIER = "fc."
"""Beginning of the names of the classifier's tensors."""
LAST = "last.safetensors"
"""The file with the weights of a plain network in the folder of its run."""
SOURCE_RATE = 0.1


def classes_of(task: str, data: Data, *, before: bool) -> list[str]:
    """The classes of a task, or those on which the network was trained before."""
    middle = len(data.classes) // 2
    if task == SAME:
        return data.classes
    return data.classes[:middle] if before else data.classes[middle:]


def _only(data: Data, classes: list[str]) -> Data:
    others = [name for name in data.classes if name not in classes]
    return without_classes(data, others) if others else data


def source(data: str, folder: Path, *, task: str, epochs: int) -> Found:
    """Train a plain ResNet-20 on the classes that it knows before its transfer."""
    images = whole(data)
    chosen = _only(images, classes_of(task, images, before=True))
    settings = Settings(epochs=epochs, batch_size=min(128, len(chosen.train)), opt="sgd", lr=SOURCE_RATE,  # type: ignore[arg-type]
                        weight_decay=5e-4)  # fmt: skip
    result = train_once(lambda: ResNet20(len(chosen.classes)), chosen, Variant(task, None), settings, output=folder)
    return {"accuracy": result.accuracy, "classes": chosen.classes}


def task_data(
    data: str, *, task: str, seed: int, tried: bool, images: int, tried_images: int, test_images: int
) -> Data:
    """The images of a task: a random choice of the training images for each seed, and test images.

    Test images are in two parts: by one the learning rates are chosen, by the other what was chosen is tested.
    """
    everything = whole(data)
    chosen = _only(everything, classes_of(task, everything, before=False))
    rows = shuffled(len(chosen.train), seed)[:images]  # type: ignore[arg-type]
    tests = shuffled(len(chosen.test))  # type: ignore[arg-type]
    tests = tests[:tried_images] if tried else tests[tried_images : tried_images + test_images]
    name = f"{chosen.name}, {images} training images of seed {seed}, {'tries' if tried else 'tests'}"
    train: Any = Subset(chosen.train, rows)
    test: Any = Subset(chosen.test, tests)
    return replace(chosen, name=name, train=train, test=test)


def learn(
    data: str,
    folder: Path,
    *,
    task: str,
    options: dict[str, Any] | None,
    lr: float,
    seed: int,
    teacher: bool,
    tried: bool,
    images: int,
    epochs: int,
    batch_size: int,
    tried_images: int,
    test_images: int,
    teacher_piece: str,
    plain: Path | None,
    output: Path,
    taught_by: Path | None,
) -> Found:
    """Fine-tune a network on a task; returns its accuracy after each epoch.

    Args:
        options: of the conversion; None: the network stays what it is.
        teacher: whether it has one.
        teacher_piece: the name of the piece that trains the teacher; "": the teacher is the network as it came.
        plain: the file of the network that is transferred; None: it was trained in the folder of its own piece.
        output: the folder of the program.
        taught_by: the folder of that piece.
    """
    chosen = task_data(data, task=task, seed=seed, tried=tried, images=images, tried_images=tried_images,
                       test_images=test_images)  # fmt: skip
    start = plain or Piece(f"source, {task}", source).folder(output) / LAST
    before = len(classes_of(task, whole(data), before=True))

    def build() -> nn.Module:
        return _starting(start, before, len(chosen.classes), new_classifier=task == OTHER)

    variant = Variant("transfer", options)
    settings = Settings(epochs=epochs, batch_size=batch_size, opt="sgd", lr=lr, weight_decay=5e-4, seed=seed)
    followed = None
    if teacher:
        original = Variant("original", None)
        followed = trained(lambda: ResNet20(len(chosen.classes)), original, taught_by) if taught_by else build().eval()
    result = train_once(build, chosen, variant, settings, output=folder, learned="features" if task == OTHER else "all",
                        calibration_images=images, teacher=followed)  # fmt: skip
    return {"accuracies": [epoch.accuracy for epoch in result.epochs], "steps": [epoch.step for epoch in result.epochs]}


def _starting(file: Path, before: int, classes: int, *, new_classifier: bool) -> nn.Module:
    """A network with the weights in a file, all but those of the classifier if that is new."""
    network = ResNet20(classes)
    with torch.random.fork_rng():
        known = ResNet20(before)
    load_weights(known, file)
    state = {name: value for name, value in known.state_dict().items()
             if not (new_classifier and name.startswith(CLASSIFIER))}  # fmt: skip
    network.load_state_dict(state, strict=not new_classifier)
    return network

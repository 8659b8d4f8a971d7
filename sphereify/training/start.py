"""The start of a training or a test: a network by name, converted if it is not yet, with its images."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sphereify.annotations import TRAINING_RECORD
from sphereify.calibration.results import Calibration
from sphereify.conversion import sphereify
from sphereify.convert.options import ConversionOptions
from sphereify.datasets import Data, ImageFiles, training_images
from sphereify.errors import DataError, UsageError, option, refused
from sphereify.models import SourceOptions, is_saved, open_model, untrained_part
from sphereify.options import checked_option
from sphereify.sources import accepts, find_model
from sphereify.training.checks import check_classes, check_trained, check_unseen, is_trained
from sphereify.training.comparison import Variant, variants
from sphereify.training.data_options import DataOptions
from sphereify.training.evaluation_options import EvaluationOptions
from sphereify.training.knowledge import FEATURES, NOTHING, keep_knowledge, open_plain, summary, with_radius
from sphereify.training.knowledge_options import KnowledgeOptions
from sphereify.training.morph import LENGTH_IMAGES, start_as_original
from sphereify.training.pairs import Pairs, read_pairs
from sphereify.training.robustness import open_original
from sphereify.training.teacher import Original, open_teacher


@dataclass(frozen=True)
class Start:
    """A converted network, its images and its teacher."""

    model: nn.Module
    data: Data
    teacher: nn.Module | None = None
    """The network whose scores are followed; None without one."""
    kept: str | None = None
    """A line on the calibration; None without one."""
    trained: bool = False
    """True if the network keeps what a trained one knew: converted from its weights, calibrated, or trained before."""
    untrained: str = ""
    """A line on a classifier that its weights left new; empty without one."""
    calibration: Calibration | None = None
    """The fit of each layer; None without a calibration."""
    original: nn.Module | None = None
    """The trained network that was converted, if it was to be kept."""


def start(
    spec: str,
    images: DataOptions,
    *,
    source: SourceOptions | None = None,
    conversion: ConversionOptions | None = None,
    teacher: str | None = None,
    teacher_weights: str | Path | None = None,
    calibration_images: int = KnowledgeOptions.calibration_images,
    morph: bool = False,
    device: str | torch.device | None = None,
    keep_original: bool = False,
) -> Start:
    """Open a network and its images for `finetune`.

    A plain model with trained weights is converted with a pooled radius, unless `conversion` says otherwise, and with a
    calibration on training images, without their labels, so that it keeps what it has learned; where its classes are
    not those of the data, the features are kept and the head is new.

    Args:
        spec: an artifact, which is taken as it is; or a plain model, which is built for the classes of the data and
            converted.
        images: the data set.
        source: how to build or load the network.
        conversion: how to convert a plain model.
        teacher, teacher_weights: as for `open_teacher`.
        calibration_images: number of these images, ≥ 0; 0: the weights are copied, without a calibration.
        morph: True to start as the original instead, for `Settings.morph`.
        device: where the calibration runs; default: on the CPU.
        keep_original: True to return the trained network that was converted, too.

    Raises:
        UsageError: no such model, a teacher that knows nothing, or options of a conversion for an artifact.
        DataError: no such data, or images that the model does not take.
        ArtifactError: a file that cannot be read or does not fit.
    """
    source, conversion = source or SourceOptions(), conversion or ConversionOptions()
    if is_saved(spec):
        usual = ConversionOptions()
        for name, value in vars(conversion).items():
            if value != getattr(usual, name):
                raise refused(name, f"does not go with the artifact {spec}, which is converted already")
        if morph:
            raise refused(
                "morph",
                f"starts from the original network, and the artifact {spec} is converted already; give the plain "
                f"model, with {option('pretrained')} or {option('weights')}",
            )
        model = open_model(spec, source)
        data = images.open(model)
        check_unseen(TRAINING_RECORD.of(model), data.held_out)
        followed = open_teacher(teacher, len(data.classes), weights=teacher_weights)
        return Start(model, data, followed, trained=is_trained(model))
    checked_option(KnowledgeOptions, "calibration_images", calibration_images)
    plain, learned = open_plain(spec, for_classes_of(images, spec, source), images.class_count())
    data = images.open(plain)
    original = Original(copy.deepcopy(plain), source.pretrained, source.weights, learned == FEATURES)
    followed = open_teacher(teacher, len(data.classes), weights=teacher_weights, original=original)
    keywords = dict(conversion.keywords())
    model = sphereify(plain, inplace=True, **(keywords if learned == NOTHING else with_radius(plain, keywords)))
    result, line, untrained = None, None, untrained_part(plain)
    if morph:
        check_classes(model, data)
        start_as_original(model, original.model, training_images(data, LENGTH_IMAGES))
    elif learned != NOTHING and calibration_images:
        check_classes(model, data)  # refused before a calibration, which takes its time
        result = keep_knowledge(model, original.model, data, learned, images=calibration_images, device=device)
        line = summary(result, learned, data, calibration_images)
    before = original.model if keep_original and learned != NOTHING else None
    return Start(model, data, followed, line, learned != NOTHING, untrained, result, before)


def for_classes_of(images: DataOptions, spec: str, source: SourceOptions, *, test_only: bool = False) -> SourceOptions:
    """The options of a plain model with the number of classes of the data.

    A builder of your own without `num_classes` makes the model as it does.

    Raises:
        DataError: the options name another number.
    """
    find_model(spec)  # an unknown name fails before the data is read
    count = images.class_count(test_only=test_only)
    if source.num_classes not in (None, count):
        raise DataError(
            f"the model has {source.num_classes} classes, {images.data} has {count}: leave out "
            f"{option('num_classes')}, and it is built for those of the data"
        )
    return replace(source, num_classes=count) if accepts(spec, "num_classes") else source


@dataclass(frozen=True)
class ToTest:
    """A trained network, the images to test it on, and its original."""

    model: nn.Module
    data: Data
    original: nn.Module | None = None
    """The network to compare with on corrupted images; None without one."""


def open_to_test(
    spec: str, images: DataOptions, source: SourceOptions | None = None, options: EvaluationOptions | None = None
) -> ToTest:
    """A trained network and the images to test it on, for `evaluate` and `robustness`.

    Args:
        spec: an artifact, or a plain model; with weights from a file it is built for the classes of the data.
        images: the data set, of which the test images are enough.
        source: how to build or load the network.
        options: name the original.

    Raises:
        UsageError: no such model, weights for other classes than those of the data, or an original that has not been
            trained.
        DataError: no such data.
        ArtifactError: a file that cannot be read or does not fit.
    """
    source, options = source or SourceOptions(), options or EvaluationOptions()
    if not is_saved(spec) and source.weights is not None and source.num_classes is None:
        source = for_classes_of(images, spec, source, test_only=True)
    model = open_model(spec, source)
    data = images.open(model, as_trained=True, test_only=True)
    check_trained(model, data, "weights", "weights")
    if options.against is None:
        return ToTest(model, data)
    original = open_original(options.against, data, weights=options.against_weights, factory=source.factory)
    return ToTest(model, data, original)


@dataclass(frozen=True)
class ToVerify:
    """A network, the images that its embeddings tell apart, and the pairs of these."""

    model: nn.Module
    data: Data
    """The data, with the images in its test part."""
    pairs: Pairs | None = None
    """Pairs from a list; None: those of the classes of `data`."""
    note: str = ""
    """A sentence on identities that the network was trained on; empty if none are known."""


def open_to_verify(
    spec: str, images: DataOptions, source: SourceOptions | None = None, pairs: Path | None = None
) -> ToVerify:
    """A network and the images to verify it on.

    The identities are the classes that the options leave out, or else those that the network's training left out, or
    else all classes of the data, which need not be those of the network.

    Args:
        spec, source: as for `open_model`; weights may be of any number of classes.
        images: the data set; a folder for a list of pairs, which may have images at any depth.
        pairs: list of pairs, see `read_pairs`.

    Raises:
        UsageError: no such model, options that do not go together, or as `choose_classes`.
        DataError: no such data, or classes that the network was trained on among those that are left out.
        ArtifactError: a file that cannot be read or does not fit.
    """
    source = source or SourceOptions()
    if not is_saved(spec) and source.weights is not None and source.num_classes is None:
        find_model(spec)
        # Embeddings need no classifier: weights of any number of classes fill all else of a network for two.
        source = replace(source, num_classes=2) if accepts(spec, "num_classes") else source
    model = open_model(spec, source)
    record = TRAINING_RECORD.of(model)
    listed = None
    if pairs is None:
        data = images.open(model, as_trained=True, test_only=True, held_out=True)
    else:
        data, listed = _of_list(pairs, images, model)
    if images.hold_out_classes is not None:
        check_unseen(record, data.classes)
    seen = [name for name in data.classes if name in (record or {}).get("classes", ())]
    note = f"the model was trained on {len(seen)} of the {len(data.classes)} identities" if seen else ""
    return ToVerify(model, data, listed, note)


def _of_list(file: Path, images: DataOptions, model: nn.Module) -> tuple[Data, Pairs]:
    """The images of a list of pairs, with the folders that hold them as classes, and the pairs."""
    if images.test_images is not None:
        raise refused("test_images", f"does not go with {option('pairs')}, which names the images")
    folder = Path(images.data or "")
    if not folder.is_dir():
        raise refused("pairs", f"needs a folder as {option('data')}, got {images.data!r}")
    files, pairs = read_pairs(file, folder)
    listed = ImageFiles(files, **images.preparation(model, as_trained=True))
    names = sorted({path.parent.name for path in files})
    if images.hold_out_classes is not None:
        left_out = images.open(model, test_only=True, held_out=True).classes
        others = [name for name in names if name not in left_out]
        if others:
            raise DataError(
                f"{option('pairs')}: {file} names images of {', '.join(others[:5])}, but "
                f"{option('hold_out_classes')} leaves out {', '.join(left_out[:5])} only"
            )
    nothing: Any = []
    return Data(f"{folder}, pairs of {file.name}", nothing, listed, names, listed.image_size), pairs


@dataclass(frozen=True)
class ToCompare:
    """The networks of a comparison, and the images that they are trained and tested on."""

    build: Callable[[], nn.Module]
    """Builds the plain network; what is new in it is drawn by the random seed of the run."""
    data: Data
    variants: list[Variant]
    learned: str
    """Part of the plain network that has been trained: a value of `sphereify.training.knowledge.LEARNED`."""
    held_out: Data | None = None
    """Images of the classes that are left out, if the networks are to be verified on them."""


def open_to_compare(
    spec: str,
    images: DataOptions,
    operators: str | Iterable[str],
    conversion: Mapping[str, Any] | None = None,
    *,
    source: SourceOptions | None = None,
    verification: bool = False,
) -> ToCompare:
    """A plain network, its conversions and its images for `compare`.

    Conversions of a network with trained weights have a pooled radius, unless `conversion` says otherwise.

    Args:
        spec: a plain model, which is built for the classes of the data.
        images: the data set.
        operators, conversion: operators and options of the conversions, as for `variants`.
        source: how to build the network.
        verification: True to test the embeddings of the networks on the classes that `images` leaves out, too.

    Raises:
        UsageError: no such model, an artifact, no operator, or a verification without classes that are left out.
        DataError: no such data.
        ArtifactError: a file that cannot be read or does not fit.
    """
    if is_saved(spec):
        raise UsageError(f"{spec}: is a saved artifact; compare starts from the plain model that it was made of")
    if verification and images.hold_out_classes is None:
        raise refused("verification", f"needs {option('hold_out_classes')}, the classes to verify on")
    source = for_classes_of(images, spec, source or SourceOptions())
    unseeded = replace(source, seed=None)  # each run has its own seed
    classes = images.class_count()
    plain, learned = open_plain(spec, source, classes)
    data = images.open(plain)
    networks = variants(operators, conversion)
    if learned != NOTHING:
        networks = [
            network if network.options is None else replace(network, options=with_radius(plain, network.options))
            for network in networks
        ]
    held_out = images.open(plain, held_out=True) if verification else None
    return ToCompare(lambda: open_plain(spec, unseeded, classes)[0], data, networks, learned, held_out)

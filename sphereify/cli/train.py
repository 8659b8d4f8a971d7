"""Commands of training: finetune, evaluate, compare."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from sphereify import choices
from sphereify.cli.convert import Model
from sphereify.cli.options import Fields, with_options
from sphereify.cli.output import Force, check_folder, name_of
from sphereify.convert.options import ConversionOptions
from sphereify.errors import ArtifactError, DataError, UsageError, option
from sphereify.models import SourceOptions, is_saved, open_model
from sphereify.training.data_options import DataOptions
from sphereify.training.settings import WITHOUT_EFFECT, Settings


def _resumed(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """The options of the run that is continued; those given again may only be those that change no result.

    `context.obj` holds all of them, for the record of the run.
    """
    context.obj = _plain(values)
    folder = values["resume"]
    if folder is None:
        return values
    record = folder / "run.json"
    if not record.is_file():
        raise UsageError(f"{option('resume')}: {folder} is not the folder of a run, there is no run.json in it")
    try:
        before = json.loads(record.read_text())
    except ValueError as error:
        raise ArtifactError(f"{record}: cannot be read ({error}); the checkpoints beside it hold the weights") from None
    given = {n for n in values if getattr(context.get_parameter_source(n), "name", "") == "COMMANDLINE"} - {"resume"}
    changed = [
        f"{option(name)}: {before.get(name)} before, {context.obj[name]} now"
        for name in sorted(given)
        if name not in WITHOUT_EFFECT and context.obj[name] != before.get(name)
    ]
    if changed:
        raise UsageError(f"{folder}: cannot be continued otherwise than it began: {'; '.join(changed)}")
    same = {name: value for name, value in before.items() if name in values and name not in given & {*WITHOUT_EFFECT}}
    paths = {name: Path(same[name]) for name in _PATHS if same.get(name) is not None}
    return {**values, **same, **paths, "output": folder, "resume": folder}


_PATHS = ("weights", "data_root", "teacher_weights")
"""Options of finetune whose value is a path."""


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


@with_options(_resumed)
def finetune(
    context: typer.Context,
    options: ConversionOptions,
    settings: Settings,
    source: SourceOptions,
    images: DataOptions,
    model: Annotated[
        str | None, typer.Argument(help="An artifact, or a model to convert first.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; default: MODEL-finetuned.")] = None,
    force: Force = False,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.", show_default=False)] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Follow the scores of: original, a model's name, or an artifact.")
    ] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="A checkpoint for the teacher.")] = None,
) -> None:
    """Train a converted network on labelled images; what is learned, how, and curves go to a folder."""
    if model is None:
        raise UsageError("MODEL: is missing; an artifact, or the name of a model to convert first")
    folder = output or Path(f"{name_of(model)}-finetuned")
    if resume is None:
        check_folder(folder, force)

    from sphereify.progress import TrainingProgress
    from sphereify.terminal import is_first_process
    from sphereify.training import finetune as train
    from sphereify.training.run_folder import write_text

    network, original, data = _network_and_data(model, images, source, options)
    followed = _teacher(teacher, teacher_weights, original, len(data.classes), source)

    def begin() -> None:
        _clear(folder)
        write_text(folder / "run.json", json.dumps(context.obj, indent=1) + "\n")

    with TrainingProgress(settings.epochs) as progress:
        result = train(network, data, settings, output=folder, resume=resume is not None, teacher=followed,
                       on_start=begin, on_step=progress.step, on_epoch=progress.epoch)  # fmt: skip
    if not is_first_process():
        return
    best = result.best
    print(f"test accuracy {result.accuracy:.2%}, saved to {folder}/last; best {best.accuracy:.2%} in epoch "
          f"{best.number}, saved to {folder}/best")  # fmt: skip


@with_options()
def evaluate(
    model: Model,
    source: SourceOptions,
    images: DataOptions,
    settings: Annotated[
        Settings, Fields(only=("batch_size", "workers", "device", "amp", "channels_last", "strict"), panel="")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for evaluation.json and confusion.png.")
    ] = None,
) -> None:
    """Test a model, converted or not, on the held-out part of a data set."""
    check_folder(output)

    from sphereify.artifact import read_document
    from sphereify.plots import plot_confusion
    from sphereify.tables import print_evaluation
    from sphereify.terminal import console
    from sphereify.training import evaluate as test
    from sphereify.training.run_folder import write_text

    network = open_model(model, source)
    training = read_document(model).get("training") or {} if is_saved(model) else {}
    if images.img_size is None and training.get("image_size"):
        images = dataclasses.replace(images, img_size=training["image_size"][-1])
    data = _load_images(images, network)
    if training.get("classes", data.classes) != data.classes and len(training["classes"]) == len(data.classes):
        odd = sorted({*training["classes"]} ^ {*data.classes}) or ["in another order"]
        raise DataError(f"{model}: was trained on other classes than {data.name} has: {', '.join(odd[:5])}")
    evaluation = test(network, data, settings)
    print_evaluation(console(), evaluation, data.classes)
    if output is None:
        return
    shares = [None if math.isnan(share) else share for share in evaluation.per_class]
    numbers = {"top1": evaluation.top1, "top5": evaluation.top5, "images": evaluation.images,
               "skipped": evaluation.skipped, "images_per_second": evaluation.images_per_second,
               "classes": data.classes, "per_class": shares, "confusion": evaluation.confusion.tolist()}  # fmt: skip
    write_text(output / "evaluation.json", json.dumps(numbers, indent=1) + "\n")
    picture = plot_confusion(evaluation.confusion, data.classes, output / "confusion.png")
    print(f"written to {output / 'evaluation.json'}, drawn to {picture}")


@with_options()
def compare(
    model: Model,
    options: Annotated[dict[str, Any], Fields(of=ConversionOptions, without=("operator",))],
    settings: Settings,
    source: SourceOptions,
    images: DataOptions,
    operators: Annotated[
        str, typer.Option(help="Operators of the conversions to compare with the original, separated by commas.")
    ] = "cosine",
    seeds: Annotated[int, typer.Option(help="Number of runs of each network, with seeds from --seed on.")] = 1,
    reach: Annotated[
        float | None, typer.Option(help="Accuracy in (0, 1] to count steps to; default: 95 % of the original's.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; default: MODEL-compared.")] = None,
) -> None:
    """Train the original and converted networks alike, and say which is better. Finished runs are not repeated."""
    if is_saved(model):
        raise UsageError(f"{model}: is a saved artifact; compare starts from the plain model that it was made of")
    names = [choices.canonical(name) for name in operators.split(",") if name.strip()]
    if not names:
        raise UsageError(f"{option('operators')}: got none, expected some of {', '.join(choices.OPERATORS)}")
    folder = output or Path(f"{name_of(model)}-compared")

    from sphereify.progress import TrainingProgress
    from sphereify.tables import comparison_table
    from sphereify.terminal import console
    from sphereify.training import Variant
    from sphereify.training import compare as run

    source = _with_classes(model, source, images)
    data = _load_images(images, open_model(model, source))
    variants = [Variant("original", None), *(Variant(name, {**options, "operator": name}) for name in names)]
    unseeded = dataclasses.replace(source, seed=None)  # each run has its own seed
    with TrainingProgress(settings.epochs) as progress:
        comparison = run(lambda: open_model(model, unseeded), data, variants, settings, output=folder, seeds=seeds,
                         reach=reach, on_run=progress.run, on_step=progress.step, on_epoch=progress.epoch)  # fmt: skip
    console().print(comparison_table(comparison))
    print(f"written to {folder}/comparison.md, .json and .png")


def _network_and_data(spec: str, images: DataOptions, source: SourceOptions,
                      options: ConversionOptions) -> tuple[Any, Any, Any]:  # fmt: skip
    """The converted network, the plain one it was made of, and the images.

    An artifact is taken as it is, and has no original; a plain model is built for the classes of the data.
    """
    import copy

    from sphereify.conversion import sphereify

    if is_saved(spec):
        for name, value in vars(options).items():
            if value != getattr(ConversionOptions(), name):
                raise UsageError(f"{option(name)}: does not go with the artifact {spec}, which is converted already")
        model = open_model(spec, source)
        return model, None, _load_images(images, model)
    plain = open_model(spec, _with_classes(spec, source, images))
    data = _load_images(images, plain)
    return sphereify(plain, **vars(options)), copy.deepcopy(plain), data


def _with_classes(model: str, source: SourceOptions, images: DataOptions) -> SourceOptions:
    """The source with as many classes as the data has, unless told otherwise, or unless the builder takes none."""
    from sphereify.datasets import class_count
    from sphereify.sources import accepts, find_model

    find_model(model)  # a wrong name is told before the data is read
    if source.num_classes is not None or not accepts(model, "num_classes"):
        return source
    return dataclasses.replace(source, num_classes=class_count(images.data, root=images.data_root))  # type: ignore[arg-type]


def _load_images(images: DataOptions, model: Any) -> Any:
    from sphereify.datasets import load_data
    from sphereify.sources import data_config, input_channels

    return load_data(
        images.data,  # type: ignore[arg-type]
        channels=input_channels(model),
        img_size=images.img_size,
        config=data_config(model),
        root=images.data_root,
        augment=images.augment,
        train_images=images.train_images,
        test_images=images.test_images,
    )


def _teacher(spec: str | None, weights: Path | None, original: Any, classes: int, source: SourceOptions) -> Any:
    """The network whose scores are followed. One with a classifier that nobody has trained is refused."""
    trained = source.pretrained or source.weights is not None
    if weights is not None and spec in (None, "original"):
        raise UsageError("--teacher-weights: belong to a --teacher by name; the original has those of --weights")
    if spec is None:
        return None
    if spec == "original" and original is not None:
        if not trained:
            raise UsageError("--teacher original: it has not been trained; bring its weights with --weights FILE")
        if source.pretrained:
            _check_classifier(original, classes)
    if spec == "original":
        if original is None:
            raise UsageError(
                "--teacher original: an artifact does not hold what it was before. Give the plain model to finetune "
                "with the options of convert, or name the teacher"
            )
        return original
    if is_saved(spec):
        return open_model(spec)
    from sphereify.sources import accepts

    if weights is None and ":" in spec and not spec.startswith("torchvision:"):
        raise UsageError(f"--teacher: {spec} needs --teacher-weights")
    number = classes if accepts(spec, "num_classes") else None
    network = open_model(spec, SourceOptions(pretrained=weights is None, weights=weights, num_classes=number))
    if weights is None:
        _check_classifier(network, classes)
    return network


def _check_classifier(network: Any, classes: int) -> None:
    """Pretrained weights for another number of classes leave the classifier as it was drawn."""
    known = (getattr(network, "pretrained_cfg", None) or {}).get("num_classes", classes)
    if known != classes:
        raise UsageError(
            f"--teacher: its pretrained weights are for {known} classes, the data has {classes}: its classifier is new "
            f"and knows nothing. Train it first, and bring its weights with --weights FILE"
        )


def _clear(folder: Path) -> None:
    """Make room for a new run in a folder that --force gave up."""
    import shutil

    for name in ("checkpoints", "last", "best", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("summary.json", "metrics.jsonl", "metrics.csv", "curves.png", "last.safetensors", "best.safetensors"):
        (folder / name).unlink(missing_ok=True)

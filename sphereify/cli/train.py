"""Commands of training: finetune, evaluate, compare."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sphereify.annotations import PLAN
from sphereify.cli.convert import Model
from sphereify.cli.options import Fields, with_options
from sphereify.cli.output import OUTPUT, Force, check_folder, name_of
from sphereify.cli.report import Report, check_report, counterpart, given, write
from sphereify.convert.options import ConversionOptions
from sphereify.errors import UsageError, exclusive, refused
from sphereify.models import SourceOptions
from sphereify.training.comparison_options import ComparisonOptions
from sphereify.training.data_options import DataOptions
from sphereify.training.evaluation_options import EvaluationOptions
from sphereify.training.knowledge_options import KnowledgeOptions
from sphereify.training.settings import Settings
from sphereify.training.verification_options import VERIFICATION, VerificationOptions
from sphereify.wording import listed, shortened


def _resumed(context: typer.Context, values: dict[str, Any]) -> dict[str, Any]:
    """The options of the run that is continued, if one is; `context.obj` holds them for the record of the run."""
    context.obj = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    folder = values["resume"]
    if folder is None:
        return values
    from sphereify.training.run_folder import RunFolder

    sources = {name: getattr(context.get_parameter_source(name), "name", "") for name in values}
    given = {name: context.obj[name] for name in values if sources[name] == "COMMANDLINE" and name != "resume"}
    run = RunFolder(folder)
    options = run.options_to_resume(given, values)
    sys.path += [str(place) for place in run.working_directories()]  # where modules of the user's own may lie
    paths = {name: Path(options[name]) for name in _PATHS if options.get(name) is not None}
    return {**values, **options, **paths, "output": folder, "resume": folder}


_PATHS = ("weights", "data_root", "teacher_weights", "report")
"""Options of finetune whose value is a path."""


@with_options(_resumed)
def finetune(
    context: typer.Context,
    conversion: ConversionOptions,
    settings: Settings,
    source: SourceOptions,
    images: DataOptions,
    knowledge: KnowledgeOptions,
    model: Annotated[
        str | None, typer.Argument(help="An artifact, or a model to convert first.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; default: MODEL-finetuned.")] = None,
    force: Force = False,
    report: Report = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.", show_default=False)] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Network whose scores to follow: original, a model's name, or an artifact.")
    ] = None,
    teacher_weights: Annotated[Path | None, typer.Option(help="Checkpoint of a teacher by name.")] = None,
) -> None:
    """Train a converted network on labelled images; what is learned, how, and curves go to a folder."""
    if model is None:
        raise UsageError("MODEL: is missing; an artifact, or the name of a model to convert first")
    from sphereify.progress import TrainingProgress
    from sphereify.torchrun import is_first_process
    from sphereify.training import finetune as train
    from sphereify.training.distributed import local_device
    from sphereify.training.recipe import with_recipe
    from sphereify.training.run_folder import RunFolder, default_run_folder
    from sphereify.training.start import start

    run = RunFolder(output or default_run_folder(model))
    if resume is None:
        check_folder(run.path, force)
    check_report(report, force or resume is not None)
    begun = start(
        model,
        images,
        source=source,
        conversion=conversion,
        teacher=teacher,
        teacher_weights=teacher_weights,
        # A checkpoint holds what came of the calibration.
        calibration_images=0 if resume is not None else knowledge.images,
        morph=settings.morph > 0,
        device=local_device(settings.chosen_device),
        keep_original=report is not None and not settings.fsdp,
    )
    if begun.data.held_out and is_first_process():
        print(f"left out of training: {listed(begun.data.held_out)}")
    if begun.kept and is_first_process():
        print(f"{begun.kept} (--no-calibrate leaves it out)")
    elif begun.untrained and is_first_process():
        print(f"note: {begun.untrained}")
    chosen = with_recipe(settings, trained=begun.trained)
    if begun.trained and is_first_process():
        print(f"trained further: {chosen.opt}, peak rate {chosen.lr:g}, weight decay {chosen.weight_decay:g}")

    def begin() -> None:
        run.clear()
        run.write_options(context.obj)

    with TrainingProgress(settings.epochs) as progress:
        result = train(
            begun.model,
            begun.data,
            chosen,
            output=run.path,
            resume=resume is not None,
            teacher=begun.teacher,
            on_start=begin,
            on_step=progress.step,
            on_epoch=progress.epoch,
        )
    if is_first_process():
        best = f"best {result.best.accuracy:.2%} in epoch {result.best.number}, saved to {run.best}"
        print(f"test accuracy {result.accuracy:.2%}, saved to {run.last}; {best}")
    if report is not None and is_first_process():
        _report_run(
            report, begun, result, chosen, options=given(conversion, chosen, source, images), name=name_of(model)
        )


def _report_run(file: Path, begun: Any, result: Any, settings: Settings, **about: Any) -> None:
    """Write the report on a run."""
    from sphereify.datasets import training_images

    about |= {
        "calibration": begun.calibration,
        "epochs": [dataclasses.asdict(epoch) for epoch in result.epochs],
        "facts": {"test accuracy": f"{100 * result.accuracy:.2f} %"},
    }
    if settings.fsdp:  # its weights lie in shards
        write(file, begun.model.conversion_plan, **about)
        return
    about |= {
        "original": begun.original,
        "inputs": training_images(begun.data, 8)[0],
        "inputs_described": f"training images of {begun.data.name}",
    }
    write(file, begun.model, **about)


@with_options()
def evaluate(
    model: Model,
    settings: Annotated[
        Settings, Fields(only=("batch_size", "workers", "device", "amp", "channels_last", "strict", "seed"), panel="")
    ],
    source: SourceOptions,
    images: Annotated[DataOptions, Fields(without=("augment", "color_jitter", "train_images"))],
    asked: EvaluationOptions,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for evaluation.json, robustness.json or verification.json, and their pictures.",
        ),
    ] = None,
    report: Report = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the report if it exists.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Test a model, converted or not, on the held-out part of a data set."""
    check_folder(output)
    check_report(report, force)
    if report is not None and asked.verified.verification:
        raise exclusive("report", "verification")
    if asked.verified.verification:
        _verify(model, settings, source, images, asked.verified, output)
        return

    from sphereify.progress import ImagesProgress
    from sphereify.tables import print_evaluation, print_robustness
    from sphereify.terminal import console
    from sphereify.training import evaluate as test
    from sphereify.training.evaluation import write_evaluation
    from sphereify.training.robustness import robustness, write_robustness
    from sphereify.training.start import open_to_test

    opened = open_to_test(model, images, source, asked)
    network, data = opened.model, opened.data
    if report is not None and not PLAN.is_on(network):
        raise refused("report", f"{model} is not converted, and a report is about a conversion; give an artifact")
    evaluation = test(network, data, settings)
    print_evaluation(console(), evaluation, data.classes)
    if data.held_out:
        print(f"without the classes that are held out: {listed(data.held_out)}")
    if output is not None:
        write_evaluation(evaluation, data.classes, output)
        print(f"written to {output / 'evaluation.json'}, drawn to {output / 'confusion.png'}")
    corrupted = None
    if asked.corruptions:
        with ImagesProgress("testing corrupted images") as progress:
            corrupted = robustness(
                network, data, settings, against=opened.original, name=model, on_images=progress.images
            )
        print_robustness(console(), corrupted)
    if corrupted is not None and output is not None:
        write_robustness(corrupted, output)
        print(f"written to {output / 'robustness.json'}, drawn to {output / 'robustness.png'}")
    if report is not None:
        from sphereify.datasets import some_test_images

        write(
            report,
            network,
            original=counterpart(opened.original, network),
            inputs=some_test_images(data, 8)[0],
            inputs_described=f"test images of {data.name}",
            robustness=None if corrupted is None else corrupted.to_json(),
            facts={"test accuracy": f"{100 * evaluation.top1:.2f} %"},
            options=given(settings, source, images),
            name=name_of(model),
        )


def _verify(
    model: str,
    settings: Settings,
    source: SourceOptions,
    images: DataOptions,
    verified: VerificationOptions,
    output: Path | None,
) -> None:
    """Test the embeddings of a model on identities, in place of its classes."""
    from sphereify.progress import ImagesProgress
    from sphereify.tables import print_verification
    from sphereify.terminal import console, say
    from sphereify.training.start import open_to_verify
    from sphereify.training.verification import verification, write_verification

    opened = open_to_verify(model, images, source, verified.pairs)
    with ImagesProgress("embedding images") as progress:
        report = verification(
            opened.model,
            opened.data,
            settings,
            pairs=opened.pairs,
            **verified.keywords(),
            on_images=progress.images,
        )
    out = console()
    print_verification(out, report, model)
    if opened.pairs is None:
        say(out, f"identities: {shortened(listed(opened.data.classes), 120)}")
    if opened.note:
        say(out, f"note: {opened.note}", "yellow")
    if output is not None:
        write_verification(report, output)
        print(f"written to {output / 'verification.json'}, drawn to {output / 'verification.png'}")


@with_options(flags={"operator": "--operators"})
def compare(
    model: Model,
    conversion: Annotated[dict[str, Any], Fields(of=ConversionOptions, without=("operator",))],
    settings: Settings,
    source: SourceOptions,
    images: DataOptions,
    asked: ComparisonOptions,
    knowledge: KnowledgeOptions,
    operators: Annotated[
        str, typer.Option(help="Operators of the conversions to compare with the original, separated by commas.")
    ] = "cosine",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder; default: MODEL-compared.")] = None,
    verification: Annotated[
        bool,
        typer.Option(
            "--verification",
            help="Test whether embeddings tell the classes apart that --hold-out-classes leaves out, too.",
            rich_help_panel=VERIFICATION,
        ),
    ] = False,
) -> None:
    """Train the original and converted networks alike, and say which is better. Finished runs are not repeated."""
    from sphereify.progress import TrainingProgress
    from sphereify.tables import print_comparison, print_robustness
    from sphereify.terminal import console
    from sphereify.training import compare as run
    from sphereify.training.comparison import default_comparison_folder
    from sphereify.training.start import open_to_compare

    folder = output or default_comparison_folder(model)
    opened = open_to_compare(model, images, operators, conversion, source=source, verification=verification)
    with TrainingProgress(settings.epochs) as progress:
        comparison = run(
            opened.build,
            opened.data,
            opened.variants,
            settings,
            output=folder,
            learned=opened.learned,
            calibration_images=knowledge.images,
            held_out=opened.held_out,
            on_run=progress.run,
            on_calibration=progress.line,
            on_step=progress.step,
            on_epoch=progress.epoch,
            **vars(asked),
        )
    for corrupted in comparison.robustness:
        print_robustness(console(), corrupted)
    print_comparison(console(), comparison)
    print(f"written to {folder}/comparison.md, .json and .png")
